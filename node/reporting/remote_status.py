"""`p2pcoord status --peer`: ask a node elsewhere, as anybody may who knows the run's secret.

The asker is a stranger with a key of its own that lasts for one question; the proof it shows is made from the secret, as a
joiner's is. It neither joins nor keeps anything.
"""

from __future__ import annotations

import json
import os
from typing import Any

from node.network.hello import OTHER_RUN, check_hello, make_hello, parse_token, proof_of
from node.network.libp2p_transport import open_transport
from node.network.link import SESSION_BYTES
from node.network.question import NoAnswer
from node.network.question import ask as ask_peer
from node.network.transport_events import DialError
from node.storage.identity_key import IdentityKey
from p2pcoord.consensus.record import Admission
from p2pcoord.errors import UserError
from p2pcoord.messages import StatusReply, StatusRequest


async def ask(address: str, secret: str | None) -> dict[str, Any]:
    """The status document of the node at `address`. Raises UserError when it does not answer or refuses."""
    token = parse_token(secret) if secret is not None else None
    key = IdentityKey.generate()
    run = token.run if token is not None else b""
    proof = proof_of(token.secret, run, key.peer_id) if token is not None else b""
    async with open_transport(
        key,
        (),
        hello=make_hello(run, proof),
        check_hello=lambda peer, data: check_hello(data, run, lambda _: ""),
        session=os.urandom(SESSION_BYTES),
    ) as transport:
        document: dict[str, Any] | None = None
        try:
            peer = await transport.connect(None, (address,))
            question = StatusRequest(Admission(key.peer_id, "", proof))
            document = _document((await ask_peer(transport, peer, question, StatusReply)).document)
        except DialError as error:
            if error.kind == "bad_address":
                raise UserError(f"--peer {address}: {error.detail}", exit_code=2) from None
            if error.detail == OTHER_RUN:
                raise UserError(f"--secret is of another run than the node at {address}") from None
            what = "refused this program" if error.kind == "refused" else "does not answer"
            raise UserError(f"the node at {address} {what}: {error.detail}") from None
        except NoAnswer:
            pass  # as if it had answered with what is no document
        if document is None:
            raise UserError(f"the node at {address} gives no status: it may need the run's --secret")
    return document


def _document(data: bytes) -> dict[str, Any] | None:
    try:
        document = json.loads(data)
    except ValueError:
        return None
    return document if isinstance(document, dict) else None

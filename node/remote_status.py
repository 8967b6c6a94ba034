"""`p2pcoord status --peer`: ask a node elsewhere, as anybody may who knows the run's secret.

The asker is a stranger with a key of its own that lasts for one question; the proof it shows is made from the secret, as a
joiner's is. It neither joins nor keeps anything.
"""

from __future__ import annotations

import json
import os
from typing import Any

import trio

from node.hello import check_hello, make_hello, parse_token
from node.identity_key import IdentityKey
from node.libp2p_transport import open_transport
from node.link import SESSION_BYTES
from node.transport_events import DialError, Disconnected, Received
from p2pcoord.consensus.record import Admission
from p2pcoord.errors import RemoteError, UserError
from p2pcoord.messages import StatusReply, StatusRequest, decode_message
from p2pcoord.rounds.participation import join_proof
from p2pcoord.wire import encode

# One round trip, on a link that was made a moment ago.
ANSWER_TIMEOUT_S = 10.0


async def ask(address: str, secret: str | None) -> dict[str, Any]:
    """The status document of the node at `address`. Raises UserError when it does not answer or refuses."""
    token = parse_token(secret) if secret is not None else None
    key = IdentityKey.generate()
    proof = join_proof(token.secret, token.run, key.peer_id) if token is not None and token.secret else b""
    run = token.run if token is not None else b""
    document: dict[str, Any] | None = None
    failure: UserError | None = None
    async with open_transport(
        key,
        (),
        hello=make_hello(run, proof),
        check_hello=lambda peer, data: check_hello(data, run, lambda _: ""),
        session=os.urandom(SESSION_BYTES),
    ) as transport:
        try:
            peer = await transport.connect(None, (address,))
        except DialError as error:
            what = "refused this program" if error.kind == "refused" else "does not answer"
            failure = UserError(f"the node at {address} {what}: {error.detail}")
        else:
            transport.send(peer, encode(StatusRequest(Admission(key.peer_id, "", proof))))
            with trio.move_on_after(ANSWER_TIMEOUT_S):
                while document is None:
                    event = await transport.receive()
                    if isinstance(event, Disconnected):
                        break
                    if isinstance(event, Received):
                        document = _document(event.frame)
    if failure is not None:
        raise failure
    if document is None:
        raise UserError(f"the node at {address} gives no status: it may need the run's --secret")
    return document


def _document(frame: bytes) -> dict[str, Any] | None:
    try:
        message = decode_message(frame)
        if isinstance(message, StatusReply):
            document = json.loads(message.document)
            return document if isinstance(document, dict) else None
    except (RemoteError, ValueError):
        pass
    return None

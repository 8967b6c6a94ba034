"""The founder's content comes from the node that is known and from those that it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trio

from node.founded_content import ContentMissing, fetch_founded, find_more
from node.network.bulk import serve
from node.network.libp2p_transport import Libp2pTransport
from node.network.transport_events import Received
from node.storage.store import Store
from p2pcoord.consensus.record import Admission, Genesis
from p2pcoord.messages import GenesisReply, GenesisRequest, StatusReply, StatusRequest, decode_message
from p2pcoord.wire import encode
from tests.node.network.bulk_sources import CONTENT, REF, Held
from tests.node.network.open_transports import opened
from tests.node.storage.signed_run import SignedRun

GENESIS = SignedRun().ledger.records[0]


async def answer(transport: Libp2pTransport, document: bytes) -> None:
    """As a member does: content is for those whose proof it has seen."""
    shown: set[str] = set()
    serve(transport, lambda peer, root: Held() if peer in shown and root == REF.root else None)
    while True:
        event = await transport.receive()
        if isinstance(event, Received):
            message = decode_message(event.frame)
            if isinstance(message, GenesisRequest):
                shown.add(event.peer)
                transport.send(event.peer, encode(GenesisReply(GENESIS)))
            elif isinstance(message, StatusRequest):
                transport.send(event.peer, encode(StatusReply(document)))


def named(*members: Libp2pTransport, alive: bool = True) -> bytes:
    fields = [
        {"peer_id": member.peer_id, "alive": alive, "addresses": list(member.addresses()), "phi": 0.0}
        for member in members
    ]
    return json.dumps({"schema": 1, "members": fields}).encode()


@pytest.mark.parametrize("known", ["b named", "b named, but gone", "no document", "a wrong one"])
def test_sources_are_found_by_the_status_of_the_first(known: str) -> None:
    async def main() -> list[str]:
        async with opened() as a, opened() as b, opened() as joiner, trio.open_nursery() as nursery:
            document = {
                "b named": named(a, b, joiner),
                "b named, but gone": named(b, alive=False),
                "no document": b"[" * 10,
                "a wrong one": b'{"members": [{"peer_id": 1}]}',
            }[known]
            nursery.start_soon(answer, a, document)
            nursery.start_soon(answer, b, b"")
            sources = [await joiner.connect(None, a.addresses())]
            await find_more(joiner, sources, Admission(joiner.peer_id, "", b""))
            nursery.cancel_scope.cancel()
            names = {a.peer_id: "a", b.peer_id: "b"}
        return [names[source] for source in sources]

    assert trio.run(main) == (["a", "b"] if known == "b named" else ["a"])


@pytest.mark.parametrize("there", [True, False])
def test_content_that_the_first_lacks_comes_from_another_and_is_told(tmp_path: Path, there: bool) -> None:
    told: list[tuple[str, dict[str, Any]]] = []
    body = GENESIS.body
    assert isinstance(body, Genesis)
    body = Genesis(body.config, body.founder, body.pins, body.state, dataset=REF)

    async def main() -> str:
        async with opened() as a, opened() as b, opened() as joiner, trio.open_nursery() as nursery:
            nursery.start_soon(answer, a, named(b) if there else named())
            nursery.start_soon(answer, b, b"")
            source = await joiner.connect(None, a.addresses())
            admission = Admission(joiner.peer_id, "", b"")
            with Store.open(tmp_path / "node") as store:
                try:
                    await fetch_founded(
                        store,
                        joiner,
                        body,
                        [source],
                        admission,
                        lambda name, fields: told.append((name, fields)),
                    )
                    assert store.file_of(REF).read_bytes() == CONTENT
                except ContentMissing as error:
                    assert (error.what, there) == ("data set", False)
                    assert source in str(error)
                finally:
                    nursery.cancel_scope.cancel()
            return b.peer_id

    other = trio.run(main)
    if there:
        fields = {
            "purpose": "dataset",
            "size_bytes": len(CONTENT),
            "sources": {other: len(CONTENT)},
            "refused": {},
        }
        assert told == [("fetched", fields)]
    else:
        assert [(name, fields["purpose"]) for name, fields in told] == [("fetch-failed", "dataset")]

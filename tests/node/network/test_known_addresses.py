"""Addresses of others outlive a restart: as many as are useful, of those that can be dialled."""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import trio

from node.network.known_addresses import (
    ADDRESSES_FILE,
    KEEP_INTERVAL_S,
    MAX_ADDRESSES_OF_A_PEER,
    keep_addresses,
    known_addresses,
)
from node.storage.store import Store
from p2pcoord.gossip.records import PeerRecord
from p2pcoord.peer import Peer


def record(peer: str, *addresses: str, reachable: bool = True) -> PeerRecord:
    return PeerRecord(peer, 1, 1, peer, addresses, reachable=reachable)


def test_a_file_that_is_none_of_ours_says_nothing(tmp_path: Path) -> None:
    with Store.open(tmp_path / "node") as store:
        assert known_addresses(store) == ()
        for data in (b"\xff", b"{}", b"[1]"):
            store.write_file(ADDRESSES_FILE, data)
            assert known_addresses(store) == ()


@pytest.mark.trio
async def test_what_is_gossiped_of_others_is_found_again(tmp_path: Path) -> None:
    book = [
        record("me", "/ip4/192.0.2.1/tcp/1"),
        record("leaf", "/ip4/192.0.2.2/tcp/1", reachable=False),
        record("lab2", *(f"/ip4/192.0.2.3/tcp/{port}" for port in range(10))),
    ]
    peer = cast(
        Peer, SimpleNamespace(me="me", gossip=SimpleNamespace(book=SimpleNamespace(records=lambda: book)))
    )
    with trio.fail_after(30), Store.open(tmp_path / "node") as store:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_addresses, store, peer)
            while not known_addresses(store):  # noqa: ASYNC110
                await trio.sleep(KEEP_INTERVAL_S / 10)
            nursery.cancel_scope.cancel()
        expected = tuple(f"/ip4/192.0.2.3/tcp/{port}" for port in range(MAX_ADDRESSES_OF_A_PEER))
        assert known_addresses(store) == expected

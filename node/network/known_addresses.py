"""Where others were last seen (DIR/addresses.json), so that the peer it bootstrapped from may be gone next time."""

from __future__ import annotations

import msgspec
import trio

from node.storage.store import Store
from p2pcoord.peer import Peer

ADDRESSES_FILE = "addresses.json"

# Some of them will be reachable, and dialling all of them is quick.
MAX_ADDRESSES = 64
MAX_ADDRESSES_OF_A_PEER = 4

# How often they are looked at: members come and go, and move, in minutes.
KEEP_INTERVAL_S = 5


def known_addresses(store: Store) -> tuple[str, ...]:
    """What an earlier life kept; nothing where the file is none of ours."""
    data = store.read_file(ADDRESSES_FILE)
    try:
        known = msgspec.json.decode(data, type=list[str]) if data is not None else []
    except msgspec.DecodeError:
        return ()
    return tuple(known[:MAX_ADDRESSES])


async def keep_addresses(store: Store, peer: Peer) -> None:
    """Writes the file anew whenever what this peer knows has changed; until cancelled."""
    written: list[str] = []
    while True:
        await trio.sleep(KEEP_INTERVAL_S)
        if peer.gossip is None:
            continue
        records = [r for r in peer.gossip.book.records() if r.peer != peer.me and r.reachable]
        known = [address for record in records for address in record.addresses[:MAX_ADDRESSES_OF_A_PEER]]
        known = known[:MAX_ADDRESSES]
        if known and known != written:
            written = known
            await trio.to_thread.run_sync(store.write_file, ADDRESSES_FILE, msgspec.json.encode(known))

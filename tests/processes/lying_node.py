"""A real node with one lie in it: the first chunk that it serves to each peer that has not contributed yet has a flipped bit.

python tests/processes/lying_node.py node ...     the flags of p2pcoord node
"""

from __future__ import annotations

from node.cli import main
from node.driver import Driver
from node.network import bulk
from p2pcoord.content import Manifest
from p2pcoord.rounds.rounds import Rounds

lied_to: set[str] = set()
honest = Driver._lookup


class Lying:
    """Content that is right but for the first chunk that is read."""

    def __init__(self, content: bulk.Readable, peer: str) -> None:
        self.content = content
        self.peer = peer

    def manifest(self) -> Manifest:
        return self.content.manifest()

    def read_chunk(self, index: int) -> bytes:
        chunk = self.content.read_chunk(index)
        if self.peer in lied_to:
            return chunk
        lied_to.add(self.peer)
        return bytes((chunk[0] ^ 1,)) + chunk[1:]


def lookup(driver: Driver, peer: str, root: bytes) -> bulk.Readable | None:
    found = honest(driver, peer, root)
    work = driver.peer.work
    newest = work.metrics.newest if isinstance(work, Rounds) else None
    if found is None or newest is None or peer in newest.contributors:
        return found
    return Lying(found, peer)


Driver._lookup = lookup  # type: ignore[method-assign, assignment]

if __name__ == "__main__":
    main()

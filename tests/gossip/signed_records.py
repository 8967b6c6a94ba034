"""Records for tests, signed with a keyed hash in place of Ed25519."""

from hashlib import sha256

import msgspec

from p2pcoord.gossip.record_book import RecordBook
from p2pcoord.gossip.records import PeerRecord
from p2pcoord.wire import encode

replace = msgspec.structs.replace


def sign(record: PeerRecord) -> PeerRecord:
    """A keyed hash in place of Ed25519: nobody in these tests signs for another but where it says so."""
    content = encode(replace(record, signature=b""))
    return replace(record, signature=sha256(record.peer.encode() + content).digest())


class Verifier:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, record: PeerRecord) -> bool:
        self.calls += 1
        return sign(record).signature == record.signature


def record(peer: str, incarnation: int = 1, version: int = 1, **state: object) -> PeerRecord:
    return sign(PeerRecord(peer, incarnation, version, name=f"name of {peer}", **state))


def book(own: str = "me", verify: Verifier | None = None) -> RecordBook:
    return RecordBook(record(own), sign, verify or Verifier(), 0)


def state(of: RecordBook) -> dict[str, PeerRecord]:
    return {each.peer: each for each in of.records()}

"""The record book: everybody's newest record, ours among them, and whose word is taken.

Theory of operation
    A peer changes its own record at most every few seconds: changes are gathered, and only what others must know at once
    (addresses, links, leaving) does not wait. An unchanged record costs nothing. How records travel is `exchange.py`'s matter.

    What comes in                                   what becomes of it
    a stamp not newer than the one held             ignored, without checking its signature
    a newer stamp, signed by its owner              held; RecordChanged
    the same stamp with other signed content        Equivocation (evidence); the larger hash is held, so all end alike
    our own id, newer than what we said             our past: outbid by a higher incarnation (IncarnationRaised)
    an incarnation at or below a tombstone          ignored: the long dead are not raised by old gossip
    a bad signature, too large, too many            Rejected; the rest of that message is not looked at
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

import msgspec

from p2pcoord.errors import LocalError, RemoteError
from p2pcoord.gossip.records import MAX_RECORD_BYTES, PeerRecord, urgent_part, weigh
from p2pcoord.gossip.version_vector import FORGOTTEN, MAX_COUNTER, Stamp, VersionVector

SECOND_NS = 1_000_000_000

UPDATE_INTERVAL_NS = 3 * SECOND_NS
"""Between changes of our record that are not urgent: status screens show seconds, and schedulers need no finer profile."""

UPDATE_NS_PER_RECORD = SECOND_NS // 50
"""That interval also grows by this with every record held, so that a large run's changes come in at no more than 50 records
(about 30 KB) a second, whatever its size. Below 150 peers it changes nothing."""

MIN_URGENT_INTERVAL_NS = SECOND_NS // 5
"""Urgent changes closer together than this are gathered too."""

MAX_OTHER_RECORDS = 256
"""Records of peers that were never admitted: those about to join. Keys are free, so this is bounded apart from members."""

MAX_RECORDS = 16_384
"""All records, as many as the largest run has members: about 16 MiB."""

MAX_TOMBSTONES = 1024
"""Forgotten peers that were never admitted. Whose tombstone is the oldest may be told of again, by who still holds it."""

VERIFIED_SIZE = 4096
"""Signatures remembered by hash, for contradicting pairs and for records that come again after they were let go."""


class Output(msgspec.Struct, frozen=True):
    """Base of what a RecordBook asks for and tells."""


class RecordChanged(Output, frozen=True):
    """Another peer's record was learned, or replaced by a newer one."""

    record: PeerRecord


class OwnRecordChanged(Output, frozen=True):
    """Our record was signed anew; `urgent`: it says what others must know at once."""

    record: PeerRecord
    urgent: bool


class IncarnationRaised(Output, frozen=True):
    """Our incarnation is now this. It must be durable before any later output leaves: a restart that began with an
    incarnation already used would sign two contents for one stamp."""

    incarnation: int


class Equivocation(Output, frozen=True):
    """Evidence: one owner signed two contents for one stamp."""

    first: PeerRecord
    second: PeerRecord


class Rejected(Output, frozen=True):
    """`sender` broke the protocol: `kind` is bad_signature, oversized, too_many_records,
    bad_incarnation or bad_digest."""

    sender: str
    kind: str
    detail: str


class Held:
    """A record as it lies here. `changed` is a moment of a counter, not of the clock."""

    __slots__ = ("changed", "content_hash", "record", "size_bytes")

    def __init__(self, record: PeerRecord, content_hash: bytes, size_bytes: int, changed: int) -> None:
        self.record = record
        self.content_hash = content_hash
        self.size_bytes = size_bytes
        self.changed = changed


class RecordBook:
    """Everybody's newest record; `vector` holds their stamps.

    `first`: our record; its incarnation must be higher than any used before (and durable), its version is set to 1.
    `sign` returns a record with its owner's signature; `verify` says whether the owner named in a record signed it.
    """

    def __init__(
        self,
        first: PeerRecord,
        sign: Callable[[PeerRecord], PeerRecord],
        verify: Callable[[PeerRecord], bool],
        now: int,
    ) -> None:
        self._sign = sign
        self._verify = verify
        self._held: dict[str, Held] = {}
        self.vector = VersionVector()
        self._others = 0  # records held of peers outside the order of admission
        self._verified: OrderedDict[bytes, None] = OrderedDict()
        self._convicted: dict[str, Stamp] = {}
        self._tombstones: dict[str, int] = {}  # forgotten peers outside the order -> incarnation
        self._changes = 0
        self._draft = first
        self._own_peer = first.peer
        self._publish_at: int | None = None
        self._published = now
        self._publish(msgspec.structs.replace(first, version=1), now)

    # Our own record --------------------------------------------------------------------------------------------------

    @property
    def own(self) -> PeerRecord:
        """Our record as others may hold it."""
        return self._held[self._own_peer].record

    @property
    def draft(self) -> PeerRecord:
        """Our record as it will be signed next; change it with `update(msgspec.structs.replace(book.draft, ...))`."""
        return self._draft

    def update(self, draft: PeerRecord, now: int) -> bool:
        """Say something new of ourselves; peer, incarnation, version and signature of the draft play no part. False if
        others hold just that already.

        `tick` publishes it when the interval since the last change is over; at once when the name, the addresses, whether
        and through whom we are reached, or leaving changed. Raises LocalError if the record is too large.
        """
        own = self.own
        draft = msgspec.structs.replace(
            draft, peer=own.peer, incarnation=own.incarnation, version=own.version, signature=own.signature
        )
        content, size = weigh(draft)
        if size > MAX_RECORD_BYTES:
            raise LocalError(f"our record has {size} bytes, at most {MAX_RECORD_BYTES}: name fewer addresses")
        self._draft = draft
        if content == self._held[own.peer].content_hash:
            self._publish_at = None
            return False
        urgent = urgent_part(draft) != urgent_part(own)
        interval = MIN_URGENT_INTERVAL_NS if urgent else self.update_interval_ns
        due = now if draft.leaving and not own.leaving else self._published + interval
        self._publish_at = due if self._publish_at is None else min(due, self._publish_at)
        return True

    @property
    def update_interval_ns(self) -> int:
        """The shortest time between changes of our record that are not urgent."""
        return max(UPDATE_INTERVAL_NS, len(self._held) * UPDATE_NS_PER_RECORD)

    def next_deadline(self) -> int | None:
        """When `tick` is due; None while there is nothing to publish."""
        return self._publish_at

    def tick(self, now: int) -> list[Output]:
        """Publish what has waited long enough."""
        if self._publish_at is None or now < self._publish_at:
            return []
        own = self.own
        if own.version + 1 == FORGOTTEN:
            raise LocalError("versions of this incarnation are used up")
        return self._publish(msgspec.structs.replace(self._draft, version=own.version + 1), now)

    def raise_incarnation(self, incarnation: int, now: int) -> list[Output]:
        """Publish our record under `incarnation`, to refute a suspicion; nothing if ours is as high already.

        The caller makes the incarnation durable before what is returned leaves (see IncarnationRaised).
        """
        if incarnation <= self.own.incarnation:
            return []
        if incarnation > MAX_COUNTER:
            raise LocalError("incarnations are used up: this key cannot go on")
        return self._publish(msgspec.structs.replace(self._draft, incarnation=incarnation, version=1), now)

    def _publish(self, draft: PeerRecord, now: int) -> list[Output]:
        record = self._sign(msgspec.structs.replace(draft, signature=b""))
        held = self._held.get(record.peer)
        urgent = held is not None and urgent_part(held.record) != urgent_part(record)
        self._draft = record
        self._publish_at = None
        self._published = now
        self._hold(record, *weigh(record))
        return [OwnRecordChanged(record, urgent)]

    # What is known ---------------------------------------------------------------------------------------------------

    def get(self, peer: str) -> PeerRecord | None:
        """The newest record held of a peer."""
        held = self._held.get(peer)
        return held.record if held else None

    def held(self, peer: str) -> Held | None:
        """The newest record of a peer as it lies here."""
        return self._held.get(peer)

    def records(self) -> list[PeerRecord]:
        """All records held, in the order in which their owners became known."""
        return [held.record for held in self._held.values()]

    def admit(self, peers: Iterable[str]) -> None:
        """Append peers to the order of admission, as the ledger certifies them; those already in it are skipped."""
        for peer in peers:
            if not self.vector.admitted(peer):
                self.vector.admit(peer)
                self._tombstones.pop(peer, None)
                if peer in self._held:
                    self._others -= 1

    def forget(self, peer: str) -> None:
        """Let go of the record of a peer removed for good: from now on only a higher incarnation of it is taken in.

        (A member excluded for a time is not removed.) A member's tombstone is its stamp, so partners see in the digest
        that they need not send its record.
        """
        if peer == self._own_peer:
            raise LocalError("our own record is not forgotten")
        self._convicted.pop(peer, None)
        held = self._held.pop(peer, None)
        if self.vector.admitted(peer):
            self.vector.update(peer, Stamp(self.vector.stamp(peer).incarnation, FORGOTTEN))
        elif held is not None:
            self._others -= 1
            self.vector.drop(peer)
            self._tombstones[peer] = held.record.incarnation
            if len(self._tombstones) > MAX_TOMBSTONES:
                del self._tombstones[next(iter(self._tombstones))]

    # What others say -------------------------------------------------------------------------------------------------

    def merge(self, sender: str, records: Iterable[PeerRecord], now: int) -> list[Output]:
        """Learn records from anybody. The first bad one ends the message: the rest has no better claim to our time."""
        outputs: list[Output] = []
        try:
            for record in records:
                outputs += self._merge_one(record, now)
        except RemoteError as error:
            outputs.append(Rejected(sender, error.kind, error.detail))
        return outputs

    def _merge_one(self, record: PeerRecord, now: int) -> list[Output]:
        peer = record.peer
        held = self._held.get(peer)
        known = self.vector.stamp(peer)
        if record.stamp < known or (record.stamp == known and held is not None and record == held.record):
            return []
        if held is None and record.incarnation <= self._tombstones.get(peer, 0):
            return []
        content, size = weigh(record)
        if size > MAX_RECORD_BYTES:
            raise RemoteError("oversized", f"a record of {size} bytes, at most {MAX_RECORD_BYTES}")
        if record.stamp == known and held is not None and content == held.content_hash:
            return []
        if held is None and not self.vector.admitted(peer) and self._others >= MAX_OTHER_RECORDS:
            raise RemoteError("too_many_records", f"{self._others} records of peers that are not members")
        if held is None and len(self._held) >= MAX_RECORDS:
            raise RemoteError("too_many_records", f"{MAX_RECORDS} records")
        self._check_signature(record, content)
        if peer == self._own_peer:
            # Signed by our key and not said in this life: a disk that was rolled back. Others hold it, so outbid it.
            if record.incarnation == MAX_COUNTER:
                raise RemoteError("bad_incarnation", "our own key signed the last incarnation there is")
            raised = self.raise_incarnation(record.incarnation + 1, now)
            return [IncarnationRaised(self.own.incarnation), *raised]
        if record.stamp == known and held is not None:
            return self._contradiction(held, record, content, size)
        self._hold(record, content, size)
        return [RecordChanged(record)]

    def _contradiction(self, held: Held, record: PeerRecord, content: bytes, size: int) -> list[Output]:
        outputs: list[Output] = []
        if self._convicted.get(record.peer) != record.stamp:  # once for each stamp is proof enough
            self._convicted[record.peer] = record.stamp
            outputs.append(Equivocation(held.record, record))
        if content > held.content_hash:
            self._hold(record, content, size)
            outputs.append(RecordChanged(record))
        return outputs

    def _hold(self, record: PeerRecord, content: bytes, size: int) -> None:
        peer = record.peer
        self._changes += 1
        if peer not in self._held and not self.vector.admitted(peer):
            self._others += 1
        self._held[peer] = Held(record, content, size, changed=self._changes)
        self.vector.update(peer, record.stamp)

    def _check_signature(self, record: PeerRecord, content: bytes) -> None:
        key = content + record.signature
        if key in self._verified:
            self._verified.move_to_end(key)
            return
        if not self._verify(record):
            raise RemoteError("bad_signature", f"a record not signed by its owner {record.peer}")
        self._verified[key] = None
        if len(self._verified) > VERIFIED_SIZE:
            self._verified.popitem(last=False)

"""State records: what each peer says of itself, signed by itself, and how everybody comes to hold everybody's.

Theory of operation
    A **record** is a peer's whole public state under a stamp (incarnation, version), signed by its owner, so it may be
    learned from anyone. A peer changes its own record at most every few seconds: changes are gathered, and only what
    others must know at once (addresses, links, leaving) does not wait. An unchanged record costs nothing.

    Records spread by anti-entropy (Scuttlebutt, van Renesse et al. 2008; chitchat and Cassandra do the same). Each
    period one random partner, three messages:

        A -> B   syn      A's digest
        B -> A   syn-ack  records that A lacks, and which of A's records B wants
        A -> B   ack      those records

    Every message has a byte budget, so records queue when much changes at once. Half of the places go to the records that
    changed last (news travels fast), half to those not sent for longest, which come first: nothing starves.

    What comes in                                   what becomes of it
    a stamp not newer than the one held             ignored, without checking its signature
    a newer stamp, signed by its owner              held; RecordChanged
    the same stamp with other signed content        Equivocation (evidence); the larger hash is held, so all end alike
    our own id, newer than what we said             our past: outbid by a higher incarnation (IncarnationRaised)
    an incarnation at or below a tombstone          ignored: the long dead are not raised by old gossip
    a bad signature, too large, too many            Rejected; the rest of that message is not looked at

    A record's content is compared as bytes, not as values: a loss may be NaN, and NaN differs from itself.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from typing import Annotated

import msgspec

from p2pcoord.errors import LocalError, RemoteError
from p2pcoord.gossip.version_vector import (
    FORGOTTEN,
    MAX_COUNTER,
    Digest,
    PeerId,
    Stamp,
    VersionVector,
    Wanted,
)
from p2pcoord.identity import Statement
from p2pcoord.wire import encode

SECOND_NS = 1_000_000_000

MAX_RECORD_BYTES = 4096
"""Typical records have 400 to 800 bytes; 16 addresses and 8 links of usual length fit in this."""

MAX_WANTED = 64
"""Records asked for in one syn-ack: the answer's budget holds 20 to 40."""

MAX_OTHER_RECORDS = 256
"""Records of peers that were never admitted: those about to join. Keys are free, so this is bounded apart from members."""

MAX_RECORDS = 16_384
"""All records, as many as the largest run has members: about 16 MiB."""

MAX_TOMBSTONES = 1024
"""Forgotten peers that were never admitted. Whose tombstone is the oldest may be told of again, by who still holds it."""

MAX_ANSWERS = 512
"""Partners answered within a fifth of a period. On average it is less than one."""

VERIFIED_SIZE = 4096
"""Signatures remembered by hash, for contradicting pairs and for records that come again after they were let go."""

URGENT_FAN_OUT = 3
"""Partners told at once of an urgent change: enough that one of them answers, few enough that a flapping address is cheap."""

MIN_URGENT_INTERVAL_NS = SECOND_NS // 5
"""Urgent changes closer together than this are gathered too."""

Text = Annotated[str, msgspec.Meta(max_length=64)]
Address = Annotated[str, msgspec.Meta(max_length=192)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Positive = Annotated[float, msgspec.Meta(ge=0)]


class CapabilityProfile(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a machine can do. 0 means: not known.

    `device`: "cpu", "cuda:0 NVIDIA H100", ...; memory in bytes of that device; CPU cores; bandwidth in bytes/s as measured
    on transfers; measured local training steps per second.
    """

    device: Text = "cpu"
    memory_bytes: Count = 0
    cores: Count = 0
    bandwidth_bytes_per_s: Count = 0
    steps_per_s: Positive = 0.0


class PeerRecord(Statement, frozen=True, tag="peer_record"):
    """One peer's public state, signed by itself.

    `reachable`: others can dial it (a leaf they cannot; it names in `links` the members it stays connected to).
    `base_version`: the version it trains from; `last_sync`: the last version it adopted; `local_loss` and
    `gradient_norm`: of its last local step, None before the first; `queue_length`: assignments it has not finished.
    `leaving`: it said goodbye and takes part no more in this incarnation.
    """

    peer: PeerId
    incarnation: Annotated[int, msgspec.Meta(ge=1, le=MAX_COUNTER)]
    version: Annotated[int, msgspec.Meta(ge=1, lt=FORGOTTEN)]
    name: Text
    addresses: Annotated[tuple[Address, ...], msgspec.Meta(max_length=16)] = ()
    reachable: bool = True
    links: Annotated[tuple[PeerId, ...], msgspec.Meta(max_length=8)] = ()
    profile: CapabilityProfile = CapabilityProfile()
    protocol_version: Count = 1
    program_version: Text = ""
    local_step: Count = 0
    base_version: Count = 0
    last_sync: Count = 0
    local_loss: float | None = None
    gradient_norm: float | None = None
    queue_length: Count = 0
    leaving: bool = False
    signature: Annotated[bytes, msgspec.Meta(max_length=64)] = b""

    @property
    def stamp(self) -> Stamp:
        return Stamp(self.incarnation, self.version)


class RecordSettings(msgspec.Struct, frozen=True):
    """Rates and budgets.

    `exchange_period_ns`: 1 s as in chitchat and Cassandra; a change reaches 1,000 peers in about 10 periods.
    `update_interval_ns`: 3 s; status screens show seconds, and schedulers need no finer profile.
    `update_ns_per_record`: the interval also grows by this with every record held, so that a large run's changes come in
    at no more than 50 records (about 30 KB) a second, whatever its size. Below 150 peers it changes nothing.
    `message_budget_bytes`: records in one message; 16 KiB is 20 to 40 records.
    """

    exchange_period_ns: int = SECOND_NS
    update_interval_ns: int = 3 * SECOND_NS
    update_ns_per_record: int = SECOND_NS // 50
    message_budget_bytes: int = 16_384


class Output(msgspec.Struct, frozen=True):
    """Base of what a RecordBook asks for and tells."""


class SendSyn(Output, frozen=True):
    """Open an exchange: send our digest."""

    to: str
    digest: Digest


class SendSynAck(Output, frozen=True):
    """Answer a syn: records its sender lacks, and those wanted from it."""

    to: str
    records: tuple[PeerRecord, ...]
    wanted: tuple[Wanted, ...]


class SendAck(Output, frozen=True):
    """End an exchange: the records that were wanted."""

    to: str
    records: tuple[PeerRecord, ...]


class RecordChanged(Output, frozen=True):
    """Another peer's record was learned, or replaced by a newer one."""

    record: PeerRecord
    previous: PeerRecord | None


class OwnRecordChanged(Output, frozen=True):
    """Our record was signed anew."""

    record: PeerRecord


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


class _Held:
    """A record as it lies here. `changed` and `sent` are moments of a counter, not of the clock."""

    __slots__ = ("changed", "content_hash", "record", "sent", "size_bytes")

    def __init__(
        self, record: PeerRecord, content_hash: bytes, size_bytes: int, changed: int, sent: int
    ) -> None:
        self.record = record
        self.content_hash = content_hash
        self.size_bytes = size_bytes
        self.changed = changed
        self.sent = sent


class _Partners:
    """Peers to draw from: adding, removing and drawing take constant time, and nothing depends on hash order."""

    def __init__(self) -> None:
        self._peers: list[str] = []
        self._places: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._peers)

    def add(self, peer: str) -> None:
        if peer not in self._places:
            self._places[peer] = len(self._peers)
            self._peers.append(peer)

    def remove(self, peer: str) -> None:
        place = self._places.pop(peer, None)
        if place is None:
            return
        last = self._peers.pop()
        if last != peer:
            self._peers[place] = last
            self._places[last] = place

    def draw(self, rng: random.Random, count: int) -> list[str]:
        return rng.sample(self._peers, min(count, len(self._peers)))


class RecordBook:
    """Everybody's newest record, ours among them.

    `first`: our record; its incarnation must be higher than any used before (and durable), its version is set to 1.
    `sign` returns a record with its owner's signature; `verify` says whether the owner named in a record signed it.
    """

    def __init__(
        self,
        first: PeerRecord,
        sign: Callable[[PeerRecord], PeerRecord],
        verify: Callable[[PeerRecord], bool],
        rng: random.Random,
        now: int,
        settings: RecordSettings | None = None,
    ) -> None:
        self._settings = settings or RecordSettings()
        if self._settings.message_budget_bytes < MAX_RECORD_BYTES:
            raise LocalError(f"a message must hold one record of {MAX_RECORD_BYTES} bytes")
        self._sign = sign
        self._verify = verify
        self._rng = rng
        self._held: dict[str, _Held] = {}
        self._vector = VersionVector()
        self._others = 0  # records held of peers outside the order of admission
        self._verified: OrderedDict[bytes, None] = OrderedDict()
        self._convicted: dict[str, Stamp] = {}
        self._tombstones: dict[str, int] = {}  # forgotten peers outside the order -> incarnation
        self._counter = 0
        self._live = _Partners()
        self._dead = _Partners()
        self._asked: dict[str, int] = {}  # partner of an exchange we opened -> when
        self._answered: dict[str, int] = {}  # partner of an exchange it opened -> when
        self._next_exchange = now + rng.randrange(self._settings.exchange_period_ns)
        self._urgent_exchange = False
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

    def update(self, draft: PeerRecord, now: int) -> list[Output]:
        """Say something new of ourselves; peer, incarnation, version and signature of the draft play no part.

        Published when the interval since the last change is over; at once when the name, the addresses, whether and
        through whom we are reached, or leaving changed. Raises LocalError if the record is too large.
        """
        own = self.own
        draft = msgspec.structs.replace(
            draft, peer=own.peer, incarnation=own.incarnation, version=own.version, signature=own.signature
        )
        content, size = _weigh(draft)
        if size > MAX_RECORD_BYTES:
            raise LocalError(f"our record has {size} bytes, at most {MAX_RECORD_BYTES}: name fewer addresses")
        self._draft = draft
        if content == self._held[own.peer].content_hash:
            self._publish_at = None
            return []
        urgent = _urgent_part(draft) != _urgent_part(own)
        interval = MIN_URGENT_INTERVAL_NS if urgent else self.update_interval_ns
        due = now if draft.leaving and not own.leaving else self._published + interval
        self._publish_at = due if self._publish_at is None else min(due, self._publish_at)
        return self.tick(now)

    @property
    def update_interval_ns(self) -> int:
        """The shortest time between changes of our record that are not urgent."""
        return max(self._settings.update_interval_ns, len(self._held) * self._settings.update_ns_per_record)

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
        if held is not None and _urgent_part(held.record) != _urgent_part(record):
            self._urgent_exchange = True
            self._next_exchange = min(self._next_exchange, now)
        self._draft = record
        self._publish_at = None
        self._published = now
        self._hold(record, *_weigh(record))
        return [OwnRecordChanged(record)]

    # What is known ---------------------------------------------------------------------------------------------------

    def get(self, peer: str) -> PeerRecord | None:
        """The newest record held of a peer."""
        held = self._held.get(peer)
        return held.record if held else None

    def records(self) -> list[PeerRecord]:
        """All records held, in the order in which their owners became known."""
        return [held.record for held in self._held.values()]

    def admit(self, peers: Iterable[str]) -> None:
        """Append peers to the order of admission, as the ledger certifies them; those already in it are skipped."""
        for peer in peers:
            if not self._vector.admitted(peer):
                self._vector.admit(peer)
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
        self.no_partner(peer)
        self._convicted.pop(peer, None)
        held = self._held.pop(peer, None)
        if self._vector.admitted(peer):
            self._vector.update(peer, Stamp(self._vector.stamp(peer).incarnation, FORGOTTEN))
        elif held is not None:
            self._others -= 1
            self._vector.drop(peer)
            self._tombstones[peer] = held.record.incarnation
            if len(self._tombstones) > MAX_TOMBSTONES:
                del self._tombstones[next(iter(self._tombstones))]

    def partner(self, peer: str, *, alive: bool) -> None:
        """Exchange records with this peer: regularly when it is alive, now and then when it is dead (a healed partition
        is found so). `forget` or `no_partner` ends it."""
        self.no_partner(peer)
        if peer != self._own_peer:
            (self._live if alive else self._dead).add(peer)

    def no_partner(self, peer: str) -> None:
        """Open no more exchanges with this peer."""
        self._live.remove(peer)
        self._dead.remove(peer)

    # Exchanges -------------------------------------------------------------------------------------------------------

    def next_deadline(self) -> int | None:
        """When `tick` is due; None while there is nobody to talk to and nothing to publish."""
        deadlines = [self._next_exchange] if len(self._live) + len(self._dead) else []
        if self._publish_at is not None:
            deadlines.append(self._publish_at)
        return min(deadlines, default=None)

    def tick(self, now: int) -> list[Output]:
        """Publish what has waited long enough, and open an exchange when one is due."""
        outputs: list[Output] = []
        if self._publish_at is not None and now >= self._publish_at:
            own = self.own
            if own.version + 1 == FORGOTTEN:
                raise LocalError("versions of this incarnation are used up")
            outputs += self._publish(msgspec.structs.replace(self._draft, version=own.version + 1), now)
        if now < self._next_exchange:
            return outputs
        # Jitter keeps peers that started together from falling into step.
        period = self._settings.exchange_period_ns
        self._next_exchange = now + period + self._rng.randrange(-period // 10, period // 10 + 1)
        partners = self._live.draw(self._rng, URGENT_FAN_OUT if self._urgent_exchange else 1)
        self._urgent_exchange = False
        dead = len(self._dead)
        if dead and self._rng.random() * (len(self._live) + 1) < dead:  # chitchat's odds
            partners += self._dead.draw(self._rng, 1)
        _drop_before(self._asked, now - 3 * period)
        for partner in partners:
            self._asked.pop(partner, None)  # so that the oldest stay in front
            self._asked[partner] = now
            outputs.append(SendSyn(partner, self.digest()))
        return outputs

    def digest(self) -> Digest:
        """What we have, or in a large run a random window of it."""
        return self._vector.random_digest(self._rng)

    def delta(self, digest: Digest, budget_bytes: int) -> tuple[PeerRecord, ...]:
        """Records that the digest's sender lacks, at most `budget_bytes` of them."""
        return self._choose(self._vector.newer_than(digest), budget_bytes)

    def receive_syn(self, sender: str, digest: Digest, now: int) -> list[Output]:
        """A partner opened an exchange."""
        try:
            digest.check()
        except RemoteError as error:
            return [Rejected(sender, error.kind, error.detail)]
        # An answer is larger than its question. An honest partner asks once a period, at most once more when urgent.
        period = self._settings.exchange_period_ns
        # Two that a slow network bunched are no fault, so the second goes unanswered and unblamed.
        _drop_before(self._answered, now - period // 5)
        if sender in self._answered or len(self._answered) >= MAX_ANSWERS:
            return []
        self._answered[sender] = now
        wanted = self._vector.older_than(digest)
        if len(wanted) > MAX_WANTED:
            wanted = self._rng.sample(wanted, MAX_WANTED)
        records = self.delta(digest, self._settings.message_budget_bytes)
        return [SendSynAck(sender, records, tuple(wanted))]

    def receive_syn_ack(
        self, sender: str, records: Sequence[PeerRecord], wanted: Sequence[Wanted], now: int
    ) -> list[Output]:
        """The answer to our syn. What we did not ask for is still learned, but answered with nothing."""
        outputs = self.merge(sender, records, now)
        if self._asked.pop(sender, None) is None or not wanted:
            return outputs
        named = ((self._vector.peer_at(wish.who), wish.have) for wish in wanted[:MAX_WANTED])
        newer = dict.fromkeys(peer for peer, have in named if peer and self._vector.stamp(peer) > have)
        chosen = self._choose(list(newer), self._settings.message_budget_bytes)
        return [*outputs, SendAck(sender, chosen)] if chosen else outputs

    def receive_ack(self, sender: str, records: Sequence[PeerRecord], now: int) -> list[Output]:
        """The end of an exchange that a partner opened."""
        return self.merge(sender, records, now)

    def _choose(self, peers: Sequence[str], budget_bytes: int) -> tuple[PeerRecord, ...]:
        """Alternate between what was not sent for longest (first, so the largest record finds room) and the newest."""
        candidates = [held for held in (self._held.get(peer) for peer in peers) if held is not None]
        by_rest = iter(sorted(candidates, key=lambda held: held.sent))
        by_news = iter(sorted(candidates, key=lambda held: -held.changed))
        chosen: dict[str, PeerRecord] = {}
        left = budget_bytes
        for pair in zip(by_rest, by_news, strict=True):
            for held in pair:
                if held.record.peer not in chosen and held.size_bytes <= left:
                    chosen[held.record.peer] = held.record
                    left -= held.size_bytes
                    self._counter += 1
                    held.sent = self._counter
        return tuple(chosen.values())

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
        known = self._vector.stamp(peer)
        if record.stamp < known or (record.stamp == known and held is not None and record == held.record):
            return []
        if held is None and record.incarnation <= self._tombstones.get(peer, 0):
            return []
        content, size = _weigh(record)
        if size > MAX_RECORD_BYTES:
            raise RemoteError("oversized", f"a record of {size} bytes, at most {MAX_RECORD_BYTES}")
        if record.stamp == known and held is not None and content == held.content_hash:
            return []
        if held is None and not self._vector.admitted(peer) and self._others >= MAX_OTHER_RECORDS:
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
        return [RecordChanged(record, held.record if held else None)]

    def _contradiction(self, held: _Held, record: PeerRecord, content: bytes, size: int) -> list[Output]:
        outputs: list[Output] = []
        if self._convicted.get(record.peer) != record.stamp:  # once for each stamp is proof enough
            self._convicted[record.peer] = record.stamp
            outputs.append(Equivocation(held.record, record))
        if content > held.content_hash:
            self._hold(record, content, size)
            outputs.append(RecordChanged(record, held.record))
        return outputs

    def _hold(self, record: PeerRecord, content: bytes, size: int) -> None:
        peer = record.peer
        self._counter += 1
        held = self._held.get(peer)
        if held is None and not self._vector.admitted(peer):
            self._others += 1
        # A change keeps the moment of its last sending: who changes often gains no place over who does not.
        self._held[peer] = _Held(record, content, size, changed=self._counter, sent=held.sent if held else 0)
        self._vector.update(peer, record.stamp)

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


def _urgent_part(record: PeerRecord) -> tuple[object, ...]:
    """What does not wait: how the peer is reached, whether it stays, and the refutation of a suspicion."""
    return record.incarnation, record.name, record.addresses, record.reachable, record.links, record.leaving


def _weigh(record: PeerRecord) -> tuple[bytes, int]:
    """The hash of a record's content without its signature, and its encoded size with it, in bytes."""
    content = encode(msgspec.structs.replace(record, signature=b""))
    length = len(record.signature)
    return sha256(content).digest(), len(content) + length + (1 if length > 23 else 0)  # a longer CBOR header


def _drop_before(moments: dict[str, int], oldest: int) -> None:
    """Entries are in order of time, so the old ones are in front."""
    for peer in list(moments):
        if moments[peer] >= oldest:
            return
        del moments[peer]

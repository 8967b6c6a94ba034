"""Exchanges of records: how everybody comes to hold everybody's.

Theory of operation
    Records spread by anti-entropy (Scuttlebutt, van Renesse et al. 2008; chitchat and Cassandra do the same). Each
    period one random partner, three messages:

        A -> B   syn      A's digest
        B -> A   syn-ack  records that A lacks, and which of A's records B wants
        A -> B   ack      those records

    Every message has a byte budget, so records queue when much changes at once. Half of the places go to the records that
    changed last (news travels fast), half to those not sent for longest, which come first: nothing starves.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from p2pcoord.errors import LocalError, RemoteError
from p2pcoord.gossip.record_book import Output, RecordBook, Rejected
from p2pcoord.gossip.records import MAX_RECORD_BYTES, PeerRecord
from p2pcoord.gossip.version_vector import Digest, Wanted

SECOND_NS = 1_000_000_000

PERIOD_NS = SECOND_NS
"""Between exchanges that we open, as in chitchat and Cassandra; a change reaches 1,000 peers in about 10 periods."""

MESSAGE_BUDGET_BYTES = 16_384
"""Records in one message: 20 to 40 of them."""

MAX_WANTED = 64
"""Records asked for in one syn-ack: the answer's budget holds 20 to 40."""

MAX_ANSWERS = 512
"""Partners answered within a fifth of a period. On average it is less than one."""

URGENT_FAN_OUT = 3
"""Partners told at once of an urgent change: enough that one of them answers, few enough that a flapping address is cheap."""


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


class Exchange:
    """One peer's exchanges. `budget_bytes`: of records in one message. Raises LocalError if that cannot hold a record."""

    def __init__(
        self, book: RecordBook, rng: random.Random, now: int, budget_bytes: int = MESSAGE_BUDGET_BYTES
    ) -> None:
        if budget_bytes < MAX_RECORD_BYTES:
            raise LocalError(f"a message must hold one record of {MAX_RECORD_BYTES} bytes")
        self._book = book
        self._rng = rng
        self._budget_bytes = budget_bytes
        self._live = _Partners()
        self._dead = _Partners()
        self._asked: dict[str, int] = {}  # partner of an exchange we opened -> when
        self._answered: dict[str, int] = {}  # partner of an exchange it opened -> when
        self._sent: dict[str, int] = {}  # whose record -> when it was sent last, a moment of a counter
        self._sendings = 0
        self._next_at = now + rng.randrange(PERIOD_NS)
        self._urgent = False

    # Partners --------------------------------------------------------------------------------------------------------

    def partner(self, peer: str, *, alive: bool) -> None:
        """Exchange records with this peer: regularly when it is alive, now and then when it is dead (a healed partition
        is found so). `forget` or `no_partner` ends it."""
        self.no_partner(peer)
        if peer != self._book.own.peer:
            (self._live if alive else self._dead).add(peer)

    def no_partner(self, peer: str) -> None:
        """Open no more exchanges with this peer."""
        self._live.remove(peer)
        self._dead.remove(peer)

    def forget(self, peer: str) -> None:
        """The book forgot this peer's record."""
        self.no_partner(peer)
        self._sent.pop(peer, None)

    # Exchanges -------------------------------------------------------------------------------------------------------

    def next_deadline(self) -> int | None:
        """When `tick` is due; None while there is nobody to talk to."""
        return self._next_at if len(self._live) + len(self._dead) else None

    def hurry(self, now: int) -> None:
        """Our record says what others must know at once: several hear it now."""
        self._urgent = True
        self._next_at = min(self._next_at, now)

    def tick(self, now: int) -> list[Output]:
        """Open an exchange when one is due."""
        if now < self._next_at:
            return []
        # Jitter keeps peers that started together from falling into step.
        self._next_at = now + PERIOD_NS + self._rng.randrange(-PERIOD_NS // 10, PERIOD_NS // 10 + 1)
        partners = self._live.draw(self._rng, URGENT_FAN_OUT if self._urgent else 1)
        self._urgent = False
        dead = len(self._dead)
        if dead and self._rng.random() * (len(self._live) + 1) < dead:  # chitchat's odds
            partners += self._dead.draw(self._rng, 1)
        _drop_before(self._asked, now - 3 * PERIOD_NS)
        outputs: list[Output] = []
        for partner in partners:
            self._asked.pop(partner, None)  # so that the oldest stay in front
            self._asked[partner] = now
            outputs.append(SendSyn(partner, self.digest()))
        return outputs

    def digest(self) -> Digest:
        """What we have, or in a large run a random window of it."""
        return self._book.vector.random_digest(self._rng)

    def delta(self, digest: Digest, budget_bytes: int) -> tuple[PeerRecord, ...]:
        """Records that the digest's sender lacks, at most `budget_bytes` of them."""
        return self._choose(self._book.vector.newer_than(digest), budget_bytes)

    def receive_syn(self, sender: str, digest: Digest, now: int) -> list[Output]:
        """A partner opened an exchange."""
        try:
            digest.check()
        except RemoteError as error:
            return [Rejected(sender, error.kind, error.detail)]
        # An answer is larger than its question. An honest partner asks once a period, at most once more when urgent.
        # Two that a slow network bunched are no fault, so the second goes unanswered and unblamed.
        _drop_before(self._answered, now - PERIOD_NS // 5)
        if sender in self._answered or len(self._answered) >= MAX_ANSWERS:
            return []
        self._answered[sender] = now
        wanted = self._book.vector.older_than(digest)
        if len(wanted) > MAX_WANTED:
            wanted = self._rng.sample(wanted, MAX_WANTED)
        records = self.delta(digest, self._budget_bytes)
        return [SendSynAck(sender, records, tuple(wanted))]

    def receive_syn_ack(
        self, sender: str, records: Sequence[PeerRecord], wanted: Sequence[Wanted], now: int
    ) -> list[Output]:
        """The answer to our syn. What we did not ask for is still learned, but answered with nothing."""
        outputs = self._book.merge(sender, records, now)
        if self._asked.pop(sender, None) is None or not wanted:
            return outputs
        named = ((self._book.vector.peer_at(wish.who), wish.have) for wish in wanted[:MAX_WANTED])
        newer = dict.fromkeys(peer for peer, have in named if peer and self._book.vector.stamp(peer) > have)
        chosen = self._choose(list(newer), self._budget_bytes)
        return [*outputs, SendAck(sender, chosen)] if chosen else outputs

    def _choose(self, peers: Sequence[str], budget_bytes: int) -> tuple[PeerRecord, ...]:
        """Alternate between what was not sent for longest (first, so the largest record finds room) and the newest."""
        candidates = [held for held in map(self._book.held, peers) if held is not None]
        # A changed record keeps the moment of its last sending: who changes often gains no place over who does not.
        by_rest = iter(sorted(candidates, key=lambda held: self._sent.get(held.record.peer, 0)))
        by_news = iter(sorted(candidates, key=lambda held: -held.changed))
        chosen: dict[str, PeerRecord] = {}
        left = budget_bytes
        for pair in zip(by_rest, by_news, strict=True):
            for held in pair:
                if held.record.peer not in chosen and held.size_bytes <= left:
                    chosen[held.record.peer] = held.record
                    left -= held.size_bytes
                    self._sendings += 1
                    self._sent[held.record.peer] = self._sendings
        return tuple(chosen.values())


def _drop_before(moments: dict[str, int], oldest: int) -> None:
    """Entries are in order of time, so the old ones are in front."""
    for peer in list(moments):
        if moments[peer] >= oldest:
            return
        del moments[peer]

"""The centre: one peer of a run, as a state machine without I/O.

    inputs    start, receive, complete, progress, tick, connected, disconnected, leave    each returns effects (`effects.py`)
    reading   next_deadline, status                                                       change nothing

`Peer` composes the agreement (`consensus/`), the roster of members and how peers come and go (`rounds/participation.py`,
`rounds/admissions.py`), the peers around it (`neighbours.py`) and the work of the run (`Work`: the rounds). It gives every
message to the part it is meant for, and is the edge at which a `RemoteError` stops: what a peer sent wrongly is counted by
kind and by peer, and goes no further. Everything random is derived by hash from the entropy given at start and a purpose, so
one more draw in one place moves nothing in another.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from random import Random
from typing import Any, Protocol

import msgspec

from p2pcoord.consensus.agreement import Agreement
from p2pcoord.consensus.batches import certified_from
from p2pcoord.consensus.election import NEVER
from p2pcoord.consensus.evidence import SignedStatement
from p2pcoord.consensus.ledger import Fork
from p2pcoord.consensus.record import CommitteeChange, Members, Record, Round
from p2pcoord.consensus.voter import Timing
from p2pcoord.effects import AnswerStatus, Done, Effect, Failed, Halt, Outcome, Persist
from p2pcoord.errors import LocalError, RemoteError
from p2pcoord.frames import Checked, Life, PeerFrame, Slot
from p2pcoord.gossip.gossip import Gossip
from p2pcoord.gossip.records import CapabilityProfile, PeerRecord
from p2pcoord.identity import Authority
from p2pcoord.messages import (
    AnyMessage,
    GenesisReply,
    GenesisRequest,
    RecordsRequest,
    StatusRequest,
    decode_message,
)
from p2pcoord.neighbours import Neighbours
from p2pcoord.outbox import Outbox
from p2pcoord.rounds.admissions import Admissions, JoinSettings
from p2pcoord.rounds.participation import MAX_NAME_LENGTH, Roster
from p2pcoord.rounds.rounds import Rounds
from p2pcoord.rounds.setting import Rules, Setting
from p2pcoord.wire import decode

# A tick this late means that the machine slept, not that the others did (architecture: effects).
LATE_TICK_NS = 500_000_000

# A member outside the committee that has heard of nothing new asks somebody this often whether it missed an announcement.
CATCH_UP_INTERVAL_NS = 2_000_000_000

# The coordinator looks at its committee this often; a change takes two certificates anyway.
TEND_INTERVAL_NS = 500_000_000

# While it waits for learners it looks more often: one that has all is ready for a moment only, until the next record.
LEARNING_INTERVAL_NS = 50_000_000

# Messages that one input may cause a peer to send itself; a round needs about ten.
MAX_LOCAL_MESSAGES = 10_000

# Rejected messages are counted for this many peers at most; the rest are counted together.
MAX_COUNTED_PEERS = 1024
OTHERS = "others"


class Restored(msgspec.Struct, frozen=True):
    """What an earlier life left: the log's frames (empty on the first start), the roots of the content on the disk, and
    fresh entropy for this life."""

    frames: tuple[bytes, ...]
    entropy: bytes
    contents: frozenset[bytes] = frozenset()


class PeerSettings(msgspec.Struct, frozen=True):
    """What this machine brings, and what the run agreed. `secret` is None in an open run."""

    name: str
    secret: bytes | None
    committee_size: int = 7
    rotation_rounds: int = 20
    timing: Timing = Timing()
    rules: Rules | None = None
    """The run's rules for rounds; None when the owner gives the peer another `work`."""
    gossip: bool = False
    """Whether this peer gossips, probes and dials; False in tests of the agreement alone, where links are given."""
    addresses: tuple[str, ...] = ()
    """Multiaddrs at which others may reach this peer."""
    bootstrap: tuple[str, ...] = ()
    """Addresses (multiaddr or host:port) to dial while this peer knows nobody."""
    profile: CapabilityProfile = CapabilityProfile()
    program_version: str = ""
    compact_after_bytes: int = 8 << 20
    """The log is rewritten when it holds this much: a day of rounds of ten seconds, and half a second to read back."""
    kept_bodies: int = 256
    """Rounds whose bodies stay when the log is compacted: what metrics and history show after a restart, and what a member
    that was away for an hour is told of."""
    minimum_memory_bytes: int = 0
    """What the run asks of a joiner's device."""
    trusted: tuple[int, bytes] | None = None
    """(height, record) that the inviter had certified: a chain without it is refused."""


class Work(Protocol):
    """What the agreement is for: makes rounds while this peer coordinates, and judges those of others."""

    def check(self, record: Record, body: Round, now: int) -> str | None: ...
    def certified(self, records: Sequence[Record], now: int) -> None: ...
    def receive(self, sender: str, message: AnyMessage, now: int) -> bool: ...
    def complete(self, effect_id: int, outcome: Outcome, now: int) -> None: ...
    def progress(self, now: int) -> None: ...
    def tick(self, now: int) -> None: ...
    def next_deadline(self) -> int: ...
    @property
    def idle(self) -> bool: ...
    @property
    def reconfigurable(self) -> bool: ...


class Peer:
    """One peer. Create it with its identity and the run's genesis, give it its `work`, then call start once."""

    def __init__(self, authority: Authority, genesis: Record, settings: PeerSettings) -> None:
        self.authority = authority
        self.me = authority.peer_id
        self.settings = settings
        self.outbox = Outbox(self.me)
        self.genesis = genesis
        self.roster = Roster(authority, settings.secret)
        self.neighbours = Neighbours(authority, self.outbox, self.roster, self._on_neighbours_changed)
        self.rejected: dict[str, dict[str, int]] = {}
        self.halted = ""
        self.incarnation = 0
        self.agreement: Agreement
        self.admissions: Admissions
        self.work: Work
        self._persists: dict[int, None] = {}
        self._catch_up_at = NEVER
        self._tend_at = NEVER
        self._now = 0
        self._work_due = False
        self._compact_above = 0

    # Inputs

    def start(self, restored: Restored, now: int) -> list[Effect]:
        """Begins, or goes on after a restart. Raises LocalError when the log is not this peer's or contradicts itself."""
        self._now = now
        self._entropy = restored.entropy
        settings = self.settings
        self.agreement = Agreement(
            self.authority,
            self.outbox,
            self.genesis,
            self.random("election"),
            timing=settings.timing,
            committee_size=settings.committee_size,
            trusted=settings.trusted,
            check=self._check,
            certified=self._on_certified,
            see=self._see,
            holds_state=lambda: not isinstance(self.work, Rounds) or self.work.participant.held,
        )
        self.admissions = Admissions(
            self.authority,
            self.outbox,
            self.roster,
            self.agreement,
            self.neighbours.connected,
            JoinSettings(
                settings.name,
                settings.secret,
                settings.profile,
                settings.minimum_memory_bytes,
                settings.addresses,
            ),
            self._tend_soon,
        )
        frames = _decoded(restored.frames)
        self.outbox.written_bytes = sum(map(len, restored.frames))
        self.agreement.start([f for f in frames if not isinstance(f, Life | Slot | Checked)], now)
        self._begin_incarnation(1 + max((f.incarnation for f in frames if isinstance(f, Life)), default=0))
        if settings.gossip:
            self._start_gossip(now)
        ledger = self.agreement.voter.ledger
        known = ledger.records[: ledger.certified + 1]
        self.roster.apply(known)
        if settings.rules is not None:
            self.work = self._rounds(settings.rules, frames, restored.contents)
        else:
            self.work.certified(known, now)
        self.neighbours.follow(self.agreement.committee.everyone, now)
        self.admissions.wake(now)
        self._catch_up_at = self._tend_at = now
        return self._finish(now)

    def _see(self, statement: SignedStatement) -> None:
        self.admissions.see(statement)

    def _begin_incarnation(self, incarnation: int) -> None:
        self.incarnation = incarnation
        self.outbox.persist([Life(incarnation)])

    def _start_gossip(self, now: int) -> None:
        settings = self.settings
        first = PeerRecord(
            self.me,
            self.incarnation,
            1,
            settings.name[:MAX_NAME_LENGTH],
            settings.addresses,
            reachable=self.genesis.header.coordinator == self.me,
            profile=settings.profile,
            program_version=settings.program_version,
        )
        self.neighbours.start_gossip(
            first, settings.bootstrap, self.random, now, began=self._begin_incarnation, reject=self.reject
        )

    def _rounds(self, rules: Rules, frames: Sequence[PeerFrame], contents: frozenset[bytes]) -> Rounds:
        setting = Setting(
            self.authority,
            self.agreement.voter,
            self.roster,
            self.outbox,
            rules,
            incarnation=self.incarnation,
            alive=self.neighbours.alive,
            fit=self.neighbours.fit,
            send=lambda peer, message: self.neighbours.send(peer, message, self._now),
            between_rounds=self._between_rounds,
            see=self.admissions.see,
            exclude=self.admissions.exclude,
            ask_records=self.agreement.catch_up.ask,
            retry=self.agreement.following.retry,
            link=lambda peer: self.neighbours.link(peer, self._now),
        )
        rounds = Rounds(setting, self.agreement)
        slots = {frame.header.slot: frame.header for frame in frames if isinstance(frame, Slot)}
        ledger = self.agreement.voter.ledger
        checked = [frame for frame in frames if isinstance(frame, Checked)]
        rounds.restore(ledger.records[: ledger.certified + 1], slots, checked, contents, self._now)
        return rounds

    def receive(self, sender: str, data: bytes, now: int) -> list[Effect]:
        """A message from an authenticated peer. Whatever it holds, this returns."""
        if self.halted:
            return []
        self._now = now
        try:
            message = decode_message(data)
        except RemoteError as error:
            self.reject(sender, error)
        else:
            self._handle(sender, message, now)
        return self._finish(now)

    def _handle(self, sender: str, message: AnyMessage, now: int) -> None:
        self.neighbours.heard(sender, message, self.agreement, now)
        try:
            self._dispatch(sender, message, now)
        except RemoteError as error:
            self.reject(sender, error)
        except Fork as fork:
            self._halt(str(fork))

    def complete(self, effect_id: int, outcome: Outcome, now: int) -> list[Effect]:
        """The outcome of an effect; ids of an earlier life are ignored."""
        if self.halted:
            return []
        self._now = now
        if effect_id in self._persists:
            del self._persists[effect_id]
            if isinstance(outcome, Done):
                self.outbox.durable = effect_id
                self.agreement.durable(now)
            else:
                reason = outcome.reason if isinstance(outcome, Failed) else "cancelled"
                self._halt(f"the log could not be written: {reason}")
        elif not self.neighbours.complete(effect_id, outcome, now):
            self.work.complete(effect_id, outcome, now)
            self._tell_own_state(now)
        return self._finish(now)

    def progress(
        self, effect_id: int, now: int, *, step: int | None = None, loss: float | None = None
    ) -> list[Effect]:
        """A long effect (Fetch, Train, Combine, Step, Validate) goes on: bytes moved, or local steps were made."""
        if self.halted:
            return []
        self._now = now
        if self.gossip is not None and step is not None:
            before = self.work.participant.local_steps if isinstance(self.work, Rounds) else 0
            self.gossip.update(now, local_step=before + step, local_loss=loss)
        self.work.progress(now)
        return self._finish(now)

    def tick(self, now: int) -> list[Effect]:
        """Time has passed: call at next_deadline(), or later."""
        if self.halted:
            return []
        self._now = now
        if now - self.next_deadline() > LATE_TICK_NS:
            self.outbox.emit("late-tick", late_ns=now - self.next_deadline())
            self.agreement.postpone(now)
            self.neighbours.gap(now)
        self.agreement.tick(now)
        self.neighbours.tick(self.agreement, now)
        self.admissions.tick(now)
        self._catch_up(now)
        if self.agreement.replication.opened and now >= self._tend_at:
            self._tend(now)
            learning = bool(self.agreement.replication.learners)
            self._tend_at = now + (LEARNING_INTERVAL_NS if learning else TEND_INTERVAL_NS)
        self.work.tick(now)
        return self._finish(now)

    def connected(self, peer: str, now: int) -> list[Effect]:
        if self.halted:
            return []
        self._now = now
        self.neighbours.on_connected(peer, now)
        self.admissions.wake(now)
        self._catch_up_at = min(self._catch_up_at, now)
        if isinstance(self.work, Rounds):
            self.work.connected(peer, now)
        return self._finish(now)

    def disconnected(self, peer: str, now: int) -> list[Effect]:
        if self.halted:
            return []
        self._now = now
        self.neighbours.on_disconnected(peer, now)
        self.admissions.disconnected(peer)
        self.work.tick(now)
        return self._finish(now)

    def leave(self, now: int) -> list[Effect]:
        """Say goodbye: hand over the duty, then ask to be let go. `left` tells when that is certified."""
        self._now = now
        if not self.halted:
            self.admissions.leave(now)
        return self._finish(now)

    # Reading

    def next_deadline(self) -> int:
        return min(
            self.agreement.next_deadline(),
            self.neighbours.next_deadline(),
            self.admissions.next_deadline(),
            self.work.next_deadline(),
            self._catch_up_at,
            self._tend_at if self.agreement.replication.opened else NEVER,
        )

    @property
    def gossip(self) -> Gossip | None:
        return self.neighbours.gossip

    @property
    def connections(self) -> set[str]:
        return self.neighbours.connected

    def alive(self, peer: str) -> bool:
        return self.neighbours.alive(peer)

    def fit(self, peer: str) -> bool:
        return self.neighbours.fit(peer)

    @property
    def is_member(self) -> bool:
        return self.roster.is_member(self.me)

    @property
    def left(self) -> bool:
        """The run has let this peer go."""
        return self.admissions.left

    def may_read(self, peer: str) -> bool:
        return self.admissions.may_read(peer)

    def random(self, purpose: str) -> Random:
        """A stream of its own for one purpose."""
        return Random(sha256(self._entropy + self.me.encode() + purpose.encode()).digest())

    # Messages

    def _dispatch(self, sender: str, message: AnyMessage, now: int) -> None:
        # Who was let go or excluded, and was away then, learns it from the records and from nowhere else.
        known = self.may_read(sender) or self.roster.was_admitted(sender)
        if isinstance(message, RecordsRequest) and not known:
            return  # a stranger, or a joiner whose proof has not arrived yet: it gets nothing, and asks again
        parts = (self.agreement, self.work, self.admissions, self.neighbours)
        if any(part.receive(sender, message, now) for part in parts):
            return
        if isinstance(message, GenesisRequest):
            self.admissions.check_proof(message.admission, sender)
            self.admissions.let_read(sender)
            self.outbox.send(sender, GenesisReply(self.genesis))
        elif isinstance(message, StatusRequest):
            self.admissions.check_proof(message.admission, sender)
            self.outbox.put(AnswerStatus(sender))

    def reject(self, sender: str, error: RemoteError) -> None:
        """Counts what a peer sent wrongly."""
        by_peer = self.rejected.setdefault(error.kind, {})
        known = sender in by_peer or len(by_peer) < MAX_COUNTED_PEERS
        by_peer[sender if known else OTHERS] = by_peer.get(sender if known else OTHERS, 0) + 1
        self.outbox.emit("rejected", kind=error.kind, peer=sender, detail=error.detail)

    # Records

    def _check(self, record: Record) -> str | None:
        """What a voter checks before it acknowledges (following.Check)."""
        body = record.body
        if isinstance(body, Round):
            return self.work.check(record, body, self._now)
        if isinstance(body, Members):
            return self.roster.check(body)
        if isinstance(body, CommitteeChange):
            # Only who becomes a voter is asked for: what a joint committee began, its incoming half must be able to end.
            new = set(body.committee.voters) - set(self.agreement.committee.everyone)
            strangers = [peer for peer in sorted(new) if not self.roster.is_member(peer)]
            return f"{strangers[0]} is no member and cannot vote" if strangers else ""
        return ""

    def _on_certified(self, records: Sequence[Record], now: int) -> None:
        was_member = self.is_member
        self.roster.apply(records)
        for record in records:
            self._tell(record)
        if self.is_member and not was_member:
            self.outbox.emit("joined", peer=self.me)
        self.admissions.certified()
        self._catch_up_at = now + CATCH_UP_INTERVAL_NS
        if any(record.header.kind in ("members", "committee") for record in records):
            self.neighbours.follow(self.agreement.committee.everyone, now)
        if self.agreement.is_coordinator:
            answer = certified_from(self.agreement.voter.ledger, records[0].header.height)
            if answer is not None:
                self.outbox.announce(answer, after=self.agreement.voter.term_persist)
            self._tend_at = now
        self.work.certified(records, now)
        self._tell_own_state(now)
        if self.outbox.written_bytes > max(self.settings.compact_after_bytes, self._compact_above):
            self._compact()

    def _compact(self) -> None:
        """The log has grown: drop what a certified state makes superfluous, and begin a new file."""
        voter = self.agreement.voter
        certified = voter.ledger.records[: voter.ledger.certified + 1]
        rounds = [record.header.height for record in certified if record.header.kind == "round"]
        # Rounds are counted, not heights: after many elections at rest the newest round may lie far below the top.
        height = rounds[-self.settings.kept_bodies] - 1 if len(rounds) >= self.settings.kept_bodies else 0
        frames: list[msgspec.Struct] = [*voter.compacted_frames(height), Life(self.incarnation)]
        if isinstance(self.work, Rounds):
            frames += [Slot(header) for header in self.work.participant.slots.values()]
            frames += self.work.participant.checked()
        self.outbox.persist(frames, replace=True)
        self.outbox.emit("compacted", height=max(height, 0), size_bytes=self.outbox.written_bytes)
        # What cannot be dropped any more must not make every certificate rewrite the whole file.
        self._compact_above = 2 * self.outbox.written_bytes

    def _tell_own_state(self, now: int) -> None:
        """Gossips which version this peer holds, and what its last training came to (coalesced to every few seconds)."""
        if self.gossip is None or not isinstance(self.work, Rounds):
            return
        participant = self.work.participant
        trained = participant.last_trained
        self.gossip.update(
            now,
            last_sync=participant.version if participant.held else self.gossip.book.draft.last_sync,
            base_version=participant.version,
            queue_length=len(participant.plan.of(self.me)) if participant.plan else 0,
            local_step=participant.local_steps,
            local_loss=trained.loss if trained else None,
            gradient_norm=trained.norm if trained else None,
        )

    def _tell(self, record: Record) -> None:
        body = record.body
        height, term = record.header.height, record.header.term
        self.outbox.emit("certified", height=height, term=term, kind=record.header.kind)
        if isinstance(body, Members):
            for admission in body.admitted:
                self.outbox.emit("admitted", peer=admission.peer, name=admission.name)
            for farewell in body.left:
                self.outbox.emit("left", peer=farewell.peer)
            for exclusion in body.excluded:
                self.outbox.emit(
                    "excluded", peer=exclusion.peer, reason=exclusion.reason, until=exclusion.until
                )

    def _catch_up(self, now: int) -> None:
        """A member outside the committee depends on announcements, and those may be lost."""
        if now < self._catch_up_at:
            return
        self._catch_up_at = now + CATCH_UP_INTERVAL_NS
        if not self.agreement.quorum_held(now) and self.is_member:
            source = self.admissions.some_connection()
            if source:
                self.agreement.catch_up.ask(source, now)

    # The coordinator's care for who is in

    def _tend_soon(self) -> None:
        self._tend_at = min(self._tend_at, self._now)

    def _tend(self, now: int) -> None:
        """Members first, then the committee, then the duty itself; each waits for the record of the one before."""
        agreement = self.agreement
        if not self.work.reconfigurable:
            return
        pending = self.admissions.pending()
        if pending is not None and agreement.voter.ledger.certified == agreement.voter.ledger.height:
            agreement.propose(pending)
            return
        gone = self.admissions.gone()
        candidates = self.neighbours.voter_candidates({*agreement.committee.everyone, *gone})
        agreement.tend_committee(candidates, gone, now)
        due = 0 < self.settings.rotation_rounds <= agreement.rounds_in_term()
        if self.work.idle and (due or self.admissions.leaving):
            agreement.rotate(now)

    def _between_rounds(self, now: int) -> bool:
        """Whoever waits between rounds has its turn; False when no round may begin after it: whoever leaves hands over first,
        and a learner cannot catch up with rounds that follow each other faster than its answers."""
        self._tend(now)
        return not self.admissions.leaving

    # Ends

    def _on_neighbours_changed(self) -> None:
        self._work_due = True

    def _halt(self, reason: str) -> None:
        if not self.halted:
            self.halted = reason
            self.outbox.put(Halt(reason))

    def _finish(self, now: int) -> list[Effect]:
        """What the detectors know, the round uses in the same step; what this peer tells itself, it hears in the same step."""
        for _ in range(MAX_LOCAL_MESSAGES):
            if self._work_due:
                self._work_due = False
                self.work.tick(now)
            if not self.outbox.local or self.halted:
                break
            self._handle(self.me, self.outbox.local.popleft(), now)  # type: ignore[arg-type]
        else:
            raise LocalError(f"over {MAX_LOCAL_MESSAGES} messages to itself in one input")
        effects = self.outbox.take()
        self._persists.update((effect.id, None) for effect in effects if isinstance(effect, Persist))
        return effects

    def status(self, now: int) -> dict[str, Any]:
        """A pure read of what this peer knows; docs/protocol.md lists the fields."""
        voter, ledger = self.agreement.voter, self.agreement.voter.ledger
        committee = self.agreement.committee
        return {
            "peer_id": self.me,
            "name": self.settings.name,
            "role": str(voter.role) if voter.is_voter() else "member" if self.is_member else "stranger",
            "term": voter.term,
            "coordinator": voter.coordinator,
            "height": ledger.height,
            "certified": ledger.certified,
            "lineage": ledger.hashes[ledger.certified].hex(),
            "voters": list(committee.voters),
            "outgoing": list(committee.outgoing),
            "quorum_held": self.agreement.quorum_held(now),
            "members": list(self.roster.members),
            "rejected": {kind: dict(by_peer) for kind, by_peer in self.rejected.items()},
        }


def _decoded(frames: Sequence[bytes]) -> list[PeerFrame]:
    """Raises LocalError: the log file was intact, so what does not decode was written by another program."""
    try:
        return [decode(frame, PeerFrame) for frame in frames]  # type: ignore[arg-type]  # a union is a type to msgspec
    except RemoteError as error:
        raise LocalError(f"the log holds what is no frame of this program: {error}") from error

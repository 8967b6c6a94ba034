"""The centre: one peer of a run, as a state machine without I/O.

    inputs    start, receive, complete, progress, tick, connected, disconnected, leave    each returns effects (`effects.py`)
    reading   next_deadline                                                               changes nothing

`Peer` composes the agreement (`consensus/`), the roster of members and how peers come and go (`rounds/participation.py`,
`rounds/admissions.py`), the peers around it (`neighbours.py`), the coordinator's duty (`duty.py`) and the work of the run
(`work.py`: the rounds). It gives every message to the part it is meant for, and is the edge at which a `RemoteError` stops:
what a peer sent wrongly is counted by kind and by peer, and goes no further. Everything random is derived by hash from the
entropy given at start and a purpose, so one more draw in one place moves nothing in another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from random import Random

from p2pcoord.compaction import Compaction
from p2pcoord.consensus.agreement import Agreement
from p2pcoord.consensus.batches import certified_from
from p2pcoord.consensus.evidence import SignedStatement
from p2pcoord.consensus.ledger import Fork
from p2pcoord.consensus.messages import RecordsRequest
from p2pcoord.consensus.record import CommitteeChange, Members, Record, Round
from p2pcoord.duty import Duty
from p2pcoord.effects import NEVER, AnswerStatus, Done, Effect, Failed, Halt, Outcome, Persist
from p2pcoord.errors import LocalError, RemoteError
from p2pcoord.frames import PeerFrame, decode_frames
from p2pcoord.gossip.gossip import Gossip
from p2pcoord.gossip.records import PeerRecord
from p2pcoord.identity import Authority
from p2pcoord.messages import AnyMessage, GenesisReply, GenesisRequest, StatusRequest, decode_message
from p2pcoord.neighbours import Neighbours
from p2pcoord.outbox import Outbox
from p2pcoord.peer_settings import PeerSettings, Restored
from p2pcoord.rounds.admissions import Admissions, JoinSettings
from p2pcoord.rounds.frames import Checked, Life, Slot
from p2pcoord.rounds.participation import MAX_NAME_LENGTH, Roster
from p2pcoord.rounds.rounds import Rounds
from p2pcoord.rounds.setting import Rules, Setting
from p2pcoord.work import Work

# A tick this late means that the machine slept, not that the others did (architecture: effects).
LATE_TICK_NS = 500_000_000

# A member outside the committee that has heard of nothing new asks somebody this often whether it missed an announcement.
CATCH_UP_INTERVAL_NS = 2_000_000_000

# Messages that one input may cause a peer to send itself; a round needs about ten.
MAX_LOCAL_MESSAGES = 10_000

# Rejected messages are counted for this many peers at most; the rest are counted together.
MAX_COUNTED_PEERS = 1024
OTHERS = "others"


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
        self.duty: Duty
        self.work: Work
        self._persists: dict[int, None] = {}
        self._catch_up_at = NEVER
        self._now = 0
        self._work_due = False
        self._compaction: Compaction

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
            distrusts=self._distrusts,
            holds_state=lambda: self.work.holds_state,
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
            lambda: self.duty.hasten(self._now),
        )
        self.duty = Duty(self.agreement, self.admissions, self.neighbours, settings.rotation_rounds)
        self._compaction = Compaction(
            self.agreement.voter, self.outbox, settings.compact_after_bytes, settings.kept_bodies
        )
        frames = decode_frames(restored.frames)
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
            self.neighbours.tell(self.work.local_progress(), now)
        else:
            self.work.certified(known, now)
        self._compaction.certified(known)
        self.neighbours.follow(self.agreement.committee.everyone, now)
        self.admissions.wake(now)
        self.duty.begin(now)
        self._catch_up_at = now
        return self._finish(now)

    def _see(self, statement: SignedStatement) -> None:
        self.admissions.see(statement)

    def _distrusts(self, peer: str) -> bool:
        return self.admissions.distrusts(peer)

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
            self.agreement,
            self.roster,
            self.outbox,
            rules,
            incarnation=self.incarnation,
            neighbours=self.neighbours,
            admissions=self.admissions,
            duty=self.duty,
        )
        rounds = Rounds(setting)
        ledger = self.agreement.voter.ledger
        rounds.restore(ledger.records[: ledger.certified + 1], frames, contents, self._now)
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
        with self._edge(sender):
            self._dispatch(sender, message, now)

    @contextmanager
    def _edge(self, sender: str = OTHERS) -> Iterator[None]:
        """What others sent wrongly is counted and goes no further, also where it was kept and is met only later."""
        try:
            yield
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
                with self._edge():
                    self.agreement.durable(now)
            else:
                reason = outcome.reason if isinstance(outcome, Failed) else "cancelled"
                self._halt(f"the log could not be written: {reason}")
        elif not self.neighbours.complete(effect_id, outcome, now):
            with self._edge():
                self.work.complete(effect_id, outcome, now)
            self.neighbours.tell(self.work.local_progress(), now)
        return self._finish(now)

    def progress(
        self, effect_id: int, now: int, *, step: int | None = None, loss: float | None = None
    ) -> list[Effect]:
        """A long effect (Fetch, Train, Combine, Step, Validate) goes on: bytes moved, or local steps were made."""
        if self.halted:
            return []
        self._now = now
        if step is not None:
            self.neighbours.tell_step(self.work.local_progress(), step, loss, now)
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
        self.duty.tick(self.work, now)
        self._work_due = True
        return self._finish(now)

    def connected(self, peer: str, now: int) -> list[Effect]:
        if self.halted:
            return []
        self._now = now
        self.neighbours.on_connected(peer, now)
        self.admissions.wake(now)
        self._catch_up_at = min(self._catch_up_at, now)
        with self._edge():
            self.work.connected(peer, now)
        return self._finish(now)

    def disconnected(self, peer: str, now: int) -> list[Effect]:
        if self.halted:
            return []
        self._now = now
        self.neighbours.on_disconnected(peer, now)
        self.admissions.disconnected(peer)
        self._work_due = True
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
            self.duty.next_deadline(),
            self.work.next_deadline(),
            self._catch_up_at,
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
        late = sum(record.header.kind == "round" for record in records) > 1
        for record in records:
            self._tell(record, late=late)
        if self.is_member and not was_member:
            self.outbox.emit("joined", peer=self.me)
        self.admissions.certified(now)
        self._catch_up_at = now + CATCH_UP_INTERVAL_NS
        if any(record.header.kind in ("members", "committee") for record in records):
            self.neighbours.follow(self.agreement.committee.everyone, now)
        if self.agreement.is_coordinator:
            answer = certified_from(self.agreement.voter.ledger, records[0].header.height)
            if answer is not None:
                self.outbox.announce(answer, after=self.agreement.voter.term_persist)
            self.duty.begin(now)
        self.work.certified(records, now)
        self.neighbours.tell(self.work.local_progress(), now)
        self._compaction.certified(records)
        if self._compaction.due:
            self._rewrite_log()

    def _rewrite_log(self) -> None:
        kept, progress = self.work.frames(), self.work.local_progress()
        steps = progress.steps if progress is not None else 0
        steps -= sum(frame.header.steps for frame in kept if isinstance(frame, Slot))
        self._compaction.rewrite([Life(self.incarnation, steps), *kept])

    def _tell(self, record: Record, *, late: bool) -> None:
        """`late`: it came with several rounds, so it is history, and no news."""
        body = record.body
        mark = {"late": True} if late else {}
        height, term = record.header.height, record.header.term
        self.outbox.emit("certified", height=height, term=term, kind=record.header.kind)
        if isinstance(body, CommitteeChange) and body.committee.everyone == (self.me,):
            self.outbox.emit("sole-voter")
        if isinstance(body, Members):
            for admission in body.admitted:
                self.outbox.emit("admitted", peer=admission.peer, name=admission.name, **mark)
            for farewell in body.left:
                self.outbox.emit("left", peer=farewell.peer, **mark)
            for exclusion in body.excluded:
                self.outbox.emit(
                    "excluded",
                    peer=exclusion.peer,
                    reason=exclusion.reason,
                    until=exclusion.until,
                    **mark,
                )

    def _catch_up(self, now: int) -> None:
        """A member outside the committee depends on announcements, and those may be lost."""
        if now < self._catch_up_at:
            return
        self._catch_up_at = now + CATCH_UP_INTERVAL_NS
        lacking = self.agreement.voter.ledger.lacking is not None
        if self.is_member and (lacking or not self.agreement.quorum_held(now)):
            source = self.admissions.some_connection()
            if source:
                self.agreement.catch_up.ask(source, now)

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
                with self._edge():
                    self.work.tick(now)
            if not self.outbox.local or self.halted:
                break
            self._handle(self.me, self.outbox.local.popleft(), now)  # type: ignore[arg-type]
        else:
            raise LocalError(f"over {MAX_LOCAL_MESSAGES} messages to itself in one input")
        effects = self.outbox.take()
        self._persists.update((effect.id, None) for effect in effects if isinstance(effect, Persist))
        return effects

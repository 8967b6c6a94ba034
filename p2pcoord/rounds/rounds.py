"""The rounds of a run: this peer's part in them, and the coordinator's while it has the duty. `Peer`'s work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from p2pcoord.consensus.record import Record, Round
from p2pcoord.consensus.voter import Frame
from p2pcoord.effects import NEVER, Outcome
from p2pcoord.metrics.training_metrics import MetricsRing
from p2pcoord.rounds.coordinator import RoundCoordinator
from p2pcoord.rounds.frames import Checked, Life, Slot
from p2pcoord.rounds.participant import Participant
from p2pcoord.rounds.phases import Phase
from p2pcoord.rounds.setting import Setting
from p2pcoord.synchronization.state_tracker import StateTracker
from p2pcoord.wire import Message
from p2pcoord.work import LocalProgress


class Rounds:
    """Messages, certified records and time, given to the participant and to the coordinator of the rounds (`work.Work`)."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.agreement = setting.agreement
        self.participant = Participant(setting)
        self.coordinator = RoundCoordinator(setting, self.participant)
        self.tracker = StateTracker(setting.rules.state_zero.root)
        self.metrics = MetricsRing()
        self.last_record: Record | None = None

    def restore(
        self,
        records: Sequence[Record],
        frames: Sequence[Frame],
        contents: frozenset[bytes],
        now: int,
    ) -> None:
        """Goes on from what an earlier life certified, signed (`frames` of the log) and stored."""
        for record in records:
            if isinstance(record.body, Round):
                self._follow(record, record.body)
        slots = {frame.header.slot: frame.header for frame in frames if isinstance(frame, Slot)}
        checked = [frame for frame in frames if isinstance(frame, Checked)]
        self.participant.training.local_steps = sum(
            frame.header.steps if isinstance(frame, Slot) else frame.local_steps
            for frame in frames
            if isinstance(frame, Slot | Life)
        )
        self.participant.restore(slots, checked, contents)
        self.participant.settle(now)

    def _follow(self, record: Record, body: Round) -> None:
        self.participant.certified(body)
        self.tracker.certified(body)
        self.metrics.certified(body)
        self.last_record = record

    # Work

    def check(self, record: Record, body: Round, now: int) -> str | None:
        return self.participant.judge.check(record.header.coordinator, body, now)

    def certified(self, records: Sequence[Record], now: int) -> None:
        rounds = [record for record in records if isinstance(record.body, Round)]
        for record in rounds:
            assert isinstance(record.body, Round)
            self._follow(record, record.body)
            self._tell(record, late=len(rounds) > 1)
        if len(rounds) > 1 and (newest := self.metrics.newest) is not None:
            self.setting.outbox.emit(
                "caught-up", version=newest.version, loss=newest.loss, rounds=len(rounds)
            )
        self.participant.settle(now)
        if rounds and self.coordinator.active:
            self.coordinator.certified(now)
        self._follow_duty(now)
        self.coordinator.tick(now)
        self._rest(now)

    def _tell(self, record: Record, *, late: bool) -> None:
        metrics = self.metrics.newest
        if metrics is not None:
            self.setting.outbox.emit(
                "commit",
                version=metrics.version,
                term=record.header.term,
                coordinator=record.header.coordinator,
                loss=metrics.loss,
                measures=metrics.measures,
                contributors=list(metrics.contributors),
                seconds=metrics.round_time,
                late=late,
            )

    def receive(self, sender: str, message: Message, now: int) -> bool:
        """To both sides: a partial sum and a result are of interest to a member and to the coordinator."""
        to_member = self.participant.receive(sender, message, now)
        return self.coordinator.receive(sender, message, now) or to_member

    def complete(self, effect_id: int, outcome: Outcome, now: int) -> None:
        self.setting.complete(effect_id, outcome, now)

    def progress(self, now: int) -> None:
        self.participant.progress(now)

    def connected(self, peer: str, now: int) -> None:
        """A link is there (again): what was said into one that broke is said once more, by both sides."""
        self.participant.connected(peer, now)
        self.coordinator.connected(peer, now)

    def tick(self, now: int) -> None:
        self._follow_duty(now)
        self.participant.tick(now)
        self.coordinator.tick(now)
        self._rest(now)

    def next_deadline(self) -> int:
        times = [self.participant.next_deadline(), self.coordinator.next_deadline()]
        return min((at for at in times if at is not None), default=NEVER)

    @property
    def idle(self) -> bool:
        return self.coordinator.idle

    @property
    def reconfigurable(self) -> bool:
        return self.coordinator.reconfigurable

    @property
    def holds_state(self) -> bool:
        return self.participant.held

    def local_progress(self) -> LocalProgress:
        training = self.participant.training
        last, plan = training.last, training.plan
        return LocalProgress(
            self.participant.version,
            self.participant.held,
            len(plan.of(self.setting.me)) if plan else 0,
            training.local_steps,
            last.loss if last else None,
            last.norm if last else None,
        )

    def frames(self) -> Sequence[msgspec.Struct]:
        return self.participant.frames()

    @property
    def over(self) -> bool:
        return self.coordinator.over

    # The duty

    def _follow_duty(self, now: int) -> None:
        """The coordinator of the rounds is whoever coordinates the run, from the certificate of its opening on."""
        opened = self.agreement.replication.opened
        if opened and not self.coordinator.active:
            self.coordinator.begin(now)
        elif not self.agreement.is_coordinator and self.coordinator.active:
            self.coordinator.end()

    def _rest(self, now: int) -> None:
        """When nothing is left to do, or nothing can be done until more members come, heartbeats slow down.

        Not while a learner is fed, though: the committee grows by the answers to heartbeats.
        """
        replication, ledger = self.agreement.replication, self.setting.voter.ledger
        nothing = self.over or (self.coordinator.waits_for_members and not replication.learners)
        rests = nothing and ledger.certified == ledger.height
        if replication.resting and not rests:
            replication.wake(now)
        replication.resting = rests

    def status(self, now: int) -> dict[str, Any]:
        """The round as this peer sees it: the coordinator knows, a member infers it from what it was sent."""
        if self.coordinator.active:
            return self.coordinator.status(now)
        participant = self.participant
        attempt = participant.current
        phase = Phase.COMPLETED
        if not self.over:
            phase = (
                Phase.AGGREGATION
                if attempt
                else Phase.LOCAL_TRAINING
                if participant.plan
                else Phase.INITIALIZATION
            )
        number = attempt.number if attempt else 0
        return {"number": participant.version + 1, "attempt": number, "phase": str(phase), "deadline_s": None}

"""The coordinator's side of a round: the phases (`phases.py`), their deadlines, and what a loss in each of them leads to.

    phases                                  what is known in them                                in
    initialization                          what a predecessor began                             takeover
    task_distribution, local_training,      the plan, and the contributions to it                collection
      gradient_collection
    aggregation, model_update               the attempt, and what is lost on the way             aggregating
    model_update, validation, completed     what the members made of it; the record              conclusion
    all                                     who is counted on                                    reliability

The parts know nothing of phases: they take what comes, and answer what is asked. Here is decided what follows. A part is made
anew with every round; what outlives a round is `Reliability`, and the backoff of refused attempts. If the coordinator dies,
the next one asks all members what they have, and goes on from there.
"""

from __future__ import annotations

import math
from typing import Any

from p2pcoord.errors import LocalError
from p2pcoord.rounds.aggregating import STALL_NS, Aggregation
from p2pcoord.rounds.collection import Assignments, Collection
from p2pcoord.rounds.conclusion import Conclusion
from p2pcoord.rounds.messages import (
    Obstacle,
    Offering,
    PartialMessage,
    PlanAccepted,
    Progress,
    Reoffered,
    Report,
    ResultMessage,
    Share,
    TrainingFailed,
)
from p2pcoord.rounds.participant import Participant
from p2pcoord.rounds.phases import COLLECTING, FOLLOWS, RECONFIGURABLE, Phase
from p2pcoord.rounds.reliability import Reliability
from p2pcoord.rounds.setting import Setting
from p2pcoord.rounds.takeover import Takeover
from p2pcoord.synchronization.bsp import Closing
from p2pcoord.wire import Message

# How long a new coordinator waits for members to say what they have; those who answer later offer what they have anyway.
REOFFER_WINDOW_NS = 1_000_000_000

# What could not be begun (nobody there, the duty on its way to another) is tried again after this long.
RETRY_NS = 500_000_000

# A refused attempt (a metric that is not finite) is planned anew after 1, 2, 4 ... s, at most a minute.
FIRST_BACKOFF_NS = 1_000_000_000
MAX_BACKOFF_NS = 60_000_000_000


class RoundCoordinator:
    """Makes rounds while its peer coordinates. `begin` when its term's opening is certified, `end` when it steps down."""

    def __init__(self, setting: Setting, participant: Participant) -> None:
        self.setting = setting
        self.replication = setting.replication
        self.participant = participant
        self.reliability = Reliability(setting)
        self.active = False
        self.phase = Phase.COMPLETED
        self._refusals = 0
        self._not_before = 0
        self._waited_with = 0
        """Members that lived when it was last told that they are too few."""
        self._clear(0)

    def _clear(self, now: int, *, revision: int = 0, number: int = 0) -> None:
        """Nothing is known of the next round. Where the same is planned anew, the numbers of plans and attempts go on."""
        setting, reliability = self.setting, self.reliability
        version, parent = self.participant.version + 1, self.participant.state
        self.takeover = Takeover(setting, version, parent)
        self.collection = Collection(setting, reliability, version, parent, now, revision)
        self.aggregation = Aggregation(setting, reliability, version, parent, now, number)
        self.conclusion = Conclusion(setting, self.aggregation)
        self.proposed: int | None = None
        """The height of the round's record."""
        self._started_at = now
        self._phase_at = now
        self._retry_at = now
        self._close_at: int | None = None
        """When to close the round, if that waits for the time of the next attempt only."""

    # Life

    def begin(self, now: int) -> None:
        """This peer coordinates: first find out what the members have of the round its predecessor may have begun."""
        self.active = True
        self._waited_with = 0
        self._clear(now)
        if self.over:
            self.phase = Phase.COMPLETED
            return
        self._enter(Phase.INITIALIZATION, now)
        self.takeover.ask(now)

    def end(self) -> None:
        self.active = False
        self._clear(0)

    @property
    def idle(self) -> bool:
        """Strictly between two rounds: nothing is lost by handing the duty over."""
        return not self.active or (self.phase is Phase.COMPLETED and self.proposed is None)

    @property
    def reconfigurable(self) -> bool:
        return self.idle or self.phase in RECONFIGURABLE

    @property
    def over(self) -> bool:
        return self.participant.version >= self.setting.rules.rounds

    @property
    def waits_for_members(self) -> bool:
        """The run cannot begin: fewer members live than it asks for. Later rounds go on with whoever is left."""
        if not self.active or self.phase is not Phase.INITIALIZATION or self.participant.version > 0:
            return False
        return len(self.reliability.living()) < self.setting.rules.minimum_members

    def status(self, now: int) -> dict[str, Any]:
        """For people: where the round stands, and how long it waits at most."""
        deadline = self.collection.barrier_at if self.collection.plan is not None else None
        return {
            "number": self.participant.version + 1,
            "attempt": self.aggregation.number,
            "phase": str(self.phase),
            "deadline_s": None if deadline is None else max(deadline - now, 0) / 1e9,
        }

    # Time

    def _enter(self, phase: Phase, now: int) -> None:
        if phase is not self.phase and phase not in FOLLOWS[self.phase] and phase is not Phase.INITIALIZATION:
            raise LocalError(f"from {self.phase} to {phase}")
        self.phase = phase
        self._phase_at = now
        self.aggregation.heard(now)
        self.setting.outbox.emit(
            "phase",
            phase=str(phase),
            version=self.participant.version + 1,
            attempt=self.aggregation.number,
            term=self.setting.voter.term,
        )

    def tick(self, now: int) -> None:
        if not self.active or self.over:
            return
        self._watch_members(now)
        match self.phase:
            case Phase.INITIALIZATION:
                self._initialize(now)
            case Phase.TASK_DISTRIBUTION | Phase.LOCAL_TRAINING | Phase.GRADIENT_COLLECTION:
                self.collection.resend(now)
                self._close(now)
            case Phase.AGGREGATION | Phase.MODEL_UPDATE:
                self._tell_again(now)
                self._keep_attempt_alive(now)
            case Phase.VALIDATION:
                self._tell_again(now)
                self._retry_at = now + RETRY_NS
                self._conclude(now)
            case Phase.COMPLETED:
                self._next_round(now)

    def next_deadline(self) -> int | None:
        if not self.active or self.over:
            return None
        match self.phase:
            case Phase.INITIALIZATION:
                return max(self._phase_at + REOFFER_WINDOW_NS, self._not_before, self._retry_at)
            case Phase.TASK_DISTRIBUTION | Phase.LOCAL_TRAINING | Phase.GRADIENT_COLLECTION:
                return self._close_at or self.collection.next_deadline()
            case Phase.AGGREGATION | Phase.MODEL_UPDATE:
                return self.aggregation.next_deadline()
            case Phase.VALIDATION:
                # Past their time, something else is waited for, such as this peer's own state.
                return min(max(self._shares_due, self._retry_at), self.aggregation.quiet_at)
            case Phase.COMPLETED:
                return None  # certificates move it on, and the heartbeat's tick

    def connected(self, peer: str, now: int) -> None:
        """A link is there (again): what was said into one that broke is said once more."""
        if not self.active or self.over or not self.setting.roster.is_member(peer):
            return
        match self.phase:
            case Phase.INITIALIZATION:
                self.takeover.connected(peer, now)
            case Phase.TASK_DISTRIBUTION | Phase.LOCAL_TRAINING | Phase.GRADIENT_COLLECTION:
                self.collection.connected(peer, now)
            case Phase.AGGREGATION | Phase.MODEL_UPDATE | Phase.VALIDATION:
                self.aggregation.connected(peer, now)
            case Phase.COMPLETED:
                pass

    def receive(self, sender: str, message: Message, now: int) -> bool:
        """Handles what is for a coordinator; False when it is not. Raises RemoteError."""
        match message:
            case Reoffered():
                self._on_reoffered(sender, message, now)
            case PlanAccepted():
                self._on_plan_accepted(sender, message, now)
            case Offering():
                self._on_offering(sender, message, now)
            case TrainingFailed():
                self._on_training_failed(sender, message, now)
            case PartialMessage():
                self.aggregation.on_partial(sender, message, now)
            case Obstacle():
                self.aggregation.on_obstacle(sender, message, now)
            case Progress():
                self.aggregation.on_progress(sender, message, now)
            case ResultMessage():
                self._on_result(sender, message, now)
            case Report():
                self._on_report(sender, message, now)
            case Share():
                self._on_share(sender, message, now)
            case _:
                return False
        return True

    def _watch_members(self, now: int) -> None:
        """What the detectors know is used at once."""
        plan = self.collection.plan
        self.reliability.watch(plan.members if plan is not None else (), now)
        if self.phase in COLLECTING:
            self.collection.sort_in()
            self._revise(self.collection.after_deaths(), now)
        elif self.phase is Phase.AGGREGATION:
            self.aggregation.watch(now)
        elif self.phase is Phase.MODEL_UPDATE:
            self.aggregation.watch_result(self.conclusion.reports, now)

    # Initialization

    def _on_reoffered(self, sender: str, message: Reoffered, now: int) -> None:
        if not self.active or self.phase is not Phase.INITIALIZATION:
            return
        if message.version != self.participant.version + 1:
            return
        self.takeover.check(message)
        for header in message.headers:
            self.collection.admit(sender, header)
        self.takeover.take(sender, message)
        self._initialize(now)

    def _initialize(self, now: int) -> None:
        """Plans the round, once enough is known of its beginnings and enough members live."""
        collection, living = self.collection, self.reliability.living()
        if now < self._phase_at + REOFFER_WINDOW_NS and self.takeover.awaits(living):
            self.takeover.ask(now)
            return
        if self.waits_for_members and len(living) != self._waited_with:
            self._waited_with = len(living)
            needed = self.setting.rules.minimum_members
            self.setting.outbox.emit("waiting-for-members", living=len(living), needed=needed)
        begun = bool(living) and not self.waits_for_members
        if now < self._not_before or not begun or self.replication.transferring is not None:
            self._retry_at = now + RETRY_NS
            return
        shown = self.takeover.plans(self.participant.plan)
        self._plan(collection.inherited(shown, living) if shown else collection.dealt(living), now)

    def _next_round(self, now: int) -> None:
        """Opens the next round, once whoever waits between rounds (admissions, committees, the duty) has had its turn."""
        ledger = self.setting.voter.ledger
        if self.over or self.proposed is not None or now < self._not_before:
            return
        if not self.setting.duty.between_rounds(self, now):
            return
        if ledger.certified != ledger.height or self.replication.transferring is not None:
            return
        self._started_at = now
        self._enter(Phase.INITIALIZATION, now)
        self.takeover.asking = False
        self._initialize(now)

    # Collection

    def _plan(self, assignments: Assignments, now: int) -> None:
        """Signs and sends a plan, or a revision of it."""
        self.collection.sign(assignments)
        if self.phase is Phase.INITIALIZATION:
            self._enter(Phase.TASK_DISTRIBUTION, now)
            self.collection.wait_from(now)
        self.collection.send(now)
        self._close(now)

    def _revise(self, assignments: Assignments | None, now: int) -> None:
        """A revision of the plan, if it differs."""
        plan = self.collection.plan
        if plan is not None and assignments is not None and assignments != plan.assignments:
            self._plan(assignments, now)

    def _on_plan_accepted(self, sender: str, message: PlanAccepted, now: int) -> None:
        if self.collection.accept(sender, message) and self.phase is Phase.TASK_DISTRIBUTION:
            self._enter(Phase.LOCAL_TRAINING, now)

    def _on_offering(self, sender: str, message: Offering, now: int) -> None:
        if not self.active:
            return
        self.collection.admit(sender, message.header)
        if self.phase in (Phase.TASK_DISTRIBUTION, Phase.LOCAL_TRAINING):
            self._enter(Phase.GRADIENT_COLLECTION, now)
        if self.phase is Phase.GRADIENT_COLLECTION:
            self._close(now)

    def _on_training_failed(self, sender: str, message: TrainingFailed, now: int) -> None:
        if not self.active or not self.collection.concerns(sender, message):
            return
        self.setting.outbox.emit(
            "assignment-failed", peer=sender, assignment=message.assignment, reason=message.reason
        )
        if self.phase in COLLECTING:
            assignments = self.collection.after_failure(message.assignment, sender)
            if assignments is not None:
                self._plan(assignments, now)

    def _close(self, now: int) -> None:
        """Asks the synchronization rule whether the round's contributions are complete."""
        collection = self.collection
        if collection.plan is None or self.phase not in COLLECTING:
            return
        missing = collection.missing(self.aggregation.lost)
        decision = collection.closing(missing, now)
        self._close_at = None
        if decision is Closing.WAIT:
            return
        if decision is Closing.CLOSE and now < self.aggregation.not_before:
            self._close_at = self.aggregation.not_before
            return
        if decision is Closing.CLOSE:
            if self.phase is not Phase.GRADIENT_COLLECTION:
                self._enter(Phase.GRADIENT_COLLECTION, now)
            for assignment in missing:
                self.reliability.failed(assignment.member, collection.version, "late")
                self.setting.outbox.emit("left-out", peer=assignment.member, assignment=assignment.index)
            self._attempt(now)
            return
        collection.extend(now)
        self.setting.outbox.emit("barrier", decision=str(decision), missing=[a.member for a in missing])
        if decision is Closing.REASSIGN:
            assignments = collection.after_barrier(missing)
            if assignments is not None:
                self._plan(assignments, now)

    # Aggregation and model update

    def _attempt(self, now: int) -> None:
        """Signs attempt n + 1 over what is usable; back to collecting when that is too little."""
        collection, aggregation = self.collection, self.aggregation
        headers = collection.usable(aggregation.lost)
        if not collection.suffices(headers):
            aggregation.give_up()
            self._enter(Phase.GRADIENT_COLLECTION, now)
            collection.wait_from(now)
            self._revise(collection.after_deaths(), now)
            return
        tree = aggregation.tree(headers)
        # However few: enough have contributed, and who finds no place for lack of links is not the same each time.
        placed = {slot: header for slot, header in headers.items() if header.contributor in tree}
        for slot in sorted(headers.keys() - placed.keys()):
            self.setting.outbox.emit("unplaced", peer=headers[slot].contributor, assignment=slot[1])
        aggregation.sign(placed, tree, now)
        self.conclusion = Conclusion(self.setting, aggregation)
        if self.phase is not Phase.GRADIENT_COLLECTION:
            self._enter(Phase.GRADIENT_COLLECTION, now)
        self._enter(Phase.AGGREGATION, now)
        aggregation.tell_all(now)

    def _tell_again(self, now: int) -> None:
        """When the attempt has gone quiet, those who owe it something hear of it again."""
        aggregation, conclusion = self.aggregation, self.conclusion
        if aggregation.attempt is None or now < aggregation.quiet_at:
            return
        match self.phase:
            case Phase.AGGREGATION:
                owing = aggregation.blocking()
            case Phase.MODEL_UPDATE:
                owing = [member for member in aggregation.audience() if member not in conclusion.reports]
            case _:
                owing = conclusion.without_share()
        aggregation.tell_again(owing, now)

    def _keep_attempt_alive(self, now: int) -> None:
        """Losses lead to the next attempt; so does who is silent for long where the attempt waits for it."""
        aggregation = self.aggregation
        if aggregation.losses_due(now):
            if aggregation.losses_stand(now):
                self._attempt(now)
            return
        if not aggregation.stalled(now):
            return
        result, reports = aggregation.result, self.conclusion.reports
        if self.phase is Phase.AGGREGATION:
            if blocking := aggregation.blocking():
                aggregation.lose(blocking[0], f"nothing from it for {STALL_NS // 1_000_000_000} s", now)
        elif result is not None and aggregation.holders(reports) <= {result.sender}:
            aggregation.lose(result.sender, "nobody could have the result from it", now)
        elif self.phase is Phase.MODEL_UPDATE and self.conclusion.all_voters_reported():
            states = {peer: state.root.hex()[:16] for peer, (state, _) in reports.items()}
            self.setting.outbox.emit("states-differ", version=aggregation.version, states=states)
            self._refuse("the voters computed different states", now)

    def _on_result(self, sender: str, message: ResultMessage, now: int) -> None:
        if self.aggregation.take_result(message):
            self._enter(Phase.MODEL_UPDATE, now)
            self.aggregation.pass_on(sender, message, now)

    def _on_report(self, sender: str, message: Report, now: int) -> None:
        if not self.conclusion.on_report(sender, message):
            return
        self.aggregation.heard(now)
        if self.conclusion.broken():
            self._refuse("the new state is not finite", now)
        elif self.phase is Phase.MODEL_UPDATE and self.conclusion.agreed_state() is not None:
            self._enter(Phase.VALIDATION, now)
            self._conclude(now)
        elif self.phase is Phase.VALIDATION:
            self._conclude(now)

    # Validation and record

    def _on_share(self, sender: str, message: Share, now: int) -> None:
        if self.conclusion.on_share(sender, message) and self.phase is Phase.VALIDATION:
            self._conclude(now)

    @property
    def _shares_due(self) -> int:
        """Until when shares of the validation are waited for."""
        return self._phase_at + (self.collection.plan.barrier_ns if self.collection.plan else 0)

    def _conclude(self, now: int) -> None:
        """Proposes the round when all shares that can still come have come, or their time is over."""
        conclusion, attempt = self.conclusion, self.aggregation.attempt
        state = conclusion.agreed_state()
        if self.phase is not Phase.VALIDATION or attempt is None or state is None:
            return
        own, _ = conclusion.reports.get(self.setting.me, (None, True))
        if own is None:
            return  # its own acknowledgement promises that it can make the state anew; its report comes back here
        if own != state:
            self.replication.step_down("it computed another state than a quorum of voters", now)
            return
        # Not of suspects: what the metrics cover is no reason to wait until a frozen member is declared dead.
        waiting = [member for member in conclusion.without_share() if self.setting.neighbours.fit(member)]
        if waiting and now < self._shares_due:
            return
        if reason := conclusion.failure():
            self._refuse(reason, now)
            return
        ledger, roster = self.setting.voter.ledger, self.setting.roster
        if ledger.certified < ledger.height:
            return  # who is a member may change with what is not certified yet; its certificate comes back here
        if not all(roster.is_member(member) for member in attempt.tree.members):
            self._attempt(now)  # no voter would append a round with somebody who has left meanwhile
            return
        metrics = conclusion.metrics(started_at=self._started_at, stepped_at=self._phase_at, now=now)
        if broken := [name for name, value in metrics if not math.isfinite(value)]:
            self._refuse(f"{', '.join(broken)} not finite", now)
            return
        body = conclusion.record(state, metrics, self.participant.holdings.totals)
        if body is None:
            return
        refusal = self.participant.judge.check(self.setting.me, body, now)
        if refusal is None:
            return
        if refusal:
            self._refuse(refusal, now)  # no voter would append what its own check refuses
            return
        height = self.replication.propose(body)
        if height is None:
            return  # another record is on its way, or the duty is being handed over; tried again at the next tick
        self.proposed = height
        self._enter(Phase.COMPLETED, now)

    def _refuse(self, reason: str, now: int) -> None:
        """The attempt makes no usable version: say why, and plan the round anew, later each time."""
        self._refusals += 1
        backoff = min(FIRST_BACKOFF_NS << (self._refusals - 1), MAX_BACKOFF_NS)
        number = self.aggregation.number
        self.setting.outbox.emit("attempt-refused", reason=reason, attempt=number, retry_s=backoff / 1e9)
        # Numbers go on: under an old number members would take the plan for outdated, and answer the attempt with what they
        # came to in the refused one.
        self._clear(now, revision=self.collection.revision, number=number)
        self._not_before = now + backoff
        self._enter(Phase.INITIALIZATION, now)

    def certified(self, now: int) -> None:
        """The commit point: the record is certified, the next round may begin."""
        if self.aggregation.attempt is not None:
            self.reliability.contributed(e.contributor for e in self.aggregation.attempt.entries)
        self._refusals = 0
        self._clear(now)
        self.phase = Phase.COMPLETED

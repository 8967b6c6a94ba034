"""The coordinator's side of a round: the phases (`phases.py`), their deadlines, and what a loss in each of them leads to.

    loss                                   answer
    a member dies while it trains          its assignment is given to another (a revision of the plan)
    a member is late                       the straggler policy (`synchronization/bsp.py`)
    a contributor's bytes are lost before  attempt n + 1 without it; losses that come together are batched
    its ancestors have summed them
    the root, before its result is known   attempt n + 1 without it
    receivers of the result                nothing, as long as a quorum of voters has stepped
    the coordinator                        the next one asks all members what they have, and goes on from there

A coordinator keeps nothing that its successor could not ask for: the plan and the headers lie with the members, and the
newest plan shown is kept.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import msgspec

from p2pcoord.aggregation.contribution import MAX_COUNT, ContributionHeader, check_header
from p2pcoord.consensus.record import Counted, Round
from p2pcoord.consensus.replication import Replication
from p2pcoord.content import ContentRef
from p2pcoord.errors import LocalError, RemoteError
from p2pcoord.messages import (
    AttemptMessage,
    Obstacle,
    Offering,
    PartialMessage,
    PlanAccepted,
    PlanMessage,
    Progress,
    Reoffer,
    Reoffered,
    Report,
    ResultMessage,
    Share,
    TrainingFailed,
)
from p2pcoord.rounds.attempt import Attempt, Result, make_attempt
from p2pcoord.rounds.participant import Participant
from p2pcoord.rounds.phases import FOLLOWS, RECONFIGURABLE, Phase
from p2pcoord.rounds.plan import MAX_ASSIGNMENTS, Assignment, Plan, check_plan, deal, replaced, split
from p2pcoord.rounds.setting import Setting
from p2pcoord.run_config import derive_seed
from p2pcoord.synchronization.bsp import Closing, closing

# How long a new coordinator waits for members to say what they have; those who answer later offer what they have anyway.
REOFFER_WINDOW_NS = 1_000_000_000

# A plan that a member has not accepted is sent again; streams are reliable, so this is for links that were cut.
RESEND_NS = 1_000_000_000

# Of an attempt in which nothing was heard for RESEND_NS, so many members that still owe something are told it again: a
# message lost with its link is rare, and an attempt over a thousand members is a large message.
RESENT_AT_ONCE = 8

# Losses come in crowds (a site's link fails): attempts wait this long for the next loss before they are made anew.
BATCH_LOSSES_NS = 50_000_000

# An attempt in which nothing at all was heard for this long is stuck on somebody frozen that is not yet suspected. Longer
# than a transfer may go without a byte (2.5 s in node/driver.py): its receiver knows better who is frozen.
STALL_NS = 4_000_000_000

# What could not be begun (nobody there, the duty on its way to another) is tried again after this long.
RETRY_NS = 500_000_000

# Rounds in a row that a member may fail (late, bytes that are wrong or do not come) before it is excluded for a while.
FAILURES_BEFORE_EXCLUSION = 3

# A suspect's work is waited for this long: a suspicion usually ends sooner, and death is certain only after 7 s or more. Giving
# its assignment to another too early costs some training; an assignment counts once anyhow.
SUSPECT_PATIENCE_NS = 3_000_000_000

# A refused attempt (a metric that is not finite) is planned anew after 1, 2, 4 ... s, at most a minute.
FIRST_BACKOFF_NS = 1_000_000_000
MAX_BACKOFF_NS = 60_000_000_000


# Offers remembered in a round: each assignment finished by two members, on average.
MAX_OFFERED = 2 * MAX_ASSIGNMENTS

# What a workload measures: names and their number end up in the record.
MAX_MEASURES = 64
MAX_MEASURE_NAME = 64


class RoundCoordinator:
    """Makes rounds while its peer coordinates. `begin` when its term's opening is certified, `end` when it steps down."""

    def __init__(self, setting: Setting, replication: Replication, participant: Participant) -> None:
        self.setting = setting
        self.replication = replication
        self.participant = participant
        self.active = False
        self.phase = Phase.COMPLETED
        self._refusals = 0
        self._not_before = 0
        self._now = 0
        self._suspect_since: dict[str, int] = {}
        """Since when a member of the plan has not been fit."""
        self._failures: dict[str, tuple[int, int]] = {}
        """Member -> (rounds failed in a row of those this coordinator led, the last of them)."""
        self._clear(0)

    def _clear(self, now: int) -> None:
        self.plan: Plan | None = None
        self.accepted: set[str] = set()
        self.headers: dict[tuple[int, int], ContributionHeader] = {}
        """The contribution that counts for each (version, assignment)."""
        self._offered: dict[tuple[int, str], ContributionHeader] = {}
        """All that was offered, by assignment and contributor."""
        self._given: dict[int, dict[str, None]] = {}
        """To whom each assignment was ever given in this round, in order."""
        self._failed_at: dict[int, set[str]] = {}
        """Members whose training of an assignment failed since the last barrier: they try it again at the next."""
        self.attempt: Attempt | None = None
        self.attempt_name = b""
        self.number = 0
        self._next_revision = 0
        self.lost: dict[str, str] = {}
        """Members left out of further attempts of this round, and why."""
        self.result: Result | None = None
        self.reports: dict[str, tuple[ContentRef, bool]] = {}
        self.shares: dict[str, Share] = {}
        self.proposed: int | None = None
        self._summed: set[str] = set()
        self._extensions = 0
        self._asking = True
        """Whether this coordinator is new and has to find out what its predecessor began."""
        self._reoffered: dict[str, Reoffered] = {}
        self._asked: set[str] = set()
        self._started_at = now
        self._phase_at = now
        self._waiting_since = now
        self._resend_at = now
        self._replan_at: int | None = None
        self._heard_at = now
        self._attempt_at = now
        self._tell_again_at = now
        self._retry_at = now

    # Life

    def begin(self, now: int) -> None:
        """This peer coordinates: first find out what the members have of the round its predecessor may have begun."""
        self.active = True
        self._clear(now)
        if self.over:
            self.phase = Phase.COMPLETED
            return
        self._enter(Phase.INITIALIZATION, now)
        self._ask_members(now)

    def end(self) -> None:
        self.active = False
        self._clear(0)

    @property
    def idle(self) -> bool:
        """Strictly between two rounds: nothing is lost by handing the duty over."""
        return not self.active or (self.phase is Phase.COMPLETED and self.proposed is None)

    @property
    def reconfigurable(self) -> bool:
        return (
            not self.active
            or (self.phase in RECONFIGURABLE)
            or (self.phase is Phase.COMPLETED and self.proposed is None)
        )

    @property
    def over(self) -> bool:
        return self.participant.version >= self.setting.rules.rounds

    def _enter(self, phase: Phase, now: int) -> None:
        if phase is not self.phase and phase not in FOLLOWS[self.phase] and phase is not Phase.INITIALIZATION:
            raise LocalError(f"from {self.phase} to {phase}")
        self.phase = phase
        self._phase_at = now
        self._heard_at = now
        self.setting.outbox.emit(
            "phase",
            phase=str(phase),
            version=self.participant.version + 1,
            attempt=self.number,
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
                self._resend(now)
                self._close(now)
            case Phase.AGGREGATION | Phase.MODEL_UPDATE:
                self._tell_again(now)
                self._keep_attempt_alive(now)
            case Phase.VALIDATION:
                self._tell_again(now)
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
                return min(self._resend_at, self._waiting_since + (self.plan.barrier_ns if self.plan else 0))
            case Phase.AGGREGATION | Phase.MODEL_UPDATE:
                due = self._replan_at if self._replan_at is not None else self._heard_at + STALL_NS
                return min(due, self._quiet_at())
            case Phase.VALIDATION:
                return min(self._phase_at + (self.plan.barrier_ns if self.plan else 0), self._quiet_at())
            case Phase.COMPLETED:
                return None  # certificates move it on, and the heartbeat's tick

    def connected(self, peer: str, now: int) -> None:
        """A link is there (again): what was said into one that broke is said once more."""
        if not self.active or self.over or not self.setting.roster.is_member(peer):
            return
        match self.phase:
            case Phase.INITIALIZATION:
                if self._asking and peer not in self._reoffered:
                    self._asked.discard(peer)
                    self._ask_members(now)
            case Phase.TASK_DISTRIBUTION | Phase.LOCAL_TRAINING | Phase.GRADIENT_COLLECTION:
                if self.plan is not None and self.plan.of(peer):
                    self.setting.send(peer, PlanMessage(self.plan, self.setting.voter.ledger.certified))
            case Phase.AGGREGATION | Phase.MODEL_UPDATE | Phase.VALIDATION:
                if self.attempt is not None and peer in self._audience():
                    self._tell_attempt(peer)
            case Phase.COMPLETED:
                pass

    # Initialization and plan

    def _ask_members(self, now: int) -> None:
        version = self.participant.version + 1
        message = Reoffer(self.setting.voter.term, version, self.setting.voter.ledger.certified)
        for member in self.setting.roster.members:
            if self.setting.alive(member) and member not in self._asked:
                self._asked.add(member)
                self.setting.send(member, message)

    def on_reoffered(self, sender: str, message: Reoffered, now: int) -> None:
        if (
            not self.active
            or self.phase is not Phase.INITIALIZATION
            or message.version != self.participant.version + 1
        ):
            return
        if message.plan is not None:
            self.setting.authority.check(message.plan.coordinator, message.plan)
            if message.plan.parent != self.participant.state.root or message.plan.version != message.version:
                raise RemoteError("bad_plan", "a plan for another state")
            if not self.setting.coordinates(message.plan.coordinator, message.plan.term):
                raise RemoteError("not_coordinator", f"a plan by {message.plan.coordinator}")
            check_plan(message.plan, self.setting.rules.train_length)
        for header in message.headers:
            self._admit(sender, header)
        self._reoffered[sender] = message
        self._initialize(now)

    def _living(self) -> list[str]:
        return [member for member in self.setting.roster.members if self.setting.fit(member)]

    @property
    def waits_for_members(self) -> bool:
        """No round can begin: fewer members live than the run asks for."""
        if not self.active or self.over or self.phase is not Phase.INITIALIZATION:
            return False
        return len(self._living()) < self.setting.rules.minimum_members

    def _initialize(self, now: int) -> None:
        living = self._living()
        waiting = [member for member in living if member not in self._reoffered]
        if self._asking and waiting and now < self._phase_at + REOFFER_WINDOW_NS:
            self._ask_members(now)
            return
        enough = len(living) >= max(self.setting.rules.minimum_members, 1)
        if now < self._not_before or not enough or self.replication.transferring is not None:
            self._retry_at = now + RETRY_NS
            return
        shown = [m.plan for m in self._reoffered.values() if m.plan is not None]
        if (
            self.participant.plan is not None
            and self.participant.plan.version == self.participant.version + 1
        ):
            shown.append(self.participant.plan)
        newest = max(shown, key=lambda plan: plan.rank, default=None)
        for earlier in shown:
            self._remember_given(earlier)
        if newest is None:
            self._plan(self._deal(living), now)
        else:
            self._plan(self._inherit(newest, living), now)

    def _deal(self, living: list[str]) -> tuple[Assignment, ...]:
        rules, version = self.setting.rules, self.participant.version + 1
        chosen = living[:MAX_ASSIGNMENTS]
        offset = derive_seed(self.setting.authority.run, "deal", rules.seed) % max(rules.train_length, 1)
        ranges = deal(rules.train_length, len(chosen), version, offset)
        return tuple(Assignment(i, member, ranges[i]) for i, member in enumerate(chosen))

    def _inherit(self, plan: Plan, living: list[str]) -> tuple[Assignment, ...]:
        """An earlier coordinator's assignments; those whose member is gone and that nobody finished go to others."""
        assignments = plan.assignments
        for assignment in plan.assignments:
            finished = (plan.version, assignment.index) in self.headers
            if not finished and assignment.member not in living:
                assignments = replaced(assignments, assignment.index, self._least_loaded(assignments, living))
        return assignments

    def _least_loaded(self, assignments: tuple[Assignment, ...], living: list[str]) -> str:
        version = self.participant.version + 1
        load = dict.fromkeys(living, 0)
        for assignment in assignments:
            if assignment.member in load and (version, assignment.index) not in self.headers:
                load[assignment.member] += 1
        return min(living, key=lambda member: (load[member], living.index(member)))

    def _plan(self, assignments: tuple[Assignment, ...], now: int) -> None:
        """Signs and sends a plan, or a revision of it."""
        setting, version = self.setting, self.participant.version + 1
        revision, self._next_revision = self._next_revision, self._next_revision + 1
        barrier = setting.rules.barrier_ns
        self.plan = setting.authority.sign(
            Plan(
                setting.voter.term,
                version,
                revision,
                self.participant.state.root,
                assignments,
                barrier,
                setting.me,
            )
        )
        self.accepted = set()
        self._remember_given(self.plan)
        self._sort_in()
        if self.phase is Phase.INITIALIZATION:
            self._enter(Phase.TASK_DISTRIBUTION, now)
            self._waiting_since = now
        self._send_plan(now)
        self._close(now)

    def _remember_given(self, plan: Plan) -> None:
        for assignment in plan.assignments:
            self._given.setdefault(assignment.index, {})[assignment.member] = None

    def _send_plan(self, now: int) -> None:
        if self.plan is None:
            return
        message = PlanMessage(self.plan, self.setting.voter.ledger.certified)
        for member in dict.fromkeys(assignment.member for assignment in self.plan.assignments):
            if member not in self.accepted and self.setting.alive(member):
                self.setting.send(member, message)
        self._resend_at = now + RESEND_NS

    def _resend(self, now: int) -> None:
        if now >= self._resend_at:
            self._send_plan(now)

    def on_plan_accepted(self, sender: str, message: PlanAccepted, now: int) -> None:
        plan = self.plan
        if plan is None or (message.version, message.term, message.revision) != plan.rank:
            return
        self.accepted.add(sender)
        members = {
            assignment.member for assignment in plan.assignments if self.setting.alive(assignment.member)
        }
        if self.phase is Phase.TASK_DISTRIBUTION and members <= self.accepted:
            self._enter(Phase.LOCAL_TRAINING, now)

    # Collection

    def on_offering(self, sender: str, message: Offering, now: int) -> None:
        if not self.active:
            return
        self._admit(sender, message.header)
        if self.phase in (Phase.TASK_DISTRIBUTION, Phase.LOCAL_TRAINING):
            self._enter(Phase.GRADIENT_COLLECTION, now)
        if self.phase is Phase.GRADIENT_COLLECTION:
            self._close(now)

    def _admit(self, sender: str, header: ContributionHeader) -> None:
        """BSP's admission: computed for this round, from the current state. Others are no fault, only too late."""
        if header.contributor != sender:
            raise RemoteError("bad_contribution", f"{sender} offers what {header.contributor} made")
        if header.origin_round != self.participant.version + 1 or header.base != self.participant.state.root:
            return
        check_header(header, self.setting.authority, self.setting.rules.contribution_bytes)
        self.setting.see(header)
        if not self.setting.roster.is_member(sender):
            raise RemoteError("stranger", "offers a contribution")
        if 0 <= header.assignment < MAX_ASSIGNMENTS and len(self._offered) < MAX_OFFERED:
            self._offered.setdefault((header.assignment, sender), header)
            self._sort_in()

    def _sort_in(self) -> None:
        """Counts what was offered by whom the plan gave it, now or before a revision; an assignment counts once."""
        if self.plan is None:
            return
        for assignment in self.plan.assignments:
            slot = (self.plan.version, assignment.index)
            if slot not in self.headers:
                for member in (assignment.member, *self._given.get(assignment.index, ())):
                    header = self._offered.get((assignment.index, member))
                    if header is not None and self._waited_for(member):
                        self.headers[slot] = header
                        break

    def on_training_failed(self, sender: str, message: TrainingFailed, now: int) -> None:
        if not self.active or self.plan is None or message.version != self.plan.version:
            return
        if (self.plan.version, message.assignment) in self.headers:
            return
        if not any(a.index == message.assignment and a.member == sender for a in self.plan.assignments):
            return
        self.setting.outbox.emit(
            "assignment-failed", peer=sender, assignment=message.assignment, reason=message.reason
        )
        if self.phase in (Phase.TASK_DISTRIBUTION, Phase.LOCAL_TRAINING, Phase.GRADIENT_COLLECTION):
            failed = self._failed_at.setdefault(message.assignment, set())
            failed.add(sender)
            if others := self._others(failed):
                member = self._least_loaded(self.plan.assignments, others)
                self._plan(replaced(self.plan.assignments, message.assignment, member), now)

    def _working_members(self) -> list[str]:
        """Living members of the plan."""
        if self.plan is None:
            return []
        members = dict.fromkeys(assignment.member for assignment in self.plan.assignments)
        return [member for member in members if self._waited_for(member)]

    def _waited_for(self, member: str) -> bool:
        """Whether a member's work is still waited for: it is not known to be gone, nor suspected for long."""
        since = self._suspect_since.get(member)
        return self.setting.alive(member) and (since is None or self._now - since < SUSPECT_PATIENCE_NS)

    def _others(self, but: Collection[str]) -> list[str]:
        """Who may take over from `but`: living members of the plan; where it has none, any that lives."""
        others = [member for member in self._working_members() if member not in but]
        return others or [member for member in self._living() if member not in but]

    def _watch_members(self, now: int) -> None:
        """What the detectors know is used at once."""
        self._now = now
        if self.plan is not None:
            for member in dict.fromkeys(assignment.member for assignment in self.plan.assignments):
                if self.setting.fit(member):
                    self._suspect_since.pop(member, None)
                else:
                    self._suspect_since.setdefault(member, now)
        if self.plan is not None and self.phase in (
            Phase.TASK_DISTRIBUTION,
            Phase.LOCAL_TRAINING,
            Phase.GRADIENT_COLLECTION,
        ):
            self._reassign_of_the_dead(now)
        elif self.attempt is not None and self.result is None and self.phase is Phase.AGGREGATION:
            for member in self.attempt.tree.members:
                if not self.setting.fit(member) and self._needed(member):
                    self._lose(member, "unreachable", now)
        elif self.phase is Phase.MODEL_UPDATE and self.result is not None and not self._result_holders():
            self._lose(self.result.sender, "unreachable with the result", now)

    def _reassign_of_the_dead(self, now: int) -> None:
        plan = self.plan
        living = self._others(())
        if plan is None or not living:
            return
        # What a dead member finished lies on its disk: nobody can have it until it is back and offers it again.
        self.headers = {slot: h for slot, h in self.headers.items() if self._waited_for(h.contributor)}
        assignments = plan.assignments
        for assignment in plan.assignments:
            if (plan.version, assignment.index) not in self.headers and assignment.member not in living:
                substitute = self._least_loaded(assignments, living)
                assignments = replaced(assignments, assignment.index, substitute)
                self.setting.outbox.emit(
                    "reassigned",
                    assignment=assignment.index,
                    was=assignment.member,
                    now=substitute,
                    reason="failed",
                )
        if assignments != plan.assignments:
            self._plan(assignments, now)

    def _close(self, now: int) -> None:
        """Asks the synchronization rule whether the round's contributions are complete."""
        plan, rules = self.plan, self.setting.rules
        if plan is None or self.phase not in (
            Phase.TASK_DISTRIBUTION,
            Phase.LOCAL_TRAINING,
            Phase.GRADIENT_COLLECTION,
        ):
            return
        usable = self._usable()
        missing = [a for a in plan.assignments if (plan.version, a.index) not in usable]
        decision = closing(
            assigned=len(plan.assignments),
            arrived=len(plan.assignments) - len(missing),
            waited_ns=now - self._waiting_since,
            barrier_ns=plan.barrier_ns,
            extensions=self._extensions,
            policy=rules.straggler_policy,
            minimum_share=rules.minimum_share,
        )
        if decision is Closing.WAIT:
            return
        if decision is Closing.CLOSE:
            if self.phase is not Phase.GRADIENT_COLLECTION:
                self._enter(Phase.GRADIENT_COLLECTION, now)
            for assignment in missing:
                self._failed_again(assignment.member, "late")
                self.setting.outbox.emit("left-out", peer=assignment.member, assignment=assignment.index)
            self._attempt(now)
            return
        self._extensions += 1
        self._waiting_since = now
        self.setting.outbox.emit("barrier", decision=str(decision), missing=[a.member for a in missing])
        if decision is Closing.REASSIGN:
            # Of the plan's own members only: what the slow are at work on is not taken from them at every barrier.
            done = [m for m in self._working_members() if m not in {a.member for a in missing}]
            assignments = plan.assignments
            for assignment in missing:
                if done:
                    assignments = replaced(
                        assignments, assignment.index, self._least_loaded(assignments, done)
                    )
            if assignments != plan.assignments or self._failed_at:
                self._failed_at.clear()  # a new revision, by which members try again what failed
                self._plan(assignments, now)

    def _usable(self) -> dict[tuple[int, int], ContributionHeader]:
        """Headers of this round whose bytes can still be had."""
        return {
            slot: h
            for slot, h in self.headers.items()
            if h.contributor not in self.lost and self._counts(h.contributor)
        }

    def _counts(self, member: str) -> bool:
        return self.setting.fit(member) and self.setting.roster.is_member(member)

    # Aggregation

    def _attempt(self, now: int) -> None:
        """Signs attempt n + 1 over what is usable; back to collecting when that is too little."""
        setting, rules = self.setting, self.setting.rules
        self._replan_at = None
        usable = self._usable()
        assigned = len(self.plan.assignments) if self.plan else 1
        if not usable or len(usable) < rules.minimum_share * assigned:
            # What still comes of the attempt before is of no use: its losses stand.
            self.attempt, self.attempt_name, self.result = None, b"", None
            self._enter(Phase.GRADIENT_COLLECTION, now)
            self._waiting_since = now
            self.lost = {member: why for member, why in self.lost.items() if not setting.alive(member)}
            self._reassign_of_the_dead(now)
            return
        self.number += 1
        version = self.participant.version + 1
        members = list(dict.fromkeys(h.contributor for _, h in sorted(usable.items())))
        validation = split(rules.validation_length, len(members)) if rules.validation_length else []
        self.attempt = make_attempt(
            setting.authority,
            list(usable.values()),
            term=setting.voter.term,
            version=version,
            number=self.number,
            parent=self.participant.state,
            mean=rules.mean,
            fan_out=rules.fan_out,
            step=rules.step_parameters(version),
            validation=validation,
        )
        self.attempt_name = setting.authority.hash(self.attempt)
        self.result = None
        self.reports, self.shares, self._summed = {}, {}, set()
        if self.phase is not Phase.GRADIENT_COLLECTION:
            self._enter(Phase.GRADIENT_COLLECTION, now)
        self._enter(Phase.AGGREGATION, now)
        self._attempt_at = now
        self._tell_again_at = now + RESEND_NS
        for member in self._audience():
            if setting.alive(member):
                self._tell_attempt(member)

    def _audience(self) -> tuple[str, ...]:
        """Who has to know of the attempt: its tree, and the voters."""
        if self.attempt is None:
            return ()
        return tuple(
            dict.fromkeys((*self.attempt.tree.members, *self.setting.voter.ledger.committee.everyone))
        )

    def _tell_attempt(self, member: str) -> None:
        """The attempt, and its result when that is known. Whoever knows it answers with what it has come to."""
        if self.attempt is None:
            return
        headers = tuple(self.headers[entry.slot] for entry in self.attempt.entries)
        self.setting.send(member, AttemptMessage(self.attempt, headers))
        if self.result is not None and member != self.result.sender:
            self.setting.send(member, ResultMessage(self.result))

    def _quiet_at(self) -> int:
        """When the attempt has gone quiet for so long that something may have been lost."""
        return max(self._tell_again_at, self._heard_at + RESEND_NS)

    def _tell_again(self, now: int) -> None:
        """When the attempt has gone quiet, those who owe it something hear of it again: a message may be lost with a link
        that breaks, and whoever sent it does not know."""
        if self.attempt is None or now < self._quiet_at():
            return
        self._tell_again_at = now + RESEND_NS
        match self.phase:
            case Phase.AGGREGATION:
                owing = [member for member in self.attempt.tree.members if self._blocks(member)]
            case Phase.MODEL_UPDATE:
                owing = [member for member in self._audience() if member not in self.reports]
            case _:
                owing = [member for member in self.attempt.tree.members if member not in self.shares]
        for member in [member for member in owing if self.setting.alive(member)][:RESENT_AT_ONCE]:
            self._tell_attempt(member)

    def _needed(self, member: str) -> bool:
        """Whether the sum still depends on this member: no ancestor has summed its subtree, nor is the result known."""
        if self.attempt is None or self.result is not None or member not in self.attempt.tree:
            return False
        at: str | None = self.attempt.tree.parent(member)
        while at is not None:
            if at in self._summed:
                return False
            at = self.attempt.tree.parent(at)
        return True

    def _lose(self, member: str, reason: str, now: int) -> None:
        if member in self.lost:
            return
        self.lost[member] = reason
        if not reason.startswith("unreachable"):
            self._failed_again(member, reason)
        self.setting.outbox.emit("lost", peer=member, reason=reason, attempt=self.number)
        if self._replan_at is None:
            self._replan_at = now + BATCH_LOSSES_NS

    def _failed_again(self, member: str, reason: str) -> None:
        """A member that fails the rounds it was counted on for, several in a row, is left out for a while."""
        version = self.participant.version + 1
        count, last = self._failures.get(member, (0, 0))
        if last == version:
            return  # attempts at one round may come many in a second
        self._failures[member] = (count + 1, version)
        if count + 1 >= FAILURES_BEFORE_EXCLUSION and member != self.setting.me:
            del self._failures[member]
            self.setting.exclude(
                self.setting.roster.exclusion_of(
                    member, f"failed {FAILURES_BEFORE_EXCLUSION} rounds: {reason}"
                )
            )

    def on_partial(self, sender: str, message: PartialMessage, now: int) -> None:
        partial = message.partial
        if not self.active or partial.attempt != self.attempt_name or self.attempt is None:
            return
        if partial.sender != sender or sender not in self.attempt.tree:
            raise RemoteError("bad_partial", f"{sender} is not in the tree")
        self._summed.add(sender)
        self._heard_at = now

    def on_obstacle(self, sender: str, message: Obstacle, now: int) -> None:
        if (
            not self.active
            or message.attempt != self.attempt_name
            or self.attempt is None
            or self.result is not None
        ):
            return
        if sender not in self.attempt.tree:
            return
        culprit = message.culprit
        related = {sender, *self.attempt.tree.children(sender), self.attempt.tree.parent(sender)}
        if culprit in related and self._needed(culprit):
            self._lose(culprit, message.reason, now)

    def _replan(self, now: int) -> None:
        """The losses are in: a new attempt, unless all were links that have come back meanwhile."""
        self._replan_at = None
        back = {
            member
            for member, reason in self.lost.items()
            if reason.startswith("unreachable") and self.setting.fit(member)
        }
        for member in back:
            del self.lost[member]
        if self.attempt is not None and any(member in self.attempt.tree for member in self.lost):
            self._attempt(now)

    def on_progress(self, sender: str, message: Progress, now: int) -> None:
        """Only who has a part in the sum speaks for it, and not for longer than the barrier."""
        if not self.active or message.attempt != self.attempt_name or self.attempt is None:
            return
        if sender in self.attempt.tree and now - self._attempt_at < self.setting.rules.barrier_ns:
            self._heard_at = now

    def _keep_attempt_alive(self, now: int) -> None:
        if self._replan_at is not None and now >= self._replan_at:
            self._replan(now)
            return
        if now < self._heard_at + STALL_NS or self.attempt is None:
            return
        self._heard_at = now
        if self.phase is Phase.AGGREGATION:
            for member in self.attempt.tree.members:
                if self._blocks(member):
                    self._lose(member, f"nothing from it for {STALL_NS // 1_000_000_000} s", now)
                    return
        elif self.result is not None and self._result_holders() <= {self.result.sender}:
            self._lose(self.result.sender, "nobody could have the result from it", now)
        elif self.phase is Phase.MODEL_UPDATE and self._all_voters_reported():
            states = {peer: state.root.hex()[:16] for peer, (state, _) in self.reports.items()}
            self.setting.outbox.emit("states-differ", version=self.participant.version + 1, states=states)
            self._refuse("the voters computed different states", now)

    def _result_holders(self) -> set[str]:
        """Who can be reached and has the result's bytes: its root, and those that stepped with it."""
        root = {self.result.sender} if self.result is not None else set()
        return {peer for peer in root | set(self.reports) if self.setting.fit(peer)}

    def _all_voters_reported(self) -> bool:
        voters = self.setting.voter.ledger.committee.everyone
        return all(voter in self.reports or not self.setting.alive(voter) for voter in voters)

    def _blocks(self, member: str) -> bool:
        """Whether `member` has all that it sums, and has not summed it."""
        attempt = self.attempt
        if (
            attempt is None
            or member in self._summed
            or not (attempt.sends_partial(member) or member == attempt.tree.root)
        ):
            return False
        waits = [child for child in attempt.tree.children(member) if attempt.sends_partial(child)]
        return all(child in self._summed for child in waits)

    # Model update

    def on_result(self, sender: str, message: ResultMessage, now: int) -> None:
        result = message.result
        if (
            not self.active
            or result.attempt != self.attempt_name
            or self.attempt is None
            or self.result is not None
        ):
            return
        if result.sender != self.attempt.tree.root:
            raise RemoteError("bad_result", f"{result.sender} is not the root")
        self.setting.authority.check(result.sender, result)
        self.result = result
        self._replan_at = None
        self._enter(Phase.MODEL_UPDATE, now)
        outside = [p for p in self.setting.voter.ledger.committee.everyone if p not in self.attempt.tree]
        root_children = self.attempt.tree.children(self.attempt.tree.root)
        for peer in (*outside, *root_children):
            if peer not in (self.setting.me, sender) and self.setting.alive(peer):
                self.setting.send(peer, message)

    def on_report(self, sender: str, message: Report, now: int) -> None:
        if not self.active or message.attempt != self.attempt_name or self.result is None:
            return
        if sender not in self._audience():
            return
        self.reports[sender] = (message.state, message.finite)
        self._heard_at = now
        broken = {peer for peer, (_, finite) in self.reports.items() if not finite}
        if self.setting.me in broken or self.setting.voter.ledger.committee.is_quorum(broken):
            self._refuse("the new state is not finite", now)
            return
        if self.phase is Phase.MODEL_UPDATE and self._agreed_state() is not None:
            self._enter(Phase.VALIDATION, now)
            self._conclude(now)

    def _agreed_state(self) -> ContentRef | None:
        """The state that a quorum of voters has computed."""
        committee = self.setting.voter.ledger.committee
        for state in {state for state, _ in self.reports.values()}:
            if committee.is_quorum(
                {peer for peer, (reported, finite) in self.reports.items() if reported == state and finite}
            ):
                return state
        return None

    # Validation and record

    def on_share(self, sender: str, message: Share, now: int) -> None:
        if not self.active or message.attempt != self.attempt_name or self.attempt is None:
            return
        if sender not in self.attempt.tree:
            return
        message = _usable_share(message)
        self.shares[sender] = message
        if message.failed:
            self.setting.outbox.emit("validation-failed", peer=sender, reason=message.failed)
        if self.phase is Phase.VALIDATION:
            self._conclude(now)

    def _conclude(self, now: int) -> None:
        """Proposes the round when all shares that can still come have come, or their time is over."""
        attempt, plan, result = self.attempt, self.plan, self.result
        state = self._agreed_state()
        if (
            attempt is None
            or plan is None
            or result is None
            or state is None
            or self.phase is not Phase.VALIDATION
        ):
            return
        # Not of suspects: what the metrics cover is no reason to wait until a frozen member is declared dead.
        waiting = [m for m in attempt.tree.members if m not in self.shares and self.setting.fit(m)]
        if waiting and now < self._phase_at + plan.barrier_ns:
            return
        failed = {member: share.failed for member, share in self.shares.items() if share.failed}
        if self.setting.me in failed or 2 * len(failed) > len(attempt.tree.members):
            self._refuse(
                f"validation failed: {failed.get(self.setting.me) or next(iter(failed.values()))}", now
            )
            return
        ledger, roster = self.setting.voter.ledger, self.setting.roster
        if ledger.certified < ledger.height:
            return  # who is a member may change with what is not certified yet; its certificate comes back here
        if not all(roster.is_member(member) for member in attempt.tree.members):
            self._attempt(now)  # no voter would append a round with somebody who has left meanwhile
            return
        metrics = self._metrics(attempt, result, now)
        if broken := [name for name, value in metrics if not math.isfinite(value)]:
            self._refuse(f"{', '.join(broken)} not finite", now)
            return
        body = Round(
            attempt.version,
            attempt.parent.root,
            self.attempt_name,
            tuple(
                Counted(e.assignment, e.contributor, e.origin_round, e.factors.float_buffers)
                for e in attempt.entries
            ),
            result.content.root,
            state.root,
            state.size_bytes,
            metrics,
        )
        self.participant.keep(self.attempt_name)
        height = self.replication.propose(body)
        if height is None:
            return  # another record is on its way, or the duty is being handed over; tried again at the next tick
        self.proposed = height
        self._enter(Phase.COMPLETED, now)

    def _metrics(self, attempt: Attempt, result: Result, now: int) -> tuple[tuple[str, float], ...]:
        """Every metric of the specification that must be agreed; see metrics/training_metrics.py for their meaning."""
        good = [share for share in self.shares.values() if not share.failed and share.samples > 0]
        samples = sum(share.samples for share in good)
        headers = [self.headers[entry.slot] for entry in attempt.entries]
        trained = sum(header.samples for header in headers)
        living = [member for member in self.setting.roster.members if self.setting.alive(member)]
        values: dict[str, float] = {
            "training_loss": sum(h.loss * h.samples for h in headers) / trained,
            "gradient_norm": result.norm,
            "learning_rate": attempt.step.learning_rate,
            "node_participation": len(attempt.tree.members) / max(len(living), 1),
            "communication_time": (self._phase_at - self._attempt_at) / 1e9,
            "computation_time": max(header.computation_ns for header in headers) / 1e9,
            "round_time": (now - self._started_at) / 1e9,
            "training_samples": float(trained),
            "training_steps": float(sum(header.steps for header in headers)),
            "validation_samples": float(samples),
        }
        if samples:
            values["loss"] = sum(share.loss_sum for share in good) / samples
            names = {name for share in good for name, _ in share.measure_sums}
            for name in names:
                values[f"measure.{name}"] = (
                    sum(dict(share.measure_sums).get(name, 0.0) for share in good) / samples
                )
        return tuple(sorted(values.items()))

    def _refuse(self, reason: str, now: int) -> None:
        """The attempt makes no usable version: say why, and plan the round anew, later each time."""
        self._refusals += 1
        backoff = min(FIRST_BACKOFF_NS << (self._refusals - 1), MAX_BACKOFF_NS)
        self.setting.outbox.emit("attempt-refused", reason=reason, attempt=self.number, retry_s=backoff / 1e9)
        # Numbers go on: under an old number members would take the plan for outdated, and answer the attempt with what they
        # came to in the refused one.
        number, revision = self.number, self._next_revision
        self._clear(now)
        self.number, self._next_revision = number, revision
        self._not_before = now + backoff
        self._enter(Phase.INITIALIZATION, now)

    # Certified

    def certified(self, now: int) -> None:
        """The commit point: the record is certified, the next round may begin."""
        if self.attempt is not None:
            for entry in self.attempt.entries:
                self._failures.pop(entry.contributor, None)
        self._refusals = 0
        self._clear(now)
        self.phase = Phase.COMPLETED

    def _next_round(self, now: int) -> None:
        """Opens the next round, once whoever waits between rounds (admissions, committees, the duty) has had its turn."""
        ledger = self.setting.voter.ledger
        if self.over or self.proposed is not None or now < self._not_before:
            return
        if not self.setting.between_rounds(now):
            return
        if ledger.certified != ledger.height or self.replication.transferring is not None:
            return
        self._started_at = now
        self._enter(Phase.INITIALIZATION, now)
        self._asking = False
        self._initialize(now)

    def status(self, now: int) -> dict[str, Any]:
        """For people: where the round stands, and how long it waits at most."""
        deadline = self._waiting_since + self.plan.barrier_ns if self.plan is not None else None
        return {
            "number": self.participant.version + 1,
            "attempt": self.number,
            "phase": str(self.phase),
            "deadline_s": None if deadline is None else max(deadline - now, 0) / 1e9,
        }


def _usable_share(share: Share) -> Share:
    """The share, or what is wrong with it as its `failed`: one member's numbers neither stop a round nor fill its record."""
    names = [name for name, _ in share.measure_sums]
    values = [share.loss_sum, *(value for _, value in share.measure_sums)]
    wrong = share.failed
    if not 0 <= share.samples <= MAX_COUNT or not all(math.isfinite(value) for value in values):
        wrong = "its sums are not finite"
    elif (
        len(names) > MAX_MEASURES
        or len(set(names)) != len(names)
        or any(len(n) > MAX_MEASURE_NAME for n in names)
    ):
        wrong = "it measures too much, or one thing twice"
    return msgspec.structs.replace(share, failed=wrong)

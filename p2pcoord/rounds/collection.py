"""A coordinator's plan of one round, its revisions, and the contributions to it.

    event                                answer
    a member dies, or is suspected long  its assignment is given to another
    a member's training fails            likewise
    a member is late                     the straggler policy (`synchronization/bsp.py`)
    a finished contribution              counts if the plan ever gave it to its author; an assignment counts once

It looks and answers; whether a new revision is signed, or the round closed, is the coordinator's turn.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

from p2pcoord.aggregation.contribution import ContributionHeader, check_header
from p2pcoord.content import ContentRef
from p2pcoord.errors import RemoteError
from p2pcoord.rounds.messages import PlanAccepted, PlanMessage, TrainingFailed
from p2pcoord.rounds.plan import (
    MAX_ASSIGNMENTS,
    Assignment,
    Plan,
    deal,
    inherited,
    least_loaded,
    replaced,
    size,
)
from p2pcoord.rounds.reliability import Reliability
from p2pcoord.rounds.setting import Setting
from p2pcoord.run_config import derive_seed
from p2pcoord.synchronization.bsp import Closing, closing

# A plan that a member has not accepted is sent again; streams are reliable, so this is for links that were cut.
RESEND_NS = 1_000_000_000

# Offers by one member remembered before there is a plan, from which it is known what the member was given. Few finish more than
# one or two assignments, and all is offered again to a new plan.
MAX_OFFERED_EARLY = 16

Assignments = tuple[Assignment, ...]
Headers = dict[tuple[int, int], ContributionHeader]


class Collection:
    """Of the round that makes `version` from `parent`. `revision` is the number of the next plan that is signed."""

    def __init__(
        self,
        setting: Setting,
        reliability: Reliability,
        version: int,
        parent: ContentRef,
        now: int,
        revision: int = 0,
    ) -> None:
        self.setting = setting
        self._reliability = reliability
        self.version = version
        self.parent = parent
        self.revision = revision
        self.plan: Plan | None = None
        self.headers: Headers = {}
        """The contribution that counts for each (version, assignment)."""
        self._accepted: set[str] = set()
        self._offered: dict[tuple[int, str], ContributionHeader] = {}
        """All that was offered, by assignment and contributor."""
        self._given: dict[int, dict[str, None]] = {}
        """To whom each assignment was ever given in this round, in order."""
        self._failed_at: dict[int, set[str]] = {}
        """Members whose training of an assignment failed since the last barrier: they try it again at the next."""
        self._extensions = 0
        self._waiting_since = now
        self._resend_at = now

    # The plan

    def dealt(self, living: Sequence[str]) -> Assignments:
        """The training data over these members."""
        rules = self.setting.rules
        chosen = living[:MAX_ASSIGNMENTS]
        seed = derive_seed(self.setting.authority.run, "deal", rules.seed)
        ranges = deal(rules.train_length, len(chosen), self.version, seed % max(rules.train_length, 1))
        return tuple(Assignment(i, member, ranges[i]) for i, member in enumerate(chosen))

    def inherited(self, plans: Sequence[Plan], living: Sequence[str]) -> Assignments:
        """What earlier coordinators assigned, by the newest plan, but for those that are gone."""
        for plan in plans:
            self._remember(plan)
        return inherited(max(plans, key=lambda plan: plan.rank), living, self._finished())

    def sign(self, assignments: Assignments) -> None:
        """The plan is this from now on, or is revised to it."""
        setting = self.setting
        self.plan = setting.authority.sign(
            Plan(
                setting.voter.term,
                self.version,
                self.revision,
                self.parent.root,
                assignments,
                setting.rules.barrier_ns,
                setting.me,
            )
        )
        self.revision += 1
        self._accepted = set()
        self._remember(self.plan)
        self.sort_in()

    def _remember(self, plan: Plan) -> None:
        """Who finishes what this plan gave it has not worked in vain."""
        for assignment in plan.assignments:
            self._given.setdefault(assignment.index, {})[assignment.member] = None

    def send(self, now: int) -> None:
        """The plan, to its members that have not accepted it yet."""
        if self.plan is None:
            return
        message = PlanMessage(self.plan, self.setting.voter.ledger.certified)
        for member in self.plan.members:
            if member not in self._accepted and self.setting.neighbours.alive(member):
                self.setting.neighbours.send(member, message, now)
        self._resend_at = now + RESEND_NS

    def resend(self, now: int) -> None:
        if now >= self._resend_at:
            self.send(now)

    def connected(self, peer: str, now: int) -> None:
        """A link is there (again): the plan may have been lost with the old one."""
        if self.plan is not None and self.plan.of(peer):
            message = PlanMessage(self.plan, self.setting.voter.ledger.certified)
            self.setting.neighbours.send(peer, message, now)

    def accept(self, sender: str, message: PlanAccepted) -> bool:
        """A member has this plan; True when all its living members have it now."""
        plan = self.plan
        if plan is None or (message.version, message.term, message.revision) != plan.rank:
            return False
        self._accepted.add(sender)
        return all(m in self._accepted for m in plan.members if self.setting.neighbours.alive(m))

    # Contributions

    def admit(self, sender: str, header: ContributionHeader) -> None:
        """BSP's admission: computed for this round, from the current state. Others are no fault, only too late."""
        setting = self.setting
        if header.contributor != sender:
            raise RemoteError("bad_contribution", f"{sender} offers what {header.contributor} made")
        if header.origin_round != self.version or header.base != self.parent.root:
            return
        rules = setting.rules
        check_header(header, setting.authority, rules.contribution_bytes, rules.most_samples(0))
        setting.admissions.see(header)
        if not setting.roster.is_member(sender):
            raise RemoteError("stranger", "offers a contribution")
        if self._has_room(sender, header.assignment):
            self._offered.setdefault((header.assignment, sender), header)
            self.sort_in()

    def _has_room(self, sender: str, assignment: int) -> bool:
        """Whether one more offer by this member may count: nobody's offers crowd out another's."""
        if self.plan is not None:
            return sender in self._given.get(assignment, ())
        return sum(by == sender for _, by in self._offered) < MAX_OFFERED_EARLY

    def sort_in(self) -> None:
        """Counts what was offered by whom the plan gave it, now or before a revision, and who is waited for now; an assignment
        counts once."""
        if self.plan is None:
            return
        for assignment in self.plan.assignments:
            slot = (self.version, assignment.index)
            if slot not in self.headers:
                for member in (assignment.member, *self._given.get(assignment.index, ())):
                    header = self._offered.get((assignment.index, member))
                    # What was trained by a plan that nobody showed was dealt otherwise: that is no fault.
                    most = self.setting.rules.most_samples(size(assignment.ranges))
                    if header is None or header.samples > most:
                        continue
                    if self._reliability.waited_for(member):
                        self.headers[slot] = header
                        break

    def _finished(self) -> set[int]:
        return {assignment for _, assignment in self.headers}

    def usable(self, lost: Container[str]) -> Headers:
        """Headers of this round whose bytes can still be had; `lost` are members that failed to give theirs."""
        return {
            slot: header
            for slot, header in self.headers.items()
            if header.contributor not in lost and self._counts(header.contributor)
        }

    def _counts(self, member: str) -> bool:
        return self.setting.neighbours.fit(member) and self.setting.roster.is_member(member)

    def suffices(self, headers: Headers) -> bool:
        """Whether an attempt may be made of so few."""
        assigned = len(self.plan.assignments) if self.plan else 1
        return bool(headers) and len(headers) >= self.setting.rules.minimum_share * assigned

    # Who does what instead

    def concerns(self, sender: str, message: TrainingFailed) -> bool:
        """Whether this failure is of an assignment that the plan gives to its sender, and that nobody has finished."""
        if self.plan is None or message.version != self.version or message.assignment in self._finished():
            return False
        return any(own.index == message.assignment for own in self.plan.of(sender))

    def after_failure(self, index: int, member: str) -> Assignments | None:
        """With this assignment given to somebody at whom it has not failed; None when there is nobody."""
        failed = self._failed_at.setdefault(index, set())
        failed.add(member)
        others = self._others(failed)
        if self.plan is None or not others:
            return None
        substitute = least_loaded(self.plan.assignments, others, self._finished())
        return replaced(self.plan.assignments, index, substitute)

    def after_deaths(self) -> Assignments | None:
        """Without those that are not waited for any more, in what nobody has finished; None when nobody is left."""
        living = self._others(())
        if self.plan is None or not living:
            return None
        # What a dead member finished lies on its disk: nobody can have it until it is back and offers it again.
        self.headers = {s: h for s, h in self.headers.items() if self._reliability.waited_for(h.contributor)}
        finished = self._finished()
        assignments = self.plan.assignments
        for assignment in self.plan.assignments:
            if assignment.index not in finished and assignment.member not in living:
                substitute = least_loaded(assignments, living, finished)
                assignments = replaced(assignments, assignment.index, substitute)
                self.setting.outbox.emit(
                    "reassigned",
                    assignment=assignment.index,
                    was=assignment.member,
                    now=substitute,
                    reason="failed",
                )
        return assignments

    def after_barrier(self, late: Sequence[Assignment]) -> Assignments | None:
        """With these given to members that are done; None when a revision would change nothing. Of the plan's own members
        only: what the slow are at work on is not taken from them at every barrier."""
        if self.plan is None:
            return None
        slow = {assignment.member for assignment in late}
        done = [member for member in self._working() if member not in slow]
        assignments = self.plan.assignments
        for assignment in late if done else ():
            substitute = least_loaded(assignments, done, self._finished())
            assignments = replaced(assignments, assignment.index, substitute)
        if assignments == self.plan.assignments and not self._failed_at:
            return None
        self._failed_at.clear()  # a new revision, by which members try again what failed
        return assignments

    def _working(self) -> list[str]:
        """Members of the plan whose work is waited for."""
        members = self.plan.members if self.plan is not None else ()
        return [member for member in members if self._reliability.waited_for(member)]

    def _others(self, but: Container[str]) -> list[str]:
        """Who may take over from `but`: living members of the plan; where it has none, any that lives."""
        others = [member for member in self._working() if member not in but]
        return others or [member for member in self._reliability.living() if member not in but]

    # Closing

    @property
    def barrier_at(self) -> int:
        """When those that are late are waited for no longer, or by the straggler policy once more."""
        return self._waiting_since + (self.plan.barrier_ns if self.plan else 0)

    def next_deadline(self) -> int:
        return min(self._resend_at, self.barrier_at)

    def wait_from(self, now: int) -> None:
        self._waiting_since = now

    def extend(self, now: int) -> None:
        self._extensions += 1
        self._waiting_since = now

    def missing(self, lost: Container[str]) -> list[Assignment]:
        """Assignments without a usable contribution."""
        usable = self.usable(lost)
        assignments = self.plan.assignments if self.plan else ()
        return [a for a in assignments if (self.version, a.index) not in usable]

    def closing(self, missing: Sequence[Assignment], now: int) -> Closing:
        """What the synchronization rule says of a round in which these are missing."""
        rules, plan = self.setting.rules, self.plan
        if plan is None:
            return Closing.WAIT
        return closing(
            assigned=len(plan.assignments),
            arrived=len(plan.assignments) - len(missing),
            waited_ns=now - self._waiting_since,
            barrier_ns=plan.barrier_ns,
            extensions=self._extensions,
            policy=rules.straggler_policy,
            minimum_share=rules.minimum_share,
        )

"""A member's work on the plan: accept it, train each own assignment once, and offer what is finished until it counts.

A slot is persisted before its header is sent, so nothing is trained twice: what was finished under an earlier coordinator, or
in an earlier life, is offered again as long as its base is the current state.
"""

from __future__ import annotations

from contextlib import suppress

from p2pcoord.aggregation.contribution import ContributionHeader
from p2pcoord.effects import Cancelled, Done, Failed, Offer, Outcome, Train, Trained
from p2pcoord.errors import RemoteError
from p2pcoord.rounds.attempt_book import AttemptBook
from p2pcoord.rounds.frames import Slot
from p2pcoord.rounds.holdings import Holdings
from p2pcoord.rounds.messages import Offering, PlanAccepted, PlanMessage, Reoffer, Reoffered, TrainingFailed
from p2pcoord.rounds.plan import Assignment, Plan, check_plan
from p2pcoord.rounds.setting import Setting
from p2pcoord.run_config import derive_seed

# What is finished is offered again this often until an attempt shows that it arrived: a link may break where only the other
# side sees it.
REOFFER_NS = 5_000_000_000


class Training:
    """`plan` is the newest for the round under way, `slots` what is finished and may count yet."""

    def __init__(self, setting: Setting, holdings: Holdings, book: AttemptBook) -> None:
        self.setting = setting
        self.holdings = holdings
        self.book = book
        self.plan: Plan | None = None
        self.slots: dict[tuple[int, int], ContributionHeader] = {}
        self.local_steps = 0
        """Optimizer steps made so far, in earlier lives too."""
        self.last: Trained | None = None
        self._at_work: tuple[Assignment, int] | None = None
        """What is trained now, and by which effect."""
        self._failed: dict[int, str] = {}
        """Assignments that failed here, and why; a newer plan begins them again."""
        self._later_plan: tuple[str, PlanMessage] | None = None
        self._later_reoffer: tuple[str, Reoffer] | None = None
        self._offer_at = 0

    @property
    def version(self) -> int:
        """Of the round under way."""
        return self.holdings.version + 1

    def restore(self, slots: dict[tuple[int, int], ContributionHeader], contents: frozenset[bytes]) -> None:
        """Takes up what an earlier life signed and whose bytes are still on the disk."""
        for slot, header in slots.items():
            if header.content.root in contents and slot[0] >= self.version:
                self.slots[slot] = header

    def contributions(self) -> list[bytes]:
        """Roots of what is finished and may count yet."""
        return [header.content.root for header in self.slots.values()]

    # Messages

    def on_plan(self, sender: str, message: PlanMessage, now: int) -> None:
        setting, plan = self.setting, message.plan
        if message.certified > setting.voter.ledger.certified or plan.version > self.version:
            self._later_plan = (sender, message)
            setting.agreement.catch_up.ask(sender, now)
            return
        if plan.version != self.version or (self.plan is not None and plan.rank < self.plan.rank):
            return
        if not setting.coordinates(plan.coordinator, plan.term):
            raise RemoteError("not_coordinator", f"a plan by {plan.coordinator} in term {plan.term}")
        setting.authority.check(plan.coordinator, plan)
        check_plan(plan, setting.rules.train_length)
        if plan.parent != self.holdings.state.root:
            raise RemoteError("bad_plan", f"trains from another state than version {self.holdings.version}")
        if self.plan is None or plan.rank > self.plan.rank:
            self._failed.clear()
        self.plan = plan
        setting.neighbours.send(sender, PlanAccepted(plan.version, plan.term, plan.revision), now)
        self.offer_again(sender, now)
        self.go_on(now)

    def on_reoffer(self, sender: str, message: Reoffer, now: int) -> None:
        setting = self.setting
        if message.certified > setting.voter.ledger.certified or message.version > self.version:
            self._later_reoffer = (sender, message)
            setting.agreement.catch_up.ask(sender, now)
            return
        if message.version != self.version or not setting.coordinates(sender, message.term):
            return
        headers = tuple(header for slot, header in sorted(self.slots.items()) if slot[0] == message.version)
        plan = self.plan if self.plan is not None and self.plan.version == message.version else None
        setting.neighbours.send(sender, Reoffered(message.version, plan, headers), now)

    def take_up_later(self, now: int) -> None:
        """What came before the records that it rests on."""
        later_plan, self._later_plan = self._later_plan, None
        later_reoffer, self._later_reoffer = self._later_reoffer, None
        # Nothing of them was checked when they came, and what is wrong with them must not stop who goes on with the records.
        if later_plan is not None:
            with suppress(RemoteError):
                self.on_plan(later_plan[0], later_plan[1], now)
        if later_reoffer is not None:
            with suppress(RemoteError):
                self.on_reoffer(later_reoffer[0], later_reoffer[1], now)

    def connected(self, coordinator: str, now: int) -> None:
        """The link to the coordinator is there (again)."""
        if self.plan is not None and self.plan.version == self.version:
            self.offer_again(coordinator, now)

    # Training

    def go_on(self, now: int) -> None:
        """Begins the next assignment of the plan that is not done, one at a time."""
        plan, setting = self.plan, self.setting
        if plan is None or plan.version != self.version:
            return
        mine = plan.of(setting.me)
        if self._at_work is not None:
            if self._at_work[0].index in {assignment.index for assignment in mine}:
                return
            self._stop()  # somebody else was given it
        if not self.holdings.held:
            self.holdings.fetch_state(now)
            return
        for assignment in mine:
            slot = (plan.version, assignment.index)
            if slot not in self.slots and assignment.index not in self._failed:
                self._begin(plan.version, assignment)
                return

    def _begin(self, version: int, assignment: Assignment) -> None:
        setting = self.setting
        seed = derive_seed(setting.authority.run, "train", version, assignment.index, setting.rules.seed)
        effect = Train(
            setting.outbox.new_id(), version, assignment.index, self.holdings.state, assignment.ranges, seed
        )
        number = setting.start(effect, lambda outcome, at: self._trained(version, assignment, outcome, at))
        self._at_work = (assignment, number)

    def _stop(self) -> None:
        if self._at_work is not None:
            self.setting.cancel(self._at_work[1])
            self._at_work = None

    def _trained(self, version: int, assignment: Assignment, outcome: Outcome, now: int) -> None:
        setting = self.setting
        self._at_work = None
        if version != self.version or isinstance(outcome, Cancelled):
            self.go_on(now)
            return
        if not isinstance(outcome, Done) or not isinstance(outcome.value, Trained):
            reason = outcome.reason if isinstance(outcome, Failed) else "no result"
            self._failed[assignment.index] = reason
            setting.outbox.emit(
                "training-failed", version=version, assignment=assignment.index, reason=reason
            )
            failed = TrainingFailed(version, assignment.index, reason)
            setting.neighbours.send(setting.coordinator, failed, now)
            self._offer_at = now + REOFFER_NS
            self.go_on(now)
            return
        trained = outcome.value
        self.last = trained
        self.local_steps += trained.steps
        header = setting.authority.sign(
            ContributionHeader(
                version,
                assignment.index,
                setting.incarnation,
                setting.me,
                self.holdings.state.root,
                trained.content,
                trained.samples,
                trained.steps,
                trained.norm,
                trained.loss,
                trained.wall_ns,
            )
        )
        self.slots[header.slot] = header
        self.holdings.add(trained.content)
        setting.outbox.persist([Slot(header)])
        setting.outbox.put(Offer(trained.content))
        setting.outbox.emit(
            "trained", version=version, assignment=assignment.index, steps=trained.steps, loss=trained.loss
        )
        setting.neighbours.send(setting.coordinator, Offering(header), now)
        self._offer_at = now + REOFFER_NS
        self.go_on(now)

    # Offering again

    def offer_again(self, coordinator: str, now: int) -> None:
        """All that is finished for this round, whoever it is assigned to by now: an assignment counts once anyhow. And what
        failed: the coordinator gives it to another."""
        for (origin_round, _), header in sorted(self.slots.items()):
            if origin_round == self.version:
                self.setting.neighbours.send(coordinator, Offering(header), now)
        for index, reason in sorted(self._failed.items()):
            self.setting.neighbours.send(coordinator, TrainingFailed(self.version, index, reason), now)

    def _owes_offers(self) -> bool:
        """Something is finished, or failed, for the round that is being collected."""
        if self.plan is None or self.setting.coordinator == self.setting.me:
            return False
        entry = self.book.current  # what it lists has arrived
        listed = {own.slot for own in entry.attempt.entries} if entry is not None else set()
        done = any(slot[0] == self.version and slot not in listed for slot in self.slots)
        return done or bool(self._failed)

    def tick(self, now: int) -> None:
        if self._owes_offers() and now >= self._offer_at:
            self._offer_at = now + REOFFER_NS
            self.offer_again(self.setting.coordinator, now)

    def next_deadline(self) -> int | None:
        return self._offer_at if self._owes_offers() else None

    # Certified

    def certified(self) -> None:
        """A version is certified (`holdings` says which): what was to make it is of no use any more."""
        self._stop()
        self._failed.clear()
        if self.plan is not None and self.plan.version < self.version:
            self.plan = None
        self.slots = {slot: header for slot, header in self.slots.items() if slot[0] >= self.version}

"""How a new coordinator finds out what its predecessor began: it asks all living members, and goes on from what they have.

A coordinator keeps nothing that its successor could not ask for: plan and headers lie with the members, and the newest plan
shown is kept. After that, `asking` is False: the coordinator knows the rounds that it began itself.
"""

from __future__ import annotations

from collections.abc import Iterable

from p2pcoord.content import ContentRef
from p2pcoord.errors import RemoteError
from p2pcoord.rounds.messages import Reoffer, Reoffered
from p2pcoord.rounds.plan import Plan, check_plan
from p2pcoord.rounds.setting import Setting


class Takeover:
    """Of the round that makes `version` from `parent`."""

    def __init__(self, setting: Setting, version: int, parent: ContentRef) -> None:
        self.setting = setting
        self._version = version
        self._parent = parent
        self.asking = True
        self._asked: set[str] = set()
        self._answers: dict[str, Reoffered] = {}

    def ask(self, now: int) -> None:
        """Asks all living members that were not asked yet."""
        setting = self.setting
        message = Reoffer(setting.voter.term, self._version, setting.voter.ledger.certified)
        for member in setting.roster.members:
            if setting.neighbours.alive(member) and member not in self._asked:
                self._asked.add(member)
                setting.neighbours.send(member, message, now)

    def connected(self, peer: str, now: int) -> None:
        """A link is there (again): the question may have been lost with the old one."""
        if self.asking and peer not in self._answers:
            self._asked.discard(peer)
            self.ask(now)

    def awaits(self, members: Iterable[str]) -> bool:
        """Whether one of these has not answered yet."""
        return self.asking and any(member not in self._answers for member in members)

    def check(self, message: Reoffered) -> None:
        """Raises RemoteError unless the plan shown is one that a coordinator signed for this round."""
        plan, setting = message.plan, self.setting
        if plan is None:
            return
        setting.authority.check(plan.coordinator, plan)
        if plan.parent != self._parent.root or plan.version != self._version:
            raise RemoteError("bad_plan", "a plan for another state")
        if not setting.coordinates(plan.coordinator, plan.term):
            raise RemoteError("not_coordinator", f"a plan by {plan.coordinator}")
        check_plan(plan, setting.rules.train_length)

    def take(self, sender: str, message: Reoffered) -> None:
        self._answers[sender] = message

    def plans(self, own: Plan | None) -> list[Plan]:
        """All plans for this round that were shown to any member; `own` is the last that was shown to this peer."""
        shown = [answer.plan for answer in self._answers.values() if answer.plan is not None]
        return [*shown, own] if own is not None and own.version == self._version else shown

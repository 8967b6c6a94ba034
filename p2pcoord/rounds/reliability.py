"""Which members a coordinator counts on, over all rounds that it leads.

    a member is          its work                       new work
    fit                  is waited for                  may be given to it
    suspected            is waited for, for a while     none
    not known to live    goes to another                none

Whoever fails the rounds it was counted on for, several in a row, is left out for some versions.
"""

from __future__ import annotations

from collections.abc import Iterable

from p2pcoord.rounds.setting import Setting

# A suspect's work is waited for this long: a suspicion usually ends sooner, and death is certain only after 7 s or more. Giving
# its assignment to another too early costs some training; an assignment counts once anyhow.
SUSPECT_PATIENCE_NS = 3_000_000_000

# Rounds in a row that a member may fail (late, bytes that are wrong or do not come) before it is excluded for a while.
FAILURES_BEFORE_EXCLUSION = 3


class Reliability:
    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._now = 0
        self._suspect_since: dict[str, int] = {}
        """Since when a member of the plan has not been fit."""
        self._failures: dict[str, tuple[int, int]] = {}
        """Member -> (rounds failed in a row of those this coordinator led, the last of them)."""

    def living(self) -> list[str]:
        """Members to which new work may be given, in order of admission."""
        return [member for member in self.setting.roster.members if self.setting.neighbours.fit(member)]

    def watch(self, members: Iterable[str], now: int) -> None:
        """Notes what the detectors know now of the members of the plan."""
        self._now = now
        for member in members:
            if self.setting.neighbours.fit(member):
                self._suspect_since.pop(member, None)
            else:
                self._suspect_since.setdefault(member, now)

    def waited_for(self, member: str) -> bool:
        """Whether a member's work is still waited for: it is a member, not known to be gone, nor suspected for long."""
        if not self.setting.roster.is_member(member):
            return False
        since = self._suspect_since.get(member)
        patient = since is None or self._now - since < SUSPECT_PATIENCE_NS
        return self.setting.neighbours.alive(member) and patient

    def failed(self, member: str, version: int, reason: str) -> None:
        """A member failed the round that makes `version`, which counted on it."""
        count, last = self._failures.get(member, (0, 0))
        if last == version:
            return  # attempts at one round may come many in a second
        self._failures[member] = (count + 1, version)
        if count + 1 >= FAILURES_BEFORE_EXCLUSION and member != self.setting.me:
            del self._failures[member]
            why = f"failed {FAILURES_BEFORE_EXCLUSION} rounds: {reason}"
            self.setting.admissions.exclude(self.setting.roster.exclusion_of(member, why))

    def contributed(self, members: Iterable[str]) -> None:
        """What these made was certified."""
        for member in members:
            self._failures.pop(member, None)

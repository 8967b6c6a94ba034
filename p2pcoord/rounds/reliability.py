"""Which members a coordinator counts on, over all rounds that it leads.

    a member is          its work                       new work
    fit                  is waited for                  may be given to it
    suspected            is waited for, for a while     none
    not known to live    goes to another                none

Whoever fails the rounds it was counted on for, several in a row, is left out for some versions.

That one member cannot have another's bytes is the word of one against the other, or their link's fault: it counts against
neither, and the two are kept apart in the tree for a while. To blame is

    who is accused           by two members
    who accuses              in two attempts, and nobody else confirms it
"""

from __future__ import annotations

from collections.abc import Iterable

from p2pcoord.rounds.setting import Setting

# A suspect's work is waited for this long: a suspicion usually ends sooner, and death is certain only after 7 s or more. Giving
# its assignment to another too early costs some training; an assignment counts once anyhow.
SUSPECT_PATIENCE_NS = 3_000_000_000

# Rounds in a row that a member may fail (late, bytes that are wrong or do not come) before it is excluded for a while.
FAILURES_BEFORE_EXCLUSION = 3


# So many versions are two members kept apart of whom one could not have the other's bytes: a broken link costs one attempt in
# so many rounds, and one that was mended is used again.
APART_VERSIONS = 16

# Remembered at a time: who accuses twice is left out, so there are far fewer.
MAX_ACCUSATIONS = 1024


class Reliability:
    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._now = 0
        self._suspect_since: dict[str, int] = {}
        """Since when a member of the plan has not been fit."""
        self._failures: dict[str, tuple[int, int]] = {}
        """Member -> (rounds failed in a row of those this coordinator led, the last of them)."""
        self._accusations: dict[tuple[str, str], tuple[int, int]] = {}
        """(Accuser, accused) -> (version, number) of the attempt."""

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

    def accuse(self, accuser: str, accused: str, attempt: tuple[int, int]) -> None:
        """A member says that it could not have another's bytes in this attempt (version, number)."""
        self._accusations.setdefault((accuser, accused), attempt)
        if len(self._accusations) > MAX_ACCUSATIONS:
            del self._accusations[next(iter(self._accusations))]

    def apart(self, version: int) -> frozenset[frozenset[str]]:
        """Pairs that are kept apart in the tree of an attempt to make this version."""
        self._accusations = {
            pair: attempt
            for pair, attempt in self._accusations.items()
            if attempt[0] > version - APART_VERSIONS
        }
        return frozenset(map(frozenset, self._accusations))

    def blamed(self, attempt: tuple[int, int]) -> dict[str, str]:
        """Whom the accusations in this attempt show to be at fault, and why. What is confirmed is settled."""
        blamed = {}
        for _, accused in [pair for pair, at in self._accusations.items() if at == attempt]:
            if len([pair for pair in self._accusations if pair[1] == accused]) > 1:
                blamed[accused] = "several members could not have its bytes"
                self._accusations = {pair: at for pair, at in self._accusations.items() if pair[1] != accused}
        for accuser, _ in [pair for pair, at in self._accusations.items() if at == attempt]:
            if len({at for pair, at in self._accusations.items() if pair[0] == accuser}) > 1:
                blamed[accuser] = "it accuses one member after the other"
        return blamed

    def contributed(self, members: Iterable[str]) -> None:
        """What these made was certified."""
        for member in members:
            self._failures.pop(member, None)

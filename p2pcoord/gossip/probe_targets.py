"""Whom to probe next, and through whom when it does not answer.

Members are probed in a shuffled round-robin (SWIM, section 4.3): each once a round, so that the time until a failure is
found is bounded and not only short on average. The dead have a turn of their own.
"""

from __future__ import annotations

import random
from collections.abc import Container, Mapping

from p2pcoord.gossip.suspicion import Member, State

HELPERS = 3
"""k of SWIM: as many are asked to ping who does not answer us (memberlist: 3)."""


class ProbeTargets:
    """`members` is the table of `Suspicions`; who is removed from it is skipped here."""

    def __init__(self, members: Mapping[str, Member], rng: random.Random) -> None:
        self._members = members
        self._rng = rng
        self._round: list[str] = []  # the members in this round's order; the gone are skipped
        self._place = 0
        self._dead_place = 0

    def add(self, peer: str) -> None:
        """A new member, at a random place of this round, so that peers which learn of it together do not probe it together."""
        self._round.insert(self._rng.randrange(self._place, len(self._round) + 1), peer)

    def next(self, probed: Container[str]) -> Member | None:
        """The next in this round who is neither dead nor being `probed`; at its end the members are shuffled anew."""
        for _ in range(2):
            while self._place < len(self._round):
                member = self._members.get(self._round[self._place])
                self._place += 1
                if member is not None and member.state is not State.DEAD and member.peer not in probed:
                    return member
            self._round = list(self._members)
            self._rng.shuffle(self._round)
            self._place = 0
        return None

    def next_dead(self) -> Member | None:
        """The next of the dead, who take turns."""
        dead = [member for member in self._members.values() if member.state is State.DEAD]
        if not dead:
            return None
        self._dead_place = (self._dead_place + 1) % len(dead)
        return dead[self._dead_place]

    def helpers(self, target: Member) -> tuple[str, ...]:
        """k living members that can ping the target: those a leaf names, else any but leaves."""
        if target.links:
            members = [self._members[peer] for peer in target.links if peer in self._members]
            named = [member.peer for member in members if member.state is not State.DEAD]
            return tuple(self._rng.sample(named, min(HELPERS, len(named))))
        chosen: dict[str, None] = {}
        # Drawn by place: a list of all who qualify would cost a pass over the run. In small runs all are tried.
        size = len(self._round)
        for place in self._rng.sample(range(size), min(size, max(32, 8 * HELPERS))):
            member = self._members.get(self._round[place])
            if member is None or member is target or member.links or member.state is not State.ALIVE:
                continue
            chosen[member.peer] = None
            if len(chosen) == HELPERS:
                break
        return tuple(chosen)

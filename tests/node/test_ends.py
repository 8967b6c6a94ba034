"""How a node ends, and what it says of a run that cannot go on: with a driver whose peer is only what is looked at."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from node import ends
from node.driver import Driver
from node.ends import QUORUM_LOST_S, watch_quorum
from p2pcoord.rounds.rounds import Rounds

ENOUGH = {"reachable": 2, "needed": 2, "outgoing": None, "held": True, "missing": []}


class Around:
    """What `watch_quorum` sees, and what it tells."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.quorum: dict[str, Any] = ENOUGH
        self.peer = SimpleNamespace(is_member=True, work=None)
        self.driver = cast(Driver, SimpleNamespace(peer=self.peer, now=lambda: 0))
        monkeypatch.setattr(ends, "quorum_of", lambda peer, now: self.quorum)

    async def watched(self, nursery: trio.Nursery) -> None:
        nursery.start_soon(watch_quorum, self.driver, lambda event, fields: self.told.append((event, fields)))

    async def wait(self, quorum: dict[str, Any], seconds: float) -> list[str]:
        """What is told meanwhile."""
        before, self.quorum = len(self.told), quorum
        await trio.sleep(seconds)
        return [event for event, _ in self.told[before:]]


@pytest.mark.trio
async def test_too_few_voters_are_told_after_a_while_and_once_and_an_election_is_not(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    around = Around(monkeypatch)
    async with trio.open_nursery() as nursery:
        await around.watched(nursery)
        assert await around.wait(ENOUGH, 10) == []
        assert await around.wait(ENOUGH | {"held": False}, 60) == [], "an election"
        few = ENOUGH | {"held": False, "reachable": 1, "missing": ["B"]}
        assert await around.wait(few, QUORUM_LOST_S - 1) == []
        assert await around.wait(few, 60) == ["quorum-lost"]
        assert around.told[-1][1] == {"reachable": 1, "needed": 2, "outgoing": None, "missing": ["B"]}
        assert await around.wait(ENOUGH | {"held": False}, 60) == [], "nobody coordinates yet"
        assert await around.wait(ENOUGH, 1) == ["quorum-regained"]
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_outgoing_voters_out_of_reach_are_too_few_voters(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    around = Around(monkeypatch)
    async with trio.open_nursery() as nursery:
        await around.watched(nursery)
        outgoing = {"voters": 3, "reachable": 1, "needed": 2}
        joint = ENOUGH | {"held": False, "outgoing": outgoing}
        assert await around.wait(joint, 10) == ["quorum-lost"]
        assert around.told[-1][1]["outgoing"] == outgoing
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_after_the_last_version_no_voter_is_missed(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    around = Around(monkeypatch)
    async with trio.open_nursery() as nursery:
        await around.watched(nursery)
        few = ENOUGH | {"held": False, "reachable": 1, "missing": ["B"]}
        assert await around.wait(few, QUORUM_LOST_S - 1) == []
        around.peer.work = rounds(over=True)
        assert await around.wait(few, 60) == []
        around.peer.work = rounds(over=False)
        assert await around.wait(few, 60) == ["quorum-lost"]
        nursery.cancel_scope.cancel()


class Made(Rounds):
    """Rounds of which only this is looked at."""

    is_over = False

    @property
    def over(self) -> bool:
        return self.is_over


def rounds(*, over: bool) -> Rounds:
    made = Made.__new__(Made)
    made.is_over = over
    return made

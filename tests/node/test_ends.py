"""How a node ends, and what it says of a run that cannot go on: with a driver whose peer is only what is looked at."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from node import ends
from node.driver import Driver
from node.ends import END_S, LEAVE_S, QUORUM_LOST_S, leaving_on_signals, watch_quorum, watch_workload
from p2pcoord.rounds.rounds import Rounds


class Exited(BaseException):
    """Instead of os._exit."""


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(code: int) -> None:
        raise Exited(code)

    monkeypatch.setattr(ends.os, "_exit", leave)


def exit_code(caught: pytest.ExceptionInfo[BaseException]) -> int:
    found: BaseException = caught.value
    while isinstance(found, BaseExceptionGroup):
        (found,) = found.exceptions
    assert isinstance(found, Exited)
    return int(found.args[0])


@pytest.mark.trio
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_node_that_is_still_starting_ends_well_when_it_is_told_to_stop(
    autojump_clock: MockClock, exits: None, number: signal.Signals
) -> None:
    told: list[str] = []
    cleaned_up = False
    async with leaving_on_signals(lambda: None, told.append):
        try:
            signal.raise_signal(number)
            await trio.sleep(60)
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(END_S / 2)
            cleaned_up = True
    assert trio.current_time() < END_S
    assert cleaned_up
    assert told == ["leaving"]


@pytest.mark.trio
async def test_what_cannot_be_cancelled_holds_a_starting_node_no_longer_than_five_seconds(
    autojump_clock: MockClock, exits: None
) -> None:
    async def stuck() -> None:
        async with leaving_on_signals(lambda: None, lambda line: None):
            signal.raise_signal(signal.SIGTERM)
            with trio.CancelScope(shield=True):
                await trio.sleep(60)

    with pytest.raises(BaseExceptionGroup) as caught:
        await stuck()
    assert exit_code(caught) == 0


class Leaving:
    """A driver whose peer has been asked to leave, and is not let go."""

    def __init__(self) -> None:
        roster = SimpleNamespace(members=["A", "B"])
        self.peer = SimpleNamespace(roster=roster, leave="leave", left=False, work=None)
        self.asked: list[Any] = []
        self.stopped = trio.Event()
        self.put = self.asked.append
        self.stop: Any = lambda reason: self.stopped.set()
        self.tensors: Any = None


@pytest.mark.trio
async def test_a_member_says_goodbye_and_waits_for_it_but_not_for_ever(
    autojump_clock: MockClock, exits: None
) -> None:
    for left in (True, False):
        told: list[str] = []
        driver = Leaving()
        driver.peer.left = left
        began = trio.current_time()
        async with leaving_on_signals(lambda driver=driver: cast(Driver, driver), told.append):
            signal.raise_signal(signal.SIGTERM)
            await driver.stopped.wait()
        assert driver.asked == ["leave"]
        assert trio.current_time() - began == pytest.approx(0 if left else LEAVE_S, abs=0.1)
        assert told[0] == "leaving"
        assert len(told) == (1 if left else 2)


@pytest.mark.trio
async def test_a_member_of_a_run_that_is_over_waits_for_nobody(
    autojump_clock: MockClock, exits: None
) -> None:
    told: list[str] = []
    driver = Leaving()
    driver.peer.work = rounds(over=True)
    began = trio.current_time()
    async with leaving_on_signals(lambda: cast(Driver, driver), told.append):
        signal.raise_signal(signal.SIGTERM)
        await driver.stopped.wait()
    assert trio.current_time() - began == pytest.approx(0, abs=0.1)
    assert (driver.asked, told) == ([], ["leaving"])


@pytest.mark.trio
async def test_a_second_sigint_ends_it_at_once_and_a_second_sigterm_does_not(
    autojump_clock: MockClock, exits: None
) -> None:
    async def impatient(driver: Leaving) -> None:
        async with leaving_on_signals(lambda: cast(Driver, driver), lambda line: None):
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
                assert not driver.stopped.is_set()
                signal.raise_signal(number)
                await trio.sleep(0.5)

    with pytest.raises(BaseExceptionGroup) as caught:
        await impatient(Leaving())
    assert exit_code(caught) == 130


@pytest.mark.trio
async def test_a_node_whose_workload_was_given_up_says_goodbye_and_stops_for_that_reason(
    autojump_clock: MockClock,
) -> None:
    driver, stopped = Leaving(), list[str]()
    gave_up = trio.Event()
    driver.tensors = SimpleNamespace(gave_up=gave_up, gave_up_why="a bug (3 times in a row)")
    driver.peer.left = True
    driver.stop = stopped.append
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch_workload, cast(Driver, driver), lambda line: None)
        await trio.sleep(60)
        assert driver.asked == stopped == []
        gave_up.set()
    assert driver.asked == ["leave"]
    assert stopped == ["a bug (3 times in a row)"]


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


@pytest.mark.trio
@pytest.mark.parametrize("lacks", [(), ("B",), ("B", "C")])
async def test_a_node_says_that_it_serves_the_result_and_who_is_not_known_to_have_it(
    autojump_clock: MockClock, lacks: tuple[str, ...]
) -> None:
    """B never comes to the result, C does after ten seconds."""
    made = rounds(over=True)
    made.metrics = cast(Any, SimpleNamespace(newest=None))
    made.participant = cast(Any, SimpleNamespace(version=3))
    names = {"A": "lab1", "B": "lab2", "C": "lab3"}

    def last_sync(member: str) -> int:
        late = member in lacks and (member == "B" or trio.current_time() - began < 10)
        return 2 if late else 3

    peer = SimpleNamespace(
        me="A",
        work=made,
        settings=SimpleNamespace(name="lab1"),
        roster=SimpleNamespace(members=list(names), everyone=list(names), departed={}),
        alive=lambda member: True,
        gossip=SimpleNamespace(
            book=SimpleNamespace(get=lambda m: SimpleNamespace(name=names[m], last_sync=last_sync(m)))
        ),
    )
    stopped = trio.Event()
    driver = SimpleNamespace(
        peer=peer,
        tensors=SimpleNamespace(exported_version=3),
        store=SimpleNamespace(path=Path("data")),
        stop=stopped.set,
    )
    began = trio.current_time()
    told: list[str] = []
    made.is_over = False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ends.watch_end, cast(Driver, driver), told.append)
        await trio.sleep(0.1)
        made.is_over = True
        await stopped.wait()
    serving = ["serving the result until every member has it (at most 60 s)"] if lacks else []
    missing = ["not known to have the result: lab2"] if lacks else []
    assert told[1:] == serving + missing

"""The made-up network: order, loss, cuts, and what the ends are told."""

import heapq
from collections.abc import Callable
from typing import Any

from simulations.network import (
    CALM,
    DIAL_TIMEOUT_NS,
    KEEP_ALIVE_NS,
    SECOND,
    Cut,
    Host,
    Loss,
    Network,
    Weather,
)


class Harness:
    """A heap of events around a network of three machines that only listen."""

    def __init__(self, seed: int = 1, *, given: bool = True) -> None:
        self.now = 0
        self.down: set[str] = set()
        self.received: list[tuple[str, str, bytes]] = []
        self.told: list[tuple[int, str, str, str]] = []
        self.lost: list[str] = []
        self._queue: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._sequence = 0
        host = Host(
            now=lambda: self.now,
            later=self.later,
            deliver=lambda receiver, sender, data: self.received.append((receiver, sender, data)),
            connected=lambda end, other: self.told.append((self.now, "up", end, other)),
            disconnected=lambda end, other: self.told.append((self.now, "down", end, other)),
            answers=lambda machine: machine not in self.down,
            plugged=lambda machine: machine not in self.down,
            kind_of=lambda data: data[:1].decode(),
            lost=lambda data, how: self.lost.append(how),
        )
        self.network = Network(seed, Weather(), host, given=given)
        for machine in "abc":
            self.network.add(machine)
        self.run(SECOND)

    def later(self, delay_ns: int, function: Callable[..., None], *arguments: Any) -> None:
        self._sequence += 1
        heapq.heappush(self._queue, (self.now + delay_ns, self._sequence, function, arguments))

    def run(self, span_ns: int) -> None:
        end = self.now + span_ns
        while self._queue and self._queue[0][0] <= end:
            self.now, _, function, arguments = heapq.heappop(self._queue)
            function(*arguments)
        self.now = end

    def send(self, count: int, sender: str = "a", receiver: str = "b") -> None:
        for number in range(count):
            self.network.send(sender, receiver, b"%d" % number)

    @property
    def numbers(self) -> list[int]:
        return [int(data) for _, _, data in self.received]


def test_all_machines_are_connected_and_told_so_once() -> None:
    harness = Harness()
    assert sorted((end, other) for _, what, end, other in harness.told) == [
        ("a", "b"), ("a", "c"), ("b", "a"), ("b", "c"), ("c", "a"), ("c", "b")
    ]  # fmt: skip
    assert harness.network.connected("a") == ["b", "c"]


def test_a_stream_keeps_its_order() -> None:
    harness = Harness()
    harness.send(200)
    harness.run(SECOND)
    assert harness.numbers == list(range(200))


def test_a_dropped_message_is_missing_and_the_rest_stays_in_order() -> None:
    harness = Harness()
    harness.network.loss = Loss(drop=0.3)
    harness.send(200)
    harness.run(SECOND)
    assert harness.numbers == sorted(harness.numbers)
    assert len(harness.numbers) + harness.lost.count("dropped") == 200
    assert 20 < harness.lost.count("dropped") < 120


def test_a_reset_tells_both_ends_loses_what_is_in_flight_and_is_dialled_again() -> None:
    harness = Harness()
    harness.send(5)
    harness.network.loss = Loss(reset=1.0)
    harness.send(1)
    harness.network.loss = CALM
    told = [(what, end) for at, what, end, _ in harness.told if at == harness.now and what == "down"]
    assert sorted(told) == [("down", "a"), ("down", "b")]
    harness.run(SECOND)
    assert harness.numbers == []
    assert "b" in harness.network.connected("a")


def test_copies_come_late_and_only_across_a_reconnection() -> None:
    harness = Harness()
    harness.network.loss = Loss(ghost=1.0)
    harness.send(3)
    harness.run(10 * SECOND)
    assert harness.numbers == [0, 1, 2]  # no reconnection, so no copy
    harness.send(3)
    harness.network.loss = CALM
    harness.run(SECOND // 10)
    harness.network.disconnect("a", "b")
    harness.run(10 * SECOND)
    assert sorted(harness.numbers) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_a_short_cut_is_told_to_nobody_and_a_long_one_to_both_ends_after_the_keep_alive() -> None:
    harness = Harness()
    cut = Cut(frozenset("a"), both=False)
    before = len(harness.told)
    harness.network.cut(cut)
    harness.run(KEEP_ALIVE_NS // 2)
    harness.network.heal(cut)
    harness.run(KEEP_ALIVE_NS)
    assert harness.told[before:] == []
    at = harness.now
    harness.network.cut(cut)
    harness.run(2 * KEEP_ALIVE_NS)
    told = harness.told[before:]
    assert {(when - at, what) for when, what, _, _ in told} == {(KEEP_ALIVE_NS, "down")}
    assert sorted(end for _, _, end, _ in told) == ["a", "a", "b", "c"]
    harness.network.heal(cut)
    harness.run(SECOND)
    assert "b" in harness.network.connected("a")


def test_a_one_way_cut_lets_the_other_way_through() -> None:
    harness = Harness()
    harness.network.cut(Cut(frozenset("a"), both=False))
    harness.send(3, "a", "b")
    harness.send(3, "b", "a")
    harness.run(SECOND)
    assert {(receiver, sender) for receiver, sender, _ in harness.received} == {("a", "b")}


def test_what_a_cut_holds_back_arrives_in_order_when_it_heals() -> None:
    both_seen = set()
    for seed in range(12):
        harness = Harness(seed)
        cut = Cut(frozenset("a"), both=True)
        harness.network.cut(cut)
        harness.send(3)
        harness.run(SECOND)
        harness.network.heal(cut)
        harness.send(1)
        harness.run(SECOND)
        assert harness.numbers in ([0, 1, 2, 0], [0])  # held, or lost
        both_seen.add(len(harness.numbers))
    assert both_seen == {1, 4}


def test_a_crash_is_told_to_the_others_at_once() -> None:
    harness = Harness()
    before, at = len(harness.told), harness.now
    harness.down.add("a")
    harness.network.crash("a")
    harness.run(SECOND)
    told = harness.told[before:]
    assert sorted((what, end, other) for _, what, end, other in told) == [
        ("down", "b", "a"),
        ("down", "c", "a"),
    ]
    assert all(when - at < SECOND // 100 for when, *_ in told)


def test_a_crash_behind_a_cut_is_told_after_the_keep_alive() -> None:
    harness = Harness()
    harness.network.cut(Cut(frozenset("a"), both=True))
    before, at = len(harness.told), harness.now
    harness.down.add("a")
    harness.network.crash("a")
    harness.run(2 * KEEP_ALIVE_NS)
    told = harness.told[before:]
    assert sorted((when - at, end) for when, _, end, _ in told) == [
        (KEEP_ALIVE_NS, "b"),
        (KEEP_ALIVE_NS, "c"),
    ]


def test_announcements_reach_most_and_lose_some_without_a_sign() -> None:
    harness = Harness()
    for number in range(300):
        harness.network.announce("a", b"%d" % number)
    harness.run(SECOND)
    assert 500 < len(harness.received) < 600
    assert len(harness.received) + harness.lost.count("dropped") == 600


def test_links_that_are_not_given_come_up_only_when_somebody_dials() -> None:
    harness = Harness(given=False)
    told: list[str] = []
    assert harness.network.connected("a") == []
    harness.network.dial("a", "b", told.append)
    harness.run(SECOND)
    assert told == [""]
    assert harness.network.connected("a") == ["b"]
    harness.network.disconnect("a", "b")
    harness.run(10 * SECOND)
    assert harness.network.connected("a") == []


def test_a_dial_is_refused_by_who_is_down_and_times_out_behind_a_cut() -> None:
    harness = Harness(given=False)
    told: list[tuple[str, int]] = []
    harness.down.add("b")
    harness.network.dial("a", "b", lambda why: told.append((why, harness.now)))
    harness.network.cut(Cut(frozenset("c"), True))
    harness.network.dial("a", "c", lambda why: told.append((why, harness.now)))
    began = harness.now
    harness.run(10 * SECOND)
    assert [why for why, _ in told] == ["refused", "timed out"]
    assert told[0][1] - began < SECOND // 2
    assert told[1][1] - began == DIAL_TIMEOUT_NS


def test_a_loss_of_one_kind_takes_nothing_else() -> None:
    harness = Harness()
    harness.network.losses_of["1"] = Loss(drop=1.0)
    harness.send(3)
    harness.run(SECOND)
    assert harness.numbers == [0, 2]

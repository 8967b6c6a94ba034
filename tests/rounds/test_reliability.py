"""Whom a coordinator counts on, and who is left out for a while."""

from p2pcoord.consensus.record import Exclusion
from p2pcoord.rounds.reliability import (
    APART_VERSIONS,
    FAILURES_BEFORE_EXCLUSION,
    SUSPECT_PATIENCE_NS,
    Reliability,
)
from tests.round_runner import RoundWorld, started
from tests.script_runner import peer_id


def test_who_is_late_several_rounds_in_a_row_is_excluded_for_a_while() -> None:
    world = RoundWorld()
    world.execute("committee A B C rounds=20 barrier=1s")
    world.execute("hold C train")
    world.execute("begin A")
    world.execute(f"run {FAILURES_BEFORE_EXCLUSION - 1}s")
    assert world.peer("A").roster.is_member(peer_id("C"))
    printed = world.execute("run 2s")
    assert any("excluded peer=C reason='failed 3 rounds: late'" in line for line in printed)


class Detectors:
    """Neighbours as detectors see them."""

    def __init__(self) -> None:
        self.gone: set[str] = set()
        self.suspected: set[str] = set()

    def alive(self, peer: str) -> bool:
        return peer not in self.gone

    def fit(self, peer: str) -> bool:
        return peer not in self.gone | self.suspected


def test_the_work_of_a_suspect_is_waited_for_for_a_while_and_that_of_the_dead_is_not() -> None:
    setting = started("A B C", begin="").participant("A").setting
    detectors = Detectors()
    setting.neighbours = detectors  # type: ignore[assignment]
    reliability = Reliability(setting)
    b, c = peer_id("B"), peer_id("C")
    detectors.suspected = {b}
    reliability.watch([b, c], 10)
    assert reliability.living() == [peer_id("A"), c]
    assert reliability.waited_for(b)
    reliability.watch([b, c], 10 + SUSPECT_PATIENCE_NS)
    assert not reliability.waited_for(b)
    detectors.suspected = set()
    reliability.watch([b, c], 11 + SUSPECT_PATIENCE_NS)
    assert reliability.waited_for(b)
    detectors.gone = {c}
    assert not reliability.waited_for(c)


def test_only_failures_in_a_row_count_and_one_in_a_round() -> None:
    setting = started("A B C", begin="").participant("A").setting
    setting.admissions = excluded = Excluded()  # type: ignore[assignment]
    reliability = Reliability(setting)
    b = peer_id("B")
    for version in range(1, FAILURES_BEFORE_EXCLUSION):
        reliability.failed(b, version, "late")
        reliability.failed(b, version, "late")
    reliability.contributed([b])
    for version in range(11, 11 + FAILURES_BEFORE_EXCLUSION - 1):
        reliability.failed(b, version, "late")
    assert excluded.peers == []
    reliability.failed(b, 20, "late")
    assert excluded.peers == [b]
    for version in range(30, 30 + 2 * FAILURES_BEFORE_EXCLUSION):
        reliability.failed(peer_id("A"), version, "late")
    assert excluded.peers == [b]  # nobody puts itself out


class Excluded:
    def __init__(self) -> None:
        self.peers: list[str] = []

    def exclude(self, exclusion: Exclusion) -> None:
        self.peers.append(exclusion.peer)


def test_nobody_waits_for_the_work_of_who_is_no_member_any_more() -> None:
    world = started("A B C members D", "rounds=1", "barrier=60s", "size=3", begin="")
    world.execute("hold D train")
    world.execute("begin A")
    world.execute("leave D")
    world.execute("run 5s")
    assert not world.peer("A").roster.is_member(peer_id("D"))
    assert world.participant("A").version == 1


def test_two_that_failed_each_other_are_kept_apart_for_some_versions_and_no_longer() -> None:
    reliability = Reliability(started("A B C", begin="").participant("A").setting)
    reliability.accuse("B", "C", (1, 1))
    assert reliability.blamed((1, 1)) == {}
    assert reliability.apart(APART_VERSIONS) == {frozenset("BC")}
    assert reliability.apart(APART_VERSIONS + 1) == frozenset()


def test_to_blame_is_who_is_accused_by_two_and_else_who_accuses_in_two_attempts() -> None:
    reliability = Reliability(started("A B C", begin="").participant("A").setting)
    reliability.accuse("B", "C", (1, 1))
    reliability.accuse("B", "D", (1, 1))
    assert reliability.blamed((1, 1)) == {}
    reliability.accuse("E", "C", (1, 2))
    assert list(reliability.blamed((1, 2))) == ["C"]
    assert reliability.apart(1) == {frozenset("BD")}
    reliability.accuse("B", "E", (2, 1))
    assert list(reliability.blamed((2, 1))) == ["B"]

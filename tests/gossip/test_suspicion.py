"""Suspicion: who is held suspect, for how long, what clears it, and what others are told of it."""

import pytest

from p2pcoord.errors import LocalError
from p2pcoord.gossip.rumors import MAX_RUMORS, Rumor
from p2pcoord.gossip.suspicion import (
    MAX_HEARD,
    MAX_MEMBERS,
    Alive,
    Dead,
    RaiseIncarnation,
    State,
    Suspect,
    Suspicions,
)
from p2pcoord.gossip.version_vector import MAX_COUNTER

SECOND = 1_000_000_000


class Held(Suspicions):
    """Suspicions of "me" about one letter each; `due`: when a suspicion is looked at."""

    def __init__(self, members: str = "abcd", incarnation: int = 1) -> None:
        self.due: dict[str, int] = {}
        super().__init__("me", incarnation, self._note)
        for peer in members:
            self.add(peer, 1, ())

    def _note(self, at: int, peer: str) -> None:
        self.due[peer] = at


def test_who_hears_itself_suspected_raises_its_incarnation_once_for_each():
    held = Held(incarnation=4)
    assert held.hear([Rumor("me", 4, "a", False)], 0) == [RaiseIncarnation(5)]
    assert held.news_for("a") == ((), ("me",))
    assert held.hear([Rumor("me", 4, "b", False)], 0) == []
    # A made-up incarnation costs one step, not a jump.
    assert held.hear([Rumor("me", 2**31, "b", True)], SECOND) == [RaiseIncarnation(6)]


def test_a_guessed_incarnation_costs_its_victim_one_step_however_often_it_comes():
    held = Held()
    guess = Rumor("me", 2**31, "b", True)
    outputs = [output for _ in range(50) for output in held.hear([guess], 0)]
    assert outputs == [RaiseIncarnation(2)]


def test_many_rumors_cost_their_victim_one_write_a_period():
    held = Held()
    outputs = []
    for at in range(1000):
        rumors = [Rumor("me", held.incarnation + n, "b", False) for n in range(MAX_RUMORS)]
        outputs += held.hear(rumors, at * SECOND // 500)
    assert outputs == [RaiseIncarnation(2), RaiseIncarnation(3)]


def test_an_incarnation_raised_elsewhere_spreads_with_our_record():
    held = Held(incarnation=4)
    held.raise_incarnation(4)
    assert held.news_for("a") == ((), ())
    held.raise_incarnation(9)
    assert held.news_for("a") == ((), ("me",))
    assert held.hear([Rumor("me", 8, "b", False)], 0) == []


def test_a_key_whose_incarnations_are_used_up_cannot_go_on():
    held = Held(incarnation=MAX_COUNTER)
    with pytest.raises(LocalError, match="used up"):
        held.hear([Rumor("me", MAX_COUNTER, "b", False)], 0)


def test_accusers_are_other_members():
    held = Held()
    assert held.hear([Rumor("a", 1, "a", False), Rumor("a", 1, "invented", False)], 0) == []
    assert held.hear([Rumor("a", 1, "me", False), Rumor("stranger", 1, "b", False)], 0) == []
    assert held.state("a") is State.ALIVE
    assert held.hear([Rumor("a", 1, "b", False)], 0) == [Suspect("a", 1, "b")]


def test_a_suspect_hears_first_what_is_said_of_it():
    held = Held("abcdefghijklmnop")
    for peer in "bcdefghijklm":
        held.hear([Rumor(peer, 1, "n", False)], 0)
    held.hear([Rumor("a", 1, "o", False)], 0)
    for _ in range(30):
        rumors, _ = held.news_for("a")
        assert rumors[0] == Rumor("a", 1, "me", False)
        assert len(rumors) <= MAX_RUMORS


def test_a_rumor_is_passed_on_once_however_often_it_comes():
    held = Held("abcdefgh")
    held.hear([Rumor("a", 1, "b", False)], 0)
    assert sum(Rumor("a", 1, "b", False) in held.news_for("c")[0] for _ in range(100)) == 4
    assert held.hear([Rumor("a", 1, "b", False)], 1) == []
    assert held.news_for("c") == ((), ())


def test_a_higher_incarnation_clears_a_suspicion_and_its_record_is_passed_on():
    held = Held()
    held.hear([Rumor("a", 1, "b", False)], 0)
    assert held.alive("a", 1, 1) == []
    assert held.alive("a", 2, 1) == [Alive("a", 2)]
    assert held.news_for("c") == ((), ("a",))
    assert held.hear([Rumor("a", 1, "c", False)], 2) == []  # of an incarnation that is over


def test_an_accusation_of_the_new_incarnation_outlives_the_refutation_of_the_old_one():
    held = Held()
    held.hear([Rumor("a", 1, "b", False)], 0)
    held.hear([Rumor("a", 2, "c", False)], 1)
    assert held.alive("a", 2, 2) == [Alive("a", 2), Suspect("a", 2, "c")]
    assert held.alive("a", 3, 3) == [Alive("a", 3)]


def test_an_answer_to_a_question_from_before_the_suspicion_clears_nothing():
    held = Held()
    held.hear([Rumor("a", 1, "b", False)], 5)
    member = held.members["a"]
    assert held.answered(member, 4) == []
    assert held.answered(member, 5) == [Alive("a", 1)]
    assert held.answered(member, 6) == []
    assert held.hear([Rumor("a", 1, "b", False)], 7) == [Suspect("a", 1, "b")]  # who accuses again is heard


def test_a_suspicion_lasts_the_longest_for_one_accuser_and_the_least_for_four():
    def ends(*rumors: Rumor, members: str = "abcdefgh") -> float:
        held = Held(members)
        held.hear(rumors, 0)
        return held.due["a"] / SECOND

    accused = [Rumor("a", 1, origin, False) for origin in "bcdefg"]
    times = [ends(*accused[:count]) for count in (1, 2, 3, 4, 6)]
    assert times == sorted(times, reverse=True)
    assert (times[0], times[3], times[4]) == (30.0, 5.0, 5.0)
    assert ends(Rumor("a", 1, "b", True)) == 5.0  # another's verdict does no more
    assert ends(*accused[:1] * 8) == 30.0  # one voice, however often
    assert ends(accused[0], members="ab") == 5.0  # where nobody can confirm, nobody is waited for
    many = [chr(0x100 + index) for index in range(99)]
    assert ends(accused[0], members="".join(["ab", *many])) == pytest.approx(
        60, abs=0.5
    )  # log10(100) as long


def test_confirmations_that_come_late_end_a_suspicion_now_and_not_in_the_past():
    held = Held("abcdefgh")
    held.hear([Rumor("a", 1, "b", False)], 0)
    held.hear([Rumor("a", 1, origin, False) for origin in "cde"], 16 * SECOND)
    assert held.due["a"] == 16 * SECOND


def test_who_is_asked_a_last_time_is_not_hurried_by_what_others_say():
    held = Held("abcdefgh")
    held.hear([Rumor("a", 1, "b", False)], 0)
    member = held.members["a"]
    assert not held.had_its_chance(member)
    held.wait_for_answer(member, 31 * SECOND)
    assert held.had_its_chance(member)
    held.hear([Rumor("a", 1, origin, True) for origin in "cde"], 30 * SECOND)
    assert held.due["a"] == 31 * SECOND
    assert not held.accused_by_us(member)
    held.failed(member, 30 * SECOND)
    assert held.accused_by_us(member)


def test_a_death_is_passed_on_and_what_is_said_of_the_dead_is_kept_for_their_return():
    held = Held()
    held.hear([Rumor("a", 1, "b", False)], 0)
    assert held.declare_dead(held.members["a"]) == [Dead("a", 1)]
    assert held.state("a") is State.DEAD
    assert held.news_for("c") == ((Rumor("a", 1, "me", True),), ())
    assert held.failed(held.members["a"], 1) == []
    assert held.hear([Rumor("a", 2, "c", False)], 1) == []
    assert held.alive("a", 2, 2) == [Alive("a", 2), Suspect("a", 2, "c")]


def test_who_spreads_a_suspicion_that_was_refuted_is_told_so_in_the_answer():
    held = Held(incarnation=3)
    held.alive("a", 2, 0)
    heard = [Rumor("a", 1, "b", False), Rumor("me", 2, "b", False)]
    assert held.answer_to("b", heard) == ((), ("a", "me"))
    assert held.answer_to("b", [Rumor("c", 1, "b", False)]) == ((), ())


def test_who_suspects_late_whom_all_others_hold_dead_hears_so_in_the_answer():
    held = Held()
    held.hear([Rumor("a", 1, "b", True)], 0)
    held.declare_dead(held.members["a"])
    rumors, _ = held.answer_to("c", [Rumor("a", 1, "c", False)])
    assert Rumor("a", 1, "me", True) in rumors


def test_a_gap_gives_everybody_the_least_time_anew():
    held = Held("abcdefgh")
    held.hear([Rumor("a", 1, "h", True), Rumor("b", 1, "h", False)], 0)
    held.wait_for_answer(held.members["a"], 6 * SECOND)
    held.gap(3600 * SECOND, 3605 * SECOND)
    assert held.due == {"a": 3610 * SECOND, "b": 3630 * SECOND}
    assert not held.had_its_chance(held.members["a"])
    assert held.answered(held.members["b"], 3599 * SECOND) == []  # asked before this process slept


def test_whatever_is_rumored_of_who_was_removed_is_ignored():
    held = Held()
    held.hear([Rumor("a", 1, "b", False)], 0)
    held.remove("a")
    held.remove("a")
    assert held.state("a") is None
    assert held.news_for("c") == ((), ())
    assert held.hear([Rumor("a", 1, "b", False), Rumor("c", 1, "a", False)], 1) == []
    assert held.alive("a", 5, 1) == []


def test_members_and_what_is_remembered_of_them_are_bounded():
    held = Held("")
    for index in range(MAX_MEMBERS):
        held.add(str(index), 1, ())
    with pytest.raises(LocalError):
        held.add("one more", 1, ())
    for origin in range(1, 2 * MAX_HEARD):
        held.hear([Rumor("0", 1, str(origin), False)], 0)
    assert len(held.members["0"].heard) == MAX_HEARD

"""Plans: how data is dealt, and which plans a member refuses."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcoord.errors import RemoteError
from p2pcoord.rounds.plan import (
    MAX_ASSIGNMENTS,
    Assignment,
    Plan,
    Ranges,
    check_plan,
    deal,
    inherited,
    least_loaded,
    replaced,
    split,
)

lengths = st.integers(1, 400)
parts = st.integers(1, 40)
offsets = st.integers(0, 1 << 62)


def plan(*assignments: Assignment) -> Plan:
    return Plan(1, 1, 0, bytes(32), assignments, 1_000, "coordinator")


def samples(ranges: Ranges) -> list[int]:
    return [i for low, high in ranges for i in range(low, high)]


def dealt(length: int, count: int, version: int, offset: int) -> list[list[int]]:
    return [samples(ranges) for ranges in deal(length, count, version, offset)]


@given(lengths, parts, st.integers(1, 1000), offsets)
def test_dealing_covers_all_samples_in_nearly_equal_parts(
    length: int, count: int, version: int, offset: int
) -> None:
    shares = dealt(length, count, version, offset)
    assert len(shares) == count
    assert {i for share in shares for i in share} == set(range(length))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


@given(st.data())
def test_with_samples_enough_for_all_each_sample_is_dealt_once(data: st.DataObject) -> None:
    count = data.draw(parts)
    length = data.draw(st.integers(count, 400))
    shares = dealt(length, count, data.draw(st.integers(1, 1000)), data.draw(offsets))
    assert sorted(i for share in shares for i in share) == list(range(length))


@given(lengths, parts, st.integers(1, 1000), offsets)
def test_what_is_dealt_is_a_plan_that_members_accept(
    length: int, count: int, version: int, offset: int
) -> None:
    ranges = deal(length, count, version, offset)
    check_plan(plan(*(Assignment(i, f"m{i}", r) for i, r in enumerate(ranges))), length)


def test_the_deal_begins_elsewhere_each_version_and_goes_on_at_the_beginning_after_the_end() -> None:
    assert deal(10, 2, 0, 3) == [((0, 5),), ((5, 10),)]
    assert deal(10, 2, 1, 3) == [((3, 8),), ((8, 10), (0, 3))]
    assert deal(10, 2, 2, 3) == [((6, 10), (0, 1)), ((1, 6),)]


def test_without_dealt_data_every_part_is_empty() -> None:
    assert deal(0, 3, 5, 7) == [(), (), ()]


@given(st.integers(0, 400), parts)
def test_splitting_gives_each_sample_to_exactly_one_in_order_and_nearly_equal(
    length: int, count: int
) -> None:
    shares = split(length, count)
    assert len(shares) == count
    assert [i for ranges in shares for i in samples(ranges)] == list(range(length))
    sizes = [len(samples(ranges)) for ranges in shares]
    assert max(sizes) - min(sizes) <= 1
    assert all(high > low for ranges in shares for low, high in ranges)


@given(st.permutations(range(6)))
def test_assignments_may_come_in_any_order(order: list[int]) -> None:
    check_plan(plan(*(Assignment(i, "m", ((i, i + 1),)) for i in order)), 6)


@pytest.mark.parametrize(
    "assignments",
    [
        (),
        (Assignment(1, "a", ((0, 1),)),),
        (Assignment(0, "a", ((0, 1),)), Assignment(0, "b", ((1, 2),))),
        (Assignment(0, "a", ((0, 1),)), Assignment(2, "b", ((1, 2),))),
        (Assignment(-1, "a", ((0, 1),)), Assignment(0, "b", ((1, 2),))),
        tuple(Assignment(i, "a", ((0, 1),)) for i in range(MAX_ASSIGNMENTS + 1)),
    ],
    ids=["none", "not from 0", "twice", "a gap", "negative", "too many"],
)
def test_a_plan_numbers_its_assignments_from_0_without_gaps(assignments: tuple[Assignment, ...]) -> None:
    with pytest.raises(RemoteError) as caught:
        check_plan(plan(*assignments), 10)
    assert caught.value.kind == "bad_plan"


def test_a_plan_may_have_as_many_assignments_as_a_record_can_name() -> None:
    check_plan(plan(*(Assignment(i, "a", ((0, 1),)) for i in range(MAX_ASSIGNMENTS))), 10)


@pytest.mark.parametrize("bad", [(-1, 3), (3, 3), (4, 3), (0, 11), (10, 11)])
def test_ranges_lie_inside_the_training_data(bad: tuple[int, int]) -> None:
    with pytest.raises(RemoteError) as caught:
        check_plan(plan(Assignment(0, "a", ((0, 5), bad))), 10)
    assert caught.value.kind == "bad_plan"
    assert "assignment 0" in caught.value.detail
    check_plan(plan(Assignment(0, "a", ((0, 5), (9, 10)))), 10)


def test_a_replacement_changes_the_member_of_one_index_and_nothing_else() -> None:
    before = (Assignment(0, "a", ((0, 1),)), Assignment(1, "b", ((1, 2),)))
    assert replaced(before, 1, "c") == (before[0], Assignment(1, "c", ((1, 2),)))
    assert replaced(before, 7, "c") == before


def test_a_plan_is_outranked_by_a_higher_version_then_term_then_revision() -> None:
    def rank(version: int, term: int, revision: int) -> tuple[int, int, int]:
        return Plan(term, version, revision, b"", (), 0, "c").rank

    assert rank(2, 1, 0) > rank(1, 9, 9)
    assert rank(2, 2, 0) > rank(2, 1, 9)
    assert rank(2, 2, 1) > rank(2, 2, 0)


# Who does what instead


def given(*members: str) -> tuple[Assignment, ...]:
    return tuple(Assignment(i, member, ()) for i, member in enumerate(members))


def members_of(assignments: tuple[Assignment, ...]) -> str:
    return "".join(assignment.member for assignment in assignments)


def test_the_least_loaded_has_the_fewest_assignments_to_finish_and_comes_first() -> None:
    assert least_loaded(given("a", "b"), "ab", ()) == "a"
    assert least_loaded(given("a", "b"), "ba", ()) == "b"
    assert least_loaded(given("a", "a", "b"), "ab", ()) == "b"
    assert least_loaded(given("a", "a", "b"), "ab", {0, 1}) == "a"
    assert least_loaded(given("a", "b"), "abc", ()) == "c"


def test_what_the_gone_have_not_finished_is_inherited_by_the_living_evenly() -> None:
    whole = plan(*given("a", "x", "x", "b", "x"))
    assert members_of(inherited(whole, "ab", ())) == "aabba"
    assert members_of(inherited(whole, "ab", {1, 2, 4})) == "axxbx"
    assert members_of(inherited(whole, "abx", ())) == "axxbx"


def test_a_plan_names_its_members_once_in_order() -> None:
    assert plan(*given("b", "a", "b")).members == ("b", "a")

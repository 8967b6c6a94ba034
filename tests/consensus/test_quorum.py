from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcoord.consensus.quorum import (
    COMMITTEE_SIZES,
    MAX_SIGNATURES,
    MAX_VOTERS,
    Committee,
    has_majority,
    largest_odd,
    majority,
)
from p2pcoord.errors import RemoteError

PEERS = "ABCDEFGHIJ"
voters = st.lists(st.sampled_from(PEERS), min_size=1, max_size=MAX_VOTERS, unique=True).map(tuple)
crowds = st.frozensets(st.sampled_from(PEERS))
committees = st.builds(Committee, voters, st.one_of(st.just(()), voters))


@given(committees, crowds, crowds)
def test_two_quorums_of_a_committee_share_a_voter(
    committee: Committee, one: frozenset[str], other: frozenset[str]
) -> None:
    if committee.is_quorum(one) and committee.is_quorum(other):
        assert one & other & set(committee.everyone)


@given(voters, voters, crowds, crowds)
def test_a_quorum_of_a_joint_committee_shares_a_voter_with_one_of_either_half(
    new: tuple[str, ...], old: tuple[str, ...], one: frozenset[str], other: frozenset[str]
) -> None:
    for half in (new, old):
        if Committee(new, old).is_quorum(one) and Committee(half).is_quorum(other):
            assert one & other & set(half)


@given(committees, crowds)
def test_a_quorum_is_a_majority_of_each_half_and_nobody_else_counts(
    committee: Committee, crowd: frozenset[str]
) -> None:
    halves = [committee.voters, *([committee.outgoing] if committee.outgoing else [])]
    expected = all(2 * len(crowd & set(half)) > len(half) for half in halves)
    assert committee.is_quorum(crowd) is expected
    assert committee.is_quorum(crowd & set(committee.everyone)) is expected


@given(committees, crowds, crowds)
def test_more_voters_never_undo_a_quorum(
    committee: Committee, crowd: frozenset[str], more: frozenset[str]
) -> None:
    assert not committee.is_quorum(crowd) or committee.is_quorum(crowd | more)


@pytest.mark.parametrize("size", range(1, MAX_VOTERS + 1))
def test_a_majority_is_the_smallest_number_of_which_two_always_meet(size: int) -> None:
    group = PEERS[:size]
    for count in range(size + 1):
        meets = all(set(a) & set(b) for a in combinations(group, count) for b in combinations(group, count))
        assert meets is (count >= majority(size))
        assert has_majority(group, group[:count]) is (count >= majority(size))


def test_everyone_is_listed_once_incoming_voters_first() -> None:
    assert Committee(("C", "D"), ("A", "C")).everyone == ("C", "D", "A")
    assert Committee(("C", "D")).everyone == ("C", "D")


@pytest.mark.parametrize(
    "committee",
    [
        Committee(()),
        Committee(("A", "A")),
        Committee(("A",), ("B", "B")),
        Committee(tuple(PEERS[: MAX_VOTERS + 1])),
        Committee(("A",), tuple(PEERS[: MAX_VOTERS + 1])),
    ],
)
def test_an_impossible_committee_is_refused(committee: Committee) -> None:
    with pytest.raises(RemoteError, match="bad_committee"):
        committee.check()


@given(committees)
def test_every_other_committee_passes_and_never_has_more_voters_than_signatures_are_read(
    committee: Committee,
) -> None:
    committee.check()
    assert len(committee.everyone) <= MAX_SIGNATURES


@given(st.integers(0, 20), st.integers(0, 20))
def test_the_largest_odd_size_fits_and_nothing_larger_does(available: int, limit: int) -> None:
    size = largest_odd(available, limit)
    assert size <= min(available, limit)
    assert size in (0, *COMMITTEE_SIZES)
    assert not any(size < other <= min(available, limit) for other in COMMITTEE_SIZES)

"""Attempts: made from headers by the coordinator, checked against them by every voter."""

from collections.abc import Mapping, Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pcoord.aggregation.contribution import ContributionHeader
from p2pcoord.aggregation.mean import Factors, Mean
from p2pcoord.aggregation.tree import build_tree
from p2pcoord.content import ContentRef
from p2pcoord.errors import LocalError, RemoteError
from p2pcoord.rounds.attempt import Attempt, Entry, check_attempt, contributors_in_order, make_attempt
from simulations import quadratic
from tests.script_runner import authority_of, peer_id

A = authority_of("A")
SIZE = 44
MEAN = Mean(clip_norm=1.0)
STEP = quadratic.rules(rounds=1).step_parameters(1)


def header(letter: str, assignment: int, **changes: object) -> ContributionHeader:
    content = ContentRef(bytes([assignment, ord(letter)]) * 16, SIZE)
    said = ContributionHeader(
        1, assignment, 1, peer_id(letter), bytes(32), content, 10 + assignment, 3, 0.5 * assignment, 1.0, 7
    )
    return authority_of(letter).sign(msgspec.structs.replace(said, **changes))


HEADERS = [header("B", 0), header("C", 1), header("D", 2), header("B", 3), header("E", 4)]


def attempt_over(headers: Sequence[ContributionHeader], mean: Mean = MEAN, fan_out: int = 2) -> Attempt:
    return make_attempt(
        A,
        headers,
        term=2,
        version=1,
        number=1,
        parent=ContentRef(bytes(32), 8),
        mean=mean,
        tree=build_tree(contributors_in_order(sorted(headers, key=lambda h: h.slot)), fan_out),
        step=STEP,
        validation=(),
    )


def by_hash(headers: Sequence[ContributionHeader]) -> dict[bytes, ContributionHeader]:
    return {A.hash(h): h for h in headers}


def check(attempt: Attempt, headers: Mapping[bytes, ContributionHeader], fan_out: int = 2) -> None:
    check_attempt(attempt, headers, authority_of("F"), mean=MEAN, fan_out=fan_out, content_bytes=SIZE)


def test_more_samples_than_were_dealt_are_refused_by_who_knows_the_plan() -> None:
    attempt, headers = attempt_over(HEADERS), by_hash(HEADERS)
    known = {"mean": MEAN, "fan_out": 2, "content_bytes": SIZE}
    check_attempt(attempt, headers, A, **known, most_samples=lambda assignment: 10 + assignment)
    with pytest.raises(RemoteError, match="samples"):
        check_attempt(attempt, headers, A, **known, most_samples=lambda assignment: 12)


def refusal(
    attempt: Attempt, headers: Sequence[ContributionHeader] = tuple(HEADERS), fan_out: int = 2
) -> tuple[str, str]:
    with pytest.raises(RemoteError) as caught:
        check(attempt, by_hash(headers), fan_out)
    return caught.value.kind, caught.value.detail


def changed(attempt: Attempt, at: int, **changes: object) -> Attempt:
    entries = list(attempt.entries)
    entries[at] = msgspec.structs.replace(entries[at], **changes)
    return msgspec.structs.replace(attempt, entries=tuple(entries))


@settings(max_examples=30)
@given(st.permutations(HEADERS), st.integers(1, 4))
def test_the_same_headers_in_any_order_make_the_same_attempt_and_voters_accept_it(
    headers: list[ContributionHeader], fan_out: int
) -> None:
    made = attempt_over(headers, fan_out=fan_out)
    assert made == attempt_over(HEADERS, fan_out=fan_out)
    assert A.hash(made) == A.hash(attempt_over(HEADERS, fan_out=fan_out))
    check(made, by_hash(headers), fan_out)


def test_contributions_are_summed_in_order_of_origin_round_and_assignment_over_each_contributor_once() -> (
    None
):
    made = attempt_over([header("C", 1, origin_round=2), *HEADERS])
    assert [entry.slot for entry in made.entries] == [(1, 0), (1, 1), (1, 2), (1, 3), (1, 4), (2, 1)]
    assert made.tree.members == tuple(peer_id(x) for x in "BCDE")
    assert contributors_in_order(HEADERS) == [peer_id(x) for x in "BCDE"]


def test_weights_follow_from_samples_and_long_updates_are_clipped() -> None:
    made = attempt_over([header("B", 0, samples=30, norm=0.5), header("C", 1, samples=10, norm=4.0)])
    assert [entry.factors for entry in made.entries] == [Factors(0.75, 0.75), Factors(0.0625, 0.25)]


def test_who_has_several_contributions_or_children_sends_a_partial_sum_and_a_leaf_sends_what_it_has() -> None:
    made = attempt_over(HEADERS)
    assert [made.sends_partial(peer_id(x)) for x in "BCDE"] == [True, True, False, False]
    assert [entry.assignment for entry in made.of(peer_id("B"))] == [0, 3]
    wide = attempt_over([*HEADERS, header("E", 5)], fan_out=4)
    assert [wide.sends_partial(peer_id(x)) for x in "BCDE"] == [True, False, False, True]


def test_a_newer_attempt_outranks_an_older_one_by_version_term_and_number() -> None:
    made = attempt_over(HEADERS)
    ranks = [
        msgspec.structs.replace(made, **change).rank
        for change in ({}, {"number": 2}, {"term": 3}, {"version": 2, "term": 1})
    ]
    assert ranks == sorted(ranks)


def test_an_attempt_over_nothing_is_no_attempt() -> None:
    with pytest.raises(LocalError):
        attempt_over([])
    empty = msgspec.structs.replace(attempt_over(HEADERS), entries=())
    assert refusal(empty) == ("bad_attempt", "no contributions")


def test_no_header_comes_along_that_no_entry_names() -> None:
    padding = header("F", 9)
    refused = refusal(attempt_over(HEADERS), [*HEADERS, padding])
    assert refused == ("bad_attempt", "a header that no entry names")


def test_every_header_is_needed() -> None:
    kind, detail = refusal(attempt_over(HEADERS), HEADERS[1:])
    assert kind == "bad_attempt"
    assert "missing" in detail


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"samples": 0}, "bad_contribution"),
        ({"norm": float("inf")}, "bad_contribution"),
        ({"content": ContentRef(bytes(32), SIZE + 1)}, "bad_contribution"),
    ],
)
def test_every_header_is_checked(changes: dict[str, object], kind: str) -> None:
    bad = header("C", 1, **changes)
    made = attempt_over(HEADERS)
    forged = changed(made, 1, header=A.hash(bad), content=bad.content)
    assert refusal(forged, [*HEADERS, bad])[0] == kind


def test_a_header_that_its_contributor_did_not_sign_is_refused() -> None:
    unsigned = msgspec.structs.replace(HEADERS[1], signature=b"")
    headers = [HEADERS[0], unsigned, *HEADERS[2:]]
    assert refusal(attempt_over(HEADERS), headers)[0] == "bad_signature"


@pytest.mark.parametrize(
    "changes",
    [
        {"origin_round": 2},
        {"assignment": 7},
        {"contributor": peer_id("D")},
        {"content": ContentRef(bytes(32), SIZE)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_an_entry_says_what_its_header_says(changes: dict[str, object]) -> None:
    kind, detail = refusal(changed(attempt_over(HEADERS), 1, **changes))
    assert kind == "bad_attempt"
    assert "differ" in detail


def test_an_assignment_counts_once_whoever_did_it() -> None:
    twice = [header("B", 0), header("C", 0), header("D", 2)]
    assert refusal(attempt_over(twice), twice) == ("bad_attempt", "an assignment counts twice")


def test_contributions_come_in_their_order() -> None:
    made = attempt_over(HEADERS)
    swapped = msgspec.structs.replace(made, entries=(made.entries[1], made.entries[0], *made.entries[2:]))
    assert refusal(swapped) == ("bad_attempt", "contributions out of order")


def test_the_tree_covers_exactly_the_contributors_and_is_not_wider_than_the_run_says() -> None:
    made = attempt_over(HEADERS)
    for letters in ("BCD", "BCDEF"):
        tree = build_tree([peer_id(x) for x in letters], 2)
        assert refusal(msgspec.structs.replace(made, tree=tree))[0] == "bad_tree"
    assert refusal(attempt_over(HEADERS, fan_out=3))[0] == "bad_tree"


@pytest.mark.parametrize("at", range(len(HEADERS)))
def test_no_weight_is_a_matter_of_opinion(at: int) -> None:
    made = attempt_over(HEADERS)
    entry: Entry = made.entries[at]
    heavier = Factors(entry.factors.parameters + 2**-20, entry.factors.float_buffers)
    kind, detail = refusal(changed(made, at, factors=heavier))
    assert kind == "bad_attempt"
    assert "factors" in detail
    assert refusal(attempt_over(HEADERS, Mean(weighted=False, clip_norm=1.0)))[0] == "bad_attempt"

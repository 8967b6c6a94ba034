import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcoord.consensus.committees import wanted_voters
from p2pcoord.consensus.quorum import COMMITTEE_SIZES, Committee


def wanted(voters: str, *, silent: str = "", gone: str = "", candidates: str = "", limit: int = 7) -> str:
    return "".join(
        wanted_voters(
            Committee(tuple(voters)),
            silent=set(silent),
            gone=set(gone),
            candidates=tuple(candidates),
            limit=limit,
        )
    )


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("A", "A"),
        ("A +B", "A"),  # two voters need both: no better than one
        ("A +BC", "ABC"),
        ("A +BCD", "ABC"),
        ("A +BCDE", "ABCDE"),
        ("ABC +DE", "ABCDE"),
        ("ABCDE +FGH", "ABCDEFG"),
        ("ABC silent:C +D", "ABD"),
        ("ABC silent:BC +D", "ABC"),  # one living and one candidate: no three
        ("ABC silent:BC +DE", "ADE"),
        ("ABC silent:C +DEF", "ABDEF"),
        ("ABC silent:C", "ABC"),  # two of three are a quorum: nothing is gained by fewer
        ("ABCDE silent:DE +F", "ABCDE"),
        ("ABC gone:C", "A"),
        ("ABC gone:C +D", "ABD"),
        ("ABC gone:B silent:C", "A"),
        ("ABCDE gone:E", "ABC"),
        ("ABCDE gone:D silent:E", "ABC"),
        ("ABCDE gone:E silent:D +F", "ABCFD"),  # a silent voter stays rather than that the committee shrinks
        ("A gone:A", "A"),  # nobody else is there: who leaves stays listed
        ("A gone:A +B", "B"),
        ("A gone:A +BCD", "BCD"),
        ("ABC gone:ABC", "ABC"),
        ("ABC +C", "ABC"),  # already a voter
        ("ABC gone:C +C", "A"),
    ],
)
def test_the_committee_that_is_wanted(case: str, expected: str) -> None:
    voters, *rest = case.split()
    parts = {"candidates": "", "silent": "", "gone": ""}
    for part in rest:
        if part.startswith("+"):
            parts["candidates"] = part[1:]
        else:
            name, letters = part.split(":")
            parts[name] = letters
    assert wanted(voters, **parts) == expected  # type: ignore[arg-type]


def test_the_run_s_limit_holds() -> None:
    assert wanted("A", candidates="BCDEFGH", limit=5) == "ABCDE"
    assert wanted("A", candidates="BCDEFGH", limit=1) == "A"
    assert wanted("A", candidates="BCDEFGH", limit=4) == "ABC"


letters = st.lists(st.sampled_from("ABCDEFGHIJ"), unique=True).map("".join)
committees = st.sampled_from(COMMITTEE_SIZES).flatmap(
    lambda n: st.lists(st.sampled_from("ABCDEFGHIJ"), min_size=n, max_size=n, unique=True).map("".join)
)


@given(committees, letters, letters, letters, st.sampled_from(COMMITTEE_SIZES))
def test_laws_of_the_wanted_committee(
    voters: str, silent: str, gone: str, candidates: str, limit: int
) -> None:
    result = wanted(voters, silent=silent, gone=gone, candidates=candidates, limit=limit)
    living = [peer for peer in voters if peer not in silent + gone]
    fresh = [peer for peer in candidates if peer not in voters + gone]

    assert len(result) in COMMITTEE_SIZES
    assert len(set(result)) == len(result)
    assert set(result) <= set(voters) | set(candidates)
    assert len(result) <= max(limit, len(voters))
    # Who has left goes, unless nobody at all could take over.
    remaining = [peer for peer in voters + candidates if peer not in gone]
    assert not set(result) & set(gone) or not remaining or result == voters
    # Living voters keep their order: rotation is steady.
    kept = [peer for peer in result if peer in living]
    assert kept == sorted(kept, key=voters.index)
    # Nobody is brought in while a living voter is sent away.
    assert not set(result) & set(fresh) or set(living) <= set(result)
    # What is wanted stays wanted once it is there.
    if result != voters:
        others = "".join(peer for peer in fresh if peer not in result)
        again = wanted(result, silent=silent, gone=gone, candidates=others, limit=limit)
        assert len(again) <= len(result)


@given(committees)
def test_nothing_changes_while_all_voters_live_and_nobody_new_is_there(voters: str) -> None:
    assert wanted(voters) == voters

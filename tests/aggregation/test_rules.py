"""What each rule declares, what it refuses, and in which words."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcoord.aggregation.pre_aggregation import (
    PRE_AGGREGATIONS,
    check,
    minimum,
    needs_gram,
    pre_aggregation,
    refusal,
)
from p2pcoord.aggregation.rules import RULES, rule
from p2pcoord.errors import UserError

LEAST = {"trimmed_mean": (2, 1), "krum": (2, 3), "multi_krum": (2, 3), "bulyan": (4, 3)}


def test_every_rule_is_found_by_its_name_and_names_its_paper():
    assert list(RULES) == [
        "federated_average",
        "median",
        "trimmed_mean",
        "krum",
        "multi_krum",
        "bulyan",
        "geometric_median",
        "centered_clipping",
    ]
    assert list(PRE_AGGREGATIONS) == ["bucketing", "nearest_neighbour_mixing"]
    for known in (RULES, PRE_AGGREGATIONS):
        for name, chosen in known.items():
            assert chosen.kind == name
            assert " et al. " in chosen.paper
    assert {name: chosen.shape for name, chosen in RULES.items() if not chosen.needs_gram} == {
        "federated_average": "sum",
        "median": "coordinate_wise",
        "trimmed_mean": "coordinate_wise",
    }


@given(st.sampled_from(sorted(LEAST)), st.integers(0, 20), st.integers(0, 100))
def test_a_rule_for_f_of_n_holds_from_its_bound_on(kind, f, n):
    per_byzantine, besides = LEAST[kind]
    chosen = rule(kind, f=f)
    assert chosen.minimum == per_byzantine * f + besides
    refused = chosen.refusal(n)
    assert bool(refused) == (n < chosen.minimum)
    assert chosen.tolerated(n) == f
    if refused and n >= besides:
        allowed = int(refused.rpartition(" ")[2])
        assert not rule(kind, f=allowed).refusal(n)
        assert rule(kind, f=allowed + 1).refusal(n)


@pytest.mark.parametrize(
    ("kind", "options", "n", "needs", "allowed"),
    [
        ("trimmed_mean", {"f": 4}, 8, "f = 4 needs at least 9 vectors (2f + 1)", "with 8, f may be at most 3"),
        ("krum", {"f": 3}, 8, "f = 3 needs at least 9 vectors (2f + 3)", "with 8, f may be at most 2"),
        ("multi_krum", {"f": 2}, 6, "f = 2 needs at least 7 vectors (2f + 3)", "with 6, f may be at most 1"),
        ("multi_krum", {"f": 1, "m": 5}, 5, "m = 5 and f = 1 needs at least 6 vectors (m + f)", "with 5, m may be at most 4"),
        ("bulyan", {"f": 1}, 6, "f = 1 needs at least 7 vectors (4f + 3)", "with 6, f may be at most 0"),
        ("bulyan", {"f": 1}, 2, "f = 1 needs at least 7 vectors (4f + 3)", "even f = 0 needs 3"),
    ],
)  # fmt: skip
def test_too_few_are_refused_with_what_would_be_allowed(kind, options, n, needs, allowed):
    chosen = rule(kind, **options)
    with pytest.raises(UserError) as error:
        check(chosen, (), n)
    assert str(error.value) == f"{kind} with {needs}, there are {n}: {allowed}"
    assert chosen.refusal(chosen.minimum) == ""
    assert chosen.refusal(chosen.minimum - 1) != ""
    assert rule("median").refusal(0) == "median needs at least 1 vector, there are 0"


@pytest.mark.parametrize(
    ("kind", "options", "text"),
    [
        ("mean", {}, "there is no aggregation rule 'mean': use bulyan, centered_clipping, federated_average, "),
        ("krum", {}, "the aggregation rule 'krum': Object missing required field `f`"),
        ("krum", {"f": 1, "m": 2}, "the aggregation rule 'krum' has no 'm': it has f"),
        ("median", {"f": 1}, "the aggregation rule 'median' has no 'f': it has no options"),
        ("krum", {"f": "1"}, "the aggregation rule 'krum': Expected `int`, got `str` - at `$.f`"),
        ("trimmed_mean", {"f": -1}, "trimmed_mean's f must be at least 0, it is -1"),
        ("multi_krum", {"f": 1, "m": 0}, "multi_krum's m must be at least 1, it is 0"),
        ("federated_average", {"clip_norm": 0.0}, "clip_norm must be a positive number, it is 0.0"),
        ("geometric_median", {"smoothing": 0.0}, "smoothing must be a positive number, it is 0.0"),
        ("geometric_median", {"iterations": 0}, "iterations must be 1 to 1000, they are 0"),
        ("centered_clipping", {"radius": float("inf")}, "radius must be a positive number, it is inf"),
        ("centered_clipping", {"radius": 1.0, "iterations": 1001}, "iterations must be 1 to 1000, they are 1001"),
    ],
)  # fmt: skip
def test_parameters_that_cannot_hold_are_refused_in_words(kind, options, text):
    with pytest.raises(UserError) as error:
        rule(kind, **options)
    assert str(error.value).startswith(text)


@pytest.mark.parametrize(
    ("kind", "options", "text"),
    [
        ("mixing", {}, "there is no pre-aggregation 'mixing': use bucketing, nearest_neighbour_mixing"),
        ("bucketing", {"size": 0}, "bucketing's size must be at least 1, it is 0"),
        ("nearest_neighbour_mixing", {"f": -2}, "nearest_neighbour_mixing's f must be at least 0, it is -2"),
    ],
)
def test_so_are_those_of_pre_aggregations(kind, options, text):
    with pytest.raises(UserError) as error:
        pre_aggregation(kind, **options)
    assert str(error.value) == text


def test_a_rule_has_to_hold_for_what_pre_aggregations_leave():
    before = (pre_aggregation("bucketing", size=2),)
    chosen = rule("krum", f=3)
    assert minimum(chosen, before) == 17
    assert refusal(chosen, before, 17) == ""
    assert refusal(chosen, before, 16) == (
        "krum with f = 3 needs at least 9 vectors (2f + 3), there are 8: with 8, f may be at most 2 "
        "(pre-aggregation leaves 8 of 16); 17 contributions would do"
    )
    mixed = (*before, pre_aggregation("nearest_neighbour_mixing", f=5))
    assert minimum(chosen, mixed) == 21
    assert refusal(chosen, mixed, 20) == (
        "nearest_neighbour_mixing with f = 5 needs at least 11 vectors (2f + 1), there are 10: with 10, f may be at most 4 "
        "(pre-aggregation leaves 10 of 20)"
    )


stages = st.lists(
    st.builds(lambda size: pre_aggregation("bucketing", size=size), st.integers(1, 4))
    | st.builds(lambda f: pre_aggregation("nearest_neighbour_mixing", f=f), st.integers(0, 4)),
    max_size=3,
).map(tuple)


@given(st.sampled_from(sorted(LEAST)), st.integers(0, 4), stages)
def test_the_minimum_is_where_refusals_end(kind, f, before):
    chosen = rule(kind, f=f)
    least = minimum(chosen, before)
    assert refusal(chosen, before, least) == ""
    assert refusal(chosen, before, least - 1) != ""
    assert refusal(chosen, before, least + 7) == ""


def test_a_mean_of_means_and_a_long_chain_are_refused():
    bucketing = pre_aggregation("bucketing", size=2)
    assert "use federated_average alone, or a robust rule" in refusal(
        rule("federated_average"), (bucketing,), 8
    )
    assert refusal(rule("median"), (bucketing,) * 5, 800) == (
        "5 pre-aggregations: at most 4 may follow each other"
    )


def test_inner_products_are_needed_where_a_stage_needs_them():
    mixing = pre_aggregation("nearest_neighbour_mixing", f=1)
    assert [needs_gram(rule("median"), before) for before in ((), (mixing,))] == [False, True]
    assert needs_gram(rule("bulyan", f=1))


def test_deciding_about_rules_imports_no_numpy():
    modules = ["combination", "outliers", "pre_aggregation", "rules", "tree"]
    imports = ", ".join(f"p2pcoord.aggregation.{module}" for module in modules)
    code = f"import sys, {imports}; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Trees: who sends to whom, bounds, encodings, and sums taken over them."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcoord.aggregation.mean import Mean
from p2pcoord.aggregation.summation import weighted_sum
from p2pcoord.aggregation.tree import Input, Tree, build_tree, check_tree
from p2pcoord.errors import LocalError, RemoteError
from p2pcoord.wire import decode, encode


def names(count: int) -> list[str]:
    return [f"peer{number}" for number in range(count)]


sizes = st.integers(1, 60)
fan_outs = st.integers(1, 8)


@st.composite
def arbitrary_trees(draw):
    """Any valid tree: parents that never decrease and come before their children."""
    count = draw(sizes)
    parents, least = [], 0
    for at in range(count - 1):
        least = draw(st.integers(least, at))
        parents.append(least)
    return Tree(tuple(names(count)), tuple(parents))


@given(sizes, fan_outs, st.data())
def test_a_built_tree_covers_all_once_under_the_bounds_and_any_root(count, fan_out, data):
    contributors = names(count)
    root = data.draw(st.none() | st.sampled_from(contributors))
    tree = build_tree(contributors, fan_out, root)
    check_tree(tree, contributors, fan_out)
    assert tree.root == (root or contributors[0])
    assert tree == build_tree(contributors, fan_out, root)
    # From below at most fan_out vectors; the result from the one parent.
    assert all(len(tree.inputs(member)) <= 1 + fan_out for member in contributors)
    smallest = next(
        depth for depth in range(count) if sum(fan_out**level for level in range(depth + 1)) >= count
    )
    assert tree.depth == smallest


@given(arbitrary_trees())
def test_parents_and_children_agree_and_every_way_up_ends_at_the_root(tree):
    reached = 0
    for member in tree.members:
        for child in tree.children(member):
            assert tree.parent(child) == member
            assert tree.level(child) == tree.level(member) + 1
            reached += 1
    assert reached == len(tree.members) - 1
    assert tree.parent(tree.root) is None
    assert tree.depth == max(tree.level(member) for member in tree.members)
    assert decode(encode(tree), Tree) == tree


def test_a_tree_of_seven_with_fan_out_two_has_three_levels():
    tree = build_tree(names(7), 2)
    assert tree.children("peer0") == ("peer1", "peer2")
    assert tree.children("peer1") == ("peer3", "peer4")
    assert tree.children("peer2") == ("peer5", "peer6")
    assert tree.depth == 2
    assert tree.inputs("peer0") == (Input("peer0", False), Input("peer1", True), Input("peer2", True))
    assert tree.inputs("peer1") == (Input("peer1", False), Input("peer3", False), Input("peer4", False))
    assert tree.inputs("peer6") == (Input("peer6", False),)
    assert "peer6" in tree
    assert "peer7" not in tree


def test_another_root_brings_other_interior_members():
    trees = [build_tree(names(9), 3, root) for root in ("peer0", "peer3", "peer6")]
    interior = [{member for member in names(9) if tree.children(member)} for tree in trees]
    assert interior == [{"peer0", "peer1", "peer2"}, {"peer3", "peer4", "peer5"}, {"peer6", "peer7", "peer8"}]


def vectors_of(count: int, seed: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {name: draw.standard_normal(16).astype(np.float32) for name in names(count)}


def sum_over(tree: Tree, vectors, factors) -> np.ndarray:
    """Every member does what `inputs` says, farthest first; only what a child sent is used."""
    sent = {}
    for member in reversed(tree.members):
        out = np.empty(16, np.float32)
        terms = [
            (sent[entry.member], 1.0) if entry.partial else (vectors[entry.member], factors[entry.member])
            for entry in tree.inputs(member)
        ]
        assert weighted_sum(terms, out)
        sent[member] = out
    return sent[tree.root]


def factors_of(contributors, samples) -> dict[str, float]:
    found = Mean().factors(samples, [1.0] * len(samples))
    return {name: factor.parameters for name, factor in zip(contributors, found, strict=True)}


@given(arbitrary_trees(), st.integers(0, 2**32 - 1))
def test_a_sum_over_any_tree_is_the_weighted_mean_within_rounding(tree, seed):
    vectors = vectors_of(len(tree.members), seed)
    samples = np.random.default_rng(seed).integers(1, 100, len(tree.members)).tolist()
    factors = factors_of(tree.members, samples)
    exact = np.average(
        np.stack([vectors[member] for member in tree.members]).astype(np.float64), axis=0, weights=samples
    )
    largest = max(np.abs(vector).max() for vector in vectors.values())
    # n additions of numbers up to `largest`, and n rounded factors and products: Higham 2002, equation 4.4.
    bound = 2 * len(tree.members) * 2.0**-23 * float(largest)
    assert np.abs(sum_over(tree, vectors, factors) - exact).max() <= bound


@given(st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_a_star_gives_the_bits_of_the_sum_in_list_order(count, seed):
    tree, vectors = build_tree(names(count), max(1, count - 1)), vectors_of(count, seed)
    factors = factors_of(names(count), list(range(1, count + 1)))
    listed = np.empty(16, np.float32)
    weighted_sum([(vectors[name], factors[name]) for name in names(count)], listed)
    assert sum_over(tree, vectors, factors).tobytes() == listed.tobytes()


@given(st.integers(2, 30), st.integers(0, 2**32 - 1))
def test_a_chain_adds_from_its_end_and_applies_every_factor_once(count, seed):
    tree, vectors = build_tree(names(count), 1), vectors_of(count, seed)
    factors = factors_of(names(count), list(range(1, count + 1)))
    total = vectors[names(count)[-1]] * np.float32(factors[names(count)[-1]])
    for name in reversed(names(count)[:-1]):
        total = vectors[name] * np.float32(factors[name]) + total
    assert sum_over(tree, vectors, factors).tobytes() == total.tobytes()


@pytest.mark.parametrize(
    ("members", "parents"),
    [
        ([], []),
        (["a", "a"], [0]),
        (["a", "b"], []),
        (["a", "b"], [1]),  # its own parent
        (["a", "b", "c"], [0, 2]),  # a cycle would need a parent that comes later
        (["a", "b", "c", "d"], [0, 1, 0]),  # not in breadth-first order: a second encoding
        (["a", "b"], [-1]),
    ],
)
def test_what_is_no_tree_cannot_be_decoded(members, parents):
    with pytest.raises(RemoteError) as error:
        decode(encode([members, parents]), Tree)
    assert error.value.kind == "bad_type"


@pytest.mark.parametrize(
    ("tree", "word"),
    [
        (Tree(("peer0", "peer1", "peer2", "x"), (0, 0, 1)), "x and 0 more are no contributors"),
        (Tree(("peer0", "peer1"), (0,)), "peer2 and 0 more contributors are not in it"),
        (Tree(("peer0", "peer1", "peer2", "peer3"), (0, 0, 0)), "3 children"),
    ],
)
def test_a_tree_over_other_members_or_too_wide_is_refused(tree, word):
    contributors = names(4) if "children" in word else names(3)
    with pytest.raises(RemoteError, match=word) as error:
        check_tree(tree, contributors, 2)
    assert error.value.kind == "bad_tree"


@pytest.mark.parametrize(
    ("contributors", "fan_out", "root"),
    [([], 2, None), (["a", "a"], 2, None), (["a"], 0, None), (["a"], 2, "b")],
)
def test_a_tree_that_cannot_be_built_is_misuse(contributors, fan_out, root):
    with pytest.raises(LocalError):
        build_tree(contributors, fan_out, root)


def test_who_is_not_in_the_tree_has_no_place_in_it():
    with pytest.raises(LocalError):
        build_tree(["a"], 2).children("b")


def test_depth_grows_with_the_logarithm():
    depths = [build_tree(names(count), 4).depth for count in (1, 5, 21, 85, 1365, 10_000)]
    assert depths == [0, 1, 2, 3, 5, math.ceil(math.log(3 * 10_000 + 1, 4)) - 1]
    assert all(before < after for before, after in pairwise(depths))


def test_who_must_be_kept_apart_are_not_parent_and_child_and_who_finds_no_place_is_left_out() -> None:
    def apart(one: str, other: str) -> bool:
        return {one, other} in ({"peer0", "peer1"}, {"peer0", "peer4"}, {"peer3", "peer5"})

    tree = build_tree(names(6), 2, apart=apart)
    assert set(tree.members) == set(names(6))
    check_tree(tree, names(6), 2)
    assert not any(apart(parent, child) for parent in tree.members for child in tree.children(parent))
    assert build_tree(names(6), 2, apart=lambda one, other: False) == build_tree(names(6), 2)
    assert build_tree(names(6), 2, apart=lambda one, other: True).members == ("peer0",)

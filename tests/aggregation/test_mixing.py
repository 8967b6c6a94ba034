"""Pre-aggregations as matrices: the means that the papers take, and what follows for weights and inner products."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcoord.aggregation.gram import gram, squared_distances
from p2pcoord.aggregation.mixing import (
    bucketing,
    mix,
    nearest_neighbour_mixing,
    permutation,
    rows_of,
    weights_of,
)
from p2pcoord.aggregation.pre_aggregation import pre_aggregation
from p2pcoord.errors import LocalError
from p2pcoord.float32 import float32

seeds = st.integers(0, 2**63 - 1)


def drawn(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 12)).astype(np.float32)


@given(seeds, st.integers(0, 50))
def test_a_seed_draws_an_order_of_all(seed, n):
    order = permutation(seed, n)
    assert sorted(order) == list(range(n))
    assert order == permutation(seed, n)


def test_orders_are_drawn_alike_and_the_same_everywhere():
    assert permutation(7, 8) == (5, 0, 6, 1, 7, 2, 3, 4)
    firsts = [permutation(seed, 5)[0] for seed in range(2000)]
    assert all(330 < firsts.count(at) < 470 for at in range(5))


@given(seeds, st.integers(1, 20), st.integers(1, 6))
def test_buckets_hold_everybody_once(seed, n, size):
    rows = drawn(seed, n)
    order = permutation(seed, n)
    matrix = bucketing(order, size)
    assert matrix.shape == (-(-n // size), n)
    for bucket, row in enumerate(matrix):
        inside = list(order[bucket * size : (bucket + 1) * size])
        np.testing.assert_allclose(row @ rows, rows[inside].mean(axis=0), atol=1e-6)
    assert ((matrix > 0).sum(axis=0) == 1).all()


@given(seeds, st.integers(0, 4), st.integers(0, 6))
def test_each_is_mixed_with_its_nearest_and_itself(seed, f, more):
    n = 2 * f + 1 + more
    rows = drawn(seed, n)
    matrix = nearest_neighbour_mixing(gram(rows), f)
    distances = squared_distances(gram(rows))
    for at in range(n):
        nearest = set(np.argsort(distances[at])[: n - f].tolist())
        assert set(np.flatnonzero(matrix[at]).tolist()) == nearest
        assert at in nearest
    assert np.allclose(matrix.sum(axis=1), 1)


def test_of_equally_near_ones_the_first_are_taken_but_itself_before_all():
    assert (nearest_neighbour_mixing(np.zeros((3, 3)), 1) > 0).tolist() == [
        [True, True, False],
        [True, True, False],
        [True, False, True],
    ]


@given(seeds, st.permutations(["bucketing", "nearest_neighbour_mixing", "bucketing"]))
def test_stages_together_are_the_stages_one_by_one(seed, kinds):
    rows = drawn(seed, 12)
    options = {"bucketing": {"size": 2}, "nearest_neighbour_mixing": {"f": 1}}
    stages = [pre_aggregation(kind, **options[kind]) for kind in kinds]
    matrix, products = mix(stages, 12, gram(rows), seed)
    one_by_one = rows.astype(np.float64)
    for number, stage in enumerate(stages):
        inner = one_by_one @ one_by_one.T
        step, _ = mix([stage], len(inner), inner, seed + number)
        one_by_one = step @ one_by_one
    np.testing.assert_allclose(matrix @ rows, one_by_one, atol=1e-5)
    np.testing.assert_allclose(products, one_by_one @ one_by_one.T, atol=1e-4)
    assert (products == products.T).all()
    weights = np.random.default_rng(seed).random(len(matrix))
    np.testing.assert_allclose(np.array(weights_of(matrix, weights)) @ rows, weights @ one_by_one, atol=1e-4)


@given(seeds, st.integers(1, 9), st.integers(1, 4))
def test_rows_are_sums_of_vectors_in_their_order_by_float32_factors(seed, n, size):
    for row in rows_of(bucketing(permutation(seed, n), size)):
        positions = [at for at, _ in row]
        assert positions == sorted(positions)
        assert {factor for _, factor in row} == {float32(1 / len(row))}


def test_bucketing_needs_no_inner_products_and_mixing_does():
    matrix, products = mix([pre_aggregation("bucketing", size=3)], 7, None, 0)
    assert matrix.shape == (3, 7)
    assert products is None
    with pytest.raises(LocalError, match="needs inner products"):
        mix([pre_aggregation("nearest_neighbour_mixing", f=1)], 7, None, 0)

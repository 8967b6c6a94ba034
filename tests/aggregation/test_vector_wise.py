"""Weights from inner products: what the papers' formulas give on the vectors themselves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pcoord.aggregation.gram import gram, squared_distances, sums_to_nearest
from p2pcoord.aggregation.rules import rule
from p2pcoord.aggregation.vector_wise import bulyan_selection, weights_from_gram
from p2pcoord.errors import LocalError

seeds = st.integers(0, 2**32 - 1)
RULES = [
    rule("krum", f=2),
    rule("multi_krum", f=2),
    rule("multi_krum", f=2, m=7),
    rule("bulyan", f=1),
    rule("geometric_median"),
    rule("centered_clipping", radius=1.0, iterations=3),
]

BULYAN = [
    rule("bulyan", f=0),
    rule("bulyan", f=3),
]  # for 1 and 2, one neighbour counts in the end, and nearest pairs tie


def drawn(seed: int, n: int, size: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, size)).astype(np.float32)


def measured(rows: np.ndarray) -> np.ndarray:
    """Squared distances in float64, from the vectors."""
    exact = rows.astype(np.float64)
    return ((exact[:, None] - exact) ** 2).sum(axis=2)


@given(seeds, st.integers(3, 12), st.data())
def test_krums_score_is_the_sum_over_the_nearest_others(seed, n, data):
    nearest = data.draw(st.integers(1, n - 1))
    distances = measured(drawn(seed, n))
    expected = [np.sort(np.delete(distances[at], at))[:nearest].sum() for at in range(n)]
    np.testing.assert_allclose(sums_to_nearest(distances, nearest), expected)


@given(seeds, st.integers(0, 3), st.integers(0, 4))
def test_krum_takes_the_best_and_multi_krum_the_mean_of_the_m_best(seed, f, more):
    n = 2 * f + 3 + more
    products = gram(drawn(seed, n))
    one = weights_from_gram(rule("krum", f=f), products)
    assert sorted(one.weights) == [0.0] * (n - 1) + [1.0]
    assert one.scores[one.weights.index(1.0)] == min(one.scores)
    best = np.argsort(one.scores)
    for m in (None, 1, n - f):
        many = weights_from_gram(rule("multi_krum", f=f, m=m), products)
        chosen = n - f - 2 if m is None else m
        assert sorted(best[:chosen].tolist()) == np.flatnonzero(many.weights).tolist()
        assert set(many.weights) <= {0.0, 1 / chosen}
        assert many.scores == one.scores


def test_of_equals_the_first_wins():
    products = gram(np.array([[4], [0], [1], [0], [1]], np.float32))
    assert weights_from_gram(rule("krum", f=1), products).weights == (0, 1, 0, 0, 0)
    assert weights_from_gram(rule("multi_krum", f=1, m=2), products).weights == (0, 0.5, 0.5, 0, 0)


@given(seeds, st.integers(0, 2), st.integers(0, 3))
def test_bulyan_asks_krum_again_among_those_that_are_left(seed, f, more):
    n = 4 * f + 3 + more
    rows = drawn(seed, n)
    left, expected = list(range(n)), []
    while len(expected) < n - 2 * f:
        distances = measured(rows[left])
        nearest = min(max(len(left) - f - 2, 1), len(left) - 1)
        scores = [np.sort(np.delete(distances[at], at))[:nearest].sum() for at in range(len(left))]
        expected.append(left.pop(int(np.argmin(scores))))
    assert bulyan_selection(squared_distances(gram(rows)), f) == expected
    weights = weights_from_gram(rule("bulyan", f=f), gram(rows)).weights
    assert np.flatnonzero(weights).tolist() == sorted(expected)


@settings(max_examples=30)
@given(seeds, st.integers(1, 10))
def test_the_geometric_median_is_where_the_sum_of_distances_is_smallest(seed, n):
    rows = drawn(seed, n).astype(np.float64)
    found = weights_from_gram(rule("geometric_median", iterations=1000), gram(rows.astype(np.float32)))
    assert sum(found.weights) == pytest.approx(1)

    def cost(point):
        return np.linalg.norm(rows - point, axis=1).sum()

    here = np.array(found.weights) @ rows
    np.testing.assert_allclose(found.scores, np.linalg.norm(rows - here, axis=1), atol=1e-4)
    step = np.random.default_rng(seed)
    for size in (1e-2, 1e-1, 1):
        for _ in range(5):
            assert cost(here) <= cost(here + step.standard_normal(rows.shape[1]) * size) + 1e-4


def test_weiszfelds_steps_are_those_of_the_paper():
    rows = drawn(8, 7).astype(np.float64)
    found = weights_from_gram(
        rule("geometric_median", iterations=3, smoothing=2.5), gram(rows.astype(np.float32))
    )
    distances = measured(rows)
    middle = np.argmin(np.sort(distances, axis=1)[:, :4].sum(axis=1))
    point = rows[np.argsort(distances[middle])[:4]].mean(axis=0)
    for _ in range(3):
        beta = (1 / 7) / np.maximum(2.5, np.linalg.norm(rows - point, axis=1))
        point = beta @ rows / beta.sum()
    np.testing.assert_allclose(np.array(found.weights) @ rows, point, atol=1e-5)


@pytest.mark.parametrize("size", [1e3, 1e12, 1e30, 3e38])
def test_a_far_outlier_has_no_more_pull_than_a_near_one(size):
    rows = np.vstack([drawn(2, 8), np.full((3, 12), size, np.float32)])
    found = weights_from_gram(rule("geometric_median"), gram(rows))
    assert sum(found.weights[8:]) * size < 2
    point = np.array(found.weights) @ rows.astype(np.float64)
    assert np.linalg.norm(point - rows[:8].mean(axis=0, dtype=np.float64)) < 3


@given(seeds, st.integers(1, 9), st.floats(0.1, 10), st.integers(1, 5), st.booleans())
def test_centered_clipping_takes_the_papers_steps(seed, n, radius, iterations, far):
    rows = drawn(seed, n)
    if far:
        rows[-1] *= np.float32(1e20)
    start = drawn(seed + 1, 1)[0]
    chosen = rule("centered_clipping", radius=radius, iterations=iterations)
    found = weights_from_gram(chosen, gram(rows, start))
    point = start.astype(np.float64)
    for _ in range(iterations):
        differences = rows.astype(np.float64) - point
        lengths = np.linalg.norm(differences, axis=1, keepdims=True)
        point = point + (differences * np.minimum(1, radius / np.maximum(lengths, 1e-300))).mean(axis=0)
    result = found.start * start.astype(np.float64) + np.array(found.weights) @ rows.astype(np.float64)
    np.testing.assert_allclose(result, point, atol=1e-4 * radius + 1e-5)
    assert np.linalg.norm(result - start) <= iterations * radius * (1 + 1e-5)
    assert found.start + sum(found.weights) == pytest.approx(1)


@given(seeds, st.sampled_from([*(chosen for chosen in RULES if chosen.kind != "bulyan"), *BULYAN]))
def test_who_is_named_first_changes_nothing(seed, chosen):
    n = max(9, chosen.minimum)
    products = gram(drawn(seed, n))
    order = np.random.default_rng(seed).permutation(n)
    found = weights_from_gram(chosen, products)
    moved = weights_from_gram(chosen, products[np.ix_(order, order)])
    np.testing.assert_allclose(moved.weights, np.array(found.weights)[order], rtol=1e-9)
    np.testing.assert_allclose(moved.scores, np.array(found.scores)[order], rtol=1e-9)
    assert np.array_equal(np.array(moved.weights) == 0, np.array(found.weights)[order] == 0)


@given(seeds, st.sampled_from([chosen for chosen in RULES if chosen.kind != "centered_clipping"]))
def test_the_centre_does_not_matter_but_for_rounding(seed, chosen):
    rows = drawn(seed, 9)
    found = weights_from_gram(chosen, gram(rows))
    centred = weights_from_gram(chosen, gram(rows, rows[4]))
    np.testing.assert_allclose(centred.scores, found.scores, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("chosen", RULES)
def test_equal_vectors_weigh_something_and_measure_nothing(chosen):
    found = weights_from_gram(chosen, np.zeros((9, 9)))
    assert found.scores == (0.0,) * 9
    assert sum(found.weights) + found.start == pytest.approx(1)


@pytest.mark.parametrize("chosen", RULES)
def test_the_same_matrix_gives_the_same_bits_and_is_only_read(chosen):
    products = gram(drawn(11, 9))
    products.flags.writeable = False
    assert weights_from_gram(chosen, products) == weights_from_gram(chosen, products.copy())


def test_a_matrix_that_cannot_be_is_misuse():
    for wrong in (np.zeros((3, 4)), np.full((5, 5), np.nan)):
        with pytest.raises(LocalError, match="no finite square matrix"):
            weights_from_gram(rule("krum", f=1), wrong)
    with pytest.raises(LocalError, match="krum with f = 1 needs at least 5"):
        weights_from_gram(rule("krum", f=1), np.zeros((4, 4)))
    with pytest.raises(LocalError, match="median takes no weights"):
        weights_from_gram(rule("median"), np.zeros((4, 4)))

"""The Gram matrix: exact products of rounded vectors, whatever multiplies them; nobody blurs the others' distances."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pcoord.aggregation import gram as gram_module
from p2pcoord.aggregation.gram import (
    BITS,
    BLOCK,
    EXACT,
    centre_among,
    gram,
    not_finite,
    squared_distances,
    total,
)
from p2pcoord.errors import LocalError

LARGEST = np.finfo(np.float32).max

seeds = st.integers(0, 2**32 - 1)


def drawn(seed: int, n: int, size: int, spread: int = 0) -> np.ndarray:
    """Normal values, times powers of two up to 2**spread."""
    random = np.random.default_rng(seed)
    scale = np.exp2(random.integers(-spread, spread + 1, (n, size)))
    return (random.standard_normal((n, size)) * scale).astype(np.float32)


def rounded(block: np.ndarray) -> np.ndarray:
    """A vector's block as the definition has it, by division and rint in float64."""
    largest = np.abs(block).max(initial=0)
    unit = 2.0 ** (math.frexp(largest)[1] - BITS)
    return np.rint(block.astype(np.float64) / unit) * unit


def by_hand(rows: np.ndarray) -> np.ndarray:
    """Exact rational products within EXACT columns, float64 sums of them."""
    n, size = rows.shape
    products = np.zeros((n, n))
    for start in range(0, size, BLOCK):
        blocks = [[Fraction(value) for value in rounded(row[start : start + BLOCK]).tolist()] for row in rows]
        for first in range(0, len(blocks[0]), EXACT):
            part = slice(first, first + EXACT)
            for i in range(n):
                for j in range(n):
                    exact = sum(x * y for x, y in zip(blocks[i][part], blocks[j][part], strict=True))
                    assert Fraction(float(exact)) == exact
                    products[i, j] += float(exact)
    return products


@given(seeds, st.integers(1, 5), st.integers(0, 40), st.sampled_from([0, 3, 60]))
def test_products_are_those_of_the_rounded_vectors_without_any_rounding(seed, n, size, spread):
    rows = drawn(seed, n, size, spread)
    assert (gram(rows) == by_hand(rows)).all()


def test_so_they_are_over_many_blocks():
    rows = drawn(1, 3, BLOCK + EXACT + 77)
    assert (gram(rows) == by_hand(rows)).all()


def test_the_fullest_block_is_still_exact():
    rows = np.full((2, BLOCK), np.float32(2) - np.float32(2**-23))  # rounds to 2: BITS bits and one
    rows[1] *= -1
    assert (gram(rows) == BLOCK * np.array([[4.0, -4.0], [-4.0, 4.0]])).all()


@given(seeds, st.integers(2, 7))
def test_any_order_of_multiplication_gives_the_same_bits(seed, n):
    # What another BLAS does: another order. Reversed columns within EXACT of them are one, other rows' company another.
    rows = drawn(seed, n, EXACT)
    whole = gram(rows)
    assert (whole == gram(np.ascontiguousarray(rows[:, ::-1]))).all()
    order = np.random.default_rng(seed).permutation(n)
    assert (whole[np.ix_(order, order)] == gram(rows[order])).all()
    assert (whole[:2, :2] == gram(rows[:2])).all()
    assert (whole == whole.T).all()


@given(seeds, st.integers(1, 6), st.sampled_from([0, 8]))
def test_each_element_moves_by_at_most_its_share_of_the_blocks_largest(seed, n, spread):
    rows = drawn(seed, n, 3000, spread)
    exact = rows.astype(np.float64)
    allowed = 2.0**-BITS * np.abs(exact).max(axis=1) * math.sqrt(3000)  # each vector, in L2 norm
    found = np.sqrt(squared_distances(gram(rows)))
    expected = np.linalg.norm(exact[:, None] - exact, axis=2)
    assert (np.abs(found - expected) <= allowed[:, None] + allowed + 1e-6 * expected).all()


@settings(max_examples=10)
@given(seeds, st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_stripes_add_up_to_the_whole_within_the_stated_bound(seed, blocks):
    rows = drawn(seed, 4, sum(blocks) * BLOCK - 5, 4)
    borders = [0, *np.cumsum(blocks) * BLOCK]
    stripes = [gram(rows[:, begin:end]) for begin, end in pairwise(borders)]
    whole = gram(rows)
    length = np.sqrt(np.diagonal(whole))
    bound = 2.0**-53 * sum(blocks) * (BLOCK // EXACT) * length[:, None] * length
    assert (np.abs(total(stripes) - whole) <= bound).all()
    if len(blocks) == 1:
        assert (total(stripes) == whole).all()


@given(seeds, st.sampled_from([0.0, 1.0, 1e6]))
def test_a_centre_is_subtracted_first(seed, size_of_centre):
    rows = drawn(seed, 4, 500)
    centre = drawn(seed + 1, 1, 500)[0] * np.float32(size_of_centre)
    assert (gram(rows, centre) == gram(rows - centre)).all()
    assert (gram(rows, np.zeros(500, np.float32)) == gram(rows)).all()


def test_the_largest_numbers_are_measured_too():
    rows = np.zeros((4, 3000), np.float32)
    rows[0], rows[1] = LARGEST, -LARGEST
    rows[2], rows[3] = drawn(0, 2, 3000)
    with np.errstate(all="raise"):
        found = squared_distances(gram(rows))
    assert found[0, 1] == pytest.approx(4 * 3000 * float(LARGEST) ** 2, rel=1e-6)
    assert found[2, 3] == squared_distances(gram(rows[2:]))[0, 1]
    centred = gram(rows, rows[0])  # differences beyond float32
    assert np.isfinite(centred).all()
    assert centred[1, 1] == pytest.approx(4 * 3000 * float(LARGEST) ** 2, rel=1e-6)
    tiny = np.full((2, 10), 2.0**-149, np.float32)
    assert (gram(tiny) == 10 * 2.0**-298).all()


def test_one_far_vector_blurs_nobodys_distances_even_when_it_is_first():
    near = drawn(3, 4, 1000)
    expected = squared_distances(gram(near))
    for size in (1e6, 1e20, 3e38):
        rows = np.vstack([np.full((1, 1000), size, np.float32), near])
        products = gram(rows)
        assert (squared_distances(products)[1:, 1:] == expected).all()
        assert centre_among(products) is None


def test_close_vectors_are_centred_by_one_of_the_majority():
    random = np.random.default_rng(5)
    common = random.standard_normal(5000).astype(np.float32) * 1000
    close = common + random.standard_normal((5, 5000)).astype(np.float32) * np.float32(0.01)
    rows = np.vstack([np.full((1, 5000), 1e9, np.float32), close, -common[None]])
    middle = centre_among(gram(rows))
    assert middle in range(1, 6)
    products = gram(rows, rows[middle])
    exact = close.astype(np.float64)
    expected = ((exact[:, None] - exact) ** 2).sum(axis=2)
    np.testing.assert_allclose(squared_distances(products)[1:6, 1:6], expected, rtol=1e-4)
    # Without, what is left of them is rounding.
    assert not np.allclose(squared_distances(gram(rows))[1:6, 1:6], expected, rtol=1e-4)


@given(seeds, st.sets(st.integers(0, 4)), st.sampled_from([np.nan, np.inf, -np.inf]))
def test_what_is_not_finite_is_named_and_leaves_the_others_alone(seed, bad, value):
    random = np.random.default_rng(seed)
    rows = drawn(seed, 5, 100)
    expected = gram(rows)
    for at in bad:
        rows[at, random.integers(100)] = value
    products = gram(rows)
    assert not_finite(products) == tuple(sorted(bad))
    good = sorted(set(range(5)) - bad)
    assert (products[np.ix_(good, good)] == expected[np.ix_(good, good)]).all()


def test_other_shapes_and_types_are_misuse():
    rows = np.zeros((2, 3), np.float32)
    for wrong in ([], [rows[0], rows[1, :2]], rows.astype(np.float64), [rows]):
        with pytest.raises(LocalError):
            gram(wrong)
    with pytest.raises(LocalError):
        gram(rows, rows[0, :2])
    with pytest.raises(LocalError):
        total([np.zeros((2, 2)), np.zeros((3, 3))])
    assert gram_module.BLOCK % gram_module.EXACT == 0

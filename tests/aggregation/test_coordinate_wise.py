"""Columns by themselves: the written order, the window around the median, and the same bits for every width."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from p2pcoord.aggregation import coordinate_wise
from p2pcoord.aggregation.combination import Combination, check_combination, identity, median
from p2pcoord.aggregation.engine import combine
from p2pcoord.aggregation.summation import weighted_sum
from p2pcoord.errors import LocalError
from p2pcoord.wire import decode, encode

LARGEST = np.finfo(np.float32).max
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def stacks(draw, least=1, most=9, elements=floats):
    shape = (draw(st.integers(least, most)), draw(st.integers(0, 12)))
    return draw(st_numpy.arrays(np.float32, shape, elements=elements))


def combined(combination, vectors, start=None):
    out = np.empty(vectors.shape[1], np.float32)
    assert combine(combination, list(vectors), out, start)
    return out


def mean_of(values):
    """In float32 in this order, held between the ends. Overflow goes to infinity and is then held."""
    with np.errstate(all="ignore"):
        total = np.float32(values[0])
        for value in values[1:]:
            total = np.float32(total + np.float32(value))
        mean = np.float32(total / np.float32(len(values)))
    return np.minimum(np.maximum(mean, min(values)), max(values)) + np.float32(0)


@given(stacks(), st.data())
def test_a_trimmed_mean_adds_what_is_left_from_the_smallest_on(vectors, data):
    cut = data.draw(st.integers(0, (len(vectors) - 1) // 2))
    found = combined(Combination("trimmed_mean", identity(len(vectors)), cut), vectors)
    for at, value in enumerate(found):
        kept = np.sort(vectors[:, at])[cut : len(vectors) - cut]
        assert value.tobytes() == mean_of(list(kept)).tobytes()


@given(stacks())
def test_the_median_is_numpys(vectors):
    with np.errstate(all="ignore"):
        expected = np.median(vectors.astype(np.float64), axis=0).astype(np.float32)
    found = combined(median(identity(len(vectors))), vectors)
    safe = np.abs(vectors).max(axis=0, initial=0) < LARGEST / 2
    assert (found[safe] == expected[safe]).all()
    assert np.isfinite(found).all()


def nearest_window(values, kept):
    """The definition, by trying every window: no value in it farther from the median than one outside; the lowest such."""
    values = np.sort(values)
    middle = mean_of(list(values[(len(values) - 1) // 2 : len(values) // 2 + 1]))
    with np.errstate(all="ignore"):
        distances = np.abs(values - middle)
    for begin in range(len(values) - kept + 1):
        inside = distances[begin : begin + kept]
        outside = [*distances[:begin], *distances[begin + kept :]]
        if not outside or inside.max() <= min(outside):
            return values[begin : begin + kept]
    raise AssertionError


@given(stacks(least=3, elements=st.integers(-4, 4) | st.integers(-(2**20), 2**20)), st.data())
def test_around_the_median_the_nearest_are_averaged(vectors, data):
    cut = data.draw(st.integers(0, len(vectors) - 1))
    found = combined(Combination("mean_around_median", identity(len(vectors)), cut), vectors)
    for at, value in enumerate(found):
        # These numbers, their medians and distances are exact in float32: nothing but the mean is rounded.
        kept = nearest_window(vectors[:, at], len(vectors) - cut).astype(np.float64)
        assert kept.min() <= value <= kept.max()
        assert value == pytest.approx(kept.mean(), rel=1e-6, abs=1e-6 * np.abs(kept).max())


@pytest.mark.parametrize(
    ("values", "cut", "mean"),
    [([4, 0, 2], 1, 1), ([6, 4, 0, 2], 2, 3), ([3, 1, 0, 2, 4], 1, 1.5), ([3, 1, 0, 2, 4], 3, 1.5), ([0, 0, 8], 2, 0)],
)  # fmt: skip
def test_of_values_equally_far_from_the_median_the_smaller_is_kept(values, cut, mean):
    columns = np.array(values, np.float32)[:, None]
    assert combined(Combination("mean_around_median", identity(len(values)), cut), columns) == [mean]


@given(stacks(least=3), st.data())
def test_around_the_median_of_any_numbers_nothing_is_farther_from_it_than_what_is_left_out(vectors, data):
    cut = data.draw(st.integers(0, len(vectors) - 1))
    found = combined(Combination("mean_around_median", identity(len(vectors)), cut), vectors)
    for at, value in enumerate(found):
        column = vectors[:, at].astype(np.float64)
        middle = np.median(column)
        reach = np.sort(np.abs(column - middle))[len(vectors) - cut - 1]
        assert abs(value - middle) <= reach + 2.0**-22 * (reach + abs(middle))


operations = st.sampled_from(
    [
        Combination("trimmed_mean", identity(7), 2),
        median(identity(7)),
        Combination("mean_around_median", identity(7), 4),
        Combination("sum", (((0, 0.5), (3, 0.25), (6, 1.0)),)),
        median((((0, 0.5), (1, 0.5)), ((2, 0.5), (3, 0.5)), ((4, 1 / 4), (5, 0.5), (6, 1 / 4)))),
    ]
)


@given(operations, st.integers(0, 2**32 - 1), st.lists(st.integers(0, 60), max_size=4))
def test_stripes_of_any_width_give_the_bits_of_the_whole(combination, seed, cuts):
    vectors = np.random.default_rng(seed).standard_normal((7, 60)).astype(np.float32)
    whole = combined(combination, vectors)
    borders = sorted({0, 60, *cuts})
    out = np.empty(60, np.float32)
    for begin, end in pairwise(borders):
        assert combine(combination, [vector[begin:end] for vector in vectors], out[begin:end])
    assert out.tobytes() == whole.tobytes()


def test_blocks_in_the_cache_change_speed_only(monkeypatch):
    vectors = np.random.default_rng(0).standard_normal((7, 5000)).astype(np.float32)
    combinations = [
        Combination("trimmed_mean", identity(7), 2),
        Combination("mean_around_median", identity(7), 4),
        median((((0, 0.5), (1, 0.5)), ((2, 0.5), (3, 0.5)), ((5, 0.25), (6, 0.75)))),
    ]
    wide = [combined(combination, vectors) for combination in combinations]
    monkeypatch.setattr(coordinate_wise, "MIN_BLOCK", 1)
    for size in (4 * 40, 4 * 1000):
        monkeypatch.setattr(coordinate_wise, "CACHE_BYTES", size)
        for combination, expected in zip(combinations, wide, strict=True):
            assert combined(combination, vectors).tobytes() == expected.tobytes()


@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.booleans())
def test_rows_of_several_vectors_are_weighted_sums(seed, count, alike):
    random = np.random.default_rng(seed)
    vectors = random.standard_normal((6, 30)).astype(np.float32)
    shares = random.random((count, 6)).astype(np.float32) * (random.random((count, 6)) < 0.6)
    shares[:, 0] = 0.5
    if alike:
        shares[shares > 0] = 0.25
    rows = tuple(tuple((at, float(share)) for at, share in enumerate(row) if share) for row in shares)
    mixed = np.empty((count, 30), np.float32)
    for row, out in zip(rows, mixed, strict=True):
        weighted_sum([(vectors[at], factor) for at, factor in row], out)
    expected = combined(median(identity(count)), mixed)
    assert combined(median(rows), vectors).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "combination", [median(identity(4)), Combination("mean_around_median", identity(4), 2)]
)
def test_the_sign_of_a_zero_does_not_tell_the_order(combination):
    vectors = np.array([[0.0], [-0.0], [0.0], [-0.0]], np.float32)
    for order in ([0, 1, 2, 3], [1, 0, 3, 2], [1, 3, 0, 2]):
        assert combined(combination, vectors[order]).tobytes() == bytes(4)


@given(operations, st.integers(0, 6), st.integers(0, 99), st.sampled_from([np.nan, np.inf, -np.inf]))
def test_what_is_not_finite_never_passes_unseen(combination, row, column, value):
    vectors = np.random.default_rng(1).standard_normal((7, 100)).astype(np.float32)
    vectors[row, column] = value
    out = np.empty(100, np.float32)
    enters = any(row == at for terms in combination.rows for at, _ in terms)
    assert combine(combination, list(vectors), out) == (not enters)


def test_means_beyond_float32_are_values_like_others_until_one_is_left():
    vectors = np.full((9, 4), LARGEST, np.float32)
    vectors[3:] = 1
    third = float(np.float32(1 / 3))
    rows = tuple(tuple((at, third) for at in range(begin, begin + 3)) for begin in (0, 3, 6))
    assert combined(median(rows), vectors) == pytest.approx(1)
    out = np.empty(4, np.float32)
    assert not combine(Combination("sum", (((0, 1.0), (1, 1.0)),)), list(vectors), out)


@given(operations)
def test_a_combination_travels(combination):
    assert decode(encode(combination), Combination) == combination


def test_nothing_but_factors_too_small_for_float32_is_zero():
    assert (combined(Combination("sum", ((),)), np.ones((2, 5), np.float32)) == 0).all()


@pytest.mark.parametrize(
    "wrong",
    [
        Combination("sum", identity(2)),
        Combination("sum", (((0, 1.0),),), 1),
        Combination("sum", (((2, 1.0),),)),
        Combination("sum", (((0, 0.0),),)),
        Combination("sum", (((0, 0.1),),)),
        Combination("sum", (((0, 0.5),),), start=0.1),
        Combination("trimmed_mean", identity(2), 1),
        Combination("trimmed_mean", identity(2), -1),
        Combination("trimmed_mean", identity(2), start=0.5),
        Combination("mean_around_median", identity(2), 2),
        Combination("trimmed_mean", ((), ((1, 1.0),))),
        Combination("trimmed_mean", ()),
    ],
)
def test_what_cannot_be_carried_out_is_refused(wrong):
    with pytest.raises(LocalError):
        check_combination(wrong, 2)
    with pytest.raises(LocalError):
        combine(wrong, list(np.ones((2, 3), np.float32)), np.empty(3, np.float32))


def test_other_shapes_and_a_missing_start_are_misuse():
    out = np.empty(3, np.float32)
    with pytest.raises(LocalError, match="cannot be combined into"):
        combine(median(identity(1)), [np.ones(2, np.float32)], out)
    with pytest.raises(LocalError, match="the last aggregate is needed"):
        combine(Combination("sum", (((0, 0.5),),), start=0.5), [np.ones(3, np.float32)], out)

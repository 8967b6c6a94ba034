"""Weights, clip factors, and what the factors of a mean promise."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcoord.aggregation.mean import PARTIAL, Factors, Mean, clip_factor, normalised_weights
from p2pcoord.aggregation.summation import norm, weighted_sum
from p2pcoord.errors import LocalError
from p2pcoord.float32 import is_float32
from p2pcoord.wire import decode, encode

samples_lists = st.lists(st.integers(0, 2**53), min_size=1, max_size=200).filter(any)
norms = st.floats(0, 1e30)


@given(samples_lists, st.booleans())
def test_weights_are_the_nearest_float32_of_the_exact_share_and_add_up_to_one(samples, weighted):
    weights = normalised_weights(samples, weighted=weighted)
    assert all(is_float32(weight) for weight in weights)
    for count, weight in zip(samples, weights, strict=True):
        share = Fraction(count, sum(samples)) if weighted else Fraction(1, len(samples))
        # Half a unit in the last place, and a hair for the rounding to float64 on the way; below 2**-126 units are fixed.
        assert abs(Fraction(weight) - share) <= max(
            share * Fraction(1, 2**24), Fraction(1, 2**150)
        ) * Fraction(1001, 1000)
    assert abs(math.fsum(weights) - 1) <= len(samples) * 2**-25


def test_the_weights_of_an_example_are_these_bits():
    weights = normalised_weights([1, 2, 4], weighted=True)
    assert np.array(weights, np.float32).tobytes().hex() == "2549123e2549923e2549123f"


@given(norms, st.floats(1e-30, 1e30))
def test_clipping_leaves_at_most_the_bound_and_what_is_below_it_alone(norm_, bound):
    factor = clip_factor(norm_, bound)
    assert is_float32(factor)
    assert 0 <= factor <= 1
    if norm_ <= bound:
        assert factor == 1.0
    elif bound / norm_ >= 2**-126:  # below, float32 keeps fewer digits
        assert bound * (1 - 2**-23) <= norm_ * factor <= bound * (1 + 2**-23)
    assert clip_factor(norm_, None) == 1.0


@given(
    st.lists(st.tuples(st.integers(1, 1000), norms), min_size=1, max_size=20),
    st.booleans(),
    st.none() | st.floats(0.1, 10),
)
def test_the_parameters_factor_is_the_float32_product_and_buffers_are_not_clipped(entries, weighted, bound):
    samples, found = zip(*entries, strict=True)
    mean = Mean(weighted=weighted, clip_norm=bound)
    factors = mean.factors(samples, found)
    for factor, weight, one_norm in zip(
        factors, normalised_weights(samples, weighted=weighted), found, strict=True
    ):
        assert factor.float_buffers == weight
        assert factor.parameters == float(np.float32(weight) * np.float32(clip_factor(one_norm, bound)))
    assert factors == mean.factors(samples, found)


@given(st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_the_mean_of_shards_is_the_mean_of_all_samples(shards, seed):
    draw = np.random.default_rng(seed)
    rows = draw.standard_normal((64, 5)).astype(np.float32)
    cuts = np.sort(draw.integers(0, 65, shards - 1))
    parts = [part for part in np.split(rows, cuts) if len(part)]
    means = [part.mean(axis=0) for part in parts]
    factors = Mean().factors([len(part) for part in parts], [1.0] * len(parts))
    out = np.empty(5, np.float32)
    assert weighted_sum([(mean, factor.parameters) for mean, factor in zip(means, factors, strict=True)], out)
    np.testing.assert_allclose(out, rows.mean(axis=0, dtype=np.float64), atol=2e-6)


def test_one_huge_contribution_moves_a_clipped_mean_no_further_than_the_bound():
    vectors = [np.full(100, 0.01, np.float32), np.full(100, 1e6, np.float32)]
    factors = Mean(weighted=False, clip_norm=1.0).factors([1, 1], [norm(vector) for vector in vectors])
    out = np.empty(100, np.float32)
    weighted_sum([(vector, factor.parameters) for vector, factor in zip(vectors, factors, strict=True)], out)
    assert norm(out) <= 0.5 * 0.1 + 0.5 * 1.0 + 1e-6


@pytest.mark.parametrize(
    ("samples", "found", "bound"),
    [
        ([], [], None),
        ([0, 0], [1.0, 1.0], None),
        ([-1, 2], [1.0, 1.0], None),
        ([1], [1.0, 1.0], None),
        ([1], [math.nan], None),
        ([1], [math.inf], 1.0),
        ([1], [-1.0], 1.0),
        ([1], [1.0], 0.0),
        ([1], [1.0], math.nan),
    ],
)
def test_what_admission_refuses_has_no_factors(samples, found, bound):
    with pytest.raises(LocalError):
        Mean(clip_norm=bound).factors(samples, found)


def test_without_samples_an_unweighted_mean_still_has_weights():
    assert Mean(weighted=False).factors([0, 0], [0.0, 0.0]) == (Factors(0.5, 0.5),) * 2


def test_factors_survive_the_wire_bit_for_bit():
    factors = Mean(clip_norm=1.0).factors([3, 4], [7.0, 0.5])
    assert tuple(decode(encode(factor), Factors) for factor in factors) == factors
    assert decode(encode(PARTIAL), Factors) == Factors(1.0, 1.0)

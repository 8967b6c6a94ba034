"""Sums and norms: written order, the same bits for every block size, nothing non-finite passes unseen."""

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from p2pcoord.aggregation import summation
from p2pcoord.aggregation.summation import (
    NORM_LANES,
    NormSum,
    all_finite,
    maximum,
    norm,
    require_ieee_arithmetic,
    weighted_sum,
)
from p2pcoord.errors import LocalError

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
anything = st.floats(width=32)
factors = st.floats(0, 1, width=32)


@st.composite
def terms(draw, elements=floats):
    size = draw(st.integers(0, 40))
    count = draw(st.integers(1, 6))
    vector = st_numpy.arrays(np.float32, size, elements=elements)
    return [(draw(vector), draw(factors | st.just(1.0))) for _ in range(count)]


def round32(value: float) -> float:
    """To float32 by hand; what is too large becomes infinite, as IEEE 754 rounds it."""
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


def by_hand(inputs, at: int) -> float:
    """One element in the written order, each operation rounded by itself. (float64 holds products of two float32
    exactly, and a sum of two float32 rounded to float64 and then to float32 is the float32 sum: Figueroa 1995.)"""
    total = None
    for vector, factor in inputs:
        product = round32(float(vector[at]) * factor)
        total = product if total is None else round32(total + product)
    return total


@given(terms())
def test_each_element_is_computed_in_the_written_order(inputs):
    out = np.empty(inputs[0][0].size, np.float32)
    finite = weighted_sum(inputs, out)
    expected = np.array([by_hand(inputs, at) for at in range(out.size)], np.float32)
    numbers = ~np.isnan(expected)  # which NaN it is, IEEE 754 leaves open
    assert out[numbers].tobytes() == expected[numbers].tobytes()
    assert np.isnan(out[~numbers]).all()
    assert finite == bool(np.isfinite(expected).all())


@given(terms(), st.integers(1, 9))
def test_block_size_changes_no_bit(inputs, block):
    whole, blocked = (np.empty(inputs[0][0].size, np.float32) for _ in range(2))
    weighted_sum(inputs, whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(summation, "BLOCK", block)
        weighted_sum(inputs, blocked)
    assert whole.tobytes() == blocked.tobytes()


@given(terms(anything))
def test_a_finite_sum_means_that_all_inputs_are_finite(inputs):
    out = np.empty(inputs[0][0].size, np.float32)
    if weighted_sum(inputs, out):
        assert all(np.isfinite(vector).all() for vector, _ in inputs)
        assert np.isfinite(out).all()
    else:
        assert not np.isfinite(out).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_one_bad_element_is_seen_wherever_it_is_even_with_weight_zero(poison):
    size = 3 * summation.BLOCK + 5
    for at in (0, summation.BLOCK - 1, summation.BLOCK, size - 1):
        good, bad, out = np.ones(size, np.float32), np.ones(size, np.float32), np.empty(size, np.float32)
        bad[at] = poison
        assert weighted_sum([(good, 0.5), (good, 0.5)], out)
        assert not weighted_sum([(good, 1.0), (bad, 0.0)], out)
        assert all_finite(good)
        assert not all_finite(bad)


def test_a_sum_beyond_float32_is_not_finite():
    large, out = np.full(3, 3e38, np.float32), np.empty(3, np.float32)
    assert weighted_sum([(large, 1.0)], out)
    assert not weighted_sum([(large, 1.0), (large, 1.0)], out)


def test_a_product_is_rounded_before_it_is_added():
    # (1 + 2**-12)**2 = 1 + 2**-11 + 2**-24: alone the last term is lost, fused with -(1 + 2**-11) it would be all.
    x, base = np.full(64, 1 + 2**-12, np.float32), np.full(64, -(1 + 2**-11), np.float32)
    out = np.empty(64, np.float32)
    # the factor has to be the same number as the element, so that it is their square
    weighted_sum([(base, 1.0), (x, 1 + 2**-12)], out)
    assert (out == 0).all()


def test_misuse_of_a_sum_is_refused():
    vector, out = np.ones(3, np.float32), np.empty(3, np.float32)
    wrong = [
        ([], out),
        ([(vector, 0.1)], out),  # 0.1 is no float32 number
        ([(vector, math.nan)], out),
        ([(vector[:2], 1.0)], out),
        ([(vector.astype(np.float64), 1.0)], out),
        ([(vector, 1.0)], out.astype(np.float64)),
    ]
    for inputs, target in wrong:
        with pytest.raises(LocalError):
            weighted_sum(inputs, target)


@given(st.lists(st_numpy.arrays(np.int64, 5), min_size=1, max_size=5), st.randoms())
def test_a_maximum_is_the_same_in_any_order(vectors, random):
    out, again = np.empty(5, np.int64), np.empty(5, np.int64)
    maximum(vectors, out)
    random.shuffle(vectors)
    maximum(vectors, again)
    assert (out == np.max(vectors, axis=0)).all()
    assert (out == again).all()


def test_a_maximum_of_nothing_or_of_other_shapes_is_misuse():
    with pytest.raises(LocalError):
        maximum([], np.empty(3, np.int64))
    with pytest.raises(LocalError):
        maximum([np.zeros(1, np.int64)], np.empty(3, np.int64))


def test_a_norm_is_computed_in_the_written_order():
    vector = np.random.default_rng(1).standard_normal(3 * NORM_LANES + 77).astype(np.float32)
    lanes = [0.0] * NORM_LANES
    for at, element in enumerate(vector.tolist()):
        lanes[at % NORM_LANES] += element * element
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = [low + high for low, high in zip(lanes[:half], lanes[half:], strict=True)]
    assert norm(vector) == math.sqrt(lanes[0])
    assert norm(vector) == pytest.approx(math.sqrt(math.fsum(x * x for x in vector.tolist())), rel=1e-15)


@settings(max_examples=30)
@given(st.integers(0, 5 * NORM_LANES), st.lists(st.integers(1, 2), max_size=4), st.integers(0, 2**32 - 1))
def test_pieces_change_no_bit_of_a_norm(size, lengths, seed):
    vector = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    pieces, at = NormSum(), 0
    for length in lengths:
        if at + length * NORM_LANES <= size:
            pieces.add(vector[at : at + length * NORM_LANES])
            at += length * NORM_LANES
    pieces.add(vector[at:])
    assert pieces.norm() == norm(vector)


def test_a_norm_neither_overflows_nor_hides_what_is_not_finite():
    assert norm(np.full(4, 3e38, np.float32)) == pytest.approx(6e38)
    assert norm(np.full(4, 1e-45, np.float32)) == pytest.approx(2 * float(np.float32(1e-45)))
    assert norm(np.empty(0, np.float32)) == 0.0
    assert math.isinf(norm(np.array([1, math.inf], np.float32)))
    assert math.isnan(norm(np.array([1, math.nan], np.float32)))


def test_a_piece_after_a_broken_one_is_misuse():
    pieces = NormSum()
    pieces.add(np.ones(3, np.float32))
    with pytest.raises(LocalError):
        pieces.add(np.ones(3, np.float32))


def test_a_thread_that_flushes_subnormals_is_refused():
    require_ieee_arithmetic()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        with pytest.raises(LocalError, match="-ffast-math"):
            require_ieee_arithmetic()
    finally:
        torch.set_flush_denormal(False)
    require_ieee_arithmetic()

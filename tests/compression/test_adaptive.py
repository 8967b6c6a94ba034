"""Adaptive quantization: who gets how many bits."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2pcoord.compression.adaptive import Adaptive, allocate
from p2pcoord.compression.quantization import Quantization
from p2pcoord.errors import RemoteError
from tests.compression.subjects import vector_of, vectors

importances = st.lists(st.floats(0, 2.0**100, width=32), max_size=40).map(
    lambda values: np.array(values, np.float32)
)


@given(importances, st.integers(1, 8), st.integers(0, 7), st.floats(0, 1))
def test_the_budget_is_kept_and_spent(importance, low, more, share):
    high = min(low + more, 8)
    least, most = low * importance.size, high * importance.size
    total = least + round(share * (most - least))
    widths = allocate(importance, low, high, total)
    assert widths.sum() <= total
    assert ((low <= widths) & (widths <= high)).all()
    # Who is more important has at least as many bits, but for the one bit that is dealt among equals of a level.
    order = np.argsort(importance, kind="stable")
    assert (np.diff(widths[order]) >= -1).all()
    # Everybody could use a bit more, or all of the budget is spent.
    assert widths.sum() == total or (widths == high).all()


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=5), st.integers(0, 20))
def test_the_squared_error_is_the_smallest_of_all_allocations(exponents, spare):
    """Against every allocation: with importance in powers of two the water level is met exactly."""
    importance = np.exp2(np.array(exponents)).astype(np.float32)
    low, high = 1, 5
    total = min(low * importance.size + spare, high * importance.size)
    widths = allocate(importance, low, high, total)

    def error(bits):
        return float((importance.astype(np.float64) ** 2 * 4.0 ** -np.array(bits)).sum())

    best = min(
        error(bits)
        for bits in itertools.product(range(low, high + 1), repeat=importance.size)
        if sum(bits) <= total
    )
    assert error(widths) <= best * (1 + 1e-12)


@given(vectors, st.sampled_from(["norm", "variance"]), st.sampled_from([0.1, 0.15, 0.3]))
def test_the_size_is_the_target_or_what_the_most_bits_take(vector, metric, target):
    c = Adaptive(min_bits=2, max_bits=8, target_ratio=target, importance_metric=metric, block=256)
    data, _ = c.compress(vector)
    assert len(data) == c.max_bytes(vector.size)
    if vector.size >= 2048:
        budget = target * 4 * vector.size
        assert len(data) - 13 <= budget
        assert len(data) - 13 > min(budget, vector.size * (1 + 3 / 2048 + 2 / 256)) - 33


@given(vectors, st.sampled_from(["norm", "variance"]))
def test_with_one_width_it_is_quantization(vector, metric):
    adaptive = Adaptive(min_bits=4, max_bits=4, target_ratio=0.5, importance_metric=metric, block=32)
    quantization = Quantization(bits=4, block=32)
    (ours, kept), (theirs, left) = adaptive.compress(vector), quantization.compress(vector)
    assert (adaptive.decompress(ours) == quantization.decompress(theirs)).all()
    assert (kept == left).all()


@given(vectors, st.sampled_from(["norm", "variance"]))
def test_each_block_has_the_error_of_its_bits(vector, metric):
    c = Adaptive(min_bits=2, max_bits=8, target_ratio=0.2, importance_metric=metric, block=32)
    data, _ = c.compress(vector)
    sent = c.decompress(data)
    count = math.ceil(vector.size / 32)
    stream = int.from_bytes(data[13 : 13 + math.ceil(3 * count / 8)], "little")
    for at in range(count):
        bits = (stream >> 3 * at & 7) + 1
        part = slice(32 * at, 32 * at + 32)
        largest = float(np.abs(vector[part]).max())
        step = max(largest / (2 ** (bits - 1) - 1) * (1 + 2**-7), 2.0**-133)
        assert (np.abs(sent[part].astype(np.float64) - vector[part]) <= step * (0.5 + 2**-20)).all()


def test_large_blocks_get_more_bits_and_constant_ones_less_by_variance():
    vector = vector_of(32 * 30, 0, 1)
    vector[:320] *= 64
    vector[320:640] = 50 + vector[320:640] / 64
    widths = {}
    for metric in ("norm", "variance"):
        c = Adaptive(min_bits=2, max_bits=8, target_ratio=0.2, importance_metric=metric, block=32)
        data, _ = c.compress(vector)
        stream = int.from_bytes(data[13:25], "little")
        bits = np.array([(stream >> 3 * at & 7) + 1 for at in range(30)])
        widths[metric] = [float(bits[at : at + 10].mean()) for at in (0, 10, 20)]
    large, constant, small = widths["norm"]
    assert large >= constant > small
    large, constant, small = widths["variance"]
    assert large > small >= constant


def test_it_beats_equal_bits_of_the_same_size_where_blocks_differ():
    vector = vector_of(40960, 0, 4) * np.repeat(np.exp2(np.arange(160) % 8), 256).astype(np.float32)
    adaptive = Adaptive(
        min_bits=1, max_bits=8, target_ratio=Quantization(bits=4).max_bytes(40960) / vector.nbytes
    )
    errors = []
    for c in (adaptive, Quantization(bits=4)):
        data, _ = c.compress(vector)
        errors.append(float(np.linalg.norm(c.decompress(data) - vector)))
        assert len(data) <= Quantization(bits=4).max_bytes(40960) + 13
    assert errors[0] < errors[1] / 1.5


@given(st.integers(1, 64), st.integers(0, 99))
def test_importance_is_torchs_norm_or_standard_deviation_of_what_is_there(elements, seed):
    filled = np.zeros(-(-elements // 32) * 32, np.float32)
    filled[:elements] = 5 + np.random.default_rng(seed).standard_normal(elements)
    parts = [torch.from_numpy(filled[at : min(at + 32, elements)]).double() for at in range(0, elements, 32)]
    for metric, expected in (
        ("norm", [torch.linalg.norm(part) for part in parts]),
        ("variance", [part.std(correction=0) for part in parts]),
    ):
        c = Adaptive(min_bits=2, max_bits=8, target_ratio=0.2, importance_metric=metric, block=32)
        assert np.allclose(c._importance(filled.reshape(-1, 32), elements), expected)


def test_an_importance_beyond_float32_is_still_an_importance():
    vector = vector_of(2048, 0, 1) * np.float32(2.0**120)
    for metric in ("norm", "variance"):
        c = Adaptive(min_bits=2, max_bits=8, target_ratio=0.2, importance_metric=metric, block=32)
        assert np.isfinite(c.decompress(c.compress(vector)[0])).all()


@pytest.mark.parametrize(
    ("at", "changed", "told"),
    [
        (10, b"\x01", "min_bits is 1, not 2"),
        (11, b"\x07", "max_bits is 7, not 6"),
        (12, b"\x06", "log2 of the block is 6, not 5"),
        (13, b"\xff", "a block's bits are not from 2 to 6"),
        (13, b"\x00", "a block's bits are not from 2 to 6"),
        (17, b"\x80\x7f", "a step is not finite or negative"),
    ],
)
def test_what_no_encoder_writes_is_refused(at, changed, told):
    c = Adaptive(min_bits=2, max_bits=6, target_ratio=0.2, block=32)
    data, _ = c.compress(vector_of(300, 0, 1))
    with pytest.raises(RemoteError, match=f"bad_compression: {told}"):
        c.decompress(data[:at] + changed + data[at + len(changed) :], 300)

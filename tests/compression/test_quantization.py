"""Quantization: bounds, bytes, and what others make of the same numbers."""

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2pcoord.compression import compressor
from p2pcoord.compression.quantization import (
    MAX_MAGNITUDE,
    Quantization,
    bfloat16_at_least,
    halved,
    mean_magnitudes,
    nearest_bfloat16,
    widened,
)
from p2pcoord.compression.randomness import ROUNDING, Stream
from p2pcoord.errors import LocalError, RemoteError
from tests.compression.subjects import vector_of, vectors

HEADER_BYTES = 12


def steps_of(vector, bits, block):
    """The step of each element's block, from the definition."""
    levels = max((1 << (bits - 1)) - 1, 1)
    filled = np.zeros(-(-vector.size // block) * block)
    filled[: vector.size] = np.abs(vector)
    largest = filled.reshape(-1, block).max(axis=1)
    return np.repeat(largest / levels, block)[: vector.size]


@given(vectors, st.integers(2, 8), st.sampled_from([32, 256]), st.booleans(), st.integers(0, 99))
def test_the_error_is_at_most_half_a_step_or_a_whole_one_at_random(vector, bits, block, stochastic, seed):
    c = Quantization(bits=bits, stochastic=stochastic, block=block)
    sent = c.decompress(c.compress(vector, None, seed)[0])
    step = np.maximum(steps_of(vector, bits, block) * (1 + 2**-7), 2.0**-133)
    error = np.abs(sent.astype(np.float64) - vector)
    assert (error <= step * (1 if stochastic else 0.5 + 2**-20)).all()


@given(vectors, st.sampled_from([32, 256]))
def test_one_bit_is_a_contraction(vector, block):
    """Karimireddy et al. 2019, lemma 8: the squared error is |x|^2 - |x|_1^2 / B, in each block."""
    vector = np.clip(vector, -(2.0**60), 2.0**60)
    c = Quantization(bits=1, block=block)
    sent = c.decompress(c.compress(vector, None)[0]).astype(np.float64)
    for start in range(0, vector.size, block):
        part = vector[start : start + block].astype(np.float64)
        error = float(((sent[start : start + block] - part) ** 2).sum())
        expected = float((part**2).sum() - np.abs(part).sum() ** 2 / part.size)
        scale = float(np.abs(part).mean())
        assert error <= expected + part.size * (scale * 2**-8 + 2**-133) ** 2 + 1e-9 * float((part**2).sum())


@given(vectors, st.integers(1, 8), st.sampled_from([32, 256, 1024]), st.booleans())
def test_the_bytes_are_header_steps_and_codes(vector, bits, block, stochastic):
    c = Quantization(bits=bits, stochastic=stochastic, block=block)
    size = HEADER_BYTES + 2 * math.ceil(vector.size / block) + math.ceil(vector.size * bits / 8)
    assert len(c.compress(vector, None, 1)[0]) == c.max_bytes(vector.size) == size


def test_the_bytes_are_what_the_page_says():
    vector = np.array(
        [3.5, -1.0, 0.25, -3.5], np.float32
    )  # a step of 0.5; 0.25 is a tie, which goes to the even 0
    data, kept = Quantization(bits=4, block=32).compress(vector)
    step = struct.unpack("<I", struct.pack("<f", 0.5))[0] >> 16
    codes = [7 + 7, -2 + 7, 0 + 7, -7 + 7]
    packed = bytes([codes[0] | codes[1] << 4, codes[2] | codes[3] << 4])
    assert data == struct.pack("<BBQBBH", 1, 1, 4, 4, 5, step) + packed
    assert kept.tolist() == [0, 0, 0.25, 0]


# What QSGDCompressor of FedLab 1.3.0 (on torch 2.13.0; PyPI: fedlab) makes of 32 numbers: (bits, the numbers times 4096,
# their levels). Its number of levels, `s`, was set to ours, and torch.rand gave it the stream of seed 11 (one minus it for
# negative numbers, of which it rounds the magnitude). The largest is a whole number of steps 2**-bits.
FEDLAB = [
    (
        2,
        """
        1024 -1024 428 -581 -464 1024 -1024 -237 -886 0 231 -361 -288 -684 -1024 -400 494 -244 981 -205 25
        1024 558 -517 -187 553 1024 -276 -249 1024 -908 -299
        """,
        """
        1 -1 0 0 -1 1 -1 0 0 0 0 0 -1 -1 -1 -1 1 0 1 0 0 1 0 0 0 1 1 0 -1 1 -1 -1
        """,
    ),
    (
        4,
        """
        904 594 94 686 -1792 1792 -983 -1709 283 0 -455 -1102 27 -54 1439 765 198 1138 -210 -948 598 597
        -220 -802 235 -1792 707 503 -1678 63 -987 775
        """,
        """
        3 2 0 3 -7 7 -4 -7 2 0 -2 -4 0 -1 6 3 1 4 -1 -3 2 3 -1 -3 1 -7 3 2 -7 0 -4 3
        """,
    ),
    (
        8,
        """
        -2032 -936 727 1184 -2032 2032 336 -624 1629 0 363 -1074 1440 -22 -381 -1759 1722 771 772 1165 358
        -655 -819 -819 1403 -1495 -611 -329 230 589 -1279 -1772
        """,
        """
        -127 -59 45 74 -127 127 21 -39 102 0 23 -67 90 -2 -24 -110 108 48 48 73 22 -41 -51 -51 88 -93 -38
        -21 14 37 -80 -111
        """,
    ),
]


@pytest.mark.parametrize(("bits", "numbers", "levels"), FEDLAB)
def test_stochastic_levels_are_those_of_fedlabs_qsgd(bits, numbers, levels):
    c = Quantization(bits=bits, stochastic=True, block=32)
    data, _ = c.compress(np.array(numbers.split(), np.float32) / 4096, None, 11)
    assert (c.decompress(data) * 2**bits).tolist() == [int(level) for level in levels.split()]


@given(vectors.filter(len), st.integers(2, 8), st.sampled_from([32, 256]))
def test_rounding_to_nearest_is_torchs_fake_quantization(vector, bits, block):
    vector = np.where(np.abs(vector) < 2.0**-100, np.float32(0), vector)
    filled = np.zeros(-(-vector.size // block) * block, np.float32)
    filled[: vector.size] = vector
    levels = (1 << (bits - 1)) - 1
    sent = Quantization(bits=bits, block=block).compress(vector)[0]
    steps = widened(np.frombuffer(sent, "<u2", filled.size // block, HEADER_BYTES))
    rows = torch.from_numpy(filled.reshape(-1, block))
    expected = torch.fake_quantize_per_channel_affine(
        rows,
        torch.from_numpy(np.where(steps > 0, steps, 1)),
        torch.zeros(len(steps), dtype=torch.int32),
        0,
        -levels,
        levels,
    ).numpy()
    ours = Quantization(bits=bits, block=block).decompress(sent)
    # torch multiplies by a rounded reciprocal, so the two may part where a quotient lies within 2**-22 of a tie.
    quotients = filled / np.repeat(np.where(steps > 0, steps, 1), block)
    ties = np.abs(np.abs(quotients) % 1 - 0.5) < 1e-4
    assert (np.abs(ours - expected.reshape(-1)[: vector.size]) == 0)[~ties[: vector.size]].all()


@given(vectors)
def test_one_bit_is_the_sign_times_the_mean_magnitude_as_torch_has_it(vector):
    vector = np.clip(vector, -(2.0**60), 2.0**60)
    data, _ = Quantization(bits=1, block=32).compress(vector)
    sent = torch.from_numpy(Quantization(bits=1, block=32).decompress(data))
    for part, ours in zip(torch.from_numpy(vector).split(32), sent.split(32), strict=True):
        scale = part.double().abs().mean().float().bfloat16().float()
        expected = torch.where(part >= 0, scale, -scale)
        assert torch.allclose(ours, expected, rtol=2**-7, atol=2.0**-133)


@given(
    st.lists(st.floats(0, 2.0**126, width=32), min_size=1, max_size=20),
    st.sampled_from([1, 3, 7, 15, 31, 63, 127]),
)
def test_a_step_is_the_smallest_bfloat16_that_reaches(numbers, levels):
    largest = np.array(numbers, np.float32)
    steps = bfloat16_at_least(largest, levels)
    reach = widened(steps).astype(np.float64) * levels
    assert (reach >= largest).all()
    lower = widened(np.maximum(steps, 1) - np.uint16(1)).astype(np.float64) * levels
    assert ((lower < largest) | (steps == 0)).all()


def test_a_step_reaches_where_the_quotient_was_rounded_down_to_it():
    largest = np.array([(127 * 2**16 + 1) * 2.0**-149], np.float32)
    assert largest / np.float32(127) == 2.0**-133
    assert widened(bfloat16_at_least(largest, 127)) == 2.0**-132


@given(st.lists(st.floats(0, 1e38), min_size=1, max_size=20))
def test_the_nearest_bfloat16_is_torchs(numbers):
    floats = torch.tensor(numbers, dtype=torch.float64).float()
    assert widened(nearest_bfloat16(np.array(numbers))).tolist() == floats.bfloat16().float().tolist()


@given(st.integers(1, 40), st.sampled_from([32, 256]), st.integers(0, 99))
def test_sums_are_right_and_filling_does_not_count(elements, block, seed):
    rows = np.random.default_rng(seed).standard_normal((3, block))
    assert np.allclose(halved(rows.copy()), rows.sum(axis=1))
    filled = rows.astype(np.float32)
    elements = min(elements, block)
    filled[-1, elements:] = 0
    means = mean_magnitudes(filled, 2 * block + elements)
    assert np.isclose(means[-1], np.abs(filled[-1, :elements]).mean())


def test_a_zero_block_and_a_negative_zero_have_a_step_of_zero():
    for zeros in (
        np.zeros(40, np.float32),
        np.full(40, -0.0, np.float32),
        np.array([-0.0, 0.0] * 20, np.float32),
    ):
        for bits in range(1, 9):
            for stochastic in (False, True):
                c = Quantization(bits=bits, stochastic=stochastic, block=32)
                data, kept = c.compress(zeros, None, 3)
                assert data[HEADER_BYTES : HEADER_BYTES + 4] == bytes(4)
                assert not c.decompress(data).any()
                assert not kept.any()


def test_what_is_too_large_is_refused_by_name_and_what_is_just_below_is_sent():
    for bits in range(1, 9):
        for stochastic in (False, True):
            c = Quantization(bits=bits, stochastic=stochastic)
            vector = np.zeros(300, np.float32)
            vector[290] = -MAX_MAGNITUDE
            with pytest.raises(
                LocalError,
                match=r"element 290 of the vector is -8\.50\d*e\+37: magnitudes from 8\.50\d*e\+37 on cannot be quantized",
            ):
                c.compress(vector, None, 1)
            vector[290] = np.nextafter(np.float32(MAX_MAGNITUDE), np.float32(0))
            assert np.isfinite(c.decompress(c.compress(vector, None, 1)[0])).all()


@pytest.mark.parametrize("stochastic", [False, True])
@given(st.integers(2, 8), st.integers(1, 6), st.integers(1, 6), st.integers(0, 999))
def test_a_level_of_partial_sums_that_are_quantized_again_adds_a_step_of_the_largest_contribution(
    stochastic, bits, groups, members, seed
):
    """Weights add up to 1, so the groups' steps add up to at most one of the largest element of all contributions."""
    contributions = np.stack([vector_of(32, 0, seed + at) for at in range(groups * members)])
    weights = np.random.default_rng(seed).dirichlet(np.ones(groups * members))
    partials = (
        (contributions * weights[:, np.newaxis]).reshape(groups, members, 32).sum(axis=1).astype(np.float32)
    )
    c = Quantization(bits=bits, stochastic=stochastic, block=32)
    sent = np.stack(
        [c.decompress(c.compress(partial, None, seed + at)[0]) for at, partial in enumerate(partials)]
    )
    error = np.abs(sent.astype(np.float64) - partials).sum(axis=0).max()
    step = float(np.abs(contributions).max()) / ((1 << (bits - 1)) - 1) * (1 + 2**-7)
    assert error <= step * (1 if stochastic else 0.5) * (1 + 1e-6)


def test_stochastic_rounding_without_residuals_where_they_would_grow():
    """With one level on either side a value may be off by the largest of its block, so what is fed back adds up."""
    assert [Quantization(bits=bits, stochastic=True).accumulates for bits in (1, 2, 3, 8)] == [
        False,
        False,
        True,
        True,
    ]
    assert all(Quantization(bits=bits).accumulates for bits in range(1, 9))


def test_the_fraction_decides_to_the_last_of_24_bits():
    vector = np.zeros(32, np.float32)
    vector[0], vector[1] = 1.0, 0.625  # a step of 1
    uniforms = [float(Stream(seed, ROUNDING).uniforms(2)[1]) for seed in range(40)]
    c = Quantization(bits=2, stochastic=True, block=32)
    sent = [float(c.decompress(c.compress(vector, None, seed)[0])[1]) for seed in range(40)]
    assert sent == [1.0 if uniform < 0.625 else 0.0 for uniform in uniforms]


@pytest.mark.parametrize(
    ("at", "changed", "told"),
    [
        (10, b"\x05", "bits is 5, not 4"),
        (11, b"\x06", "log2 of the block is 6, not 8"),
        (12, b"\x80\x7f", "not finite or negative"),
        (12, b"\x00\x80", "not finite or negative"),
        (12, b"\x7f\x7f", "highest level is not finite"),
    ],
)
def test_parameters_and_steps_of_others_are_refused(at, changed, told):
    data, _ = Quantization(bits=4).compress(vector_of(300, 0, 1))
    with pytest.raises(RemoteError, match=f"bad_compression: .*{told}"):
        Quantization(bits=4).decompress(data[:at] + changed + data[at + len(changed) :], 300)


def test_rounding_at_random_needs_random_numbers():
    with pytest.raises(LocalError, match="a Generator or a seed"):
        compressor("quantization", bits=4, stochastic=True).compress(vector_of(40, 0, 1))

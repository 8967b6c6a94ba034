"""Laws that hold for every compressor."""

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pcoord.compression import compressor
from p2pcoord.errors import LocalError, RemoteError
from tests.compression.subjects import COMPRESSORS, OPTIONS, vector_of, vectors

any_compressor = st.sampled_from(COMPRESSORS)
seeds = st.integers(0, 2**64 - 1)


def same_bits(left, right):
    """Equal, bit for bit, but for the sign of zeros."""
    return left.shape == right.shape and bool(
        ((left.view(np.uint32) == right.view(np.uint32)) | ((left == 0) & (right == 0))).all()
    )


@pytest.mark.parametrize("c", COMPRESSORS, ids=repr)
@given(vector=vectors, seed=seeds)
@settings(max_examples=12)
def test_what_is_sent_and_what_is_kept_is_what_was_computed(c, vector, seed):
    residual = vector_of(vector.size, 0, seed % 1000)
    computed = vector + residual
    before = vector.tobytes(), residual.tobytes()
    data, kept = c.compress(vector, residual, seed)
    assert (vector.tobytes(), residual.tobytes()) == before
    sent = c.decompress(data, vector.size)
    assert sent.dtype == kept.dtype == np.float32
    assert np.isfinite(sent).all()
    if c.exact:
        assert same_bits(sent + kept, computed)
    if c.accumulates and c.kind != "composition":
        assert same_bits(kept, computed - sent)  # the nearest float32, where it is not exact
    if not c.accumulates:
        assert not kept.any()


@given(any_compressor, vectors, seeds)
def test_without_a_residual_it_is_zeros(c, vector, seed):
    without, zeros = (c.compress(vector, residual, seed)[0] for residual in (None, np.zeros_like(vector)))
    assert same_bits(c.decompress(without), c.decompress(zeros))


@given(any_compressor, vectors, seeds)
def test_no_data_is_larger_than_stated(c, vector, seed):
    data, _ = c.compress(vector, None, seed)
    assert len(data) <= c.max_bytes(vector.size)
    if c.kind in ("none", "quantization", "random_k"):
        assert len(data) == c.max_bytes(vector.size)


@given(any_compressor, vectors, seeds)
def test_the_same_arguments_give_the_same_bytes(c, vector, seed):
    first, second = (c.compress(vector, None, np.random.Generator(np.random.PCG64(seed))) for _ in range(2))
    assert first[0] == second[0]
    assert same_bits(first[1], second[1])
    assert c.compress(vector, None, seed)[0] == c.compress(vector, None, seed)[0]


@given(any_compressor, vectors, st.sampled_from([1.0, 0.5, -0.25, float(np.float32(0.3)), 0.0]), seeds)
def test_adding_is_what_adding_the_expanded_vector_gives(c, vector, factor, seed):
    data, _ = c.compress(vector, None, seed)
    accumulator = vector_of(vector.size, 0, 17)
    expected = accumulator + c.decompress(data) * np.float32(factor)
    c.add(data, accumulator, factor)
    assert same_bits(accumulator, expected)


@pytest.mark.parametrize(
    "c",
    [c for c in COMPRESSORS if c.accumulates and (c.kind != "composition" or c.second.accumulates)],
    ids=repr,
)
def test_what_is_kept_stays_bounded_and_all_is_sent_in_the_end(c):
    vector = vector_of(1000, 0, 3)
    residual, total, rounds = np.zeros_like(vector), np.zeros(1000), 60 * math.ceil(1000 / c.max_bytes(1000))
    for round_number in range(rounds):
        data, residual = c.compress(vector, residual, round_number)
        total += c.decompress(data)
    # Error feedback: the mean of what was sent misses the vector by what is still kept, over the number of rounds.
    assert np.allclose(total + residual, vector.astype(np.float64) * rounds, atol=1e-3 * rounds)
    middle = residual
    for round_number in range(rounds):
        data, residual = c.compress(vector, residual, rounds + round_number)
    assert np.linalg.norm(residual) < 2 * np.linalg.norm(middle) + np.linalg.norm(vector)


@pytest.mark.parametrize("c", [c for c in COMPRESSORS if c.is_unbiased], ids=repr)
def test_the_mean_of_many_draws_is_the_vector(c):
    """Hoeffding: the mean of N draws from [low, high] misses its expectation by (high - low) * sqrt(ln(2 n / p) / (2 N)) in
    any of n elements with a probability of at most p, here one in a billion."""
    draws, vector = 1000, vector_of(96, 0, 5)
    sent = np.stack([c.decompress(c.compress(vector, None, seed)[0]) for seed in range(draws)]).astype(float)
    span = sent.max(axis=0) - sent.min(axis=0)
    if c.kind == "quantization":  # all elements have the same range, but some do not show it
        span[:] = span.max()
    allowed = span * math.sqrt(math.log(2 * 96 / 1e-9) / (2 * draws)) + 1e-6
    assert (np.abs(sent.mean(axis=0) - vector) <= allowed).all()


@pytest.mark.parametrize("c", COMPRESSORS, ids=repr)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_by_name(c, wrong):
    vector = vector_of(40000, 0, 1)
    vector[39001] = wrong
    with pytest.raises(
        LocalError, match=f"^element 39001 of the vector is {wrong}: what is not finite cannot be compressed$"
    ):
        c.compress(vector, None, 1)
    residual, vector[39001] = np.zeros_like(vector), 1
    residual[39001] = wrong
    with pytest.raises(
        LocalError, match=re.escape(f"element 39001 of the vector is 1.0, of the residual {wrong}: ")
    ):
        c.compress(vector, residual, 1)
    vector[39001] = residual[39001] = 3e38
    with pytest.raises(LocalError, match="what is not finite"):
        c.compress(vector, residual, 1)


@pytest.mark.parametrize("c", COMPRESSORS, ids=repr)
def test_other_shapes_and_types_are_misuse(c):
    vector = vector_of(64, 0, 1)
    for wrong in (vector.astype(np.float64), vector.reshape(8, 8)):
        with pytest.raises(LocalError, match="a vector is a flat float32 array"):
            c.compress(wrong, None, 1)
    for residual in (vector[1:], vector.astype(np.float64)):
        with pytest.raises(LocalError, match="a residual of"):
            c.compress(vector, residual, 1)
    data, _ = c.compress(vector, None, 1)
    for accumulator in (vector.astype(np.float64), vector.reshape(8, 8)):
        with pytest.raises(LocalError, match="an accumulator is a flat float32 array"):
            c.add(data, accumulator)
    for factor in (0.1, math.nan, 1e39):
        with pytest.raises(LocalError, match="is no float32 number"):
            c.add(data, vector, factor)


@pytest.mark.parametrize(("kind", "options"), OPTIONS[:: len(OPTIONS) // 12])
@given(st.data())
@settings(max_examples=60)
def test_hostile_bytes_are_refused_or_finite_and_touch_nothing(kind, options, data):
    c = compressor(kind, **options)
    length = 300
    good = bytearray(c.compress(vector_of(length, data.draw(st.integers(0, 4)), 1), None, 1)[0])
    for _ in range(data.draw(st.integers(1, 3))):
        match data.draw(st.sampled_from(["flip", "cut", "grow", "set"])):
            case "flip":
                at = data.draw(st.integers(0, 8 * len(good) - 1)) if good else 0
                good[at // 8 : at // 8 + 1] = bytes([b ^ (1 << at % 8) for b in good[at // 8 : at // 8 + 1]])
            case "cut":
                del good[data.draw(st.integers(0, len(good))) :]
            case "grow":
                good += data.draw(st.binary(max_size=9))
            case "set":
                at = data.draw(st.integers(0, min(len(good), 40)))
                good[at : at + 4] = data.draw(
                    st.sampled_from([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\0\0\x80\x7f"])
                )
    accumulator = np.ones(length, np.float32)
    try:
        vector = c.decompress(bytes(good), length)
    except RemoteError as error:
        assert error.kind in ("bad_compression", "oversized")
        with pytest.raises(RemoteError):
            c.add(bytes(good), accumulator)
        assert (accumulator == 1).all()
    else:
        assert vector.shape == (length,)
        assert np.isfinite(vector).all()


@given(any_compressor, st.binary(max_size=200))
def test_noise_is_refused(c, noise):
    with pytest.raises(RemoteError):
        c.decompress(noise, 300)


@pytest.mark.parametrize("c", COMPRESSORS, ids=repr)
def test_another_length_kind_or_version_is_refused(c):
    data, _ = c.compress(vector_of(64, 0, 1), None, 1)
    with pytest.raises(RemoteError, match="bad_compression: the length is 64, not 65"):
        c.decompress(data, 65)
    with pytest.raises(RemoteError, match="bad_compression: the format version is 2, not 1"):
        c.decompress(b"\x02" + data[1:], 64)
    with pytest.raises(RemoteError, match="bad_compression: the kind's number is 9, not"):
        c.decompress(data[:1] + b"\x09" + data[2:], 64)
    with pytest.raises(RemoteError, match="oversized: a vector of 18446744073709551615 elements"):
        c.decompress(data[:2] + b"\xff" * 8 + data[10:])
    with pytest.raises(RemoteError, match="oversized: more bytes than"):
        c.decompress(data + bytes(1000), 64)

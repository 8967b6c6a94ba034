"""top_k and random_k: which elements are sent."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2pcoord.compression import sparsification
from p2pcoord.compression.sparsification import RandomK, TopK, drawn_positions, largest
from p2pcoord.errors import LocalError, RemoteError
from tests.compression.subjects import vector_of, vectors


def by_sorting(vector, count):
    """The definition: by magnitude, then by position."""
    return np.sort(np.lexsort((np.arange(vector.size), -np.abs(vector.astype(np.float64))))[:count])


@given(vectors, st.floats(0, 1), st.sampled_from([8, 64, 1 << 16]))
def test_the_largest_are_found_whatever_the_sample_says(vector, share, sample):
    before, sparsification.SAMPLE = sparsification.SAMPLE, sample
    try:
        count = round(share * vector.size)
        assert largest(vector, count).tolist() == by_sorting(vector, count).tolist()
    finally:
        sparsification.SAMPLE = before


@pytest.mark.parametrize("arranged", ["ascending", "one column", "few values", "equal", "last"])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.7])
def test_a_sample_that_misleads_costs_time_only(arranged, share, monkeypatch):
    monkeypatch.setattr(sparsification, "SAMPLE", 256)
    vector = vector_of(70_001, 0, 2)
    stride = (vector.size // 256) | 1
    match arranged:
        case "ascending":
            vector = np.sort(np.abs(vector))
        case "one column":
            vector[::stride] = 100
        case "few values":
            vector = np.round(vector)
        case "equal":
            vector[:] = -3
        case "last":
            vector[:69_000] = 0
    count = round(share * vector.size)
    assert largest(vector, count).tolist() == by_sorting(vector, count).tolist()


@given(vectors, st.sampled_from([0.001, 0.1, 0.5, 1.0]))
def test_top_k_is_torchs(vector, ratio):
    c = TopK(ratio=ratio)
    sent = torch.from_numpy(c.decompress(c.compress(vector)[0]))
    values = torch.from_numpy(vector)
    expected = torch.topk(values.abs(), c.count(vector.size)).values
    # torch does not say which of equal elements it takes, so magnitudes are compared.
    assert torch.equal(torch.topk(sent.abs(), c.count(vector.size)).values, expected)
    assert torch.equal(sent[sent != 0], values[sent != 0])


@given(vectors, st.sampled_from([0.001, 0.1, 0.5, 1.0]))
def test_what_top_k_leaves_is_at_most_its_share(vector, ratio):
    """Stich et al. 2018, definition 2.1: |x - sent|^2 <= (1 - k / n) |x|^2."""
    vector = np.clip(vector, -(2.0**60), 2.0**60)
    c = TopK(ratio=ratio)
    data, kept = c.compress(vector)
    whole = float((vector.astype(np.float64) ** 2).sum())
    left = float((kept.astype(np.float64) ** 2).sum())
    assert left <= (1 - c.count(vector.size) / max(vector.size, 1)) * whole * (1 + 1e-12)
    assert len(data) <= 10 + 17 + math.ceil(vector.size / 8) + 4 * c.count(vector.size)


def test_k_and_ratio_count_as_they_say():
    assert [TopK(k=5).count(n) for n in (0, 3, 5, 100)] == [0, 3, 5, 5]
    assert [TopK(ratio=0.01).count(n) for n in (0, 1, 100, 1000, 1049)] == [0, 1, 1, 10, 10]
    assert [RandomK(sparsity=0.99).count(n) for n in (0, 1, 100, 1000)] == [0, 1, 1, 10]
    assert RandomK(sparsity=0.0).count(7) == 7


def test_what_is_not_accumulated_is_forgotten():
    vector = np.array([3, -1, 2, 0.5], np.float32)
    for accumulate, kept in ((True, [0, -1, 0, 0.5]), (False, [0, 0, 0, 0])):
        c = TopK(k=2, accumulate_residuals=accumulate)
        data, left = c.compress(vector)
        assert c.decompress(data).tolist() == [3, 0, 2, 0]
        assert left.tolist() == kept


@given(st.integers(0, 5000), st.floats(0, 1), st.integers(0, 2**64 - 1))
def test_each_window_gives_one_position(length, share, seed):
    count = min(max(round(share * length), 1), length)
    positions, sizes = drawn_positions(seed, count, length)
    edges = [j * length // count for j in range(count + 1)] if count else [0]
    assert all(low <= at < high for low, at, high in zip(edges, positions.tolist(), edges[1:], strict=False))
    assert sizes.tolist() == np.diff(edges).tolist()
    assert not count or set(sizes.tolist()) <= {length // count, -(-length // count)}


def test_every_element_has_its_chance():
    """Of 20,000 draws, each element's number is within 6 standard deviations; all of 50 are with a probability above
    1 - 1e-7."""
    hits = np.zeros(50)
    for seed in range(20_000):
        hits[drawn_positions(seed, 7, 50)[0]] += 1
    for start, stop in ((j * 50 // 7, (j + 1) * 50 // 7) for j in range(7)):
        chance = 1 / (stop - start)
        assert (
            np.abs(hits[start:stop] - 20_000 * chance) < 6 * math.sqrt(20_000 * chance * (1 - chance))
        ).all()


@given(vectors, st.integers(0, 2**64 - 1), st.booleans())
def test_the_seed_is_all_that_travels_of_random_positions(vector, seed, unbiased):
    vector = np.clip(vector, -(2.0**100), 2.0**100)
    c = RandomK(sparsity=0.95, unbiased=unbiased)
    data, kept = c.compress(vector, None, seed)
    positions, sizes = drawn_positions(seed, c.count(vector.size), vector.size)
    assert len(data) == 10 + 17 + 4 * positions.size
    sent = c.decompress(data)
    expected = np.zeros_like(vector)
    expected[positions] = vector[positions] * (sizes.astype(np.float32) if unbiased else 1)
    assert (sent == expected).all()
    assert (kept == (0 if unbiased else vector - expected)).all()


@given(vectors.filter(len), st.integers(0, 999))
def test_what_random_k_scales_up_varies_as_the_paper_has_it(vector, seed):
    """Stich et al. 2018: E |sent - x|^2 = (n / k - 1) |x|^2, here with each window's own size; computed over all choices."""
    vector = np.clip(vector, -(2.0**60), 2.0**60)
    _, sizes = drawn_positions(seed, RandomK(sparsity=0.9).count(vector.size), vector.size)
    size = np.repeat(sizes, sizes.astype(np.int64)).astype(np.float64)
    x = vector.astype(np.float64)
    variance = float((((size - 1) * x) ** 2 / size + x**2 * (1 - 1 / size)).sum())
    assert variance <= (size.max() - 1) * float((x**2).sum()) * (1 + 1e-12)


def test_what_scales_up_beyond_float32_is_refused_by_name():
    vector = np.full(100, 3e38, np.float32)
    with pytest.raises(LocalError, match=r"element \d+ is 3e\+38: scaled up it has no float32"):
        RandomK(sparsity=0.9, unbiased=True).compress(vector, None, 1)
    RandomK(sparsity=0.9).compress(vector, None, 1)


@pytest.mark.parametrize(
    ("ours", "theirs", "told"),
    [
        (TopK(k=5), TopK(k=6), "k is 6, not 5"),
        (RandomK(sparsity=0.9), RandomK(sparsity=0.8), "k is 60, not 30"),
        (RandomK(sparsity=0.9), RandomK(sparsity=0.9, unbiased=True), "unbiased is 1, not 0"),
    ],
)
def test_parameters_of_others_are_refused(ours, theirs, told):
    data, _ = theirs.compress(vector_of(300, 0, 1), None, 1)
    with pytest.raises(RemoteError, match=f"({told}|oversized)"):
        ours.decompress(data, 300)


def test_a_value_that_is_not_finite_is_refused():
    for c in (TopK(k=2), RandomK(sparsity=0.9)):
        data, _ = c.compress(vector_of(20, 0, 1), None, 1)
        for wrong in (math.nan, math.inf):
            with pytest.raises(RemoteError, match="bad_compression: a value is not finite"):
                c.decompress(data[:-4] + np.float32(wrong).tobytes(), 20)


def test_no_positions_are_drawn_for_values_that_are_not_there():
    data, _ = RandomK(sparsity=0.0).compress(vector_of(20, 0, 1), None, 1)
    count = 1 << 32
    promised = data[:2] + count.to_bytes(8, "little") + count.to_bytes(8, "little") + data[18:27]
    with pytest.raises(RemoteError, match="bad_compression: 0 bytes where 536870912 are needed"):
        RandomK(sparsity=0.0).decompress(promised)

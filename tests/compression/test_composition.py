"""top_k or random_k, then quantization."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcoord.compression import compressor
from p2pcoord.compression.quantization import Quantization
from p2pcoord.compression.sparsification import RandomK, TopK
from p2pcoord.errors import RemoteError
from tests.compression.subjects import vector_of, vectors

TOP_K_4_BITS = compressor(
    "composition", stages=[("top_k", {"ratio": 0.1}), ("quantization", {"bits": 4, "block": 32})]
)


@given(vectors)
def test_it_is_one_after_the_other(vector):
    first, second = TopK(ratio=0.1), Quantization(bits=4, block=32)
    data, kept = TOP_K_4_BITS.compress(vector)
    chosen = first.choose(vector)
    values, unsent = second.compress(chosen.values)
    assert data[10:] == chosen.header + values
    expected = np.zeros_like(vector)
    expected[chosen.positions] = second.decompress(values)
    assert (TOP_K_4_BITS.decompress(data) == expected).all()
    left = vector.copy()
    left[chosen.positions] = unsent
    assert (kept == left).all()


@given(vectors, st.integers(0, 999))
def test_a_stage_that_owes_nothing_keeps_nothing_of_what_was_chosen(vector, seed):
    c = compressor(
        "composition", stages=[("top_k", {"ratio": 0.1}), ("quantization", {"bits": 2, "stochastic": True})]
    )
    _, kept = c.compress(vector, None, seed)
    assert (kept == TopK(ratio=0.1).compress(vector)[1]).all()
    c = compressor(
        "composition",
        stages=[("random_k", {"sparsity": 0.9, "unbiased": True}), ("quantization", {"bits": 8})],
    )
    assert not c.compress(np.clip(vector, -(2.0**100), 2.0**100), None, seed)[1].any()


def test_positions_and_rounding_are_drawn_from_different_streams():
    c = compressor(
        "composition",
        stages=[("random_k", {"sparsity": 0.9}), ("quantization", {"bits": 2, "stochastic": True})],
    )
    vector = vector_of(1000, 0, 1)
    data, _ = c.compress(vector, None, 5)
    chosen = RandomK(sparsity=0.9).choose(vector, None, 5)
    assert data[10 : 10 + len(chosen.header)] == chosen.header
    assert data[10 + len(chosen.header) :] == c.second.compress(chosen.values, None, 5)[0]


def test_a_quarter_of_top_ks_bytes_at_a_tenth_more_error():
    vector = vector_of(100_000, 0, 1)
    sizes, errors = [], []
    for c in (TopK(ratio=0.1), TOP_K_4_BITS):
        data, kept = c.compress(vector)
        sizes.append(len(data))
        errors.append(float(np.linalg.norm(kept)))
    assert sizes[1] < 0.4 * sizes[0]
    assert errors[1] < 1.1 * errors[0]


def test_hostile_stages_are_refused():
    data, _ = TOP_K_4_BITS.compress(vector_of(300, 0, 1))
    inner = data.index(b"\x01\x01" + (30).to_bytes(8, "little"))
    with pytest.raises(RemoteError, match="bad_compression: the length is 31, not 30"):
        TOP_K_4_BITS.decompress(data[: inner + 2] + b"\x1f" + data[inner + 3 :], 300)
    with pytest.raises(RemoteError, match="bad_compression: bits is 5, not 4"):
        TOP_K_4_BITS.decompress(data[: inner + 10] + b"\x05" + data[inner + 11 :], 300)

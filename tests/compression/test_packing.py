"""The bit stream of codes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcoord.compression.packing import pack, packed_bytes, unpack
from p2pcoord.errors import LocalError


@given(st.integers(1, 8), st.integers(0, 40), st.integers(0, 1000))
def test_code_i_lies_in_its_bits_and_comes_back(bits, groups, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, 8 * groups, np.uint8)
    packed = pack(codes, bits)
    # One Python integer as the bit stream, least significant bit first.
    stream = sum(int(code) << (bits * at) for at, code in enumerate(codes.tolist()))
    assert packed.tobytes() == stream.to_bytes(bits * groups, "little")
    assert (unpack(packed, bits) == codes).all()


@given(st.integers(1, 8), st.integers(0, 50), st.integers(0, 1000))
def test_a_stream_that_was_cut_behind_its_last_code_gives_all_codes(bits, count, seed):
    codes = np.zeros(-(-count // 8) * 8, np.uint8)
    codes[:count] = np.random.default_rng(seed).integers(0, 1 << bits, count)
    cut = pack(codes, bits)[: packed_bytes(count, bits)]
    assert (unpack(cut, bits)[:count] == codes[:count]).all()


def test_codes_that_fill_no_group_are_misuse():
    with pytest.raises(LocalError):
        pack(np.zeros(7, np.uint8), 4)

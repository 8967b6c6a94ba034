"""The encoding of chosen positions."""

import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcoord.compression.positions import BITMAP, BYTES, WORDS, decode_positions, encode_positions
from p2pcoord.compression.wire_format import Reader
from p2pcoord.errors import RemoteError


@st.composite
def chosen(draw):
    """Positions of every density, and the length."""
    length = draw(st.integers(1, 200_000))
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    density = draw(st.sampled_from([0, 1e-5, 1e-3, 0.01, 0.1, 0.5, 1]))
    return np.flatnonzero(random.random(length) < density), length


def as_read(form, data, count, length):
    return decode_positions(Reader(data), form, len(data), count, length)


@given(chosen())
def test_positions_come_back_in_the_fewest_bytes_of_the_three_forms(case):
    positions, length = case
    form, data = encode_positions(positions, length)
    assert as_read(form, data, positions.size, length).tolist() == positions.tolist()
    gaps = np.diff(positions, prepend=-1) - 1
    sizes = {
        BITMAP: math.ceil(length / 8),
        BYTES: sum(gap // 255 + 1 for gap in gaps.tolist()),
        WORDS: 2 * sum(gap // 65535 + 1 for gap in gaps.tolist()),
    }
    assert len(data) == sizes[form] == min(sizes.values())


def test_the_forms_are_what_the_page_says():
    assert encode_positions(np.array([0, 1, 7, 8]), 9) == (BITMAP, bytes([0b10000011, 1]))
    assert encode_positions(np.array([0, 254, 510, 1021]), 8000) == (
        BYTES,
        bytes([0, 253, 255, 0, 255, 255, 0]),
    )
    far = np.array([70000, 140000, 300000])
    skips = [65535, 4465, 65535, 4464, 65535, 65535, 28929]
    assert encode_positions(far, 10**6) == (WORDS, struct.pack("<7H", *skips))


@pytest.mark.parametrize(
    ("form", "data", "count", "told"),
    [
        (BITMAP, b"\x01", 1, "another length"),
        (BITMAP, b"\x01\x04", 2, "another length"),  # bit 10 of 10
        (BITMAP, b"\x01\x00", 2, "1 positions, not 2"),
        (BYTES, b"\x00\x09", 2, "beyond the vector"),
        (BYTES, b"\x00\xff", 1, "beyond the vector"),
        (BYTES, b"\x00", 2, "1 positions, not 2"),
        (WORDS, b"\x00", 1, "half a symbol"),
        (WORDS, b"\x0a\x00", 1, "beyond the vector"),
        (3, b"\x00", 1, "no form 3"),
        (BYTES, b"\x00\x00\x00", 3, "3 bytes of positions among 10"),
    ],
)
def test_what_no_encoder_writes_is_refused(form, data, count, told):
    with pytest.raises(RemoteError, match=f"bad_compression: .*{told}"):
        as_read(form, data, count, 10)

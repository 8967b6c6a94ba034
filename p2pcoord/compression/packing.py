"""Codes of 1 to 8 bits as a bit stream without gaps.

Code i of width b lies in bits [b i, b i + b) of the stream; bit j is bit j % 8 of byte j // 8. Eight codes fill b whole
bytes. Pairs are pushed together three times, inside of words of 16, 32 and 64 bits, which numpy does for a whole array at
once: unlike shifting bit by bit it costs the same for every width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from p2pcoord.errors import LocalError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from p2pcoord.layout import Octets

GROUP: Final = 8
"""Codes that fill a whole number of bytes, whatever their width."""

_WORDS: Final = (("<u2", 8), ("<u4", 16), ("<u8", 32))
"""Words, and how far apart the two codes, pairs and fours of a word lie."""


def packed_bytes(count: int, bits: int) -> int:
    """Size of `count` codes of this width."""
    return (count * bits + 7) // 8


def pack(codes: Octets, bits: int) -> Octets:
    """The bit stream of codes below 2**bits, as many as whole groups hold (else LocalError)."""
    if codes.size % GROUP:
        raise LocalError(f"{codes.size} codes do not fill groups of {GROUP}")
    if bits == 8:
        return codes
    packed = np.empty((codes.size // GROUP, bits), np.uint8)
    words: NDArray[np.integer] = codes
    for dtype, distance in _WORDS:
        words = words.view(dtype)
        width = bits * distance // 8
        low = words & ((1 << width) - 1)
        words = words >> (distance - width)
        words &= ((1 << width) - 1) << width
        words |= low
    columns = words.view(np.uint8).reshape(-1, 8)
    for column in range(bits):
        packed[:, column] = columns[:, column]
    return packed.reshape(-1)


def unpack(stream: Octets, bits: int) -> Octets:
    """All codes of a stream; as many zeros as complete the last group follow."""
    if bits == 8:
        return stream
    groups = -(-stream.size // bits)
    if stream.size % bits:
        stream = np.concatenate([stream, np.zeros(groups * bits - stream.size, np.uint8)])
    words: NDArray[np.integer] = np.zeros(groups, "<u8")
    columns, packed = words.view(np.uint8).reshape(-1, 8), stream.reshape(-1, bits)
    for column in range(bits):
        columns[:, column] = packed[:, column]
    for dtype, distance in reversed(_WORDS):
        words = words.view(dtype)
        width = bits * distance // 8
        low = words & ((1 << width) - 1)
        words = words >> width
        words &= (1 << width) - 1
        words <<= distance
        words |= low
    return words.view(np.uint8)

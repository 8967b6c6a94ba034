"""Quantization: every element as a code of 1 to 8 bits, with a scale per block.

Theory of operation
    A block of B elements has one step; with b bits there are s = 2**(b - 1) - 1 levels on either side of zero, and

        step    = max |x| / s, rounded up to a bfloat16                    q in -s..s, code = q + s, decoded = q * step
        q       = x / step, rounded to the nearest integer, ties to even                                   deterministic
        q       = floor(x / step), plus 1 with probability x / step - floor(x / step)                      stochastic

    Stochastic rounding is QSGD (Alistarh et al. 2017), in the variant that its experiments use: scaled by the maximum of
    a bucket, not by its 2-norm, and fixed-width codes.

    One bit has a sign and no zero: decoded = step or -step, code = 1 for step.

        step    = mean |x|, rounded to a bfloat16; the sign of x       deterministic: 1-bit SGD (Seide et al. 2014), scaled
                                                                       as in EF-SGD (Karimireddy et al. 2019)
        step    = max |x|;  + with probability (1 + x / step) / 2      stochastic

    **Why bfloat16 steps.** q has 7 bits and a bfloat16 8, so q * step is exact in float32, and so is x - q * step when q is
    the nearest integer (it is no larger than x, and a multiple of x's last bit). A step of 24 bits would lose that, and
    what is kept would drift from what was not sent. Rounding up costs at most 2**-7 of the step, and saves 2 bytes a block.

    x / step is a division because a product with a rounded reciprocal can land on the wrong side of a half.

    On the wire, behind the common header: bits u8, log2 B u8, a step for every block (the bfloat16's 16 bits, u16), the
    codes as a bit stream (packing.py). A code of 2**b - 1, which nobody sends for b > 1, is a level like the others.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np

from p2pcoord.compression.forms import (
    TILE,
    DenseCompressor,
    add_residual,
    check_input,
    refuse,
)
from p2pcoord.compression.packing import pack, packed_bytes, unpack
from p2pcoord.compression.randomness import ROUNDING, Stream
from p2pcoord.compression.wire_format import HEADER, Reader, bad, little_endian, require_equal
from p2pcoord.kinds import require

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from p2pcoord.compression.randomness import Random
    from p2pcoord.layout import Float32s, Octets

    UInt16s = NDArray[np.uint16]

MAX_BITS: Final = 8

MAX_MAGNITUDE: Final = 2.0**126
"""Below this, every code of a step that was rounded up means a float32, the one above the highest level included."""

MIN_BLOCK: Final = 32
MAX_BLOCK: Final = TILE
"""A block lies within a tile. 256 elements make a step's 16 bits 1/16 bit an element; QSGD's experiments use 512 and 8,192."""

STEP_BYTES: Final = 2

_MIN_INFINITE: Final = 0x7F80
"""The first bfloat16 that is no number from 0 to the largest: infinity, NaN, and all that are negative."""

_PARAMETERS: Final = struct.Struct("<BB")


class TooLargeError(Exception):
    """A block holds what is not finite or not below MAX_MAGNITUDE. Caught by whoever can say which element."""


class Quantization(DenseCompressor, frozen=True, kw_only=True):
    """Codes of `bits` bits, rounded to nearest or at random (`stochastic`), a scale for every `block` elements."""

    kind: ClassVar[str] = "quantization"
    number: ClassVar[int] = 1

    bits: int
    stochastic: bool = False
    block: int = 256

    def __post_init__(self) -> None:
        require(1 <= self.bits <= MAX_BITS, f"bits must be from 1 to {MAX_BITS}, they are {self.bits}")
        check_block(self.block)

    @property
    def exact(self) -> bool:
        return self.bits > 1 and not self.stochastic

    @property
    def accumulates(self) -> bool:
        """With one level on either side, a rounded value may be off by as much as the largest of its block."""
        return not self.stochastic or self.bits > 2

    @property
    def is_unbiased(self) -> bool:
        return self.stochastic

    def max_bytes(self, length: int) -> int:
        """The size, which is always the same."""
        return (
            HEADER.size
            + _PARAMETERS.size
            + STEP_BYTES * blocks(length, self.block)
            + packed_bytes(length, self.bits)
        )

    def compress(
        self, vector: Float32s, residual: Float32s | None = None, random: Random | None = None
    ) -> tuple[bytes, Float32s]:
        check_input(vector, residual)
        length = vector.size
        stream = Stream(random, ROUNDING) if self.stochastic else None
        count = blocks(length, self.block)
        steps = np.empty(count, np.uint16)
        codes = np.empty(packed_bytes(count * self.block, self.bits), np.uint8)
        if self.accumulates:
            kept = np.empty(count * self.block, np.float32)
        else:
            kept, scratch = np.zeros(length, np.float32), np.empty(TILE, np.float32)
        for start in range(0, length, TILE):
            stop = min(start + TILE, count * self.block)
            tile = kept[start:stop] if self.accumulates else scratch[: stop - start]
            part = None if residual is None else residual[start:stop]
            add_residual(vector[start:stop], part, tile)
            rows = tile.reshape(-1, self.block)
            first = start // self.block
            try:
                quantized = quantize(
                    rows, self.bits, steps[first : first + len(rows)], stream, length - start
                )
            except TooLargeError:
                raise refuse(vector, residual, MAX_MAGNITUDE) from None
            at = start * self.bits // 8
            packed = pack(quantized.reshape(-1), self.bits)
            codes[at : at + packed.size] = packed
        sections = little_endian(steps), little_endian(codes[: packed_bytes(length, self.bits)])
        parameters = _PARAMETERS.pack(self.bits, self.block.bit_length() - 1)
        return b"".join((self._header(length), parameters, *sections)), kept[:length]

    def _tiles(self, reader: Reader, length: int) -> Iterator[tuple[int, Float32s]]:
        bits, log2_block = reader.unpack(_PARAMETERS)
        require_equal("bits", bits, self.bits)
        require_equal("log2 of the block", log2_block, self.block.bit_length() - 1)
        steps = read_steps(reader, blocks(length, self.block), np.array(self.bits))
        codes = reader.take(np.uint8, packed_bytes(length, self.bits))
        reader.end()
        return self._decoded(steps, codes, length)

    def _decoded(self, steps: Float32s, codes: Octets, length: int) -> Iterator[tuple[int, Float32s]]:
        tile = np.zeros(min(TILE, steps.size * self.block), np.float32)
        for start in range(0, length, TILE):
            stop = min(start + TILE, length)
            at = start * self.bits // 8
            numbers = unpack(codes[at : at + packed_bytes(stop - start, self.bits)], self.bits)[
                : stop - start
            ]
            first, last = start // self.block, blocks(stop, self.block)
            tile[: stop - start] = numbers
            tile[stop - start :] = 0
            rows = tile[: (last - first) * self.block].reshape(-1, self.block)
            dequantize(rows, self.bits, steps[first:last])
            yield start, tile[: stop - start]


def blocks(length: int, block: int) -> int:
    """How many blocks `length` elements fill, the last one perhaps in part."""
    return -(-length // block)


def check_block(block: int) -> None:
    """Raise UserError unless a block can have this many elements."""
    require(
        MIN_BLOCK <= block <= MAX_BLOCK and block & (block - 1) == 0,
        f"block must be a power of two from {MIN_BLOCK} to {MAX_BLOCK}, it is {block}",
    )


def quantize(
    rows: Float32s, bits: int, steps: UInt16s, stream: Stream | None, elements: int | None = None
) -> Octets:
    """The codes of blocks, uint8 of the shape of `rows` (blocks, B); `steps` is set to the blocks' bfloat16 steps.

    `rows` is left holding what is not sent. Zeros fill up the last block where fewer than all its elements exist
    (`elements`, from the first row on). `stream` is for rounding at random; None rounds to nearest. Raises TooLargeError.
    """
    # Without the sign of a zero, which numpy takes from either of two equal zeros.
    largest = np.abs(np.maximum(rows.max(axis=1), -rows.min(axis=1)))
    if not (largest < MAX_MAGNITUDE).all():  # NaN is not below, and survives max and min
        raise TooLargeError
    if bits == 1:
        return _signs(rows, largest, steps, stream, elements)
    levels = (1 << (bits - 1)) - 1
    steps[:] = bfloat16_at_least(largest, levels)
    step = widened(steps)[:, np.newaxis]
    with np.errstate(all="ignore"):
        quotients = np.divide(rows, np.where(step > 0, step, np.float32(1)), dtype=np.float32)
        if stream is None:
            np.rint(quotients, out=quotients)
        else:
            _round_at_random(quotients, stream)
        codes = (quotients + np.float32(levels)).astype(np.uint8)
        quotients *= step
        rows -= quotients
    return codes


def _signs(
    rows: Float32s, largest: Float32s, steps: UInt16s, stream: Stream | None, elements: int | None
) -> Octets:
    with np.errstate(all="ignore"):
        if stream is None:
            steps[:] = nearest_bfloat16(mean_magnitudes(rows, elements))
            step = widened(steps)[:, np.newaxis]
            above = (rows >= 0).astype(np.float32)
        else:
            steps[:] = bfloat16_at_least(largest, 1)
            step = widened(steps)[:, np.newaxis]
            above = np.divide(rows, np.where(step > 0, step, np.float32(1)), dtype=np.float32)
            above += np.float32(1)
            above *= np.float32(0.5)
            _round_at_random(above, stream)
        codes = above.astype(np.uint8)
        above += above
        above -= np.float32(1)
        above *= step
        rows -= above
    return codes


def _round_at_random(quotients: Float32s, stream: Stream) -> None:
    """Round down, and up with the probability of the fraction: exact but for the fraction's last 2**-24."""
    lower = np.floor(quotients)
    quotients -= lower
    up = stream.uniforms(quotients.size).reshape(quotients.shape) < quotients
    np.add(lower, up, out=quotients)


def dequantize(rows: Float32s, bits: int, steps: Float32s) -> None:
    """Codes, as float32 of shape (blocks, B), become values, in place."""
    if bits == 1:
        rows += rows
        rows -= np.float32(1)
    else:
        rows -= np.float32((1 << (bits - 1)) - 1)
    rows *= steps[:, np.newaxis]


def read_steps(reader: Reader, count: int, bits: NDArray[np.integer]) -> Float32s:
    """The steps of `count` blocks with these bits. Raises RemoteError where a level would not be finite."""
    stored = reader.take(np.uint16, count)
    if (stored >= _MIN_INFINITE).any():
        raise bad("a step is not finite or negative")
    steps = widened(stored)
    # The highest code of all is one level above the highest that is sent.
    if (steps > np.ldexp(np.float32(np.finfo(np.float32).max), -np.maximum(bits - 1, 0))).any():
        raise bad("a step's highest level is not finite")
    return steps


def widened(steps: UInt16s) -> Float32s:
    """bfloat16 as float32."""
    bits = steps.astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


def bfloat16_at_least(largest: Float32s, levels: int) -> UInt16s:
    """The smallest bfloat16 of which `levels` times reach each of these numbers, none negative."""
    bits = (largest / np.float32(levels)).view(np.uint32) + np.uint32(0xFFFF)
    steps = (bits >> 16).astype(np.uint16)
    # A subnormal quotient may have been rounded down to a bfloat16; 8 by 7 bits are exact in float64.
    steps += widened(steps).astype(np.float64) * levels < largest
    return steps


def nearest_bfloat16(numbers: NDArray[np.float64]) -> UInt16s:
    """Rounded to float32, then to bfloat16, ties to even."""
    bits = numbers.astype(np.float32).view(np.uint32)
    bits = bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)
    return (bits >> 16).astype(np.uint16)


def mean_magnitudes(rows: Float32s, elements: int | None) -> NDArray[np.float64]:
    """mean |x| of every block, in float64 and in a fixed order (`halved`)."""
    sums = halved(np.abs(rows, dtype=np.float64))
    return sums / existing(len(rows), rows.shape[1], elements)


def existing(count: int, block: int, elements: int | None) -> NDArray[np.float64]:
    """How many elements of each block are not filling."""
    sizes = np.full(count, float(block))
    if elements is not None and elements < count * block:
        sizes[-1] = elements - (count - 1) * block
    return sizes


def halved(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sum of each row: the upper half is added to the lower until one number is left. `rows` is overwritten.

    numpy's own sum has another order on other processors, so its last bit differs.
    """
    while rows.shape[1] > 1:
        half = rows.shape[1] // 2
        rows = np.add(rows[:, :half], rows[:, half:], out=rows[:, :half])
    return rows[:, 0]

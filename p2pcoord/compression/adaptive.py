"""Adaptive quantization: each block gets as many bits as its importance earns of a common budget.

Theory of operation
    A block's rounding error is about importance / 2**bits, with its norm or its standard deviation for importance, so the
    sum of squared errors is smallest when it is the same in all blocks: one bit more for each doubling (reverse
    water-filling; Cover and Thomas 2006, section 10.3.3). With a water level t

        bits = min_bits + 1 + floor(log2(importance / t)), at least min_bits and at most max_bits

    and t is the lowest level at which all blocks together stay within the budget. Of blocks that the next lower level would
    give a bit, the first ones get what is left.

    **Same bytes everywhere.** Importance is summed in float64 in a fixed order, then rounded to float32. The bits of positive
    float32 numbers, as integers, grow by 2**23 for each doubling, so the formula above is an integer shift, and t is found
    by bisection over integers. No logarithm is taken.

    The budget is target_ratio times the uncompressed size, headers left out. `variance` looks for blocks that differ inside
    themselves: one that is constant, but large, gets fewer bits than by its norm.

    Inside a block, quantization is that of quantization.py, rounded to nearest.

    On the wire, behind the common header: min_bits u8, max_bits u8, log2 B u8; each block's bits - 1 as 3-bit codes
    (packing.py); a step for every block; the codes of block after block, B * bits / 8 bytes each. The last block is sent whole,
    zeros after its last element.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, ClassVar, Final, Literal

import numpy as np

from p2pcoord.compression.forms import TILE, DenseCompressor, add_residual, check_input, refuse
from p2pcoord.compression.packing import GROUP, pack, packed_bytes, unpack
from p2pcoord.compression.quantization import (
    MAX_BITS,
    MAX_MAGNITUDE,
    STEP_BYTES,
    TooLargeError,
    blocks,
    check_block,
    dequantize,
    existing,
    halved,
    quantize,
    read_steps,
)
from p2pcoord.compression.wire_format import HEADER, Reader, bad, little_endian, require_equal
from p2pcoord.kinds import require
from p2pcoord.layout import FLOAT_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from p2pcoord.compression.randomness import Random
    from p2pcoord.layout import Float32s, Octets

    Widths = NDArray[np.int64]

_PARAMETERS: Final = struct.Struct("<BBB")

_WIDTH_BITS: Final = 3
"""A width from 1 to 8, less one."""

_DOUBLING: Final = 23
"""Bits of a float32's significand: its bits as an integer grow by 2**23 when it doubles."""


GATHERED: Final = 8 * TILE
"""Elements whose blocks are grouped by their bits, so that a group, which is what is worked on, has about a tile of them."""


class Adaptive(DenseCompressor, frozen=True, kw_only=True):
    """`min_bits` to `max_bits` for every `block` elements, by `importance_metric`, `target_ratio` of the size in all."""

    kind: ClassVar[str] = "adaptive"
    number: ClassVar[int] = 4

    min_bits: int
    max_bits: int
    target_ratio: float
    importance_metric: Literal["norm", "variance"] = "norm"
    block: int = 256

    def __post_init__(self) -> None:
        require(
            1 <= self.min_bits <= self.max_bits <= MAX_BITS,
            f"min_bits and max_bits must be from 1 to {MAX_BITS}, in this order, "
            f"they are {self.min_bits} and {self.max_bits}",
        )
        check_block(self.block)
        least = (STEP_BYTES + _WIDTH_BITS / 8 + self.min_bits * self.block / 8) / (FLOAT_BYTES * self.block)
        require(
            least <= self.target_ratio <= 1,
            "target_ratio, the share of the uncompressed size, must be at most 1 and at least what min_bits take, "
            f"{least:.4f}, it is {self.target_ratio}",
        )

    @property
    def exact(self) -> bool:
        return self.min_bits > 1

    def max_bytes(self, length: int) -> int:
        """The size when the budget is spent."""
        return self._fixed_bytes(length) + self._budget(length) * self.block // 8

    def _fixed_bytes(self, length: int) -> int:
        count = blocks(length, self.block)
        return HEADER.size + _PARAMETERS.size + packed_bytes(count, _WIDTH_BITS) + STEP_BYTES * count

    def _budget(self, length: int) -> int:
        """How many bits an element of each block may have, all blocks added up."""
        count = blocks(length, self.block)
        left = int(self.target_ratio * FLOAT_BYTES * length) - (
            self._fixed_bytes(length) - self._fixed_bytes(0)
        )
        return min(max(left // (self.block // 8), self.min_bits * count), self.max_bits * count)

    def compress(
        self, vector: Float32s, residual: Float32s | None = None, random: Random | None = None
    ) -> tuple[bytes, Float32s]:
        check_input(vector, residual)
        length = vector.size
        count = blocks(length, self.block)
        kept = np.empty(count * self.block, np.float32)
        importance = np.empty(count, np.float32)
        for start in range(0, length, TILE):
            tile = kept[start : start + TILE]
            add_residual(
                vector[start : start + TILE],
                None if residual is None else residual[start : start + TILE],
                tile,
            )
            first, rows = start // self.block, tile.reshape(-1, self.block)
            importance[first : first + len(rows)] = self._importance(rows, length - start)
        widths = allocate(importance, self.min_bits, self.max_bits, self._budget(length))
        steps = np.empty(count, np.uint16)
        try:
            codes = self._quantized(kept, widths, steps, length)
        except TooLargeError:
            raise refuse(vector, residual, MAX_MAGNITUDE) from None
        filled = np.zeros(-(-count // GROUP) * GROUP, np.uint8)
        filled[:count] = widths - 1
        data = (
            self._header(length),
            _PARAMETERS.pack(self.min_bits, self.max_bits, self.block.bit_length() - 1),
            pack(filled, _WIDTH_BITS)[: packed_bytes(count, _WIDTH_BITS)].tobytes(),
            little_endian(steps),
            little_endian(codes),
        )
        return b"".join(data), kept[:length]

    def _importance(self, rows: Float32s, elements: int) -> NDArray[np.float64]:
        values = rows.astype(np.float64)
        with np.errstate(all="ignore"):
            if self.importance_metric == "norm":
                values *= values
                return np.sqrt(halved(values))
            sizes = existing(len(rows), self.block, elements)
            values -= (halved(values.copy()) / sizes)[:, np.newaxis]
            values[-1, int(sizes[-1]) :] = 0
            values *= values
            return np.sqrt(halved(values) / sizes)

    def _quantized(self, kept: Float32s, widths: Widths, steps: NDArray[np.uint16], length: int) -> Octets:
        """The codes of all blocks; `kept` is left holding what is not sent, and `steps` is set."""
        rows = kept.reshape(-1, self.block)
        units = np.empty((int(widths.sum()), self.block // 8), np.uint8)
        for first, last, bits, members, at in self._groups(widths):
            chosen = rows[first:last][members]
            group_steps = np.empty(len(chosen), np.uint16)
            # Only the last row of all may be filled up, and it is the last of its group.
            elements = (len(chosen) - 1) * self.block + length - (first + int(members[-1])) * self.block
            codes = quantize(chosen, bits, group_steps, None, elements)
            rows[first:last][members] = chosen
            steps[first:last][members] = group_steps
            units[at] = pack(codes.reshape(-1), bits).reshape(len(chosen), bits, -1)
        return units.reshape(-1)

    def _groups(self, widths: Widths) -> Iterator[tuple[int, int, int, Widths, Widths]]:
        """The blocks of a stretch that have the same bits: first and last block of the stretch, bits, which of its
        blocks, and for each of them the units of the code section (a unit is a bit of each of a block's elements)."""
        starts = np.cumsum(widths) - widths
        rows = GATHERED // self.block
        for first in range(0, widths.size, rows):
            last = min(first + rows, widths.size)
            for bits in np.unique(widths[first:last]).tolist():
                members = np.flatnonzero(widths[first:last] == bits)
                yield first, last, bits, members, starts[first:last][members][:, np.newaxis] + np.arange(bits)

    def _tiles(self, reader: Reader, length: int) -> Iterator[tuple[int, Float32s]]:
        min_bits, max_bits, log2_block = reader.unpack(_PARAMETERS)
        require_equal("min_bits", min_bits, self.min_bits)
        require_equal("max_bits", max_bits, self.max_bits)
        require_equal("log2 of the block", log2_block, self.block.bit_length() - 1)
        count = blocks(length, self.block)
        stored = reader.take(np.uint8, packed_bytes(count, _WIDTH_BITS))
        widths = unpack(stored, _WIDTH_BITS)[:count].astype(np.int64) + 1
        if ((widths < min_bits) | (widths > max_bits)).any():
            raise bad(f"a block's bits are not from {min_bits} to {max_bits}")
        steps = read_steps(reader, count, widths)
        units = reader.take(np.uint8, int(widths.sum()) * (self.block // 8)).reshape(-1, self.block // 8)
        reader.end()
        return self._decoded(widths, steps, units, length)

    def _decoded(
        self, widths: Widths, steps: Float32s, units: Octets, length: int
    ) -> Iterator[tuple[int, Float32s]]:
        tile, done = np.empty((GATHERED // self.block, self.block), np.float32), 0
        for first, last, bits, members, at in self._groups(widths):
            codes = unpack(units[at].reshape(-1), bits).reshape(-1, self.block)
            rows = codes.astype(np.float32)
            dequantize(rows, bits, steps[first:last][members])
            tile[members] = rows
            done += len(rows)
            if done == last:
                start = first * self.block
                yield start, tile.reshape(-1)[: min(GATHERED, length - start)]


def allocate(importance: Float32s, low: int, high: int, total: int) -> Widths:
    """The bits of each block, from `low` to `high`, together at most `total`, which is at least `low` for each."""
    keys = importance.view(np.uint32).astype(np.int64)

    def widths(level: int) -> Widths:
        bits: Widths = np.clip(low + 1 + ((keys - level) >> _DOUBLING), low, high)
        return bits

    if not keys.size:
        return keys
    below, level = int(keys.min()) - ((high - low) << _DOUBLING), int(keys.max()) + 1
    if int(widths(below).sum()) <= total:
        return widths(below)
    while level - below > 1:  # the sum is above the total at `below`, and not at `level`
        middle = (below + level) // 2
        if int(widths(middle).sum()) <= total:
            level = middle
        else:
            below = middle
    chosen = widths(level)
    gaining = np.flatnonzero(widths(below) > chosen)
    chosen[gaining[: total - int(chosen.sum())]] += 1
    return chosen

"""Sparsification: some elements are sent as they are, the others not at all.

Theory of operation
    **top_k** sends the k elements of largest magnitude; of equal ones, the first (Aji and Heafield 2017; with error
    feedback: Lin et al. 2018, Stich et al. 2018). The k-th largest magnitude is found without sorting: a sample says where it
    lies, one pass collects the magnitudes near there, and only those are partitioned; a second pass picks what reaches the
    threshold. The outcome does not depend on the guess. Magnitudes are compared as integers, the bits of a float32
    without its sign: they have the same order, and one comparison finds what is not finite.

    **random_k** sends the elements at positions that a seed determines, so the seed travels instead of them. The vector is
    cut into k windows whose sizes differ by at most one, and each gives one element, drawn uniformly: every element has
    the chance 1 / w, w its window's size, as with a subset drawn from all; none waits by bad luck much longer than others,
    and it costs k draws, not n. `unbiased` sends x * w, so that the expectation is x, and keeps nothing; else x is sent and
    the rest is kept (Stich et al. 2018; Wangni et al. 2018).

        window j is [j n // k, (j + 1) n // k);  its element is start + (u * w >> 32), u the j-th 32-bit number of the stream

    On the wire, behind the common header:

        top_k      k u64 | form u8, size u64 of the positions | positions (positions.py) | k float32 values
        random_k   k u64 | seed u64 | unbiased u8 | k float32 values
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np

from p2pcoord.compression.forms import (
    TILE,
    Chosen,
    SparseCompressor,
    add_residual,
    check_input,
    refuse,
)
from p2pcoord.compression.packing import packed_bytes
from p2pcoord.compression.positions import decode_positions, encode_positions
from p2pcoord.compression.randomness import POSITIONS, Stream, seed_of
from p2pcoord.compression.wire_format import MAX_LENGTH, Reader, require_equal
from p2pcoord.errors import LocalError
from p2pcoord.kinds import require

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from p2pcoord.compression.randomness import Random
    from p2pcoord.layout import Float32s

    UInt32s = NDArray[np.uint32]
    Positions = NDArray[np.int64]

SAMPLE: Final = 1 << 16
"""Magnitudes that are looked at for a guess. Of n elements, some n / 32 are then between the guesses (4 standard deviations
of the sample's rank, either way) where half are sent, and n / 150 where one of a hundred is."""

_MAGNITUDE: Final = np.uint32(0x7FFFFFFF)
_INFINITY: Final = 0x7F800000

_TOP_K: Final = struct.Struct("<QBQ")
_RANDOM_K: Final = struct.Struct("<QQB")


class TopK(SparseCompressor, frozen=True, kw_only=True):
    """The `k` elements of largest magnitude, or a `ratio` of all; with `accumulate_residuals` the others are kept."""

    kind: ClassVar[str] = "top_k"
    number: ClassVar[int] = 2

    k: int | None = None
    ratio: float | None = None
    accumulate_residuals: bool = True

    def __post_init__(self) -> None:
        require((self.k is None) != (self.ratio is None), "top_k needs k or ratio, and not both")
        require(
            self.k is None or 1 <= self.k <= MAX_LENGTH, f"k must be from 1 to {MAX_LENGTH}, it is {self.k}"
        )
        require(
            self.ratio is None or 0 < self.ratio <= 1,
            f"ratio, the share of elements that are sent, must be above 0 and at most 1, it is {self.ratio}",
        )

    @property
    def accumulates(self) -> bool:
        return self.accumulate_residuals

    @property
    def exact(self) -> bool:
        return self.accumulate_residuals

    def count(self, length: int) -> int:
        if self.ratio is None:
            return min(self.k or 0, length)
        return min(max(round(self.ratio * length), 1), length)

    def max_position_bytes(self, length: int) -> int:
        return _TOP_K.size + packed_bytes(length, 1)

    def choose(
        self, vector: Float32s, residual: Float32s | None = None, random: Random | None = None
    ) -> Chosen:
        check_input(vector, residual)
        computed = vector
        if self.accumulate_residuals or residual is not None:
            computed = np.empty(vector.size, np.float32)
            add_residual(vector, residual, computed)
        try:
            positions = largest(computed, self.count(vector.size))
        except ValueError:
            raise refuse(vector, residual) from None
        values = computed[positions]
        if self.accumulate_residuals:
            computed[positions] = 0
        form, written = encode_positions(positions, vector.size)
        header = _TOP_K.pack(positions.size, form, len(written)) + written
        return Chosen(
            header, positions, values, computed if self.accumulate_residuals else np.zeros_like(vector)
        )

    def read_positions(self, reader: Reader, length: int) -> Positions:
        count, form, size = reader.unpack(_TOP_K)
        require_equal("k", count, self.count(length))
        return decode_positions(reader, form, size, count, length)


class RandomK(SparseCompressor, frozen=True, kw_only=True):
    """Random elements, all but the share `sparsity`; `unbiased` scales them up, else the others are kept."""

    kind: ClassVar[str] = "random_k"
    number: ClassVar[int] = 3

    sparsity: float
    unbiased: bool = False

    def __post_init__(self) -> None:
        require(
            0 <= self.sparsity < 1,
            f"sparsity, the share of elements that are left out, must be at least 0 and below 1, it is {self.sparsity}",
        )

    @property
    def accumulates(self) -> bool:
        return not self.unbiased

    @property
    def exact(self) -> bool:
        return not self.unbiased

    @property
    def is_unbiased(self) -> bool:
        return self.unbiased

    def count(self, length: int) -> int:
        return min(max(length - round(self.sparsity * length), 1), length)

    def max_position_bytes(self, length: int) -> int:
        return _RANDOM_K.size

    def choose(
        self, vector: Float32s, residual: Float32s | None = None, random: Random | None = None
    ) -> Chosen:
        check_input(vector, residual)
        seed = seed_of(random)
        count = self.count(vector.size)
        positions, sizes = drawn_positions(seed, count, vector.size)
        computed = np.empty(vector.size, np.float32)
        add_residual(vector, residual, computed)
        if any(magnitudes.max() >= _INFINITY for magnitudes in magnitude_tiles(computed)):
            raise refuse(vector, residual)
        values = computed[positions]
        if self.unbiased:
            with np.errstate(all="ignore"):
                values *= sizes.astype(np.float32)
            if not np.isfinite(values).all():
                at = int(positions[np.flatnonzero(~np.isfinite(values))[0]])
                raise LocalError(f"element {at} is {computed[at]!s}: scaled up it has no float32")
            computed = np.zeros_like(vector)
        else:
            computed[positions] = 0
        return Chosen(_RANDOM_K.pack(count, seed, self.unbiased), positions, values, computed)

    def read_positions(self, reader: Reader, length: int) -> Positions:
        count, seed, unbiased = reader.unpack(_RANDOM_K)
        require_equal("k", count, self.count(length))
        require_equal("unbiased", unbiased, int(self.unbiased))
        # Nothing is drawn for values that are not there; a quantized one may be a bit.
        reader.require(packed_bytes(count, 1))
        return drawn_positions(seed, count, length)[0]


def drawn_positions(seed: int, count: int, length: int) -> tuple[Positions, NDArray[np.uint64]]:
    """A position in each of `count` windows of `length` elements, and the windows' sizes."""
    if count == 0:
        return np.empty(0, np.int64), np.empty(0, np.uint64)
    edges = np.arange(count + 1, dtype=np.uint64)
    edges *= np.uint64(length)
    edges //= np.uint64(count)
    sizes = np.diff(edges)
    positions = Stream(seed, POSITIONS).words(count).astype(np.uint64)
    positions *= sizes
    positions >>= np.uint64(32)
    positions += edges[:-1]
    return positions.view(np.int64), sizes


def magnitude_tiles(vector: Float32s) -> Iterator[UInt32s]:
    """The bits of |x|, tile by tile."""
    bits = vector.view(np.uint32)
    for start in range(0, vector.size, TILE):
        yield bits[start : start + TILE] & _MAGNITUDE


def largest(vector: Float32s, count: int) -> Positions:
    """The positions of the `count` elements of largest magnitude, ascending; of equal ones, the first.

    `count` is at most the vector's size. Raises ValueError for an element that is not finite.
    """
    threshold, ties = _threshold(vector, count)
    chosen = []
    for tile, magnitudes in enumerate(magnitude_tiles(vector)):
        if not ties:
            reached = np.flatnonzero(magnitudes > threshold)
        else:
            reached = np.flatnonzero(magnitudes >= threshold)
            equal = np.flatnonzero(magnitudes[reached] == threshold)
            reached = np.delete(reached, equal[ties:])
            ties -= min(ties, equal.size)
        reached += tile * TILE
        chosen.append(reached)
    return np.concatenate(chosen) if chosen else np.empty(0, np.int64)


def _threshold(vector: Float32s, count: int) -> tuple[int, int]:
    """The `count`-th largest magnitude, as bits, and how many elements of just this magnitude are among the largest."""
    if not count:
        return _INFINITY, 0
    for low, high in (_bracket(vector, count), (0, _INFINITY)):
        found, beyond, finite = [], 0, True
        for magnitudes in magnitude_tiles(vector):
            finite = finite and int(magnitudes.max()) < _INFINITY
            # low < magnitude <= high in one comparison: what is not above `low` wraps around, and is negative if signed.
            magnitudes -= np.uint32(low + 1)
            found.append(magnitudes[magnitudes < high - low])
            beyond += int(np.count_nonzero(magnitudes.view(np.int32) >= high - low))
        if not finite:
            raise ValueError("not finite")
        candidates = np.concatenate(found)
        wanted = count - beyond
        if candidates.size >= wanted > 0:
            rank = candidates.size - wanted
            candidates.partition(rank)
            threshold = candidates[rank]
            ties = wanted - int(np.count_nonzero(candidates[rank:] > threshold))
            return int(threshold) + low + 1, ties
        equal = sum(int(np.count_nonzero(magnitudes == low)) for magnitudes in magnitude_tiles(vector))
        if 0 < wanted <= candidates.size + equal:
            return low, wanted - candidates.size
    raise LocalError(f"no {count} largest of {vector.size} elements")


def _bracket(vector: Float32s, count: int) -> tuple[int, int]:
    """Magnitudes between which the `count`-th largest likely lies, above the first and up to the second."""
    # An odd stride, so that rows of a matrix, often a power of two long, are not all met in the same column.
    stride = (vector.size // SAMPLE) | 1
    sample = vector[::stride].view(np.uint32) & _MAGNITUDE
    expected = count / max(vector.size, 1) * sample.size
    margin = int(4 * expected**0.5) + 8
    low, high = sample.size - int(expected) - margin, sample.size - int(expected) + margin
    ranks = [at for at in (low, high) if 0 <= at < sample.size]
    if ranks:
        sample.partition(ranks)
    return int(sample[low]) if low >= 0 else 0, int(sample[high]) if high < sample.size else _INFINITY

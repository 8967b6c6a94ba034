"""What all compressors have in common: how they are made, how they take vectors and how they give them back.

Theory of operation
    A compressor is a frozen value, the same on all members of a run; what changes from call to call (the residual, the
    random stream) is passed in and handed back.

        computed          = vector + residual                       (float32, element by element)
        data, kept        = compress(vector, residual, random)
        sent              = decompress(data)
        kept              = computed - sent                          where the compressor accumulates; else zeros

    **The residual law.** Where `exact` holds, sent + kept is computed, bit for bit (but for the sign of a zero): no kept
    value needs more than the 24 bits of a float32. It holds for every compressor that never sends more than twice what
    it has: then kept is no larger than computed, and a multiple of computed's last bit. It cannot hold for one that may
    send a whole step for a tiny value (stochastic rounding, one bit): a step minus a value 2**30 times smaller has 30
    bits. There kept is the nearest float32, off by at most half a unit in its last place, 2**-25 of a step. That is what
    the float32 sum `vector + residual` loses, too.

    **Who accumulates.** Error feedback (Seide et al. 2014; Karimireddy et al. 2019) converges when what is kept is
    smaller than what was computed. An unbiased compressor that is not contractive owes nothing in expectation, and its
    residual would grow if it were fed back: random_k scaled up and stochastic rounding to one bit without bound, to two
    bits to some six times the vector. These keep nothing. So `kept` is always right to pass to the next call.

    **Adding.** `add` computes accumulator + (sent * factor) in float32, the product rounded first, as
    aggregation/summation.py does. A sparse form touches only what was sent: an accumulator's -0.0 stays -0.0 where
    adding a zero would make it 0.0.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Final

import msgspec
import numpy as np

from p2pcoord.compression.wire_format import (
    FORMAT_VERSION,
    HEADER,
    MAX_LENGTH,
    Reader,
    bad,
    little_endian,
    require_equal,
)
from p2pcoord.errors import LocalError, RemoteError
from p2pcoord.float32 import is_float32

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from p2pcoord.compression.randomness import Random
    from p2pcoord.compression.wire_format import Data
    from p2pcoord.layout import Float32s

TILE: Final = 1 << 15
"""Elements that are worked on at a time: 128 KiB of float32, of which a handful lie in a second-level cache."""


class Compressor(msgspec.Struct, frozen=True, kw_only=True):
    """Base of the compressors; made by `compressor`. Instances are checked when they are made (UserError)."""

    kind: ClassVar[str]
    number: ClassVar[int]
    """The kind in the header."""

    @property
    def exact(self) -> bool:
        """Whether sent + kept is computed, bit for bit."""
        return True

    @property
    def accumulates(self) -> bool:
        """Whether what is not sent is kept. Else `kept` is zeros."""
        return True

    @property
    def is_unbiased(self) -> bool:
        """Whether the expectation of what is sent is what was computed."""
        return False

    @abstractmethod
    def compress(
        self, vector: Float32s, residual: Float32s | None = None, random: Random | None = None
    ) -> tuple[bytes, Float32s]:
        """The bytes to send, and what is kept for the next call: float32 of the vector's shape.

        `vector` and `residual` (None: nothing was kept) are float32 of shape (n,), and are not changed. `random` is for
        the compressors that draw: a numpy Generator whose stream goes on, or a seed below 2**64. The same arguments
        give the same bytes on every machine.

        Raises LocalError for other types and shapes, for a missing `random`, and naming the first element that is not
        finite, or too large to be compressed.
        """

    @abstractmethod
    def decompress(self, data: Data, length: int | None = None) -> Float32s:
        """What was sent, float32 of shape (n,), every element finite.

        `length` is the n that the receiver expects; without it the sender's is believed, up to MAX_LENGTH, so bytes
        from a peer are always read with it. Raises RemoteError "bad_compression" for bytes that this compressor does
        not make, and "oversized" for more of them than `max_bytes` or a length beyond MAX_LENGTH.
        """

    @abstractmethod
    def add(self, data: Data, accumulator: Float32s, factor: float = 1.0) -> None:
        """accumulator += what was sent * factor, in place, without expanding what was sent.

        `factor` is a float32 number, `accumulator` float32 of shape (n,) with the n that was sent. Raises RemoteError as
        `decompress` does, before the accumulator is touched; LocalError for other factors and accumulators. Whether the
        sum is still finite is for its owner to ask.
        """

    @abstractmethod
    def max_bytes(self, length: int) -> int:
        """Size of the largest data for a vector of `length` elements."""

    def _header(self, length: int) -> bytes:
        return HEADER.pack(FORMAT_VERSION, self.number, length)

    def _open(self, data: Data, length: int | None) -> tuple[int, Reader]:
        """The length that the header states, checked, and a reader behind the header."""
        reader = Reader(data)
        version, number, stated = reader.unpack(HEADER)
        require_equal("the format version", version, FORMAT_VERSION)
        require_equal("the kind's number", number, self.number)
        if length is not None:
            require_equal("the length", stated, length)
        if stated > MAX_LENGTH:
            raise RemoteError("oversized", f"a vector of {stated} elements, at most {MAX_LENGTH}")
        if reader.left + HEADER.size > self.max_bytes(stated):
            raise RemoteError("oversized", f"more bytes than {self.kind} makes of {stated} elements")
        return stated, reader


class DenseCompressor(Compressor, frozen=True, kw_only=True):
    """A compressor that sends something for every element."""

    @abstractmethod
    def _tiles(self, reader: Reader, length: int) -> Iterator[tuple[int, Float32s]]:
        """Starts and values of consecutive tiles, which the caller may overwrite. All is checked when this returns."""

    def decompress(self, data: Data, length: int | None = None) -> Float32s:
        length, reader = self._open(data, length)
        tiles = self._tiles(reader, length)
        vector = np.empty(length, np.float32)
        for start, tile in tiles:
            vector[start : start + tile.size] = tile
        return vector

    def add(self, data: Data, accumulator: Float32s, factor: float = 1.0) -> None:
        check_accumulator(accumulator, factor)
        length, reader = self._open(data, accumulator.size)
        with np.errstate(all="ignore"):
            for start, tile in self._tiles(reader, length):
                if factor != 1.0:
                    np.multiply(tile, np.float32(factor), out=tile)
                accumulator[start : start + tile.size] += tile


class Chosen(msgspec.Struct, frozen=True):
    """What a sparse compressor sends of a vector: the elements at ascending `positions`, as `values`; `header` and
    `kept` are as in `compress`, and `header` says where the positions are."""

    header: bytes
    positions: NDArray[np.int64]
    values: Float32s
    kept: Float32s


class EntriesCompressor(Compressor, frozen=True, kw_only=True):
    """A compressor that sends some elements; the others are zero at the receiver."""

    @abstractmethod
    def _entries(self, data: Data, length: int | None) -> tuple[int, NDArray[np.int64], Float32s]:
        """Length of the vector, ascending positions without repetition, and their values. Raises as `decompress` does."""

    def decompress(self, data: Data, length: int | None = None) -> Float32s:
        length, positions, values = self._entries(data, length)
        vector = np.zeros(length, np.float32)
        vector[positions] = values
        return vector

    def add(self, data: Data, accumulator: Float32s, factor: float = 1.0) -> None:
        check_accumulator(accumulator, factor)
        _, positions, values = self._entries(data, accumulator.size)
        with np.errstate(all="ignore"):
            accumulator[positions] += values * np.float32(factor)


class SparseCompressor(EntriesCompressor, frozen=True, kw_only=True):
    """One that sends them as float32 numbers."""

    @abstractmethod
    def choose(
        self, vector: Float32s, residual: Float32s | None = None, random: Random | None = None
    ) -> Chosen:
        """Which elements are sent. Raises as `compress` does."""

    @abstractmethod
    def count(self, length: int) -> int:
        """How many elements of `length` are sent."""

    @abstractmethod
    def max_position_bytes(self, length: int) -> int:
        """Size of the largest `Chosen.header`, the common header left out."""

    @abstractmethod
    def read_positions(self, reader: Reader, length: int) -> NDArray[np.int64]:
        """The positions that a header names: count(length) of them, ascending, below `length`. Else RemoteError."""

    def compress(
        self, vector: Float32s, residual: Float32s | None = None, random: Random | None = None
    ) -> tuple[bytes, Float32s]:
        chosen = self.choose(vector, residual, random)
        data = b"".join((self._header(vector.size), chosen.header, little_endian(chosen.values)))
        return data, chosen.kept

    def max_bytes(self, length: int) -> int:
        return HEADER.size + self.max_position_bytes(length) + 4 * self.count(length)

    def _entries(self, data: Data, length: int | None) -> tuple[int, NDArray[np.int64], Float32s]:
        length, reader = self._open(data, length)
        positions = self.read_positions(reader, length)
        values = reader.take(np.float32, positions.size)
        reader.end()
        if not np.isfinite(values).all():
            raise bad("a value is not finite")
        return length, positions, values


def check_accumulator(accumulator: Float32s, factor: float) -> None:
    """Raise LocalError for what cannot be added into."""
    if accumulator.dtype != np.float32 or accumulator.ndim != 1:
        raise LocalError(
            f"an accumulator is a flat float32 array, not {accumulator.dtype}, {accumulator.ndim} dimensions"
        )
    if not is_float32(factor):
        raise LocalError(f"the factor {factor!r} is no float32 number")


def check_input(vector: Float32s, residual: Float32s | None) -> None:
    """Raise LocalError unless these are flat float32 arrays of one shape and of at most MAX_LENGTH elements."""
    if vector.dtype != np.float32 or vector.ndim != 1:
        raise LocalError(f"a vector is a flat float32 array, not {vector.dtype} of shape {vector.shape}")
    if vector.size > MAX_LENGTH:
        raise LocalError(f"a vector of {vector.size} elements, at most {MAX_LENGTH}")
    if residual is not None and (residual.dtype != np.float32 or residual.shape != vector.shape):
        raise LocalError(
            f"a residual of {residual.dtype}, shape {residual.shape}, for a vector of shape {vector.shape}"
        )


def add_residual(vector: Float32s, residual: Float32s | None, out: Float32s) -> None:
    """out = computed: the vector, plus what was kept. `out` may be longer; zeros follow."""
    size = vector.size
    if residual is None:
        out[:size] = vector
    else:
        with np.errstate(all="ignore"):
            np.add(vector, residual, out=out[:size])
    out[size:] = 0.0


def refuse(vector: Float32s, residual: Float32s | None, limit: float = np.inf) -> LocalError:
    """The error that names the first element which is not finite, or not below `limit` in magnitude."""
    for start in range(0, vector.size, TILE):
        part = vector[start : start + TILE]
        kept = None if residual is None else residual[start : start + TILE]
        with np.errstate(all="ignore"):
            total = part if kept is None else part + kept
            wrong = np.flatnonzero(~(np.abs(total) < limit))
        if wrong.size:
            at = int(wrong[0])
            told = f"element {start + at} of the vector is {part[at]!s}"
            if kept is not None:
                told += f", of the residual {kept[at]!s}"
            if np.isfinite(total[at]) and np.isfinite(limit):
                return LocalError(f"{told}: magnitudes from {limit:g} on cannot be quantized")
            return LocalError(f"{told}: what is not finite cannot be compressed")
    return LocalError("an element that is not finite cannot be compressed")

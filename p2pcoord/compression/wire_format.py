"""Compressed bytes: the header that every kind begins with, and a reader that believes nothing.

Theory of operation
    All numbers are little-endian, whatever the machine:

        version u8 = 1 | kind u8 | length u64 | the kind's parameters | the kind's sections

    `length` counts the elements of the uncompressed vector. The bytes say by themselves how they are read, but a
    receiver knows how its run compresses and what lengths it expects: what differs is refused, so nobody can send
    more, or ask for more memory, than the run agreed on. Everything is checked before the vector is allocated, and
    every value that bytes can state is finite.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, TypeVar

import numpy as np

from p2pcoord.content import MAX_CONTENT_BYTES
from p2pcoord.errors import RemoteError
from p2pcoord.layout import FLOAT_BYTES

if TYPE_CHECKING:
    from typing import TypeAlias

    from numpy.typing import NDArray

    Data: TypeAlias = bytes | bytearray | memoryview

    Scalar = TypeVar("Scalar", bound=np.generic)

FORMAT_VERSION: Final = 1

HEADER: Final = struct.Struct("<BBQ")

MAX_LENGTH: Final = MAX_CONTENT_BYTES // FLOAT_BYTES
"""Elements of the longest vector that a layout can have."""


class Reader:
    """Takes compressed bytes apart from front to back. Raises RemoteError "bad_compression" where they end too early."""

    def __init__(self, data: Data) -> None:
        self._data = memoryview(data).cast("B")
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes that were not taken yet."""
        return self._data.nbytes - self._at

    def unpack(self, layout: struct.Struct) -> tuple[int, ...]:
        """The next integers."""
        self.require(layout.size)
        values = layout.unpack_from(self._data, self._at)
        self._at += layout.size
        return values

    def take(self, dtype: type[Scalar], count: int) -> NDArray[Scalar]:
        """A view of the next `count` numbers, stored little-endian."""
        stored = np.dtype(dtype).newbyteorder("<")
        self.require(count * stored.itemsize)
        taken: NDArray[Scalar] = np.frombuffer(self._data, stored, count, self._at)
        self._at += count * stored.itemsize
        return taken

    def rest(self) -> memoryview:
        """All that is left."""
        taken = self._data[self._at :]
        self._at = self._data.nbytes
        return taken

    def end(self) -> None:
        """Nothing may be left."""
        if self.left:
            raise bad(f"{self.left} bytes too many")

    def require(self, size: int) -> None:
        """At least this many bytes are left."""
        if size > self.left:
            raise bad(f"{self.left} bytes where {size} are needed")


def bad(detail: str) -> RemoteError:
    """The error for bytes that no honest peer sends."""
    return RemoteError("bad_compression", detail)


def require_equal(name: str, theirs: int, ours: int) -> None:
    """A parameter in the bytes is what the run says."""
    if theirs != ours:
        raise bad(f"{name} is {theirs}, not {ours}")


def little_endian(vector: NDArray[np.generic]) -> memoryview:
    """The numbers as they are stored, without a copy where they lie so."""
    stored = np.ascontiguousarray(vector, vector.dtype.newbyteorder("<"))
    return stored.view(np.uint8).data

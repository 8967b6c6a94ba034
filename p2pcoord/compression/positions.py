"""Which elements of a vector were chosen, written in as few bytes as one of three forms takes.

Theory of operation
    Positions ascend. Between two of them lies a gap, the number of elements that are skipped; before the first one, too.

        bitmap   a bit per element, bit i % 8 of byte i // 8                  length / 8 bytes
        bytes    a byte per gap; 255 skips 255 elements and chooses none      1 to 1.6 bytes a position from 1/8 down to 1/256
        words    the same with 16 bits and 65,535                             2 bytes a position down to 1/65,536

    The shortest form is used, the first of equals, so positions have one encoding and never take more than the bitmap.
    Choosing at random one element of a hundred takes 8.1 bits a position (the entropy) at least, and 8.7 as bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from p2pcoord.compression.packing import packed_bytes
from p2pcoord.compression.wire_format import Reader, bad

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Positions = NDArray[np.int64]

BITMAP: Final = 0
BYTES: Final = 1
WORDS: Final = 2

_SYMBOLS: Final[dict[int, type[np.uint8 | np.uint16]]] = {BYTES: np.uint8, WORDS: np.uint16}


def encode_positions(positions: Positions, length: int) -> tuple[int, bytes]:
    """The form and the bytes of ascending positions below `length`."""
    form, size = BITMAP, packed_bytes(length, 1)
    gaps = None
    if positions.size < size:  # else no other form is shorter
        gaps = np.diff(positions, prepend=-1) - 1
        for other, symbol in _SYMBOLS.items():
            symbols = positions.size + int((gaps // np.iinfo(symbol).max).sum())
            other_size = symbols * np.dtype(symbol).itemsize
            if other_size < size:
                form, size = other, other_size
    if form == BITMAP or gaps is None:
        chosen = np.zeros(length, np.bool_)
        chosen[positions] = True
        return form, np.packbits(chosen, bitorder="little").tobytes()
    symbol = _SYMBOLS[form]
    skips, rest = np.divmod(gaps, np.iinfo(symbol).max)
    ends = np.cumsum(skips + 1) - 1
    written = np.full(
        size // np.dtype(symbol).itemsize, np.iinfo(symbol).max, np.dtype(symbol).newbyteorder("<")
    )
    written[ends] = rest
    return form, written.tobytes()


def decode_positions(reader: Reader, form: int, size: int, count: int, length: int) -> Positions:
    """`count` ascending positions below `length`, out of `size` bytes. Raises RemoteError "bad_compression"."""
    if size > packed_bytes(length, 1):
        raise bad(f"{size} bytes of positions among {length}")
    if form == BITMAP:
        stored = reader.take(np.uint8, size)
        if size != packed_bytes(length, 1) or (size and int(stored[-1]) >> ((length - 1) % 8 + 1)):
            raise bad("the bitmap of positions has another length")
        # Counted before positions, of 64 bits each, are made of it.
        chosen = np.unpackbits(stored, count=length, bitorder="little").view(np.bool_)
        _require_count(int(np.count_nonzero(chosen)), count)
        return np.flatnonzero(chosen)
    if form not in _SYMBOLS:
        raise bad(f"there is no form {form} of positions")
    symbol = _SYMBOLS[form]
    symbols = reader.take(symbol, size // np.dtype(symbol).itemsize)
    if symbols.nbytes != size:
        raise bad("half a symbol")
    choose = symbols != np.iinfo(symbol).max
    _require_count(int(np.count_nonzero(choose)), count)
    reached = np.cumsum(symbols, dtype=np.int64)
    positions: Positions = reached[choose]
    positions += np.arange(count)
    if symbols.size and not (choose[-1] and positions[-1] < length):
        raise bad("a position beyond the vector")
    return positions


def _require_count(found: int, count: int) -> None:
    if found != count:
        raise bad(f"{found} positions, not {count}")

"""float32 numbers in Python's own floats: what a signed attempt may carry as weight, factor or learning rate.

Python and CBOR know float64 only. A scalar that enters tensor arithmetic is rounded to float32 once, by whoever signs it,
so that every machine multiplies by the same 32 bits; a receiver checks that it is such a number. Rounding is to nearest,
ties to even, as IEEE 754 has it; it needs no numpy, because decisions are made without.
"""

import math
import struct

from p2pcoord.errors import LocalError

MAX_FLOAT32 = 2.0**128 - 2.0**104

_FLOAT32 = struct.Struct("<f")


def float32(value: float) -> float:
    """The float32 nearest to `value`. Raises LocalError when it is not finite or rounds to infinity."""
    try:
        rounded: float = _FLOAT32.unpack(_FLOAT32.pack(value))[0]
    except OverflowError:
        rounded = math.inf
    if not math.isfinite(rounded):
        raise LocalError(f"{value!r} has no finite float32")
    return rounded


def is_float32(value: float) -> bool:
    """Whether `value` is finite and float32 holds it exactly."""
    try:
        return math.isfinite(value) and float(_FLOAT32.unpack(_FLOAT32.pack(value))[0]) == value
    except OverflowError:
        return False

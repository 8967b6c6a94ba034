"""Sums of long vectors that come out the same, bit for bit, on every machine.

Theory of operation
    Floating-point addition is not associative, and compilers and libraries reorder, fuse and vectorise. What is certified
    must not depend on that, so this module uses element-wise numpy operations only, each correctly rounded by IEEE 754, in
    a written order:

        out = x_1 * f_1;  out = out + (x_2 * f_2);  out = out + (x_3 * f_3);  ...      (float32; f = 1 is not multiplied)

    No fused multiply-add (a product is stored before it is added), no dot, no `sum`. Work proceeds in blocks that stay in
    the cache; since each element is computed by itself, block size changes nothing but speed.

    A norm is a reduction, so its order is written out too (`NormSum`): NORM_LANES float64 lanes take the squares of
    elements j, j + lanes, j + 2 * lanes, ..., in this order; then the upper half of the lanes is added to the lower half
    until one is left. Squares of float32 are exact in float64. So a norm in a signed header can be checked with ==.

    A sum is finite only if all that entered it is: NaN and infinity survive every product (0 * inf is NaN) and every sum.

    One thing can still break equality: a library compiled with -ffast-math that makes this thread flush subnormal numbers
    to zero when it is loaded. `require_ieee_arithmetic` detects it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np

from p2pcoord.errors import LocalError
from p2pcoord.float32 import is_float32

if TYPE_CHECKING:
    from collections.abc import Sequence

    from p2pcoord.layout import Float32s, Int64s

BLOCK: Final = 1 << 16
"""Elements in a block: output, product and one input of 256 KiB each lie in a second-level cache of 1 MiB, and numpy's
1 us a call is a tenth of the time. benchmarks/combine.py, on such a machine: 2**12 is half as fast, 2**17 a tenth faster."""

NORM_LANES: Final = 1 << 13
"""Part of a norm's definition: changing it changes norms in the last bits. 8,192 lanes of float64 are 64 KiB."""


def weighted_sum(inputs: Sequence[tuple[Float32s, float]], out: Float32s) -> bool:
    """out = the sum of vector * factor in the order given, as written above. Returns whether all of it is finite.

    All vectors are float32 of one shape (n,), factors are float32 numbers, `out` overlaps no input. Raises LocalError for
    anything else and for no inputs.
    """
    if not inputs or out.dtype != np.float32 or out.ndim != 1:
        raise LocalError("a sum needs inputs and a flat float32 output")
    for vector, factor in inputs:
        if vector.dtype != np.float32 or vector.shape != out.shape:
            raise LocalError(f"{vector.dtype} of shape {vector.shape} cannot be added to {out.shape}")
        if not is_float32(factor):
            raise LocalError(f"the factor {factor!r} is no float32 number")
    (first, first_factor), *others = inputs
    product = np.empty(min(BLOCK, out.size), np.float32)
    finite = np.empty(product.shape, np.bool_)
    all_finite = True
    with np.errstate(all="ignore"):
        for start in range(0, out.size, BLOCK):
            total = out[start : start + BLOCK]
            np.multiply(first[start : start + BLOCK], np.float32(first_factor), out=total)
            for vector, factor in others:
                block = vector[start : start + BLOCK]
                if factor != 1.0:
                    block = np.multiply(block, np.float32(factor), out=product[: total.size])
                np.add(total, block, out=total)
            all_finite &= bool(np.isfinite(total, out=finite[: total.size]).all())
    return all_finite


def maximum(inputs: Sequence[Int64s], out: Int64s) -> None:
    """out = the element-wise maximum; all int64 of one shape. Raises LocalError for no inputs and other shapes."""
    if not inputs or any(vector.shape != out.shape for vector in inputs):
        raise LocalError("a maximum needs inputs of the output's shape")
    out[:] = inputs[0]
    for vector in inputs[1:]:
        np.maximum(out, vector, out=out)


def all_finite(vector: Float32s) -> bool:
    """Whether no element is NaN or infinite."""
    finite = np.empty(min(BLOCK, vector.size), np.bool_)
    for start in range(0, vector.size, BLOCK):
        block = vector[start : start + BLOCK]
        if not np.isfinite(block, out=finite[: block.size]).all():
            return False
    return True


class NormSum:
    """The L2 norm of a float32 vector that arrives in pieces, float64, in the order written above.

    Each piece but the last has a multiple of NORM_LANES elements, else LocalError.
    """

    def __init__(self) -> None:
        self._lanes = np.zeros(NORM_LANES, np.float64)
        self._squares = np.empty(NORM_LANES, np.float64)
        self._open = True

    def add(self, vector: Float32s) -> None:
        """The next piece, float32 of shape (n,)."""
        if not self._open:
            raise LocalError("a piece follows one that filled no whole number of lanes")
        self._open = vector.size % NORM_LANES == 0
        with np.errstate(all="ignore"):
            for start in range(0, vector.size, NORM_LANES):
                block = vector[start : start + NORM_LANES]
                squares = self._squares[: block.size]
                squares[:] = block
                np.multiply(squares, squares, out=squares)
                lanes = self._lanes[: block.size]
                np.add(lanes, squares, out=lanes)

    def norm(self) -> float:
        """The norm of all pieces so far; infinite or NaN if an element is."""
        lanes = self._lanes.copy()
        with np.errstate(all="ignore"):
            while lanes.size > 1:
                half = lanes.size // 2
                lanes = lanes[:half] + lanes[half:]
        return math.sqrt(float(lanes[0]))


def norm(vector: Float32s) -> float:
    """The L2 norm of a float32 vector, float64, the same bits everywhere. NaN or infinite if an element is."""
    total = NormSum()
    total.add(vector)
    return total.norm()


def require_ieee_arithmetic() -> None:
    """Raise LocalError if this thread's float32 arithmetic flushes subnormals or does not round to nearest even.

    The processor keeps these modes per thread, and loading a shared library may change them, so ask in the thread that
    computes; a call costs some microseconds.
    """
    smallest = np.array([2.0**-149, 2.0**-126, 1.0, -1.0], np.float32)
    with np.errstate(all="ignore"):
        doubled = smallest[:1] + smallest[:1]
        halved = smallest[1:2] * np.float32(0.5)
        tie = smallest[2:] + np.array([2.0**-24, -(2.0**-24)], np.float32)
    # Compared as bits: a comparison of subnormals would flush them, too.
    bits = np.concatenate([doubled, halved, tie]).view(np.uint32).tolist()
    if bits != [2, 1 << 22, 0x3F800000, 0xBF800000]:
        raise LocalError(
            "this thread's float32 arithmetic is not IEEE 754's (subnormal numbers are flushed to zero, or rounding is "
            "not to nearest): its results would differ from everybody else's. A library built with -ffast-math does this"
        )

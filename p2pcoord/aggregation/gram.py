"""Inner products of all pairs of vectors, from columns, the same bits on every machine.

Theory of operation
    Distances, and with them every vector-wise rule, follow from the Gram matrix G[i, j] = <x_i - c, x_j - c>:
    |x_i - x_j|^2 = G[i, i] + G[j, j] - 2 G[i, j]. It is a sum over columns, so owners of stripes add up theirs.

    A matrix product by BLAS is ten times faster than sums in an order that we could write down, but its order, and so its
    last bits, depend on the library, the processor and the number of threads. Unless nothing is rounded: then every
    order gives the same. So in each block of BLOCK columns

        x_i - c          float32                                                     (c: a centre, or nothing)
        q_i              rounded to a multiple of 2**(e_i - BITS), where 2**e_i is the power of two above the block's
                         largest |x_i - c|: at most BITS bits and a sign
        q q^T            of each EXACT columns by BLAS in float64: a product has at most 2 * BITS bits, a sum of them at most 53
        G = G + q q^T    float64, in the columns' order

    The result is the Gram matrix of vectors that differ from the given ones by at most 2**-BITS of a block's largest
    value in each element. Only the vector's own size counts: no vector can blur the distances between others.

    Close vectors: where all lie much closer to each other than to the centre, their distances drown in that rounding. Then
    `centre_among` names a vector to centre by, and the matrix is computed once more. It is the one to which a majority is
    nearest, so it lies among the honest ones. (Not simply the first: with the first vector an arbitrary one, far away,
    the others' distances would drown and any of them could pass for near.)

    A vector with NaN or infinity has a NaN in its row and column and leaves all others' alone: `not_finite`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from p2pcoord.aggregation.summation import require_ieee_arithmetic
from p2pcoord.errors import LocalError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from p2pcoord.layout import Float32s

    Float64s: TypeAlias = NDArray[np.float64]

BITS: Final = 21
EXACT: Final = 1 << 11
"""Columns whose products are summed without rounding: 2 * 21 + 11 = 53. Few enough, too, for the kernel that OpenBLAS has for
small matrices, which does not copy its input first."""

BLOCK: Final = 1 << 14
"""Columns that share an exponent. All three are part of the matrix's definition: changing one changes its last bits."""

assert BLOCK % EXACT == 0

CLOSE: Final = 2.0**-12
"""Vectors are close when their squared distance is below this part of their squared distance to the centre. Rounding moves a
vector by at most 2**-31 of that (squared; the worst case, a block with one large element), so where nothing is centred
again distances are right to about 2**-9, and to 2**-19 in ordinary blocks."""

LARGEST: Final = np.float32(2.0**125)
"""Above, 1.5 * 2**(e + 2) is no float32, and differences may not be: such blocks are rounded in float64."""


def gram(rows: Sequence[Float32s], centre: Float32s | None = None) -> Float64s:
    """The Gram matrix (n, n) of these n vectors' columns, centred by `centre`, all float32 of one shape (d,).

    A stripe begins, and but for the last ends, at a multiple of BLOCK columns, else its blocks are others. Raises
    LocalError for other shapes, no rows, and in a thread whose arithmetic is not IEEE 754's.
    """
    require_ieee_arithmetic()
    _check(rows, centre)
    n, half, size = len(rows), len(rows) // 2, rows[0].size
    differences = np.zeros((n, BLOCK), np.float32)
    # One row of zeros more: numpy gives a matrix times its own transpose to BLAS's syrk, which is slower for few rows.
    rounded = np.zeros((n + 1, EXACT), np.float64)
    products = np.zeros((n, n + 1), np.float64)
    product = np.zeros_like(products)
    with np.errstate(all="ignore"):
        for start in range(0, size, BLOCK):
            part = slice(start, min(start + BLOCK, size))
            used = part.stop - start
            for at, row in enumerate(rows):
                if centre is None:
                    differences[at, :used] = row[part]
                else:
                    np.subtract(row[part], centre[part], out=differences[at, :used])
            differences[:, used:] = 0
            largest = np.maximum(differences.max(axis=1), -differences.min(axis=1))
            # Adding and subtracting 1.5 * 2**(e - BITS + 23) rounds a float32 to a multiple of 2**(e - BITS).
            shift = np.ldexp(np.float32(1.5), np.frexp(largest)[1] + (23 - BITS))[:, None]
            np.add(differences, shift, out=differences)
            np.subtract(differences, shift, out=differences)
            large = {
                at: _rounded(rows[at][part], None if centre is None else centre[part])
                for at in np.flatnonzero(~(largest < LARGEST)).tolist()
            }
            for first in range(0, used, EXACT):
                rounded[:n] = differences[:, first : first + EXACT]
                for at, wide in large.items():
                    columns = wide[first : first + EXACT]
                    rounded[at, : columns.size] = columns
                    rounded[at, columns.size :] = 0
                # Two products leave out the lower left quarter, which is the upper right one's transpose.
                np.matmul(rounded[:half], rounded.T, out=product[:half])
                np.matmul(rounded[half:n], rounded[half:].T, out=product[half:, half:])
                np.add(products, product, out=products)
    products[half:, :half] = products[:half, half:n].T
    return products[:, :n].copy()


def total(stripes: Iterable[Float64s]) -> Float64s:
    """The sum of stripes' Gram matrices, in their order. Differs from the whole's by rounding of float64: at most
    2**-53 times the number of exact products (each EXACT columns), relative to sqrt(G[i, i] * G[j, j])."""
    matrices = list(stripes)
    if not matrices or any(matrix.shape != matrices[0].shape for matrix in matrices):
        raise LocalError("a sum of Gram matrices needs matrices of one shape")
    added = matrices[0].copy()
    with np.errstate(all="ignore"):
        for matrix in matrices[1:]:
            np.add(added, matrix, out=added)
    return added


def not_finite(products: Float64s) -> tuple[int, ...]:
    """Positions of the vectors that hold NaN or infinity."""
    return tuple(int(at) for at in np.flatnonzero(~np.isfinite(np.diagonal(products))))


def squared_distances(products: Float64s) -> Float64s:
    """|x_i - x_j|^2 of all pairs (n, n), none below 0, zeros on the diagonal."""
    own = np.diagonal(products)
    distances: Float64s = own[:, None] + own - 2 * products
    np.maximum(distances, 0, out=distances)
    np.fill_diagonal(distances, 0)
    return distances


def sums_to_nearest(distances: Float64s, nearest: int) -> Float64s:
    """For each vector, the sum of the (squared) distances to the `nearest` others that are nearest, smallest first."""
    others = distances.copy()
    np.fill_diagonal(others, np.inf)
    others.sort(axis=1)
    sums = np.zeros(len(distances))
    for column in range(nearest):
        np.add(sums, others[:, column], out=sums)
    return sums


def middle_of(distances: Float64s) -> int:
    """The vector to which a majority (itself counted) is nearest."""
    return int(np.argmin(sums_to_nearest(distances, len(distances) // 2)))


def centre_among(products: Float64s) -> int | None:
    """The position of the vector to centre by, if distances among the majority are too small beside this matrix's rounding."""
    distances = squared_distances(products)
    middle, majority = middle_of(distances), len(distances) // 2
    close = sums_to_nearest(distances, majority)[middle] < CLOSE * majority * products[middle, middle]
    return middle if close else None


def _rounded(row: Float32s, centre: Float32s | None) -> Float64s:
    """The same rounding of a block with values beyond what float32 can do it for; NaN for what is not finite."""
    differences = row.astype(np.float64)
    if centre is not None:
        differences -= centre
    largest = np.abs(differences).max(initial=0)
    if not np.isfinite(largest):
        return np.full_like(differences, np.nan)
    shift = np.ldexp(1.5, int(np.frexp(largest)[1]) + 52 - BITS)
    rounded: Float64s = differences + shift - shift
    return rounded


def _check(rows: Sequence[Float32s], centre: Float32s | None) -> None:
    if not len(rows):
        raise LocalError("a Gram matrix needs vectors")
    vectors = [*rows] if centre is None else [*rows, centre]
    for vector in vectors:
        if vector.dtype != np.float32 or vector.shape != (rows[0].size,):
            raise LocalError(
                f"{vector.dtype} of shape {vector.shape} among vectors of {rows[0].size} float32"
            )

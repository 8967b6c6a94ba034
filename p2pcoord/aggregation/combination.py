"""What is done to the columns of all vectors, once it is decided: small, and the same for every stripe.

Theory of operation
    A rule is two steps. **Deciding** sees numbers about the vectors (samples, norms, inner products) and no vector;
    **combining** sees columns and follows what was decided. What passes between them is a `Combination`. Whoever decides may
    sign it, and whoever owns a stripe of columns, however wide, gets the bits that it would get from all columns at once.

        rows        what is combined: each row is a sum of vectors with factors, in the order written. Without a
                    pre-aggregation a row is one vector by itself
        operation   sum                  the only row; `start` is the factor of the last aggregate, which goes first
                    trimmed_mean         in each column the mean without the `cut` smallest and the `cut` largest
                    mean_around_median   in each column the mean of all but the `cut` farthest from their median
        (the median is a trimmed mean, of one or two values)

    A vector with factor 0 is in no row: it is never multiplied, so that what it holds cannot matter.

This module knows no numpy.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from p2pcoord.errors import LocalError
from p2pcoord.float32 import is_float32

Row: TypeAlias = tuple[tuple[int, float], ...]
"""(position of a vector, its factor), in the order of the sum. Factors are float32 numbers other than 0."""

Operation = Literal["sum", "trimmed_mean", "mean_around_median"]


class Combination(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """See above. Positions count the vectors that take part."""

    operation: Operation
    rows: tuple[Row, ...]
    cut: int = 0
    start: float = 0.0


def identity(n: int) -> tuple[Row, ...]:
    """Each of n vectors by itself."""
    return tuple(((at, 1.0),) for at in range(n))


def median(rows: tuple[Row, ...]) -> Combination:
    """The median of these rows."""
    return Combination("trimmed_mean", rows, (len(rows) - 1) // 2)


def check_combination(combination: Combination, n: int) -> None:
    """Raises LocalError for what cannot be carried out on n vectors."""
    rows, cut = combination.rows, combination.cut
    if combination.operation == "sum":
        fits = len(rows) == 1 and cut == 0
    else:
        removed = 2 * cut if combination.operation == "trimmed_mean" else cut
        fits = 0 <= removed < len(rows) and all(rows) and combination.start == 0
    if not fits:
        raise LocalError(f"{combination.operation} of {len(rows)} rows cannot leave out {cut}")
    for row in rows:
        for at, factor in row:
            if not (0 <= at < n and factor and is_float32(factor)):
                raise LocalError(f"vector {at} of {n} cannot enter with the factor {factor!r}")
    if not is_float32(combination.start):
        raise LocalError(f"the last aggregate cannot enter with the factor {combination.start!r}")

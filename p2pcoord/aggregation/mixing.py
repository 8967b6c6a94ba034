"""Pre-aggregations as matrices: which vectors each mean is taken of.

Theory of operation
    Every pre-aggregation replaces n vectors X by m means M X, where M (m x n) has rows that add up to 1. Followed by others, or
    by a rule, it needs no vector to be computed: stages multiply (M2 M1), and the Gram matrix of what they leave is
    M G M^T. A vector-wise rule's weights w of the means are the weights M^T w of the vectors; a coordinate-wise rule needs the
    means' columns, which are computed from the vectors' columns (combination.Row).

    The order that bucketing deals vectors in is drawn by hash from a seed, so it is everybody's. The seed must not be known
    to a contributor before it has committed to its vector, or it may aim at a bucket.
"""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING

import numpy as np

from p2pcoord.aggregation.gram import squared_distances
from p2pcoord.aggregation.pre_aggregation import Bucketing, NearestNeighbourMixing
from p2pcoord.errors import LocalError
from p2pcoord.float32 import float32

if TYPE_CHECKING:
    from collections.abc import Sequence

    from p2pcoord.aggregation.combination import Row
    from p2pcoord.aggregation.gram import Float64s
    from p2pcoord.aggregation.pre_aggregation import PreAggregation


def permutation(seed: int, n: int) -> tuple[int, ...]:
    """0 ... n - 1 in the order that this seed draws: sorted by a hash of seed and number."""
    return tuple(sorted(range(n), key=lambda at: sha256(b"p2pcoord bucketing %d %d" % (seed, at)).digest()))


def bucketing(order: Sequence[int], size: int) -> Float64s:
    """The matrix of the means of each `size` vectors in this order (a permutation of 0 ... n - 1)."""
    buckets = [order[begin : begin + size] for begin in range(0, len(order), size)]
    return _means(buckets, len(order))


def nearest_neighbour_mixing(products: Float64s, f: int) -> Float64s:
    """The matrix of the means of each vector's n - f nearest, itself first; of equally near ones the first."""
    distances = squared_distances(products)
    np.fill_diagonal(distances, -1)
    nearest = np.argsort(distances, axis=1, kind="stable")[:, : len(products) - f]
    return _means(nearest.tolist(), len(products))


def mix(
    stages: Sequence[PreAggregation], n: int, products: Float64s | None, seed: int
) -> tuple[Float64s, Float64s | None]:
    """The matrix of all stages together, of n vectors; and the Gram matrix of what they leave, if theirs is given.

    Raises LocalError where a stage needs it and it is not.
    """
    matrix = np.eye(n)
    for number, stage in enumerate(stages):
        match stage:
            case Bucketing():
                # The first stage's seed is the seed itself; a second bucketing draws another order.
                step = bucketing(permutation(seed + number, len(matrix)), stage.size)
            case NearestNeighbourMixing():
                if products is None:
                    raise LocalError(f"{stage.kind} needs inner products")
                step = nearest_neighbour_mixing(products, stage.f)
            case _:
                raise LocalError(f"no pre-aggregation {stage.kind}")
        matrix = _product(step, matrix)
        if products is not None:
            products = _product(_product(step, products), step.T)
            products = (products + products.T) / 2
    return matrix, products


def rows_of(matrix: Float64s) -> tuple[Row, ...]:
    """The rows of means as sums of vectors in their order, factors rounded to float32; those that become 0 are left out."""
    return tuple(row_of(row.tolist()) for row in matrix)


def row_of(weights: Sequence[float]) -> Row:
    """One such row."""
    rounded = [float32(weight) for weight in weights]
    return tuple((at, factor) for at, factor in enumerate(rounded) if factor)


def weights_of(matrix: Float64s, weights: Sequence[float]) -> tuple[float, ...]:
    """The vectors' weights, from the weights of their means."""
    result = np.zeros(matrix.shape[1])
    for row, weight in zip(matrix, weights, strict=True):
        np.add(result, row * weight, out=result)
    return tuple(result.tolist())


def _means(groups: Sequence[Sequence[int]], n: int) -> Float64s:
    matrix = np.zeros((len(groups), n))
    for row, group in zip(matrix, groups, strict=True):
        row[list(group)] = 1 / len(group)
    return matrix


def _product(left: Float64s, right: Float64s) -> Float64s:
    """left right, summed in the order of the inner index: a library's own order would be another on another machine."""
    result = np.zeros((left.shape[0], right.shape[1]))
    for at in range(left.shape[1]):
        np.add(result, left[:, at, None] * right[at], out=result)
    return result

"""Vector-wise rules: from the Gram matrix of n vectors to n factors.

Theory of operation
    All of these rules choose a point of the form sum_i w_i x_i, by distances. Distances of the vectors to each other, and to
    any such point z, follow from the Gram matrix G (gram.py), whatever it is centred by:

        |x_i - x_j|^2 = G[i, i] + G[j, j] - 2 G[i, j]
        |x_i - z|^2   = G[i, i] - 2 (G w)_i + w^T G w           with weights that add up to 1, or measured from the centre

    So n x n numbers decide, and what is left is a sum. Everything here is float64, element-wise numpy or a loop in a written
    order, and every operation is correctly rounded: from the same matrix everybody gets the same factors.

    Where scores tie, the first in the given order wins (Blanchard et al.: the smallest identifier). Two that are each
    other's nearest tie whenever a single neighbour counts: Bulyan's last choices for f = 1 and 2 depend on the order.

    The geometric median starts from the mean of the majority nearest to the vector that has the nearest majority. The paper's
    start, the mean of all, is as far away as one liar wants it, and Weiszfeld's method comes back by a factor of about n an
    iteration only; a start at one of the vectors stays there, when `smoothing` is small.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np

from p2pcoord.aggregation.gram import middle_of, squared_distances, sums_to_nearest
from p2pcoord.aggregation.rules import Bulyan, CenteredClipping, GeometricMedian, Krum, MultiKrum, Rule
from p2pcoord.errors import LocalError

if TYPE_CHECKING:
    from p2pcoord.aggregation.gram import Float64s


class Weights(msgspec.Struct, frozen=True):
    """`weights`: each vector's factor; 0: not in the sum. `start`: the factor of the last aggregate, which the matrix is
    then centred by. `scores`: what the rule measured of each vector, a smaller one is better: for the Krum family the sum
    of squared distances to the nearest others, else the distance (L2) to the result."""

    weights: tuple[float, ...]
    scores: tuple[float, ...]
    start: float = 0.0


def weights_from_gram(rule: Rule, products: Float64s) -> Weights:
    """The weights of a vector-wise rule, or of the vectors that Bulyan selects (equal ones), from the Gram matrix (n, n).

    For centered clipping it is centred by the last aggregate. The rule holds for n, the matrix is finite (LocalError).
    """
    n = len(products)
    if products.shape != (n, n) or not np.isfinite(products).all():
        raise LocalError(f"no finite square matrix: {products.shape}")
    refused = rule.refusal(n)
    if refused:
        raise LocalError(refused)
    match rule:
        case Krum():
            scores = sums_to_nearest(squared_distances(products), n - rule.f - 2)
            return _mean_of([int(np.argmin(scores))], scores)
        case MultiKrum():
            scores = sums_to_nearest(squared_distances(products), n - rule.f - 2)
            return _mean_of(np.argsort(scores, kind="stable")[: rule.chosen(n)].tolist(), scores)
        case Bulyan():
            distances = squared_distances(products)
            return _mean_of(bulyan_selection(distances, rule.f), sums_to_nearest(distances, n - rule.f - 2))
        case GeometricMedian():
            return _geometric_median(rule, products)
        case CenteredClipping():
            return _centered_clipping(rule, products)
    raise LocalError(f"{rule.kind} takes no weights from inner products")


def bulyan_selection(distances: Float64s, f: int) -> list[int]:
    """The n - 2f vectors that Krum chooses one after the other, each among those that are left.

    The last choices are among so few that n - f - 2 of them are none; at least one neighbour is then counted.
    """
    left, selected = list(range(len(distances))), []
    for _ in range(len(distances) - 2 * f):
        nearest = min(max(len(left) - f - 2, 1), len(left) - 1)
        best = int(np.argmin(sums_to_nearest(distances[np.ix_(left, left)], nearest)))
        selected.append(left.pop(best))
    return selected


def _mean_of(chosen: list[int], scores: Float64s) -> Weights:
    weights = [0.0] * len(scores)
    for at in chosen:
        weights[at] = 1 / len(chosen)
    return Weights(tuple(weights), tuple(scores.tolist()))


def _geometric_median(rule: GeometricMedian, products: Float64s) -> Weights:
    n = len(products)
    distances = squared_distances(products)
    near = np.argsort(distances[middle_of(distances)], kind="stable")[: n // 2 + 1]
    weights = np.zeros(n)
    weights[near] = 1 / len(near)
    for _ in range(rule.iterations):
        closeness = 1 / np.maximum(np.sqrt(_squared_distances_to(weights, products)), rule.smoothing)
        weights = closeness / _ordered_sum(closeness)
    scores = np.sqrt(_squared_distances_to(weights, products))
    return Weights(tuple(weights.tolist()), tuple(scores.tolist()))


def _centered_clipping(rule: CenteredClipping, products: Float64s) -> Weights:
    n = len(products)
    weights = np.zeros(n)  # of x_i - start: what is missing to 1 is the start's
    for _ in range(rule.iterations):
        distances = np.sqrt(_squared_distances_to(weights, products))
        clips = rule.radius / np.maximum(distances, rule.radius)
        weights = weights * (1 - _ordered_sum(clips) / n) + clips / n
    scores = np.sqrt(_squared_distances_to(weights, products))
    return Weights(tuple(weights.tolist()), tuple(scores.tolist()), max(1 - _ordered_sum(weights), 0))


def _squared_distances_to(weights: Float64s, products: Float64s) -> Float64s:
    """|x_i - z|^2 where z is the sum of the vectors, measured from the centre, with these weights."""
    applied = np.zeros(len(products))
    for at, weight in enumerate(weights):
        np.add(applied, products[:, at] * weight, out=applied)
    distances = np.diagonal(products) - 2 * applied + _ordered_sum(weights * applied)
    return np.maximum(distances, 0, out=distances)


def _ordered_sum(values: Float64s) -> float:
    """In the order written: numpy's own sum adds in an order of its own."""
    result = 0.0
    for value in values.tolist():
        result += value
    return result

"""The aggregation engine: many updates in, one out, by any rule.

    from p2pcoord.aggregation import aggregate

    aggregate("trimmed_mean", updates, f=3)
    aggregate("krum", updates, f=3, pre=[("bucketing", {"size": 2})], seed=seed)
    aggregate("federated_average", updates, samples, clip_norm=1.0)

Theory of operation
    `aggregate` is what a member does that holds all vectors. It is put together from pieces that need no such member:

        products     gram.gram on each stripe of columns, gram.total of the stripes         where `pre_aggregation.needs_gram`
        again        the same with the vector that gram.centre_among names as centre        where it names one
        decide       samples, norms, products -> Decision: a Combination, weights, scores   sees no vector
        combine      on each stripe of columns, as the Combination says                     any stripes, the same bits

    The one difference that stripes make is in the order in which Gram matrices are added up, in float64. Here pieces of PIECE
    columns are added; any other division gives weights that differ by rounding of float64, so whoever signs the matrix
    decides.

    Pieces may be worked on in any order and at once: `run` is how a function is applied to all pieces, in the manner of
    the built-in map; a thread pool's map gives the same bits.
"""

from __future__ import annotations

from fractions import Fraction
from math import isfinite, lcm
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import msgspec
import numpy as np

from p2pcoord.aggregation.combination import Combination, Row, check_combination, median
from p2pcoord.aggregation.coordinate_wise import combine_columns
from p2pcoord.aggregation.gram import BLOCK, centre_among, gram, not_finite, total
from p2pcoord.aggregation.mixing import mix, row_of, rows_of, weights_of
from p2pcoord.aggregation.outliers import Measured, measured_from_gram
from p2pcoord.aggregation.pre_aggregation import PreAggregation, check, needs_gram, pre_aggregation
from p2pcoord.aggregation.rules import (
    Bulyan,
    CenteredClipping,
    FederatedAverage,
    Median,
    Rule,
    TrimmedMean,
    rule,
)
from p2pcoord.aggregation.summation import all_finite, norm, require_ieee_arithmetic, weighted_sum
from p2pcoord.aggregation.vector_wise import weights_from_gram
from p2pcoord.errors import LocalError
from p2pcoord.float32 import float32

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from numpy.typing import ArrayLike

    from p2pcoord.aggregation.gram import Float64s
    from p2pcoord.layout import Float32s

PIECE: Final = 1 << 20
"""Columns that are worked on at once: a multiple of gram.BLOCK. Part of a Gram matrix's definition here, see above."""

assert PIECE % BLOCK == 0

Given = TypeVar("Given")
Found = TypeVar("Found")


class Run(Protocol):
    """Applies a function to all items and returns the results in the items' order, as `map` does."""

    def __call__(self, function: Callable[[Given], Found], items: Iterable[Given], /) -> Iterable[Found]: ...


class NotFiniteError(LocalError):
    """Updates hold NaN or infinity: `updates` are their positions. They are refused, and so is what they were given with;
    without them the others may be combined."""

    def __init__(self, updates: tuple[int, ...]) -> None:
        named = ", ".join(str(at) for at in updates[:8]) + ("" if len(updates) <= 8 else ", ...")
        what = "update" if len(updates) == 1 else "updates"
        super().__init__(f"{what} {named} (counted from 0) not finite: NaN or infinity is never combined")
        self.updates = updates


class Decision(msgspec.Struct, frozen=True):
    """What `decide` finds. `combination` is for the parameters, `float_buffers` for the section of running statistics, which
    are values and no differences: clipping does not apply to them. `weights` and `scores` as in Aggregate."""

    combination: Combination
    float_buffers: Combination
    weights: tuple[float, ...]
    scores: tuple[float, ...]


class Aggregate(msgspec.Struct, frozen=True):
    """What many updates make.

    value    float32 (d,)
    weights  the factor of each update in it, float32 numbers, 0: not in it. Empty for a coordinate-wise rule, where it differs
             from column to column
    scores   what the rule measured of each update (vector_wise.Weights; the L2 norm for a clipped mean), float64. Empty where
             it measures nothing, and after a pre-aggregation, where it measures means. NaN for an update of weight 0
    """

    value: Float32s
    weights: tuple[float, ...]
    scores: tuple[float, ...]


def aggregate(
    kind: str | Rule,
    updates: Sequence[Float32s] | Float32s,
    weights: Sequence[float] | ArrayLike | None = None,
    *,
    pre: Sequence[tuple[str, Mapping[str, Any]] | PreAggregation] = (),
    start: Float32s | None = None,
    seed: int = 0,
    run: Run = map,
    **options: Any,
) -> Aggregate:
    """Combine updates, float32 (n, d) or n vectors (d,), by a rule: its name with its parameters, or one already made.

    `weights` (n,), usually numbers of samples, are what federated_average weighs by; for every rule, an update of weight 0
    takes no part. `start` (d,) is the last aggregate, from which centered_clipping starts (zeros unless given). `seed` draws
    bucketing's order. What is given is only read.

    Raises UserError for a rule, parameters or a number of updates that cannot be combined, saying what could be;
    NotFiniteError for updates that hold NaN or infinity; LocalError for shapes, types, and a sum beyond float32.
    """
    chosen = kind if isinstance(kind, Rule) else rule(kind, **options)
    before = tuple(
        stage if isinstance(stage, PreAggregation) else pre_aggregation(stage[0], **stage[1]) for stage in pre
    )
    if options and isinstance(kind, Rule):
        raise LocalError("a rule that is already made takes no parameters")
    if start is not None and not isinstance(chosen, CenteredClipping):
        raise LocalError(f"{chosen.kind} starts from nothing")
    counts = _as_counts(weights, len(updates))
    taking_part = [at for at, count in enumerate(counts) if count]
    vectors = [updates[at] for at in taking_part]
    check(chosen, before, len(vectors))
    _check_vectors(vectors, start)
    pieces = _pieces(vectors[0].size)

    def named(positions: Iterable[int]) -> NotFiniteError:
        return NotFiniteError(tuple(taking_part[at] for at in positions))

    def products(centre: Float32s | None) -> Float64s:
        found = total(
            run(
                lambda piece: gram(
                    [vector[piece] for vector in vectors], None if centre is None else centre[piece]
                ),
                pieces,
            )
        )
        if bad := not_finite(found):
            raise named(bad)
        return found

    inner = None
    if needs_gram(chosen, before):
        if start is not None and not all_finite(start):
            raise LocalError("the last aggregate is not finite")
        inner = products(start)
        nearest = None if isinstance(chosen, CenteredClipping) else centre_among(inner)
        if nearest is not None:
            inner = products(vectors[nearest])
    norms = []
    if isinstance(chosen, FederatedAverage) and chosen.clip_norm is not None:
        norms = [norm(vector) for vector in vectors]
        if bad := tuple(at for at, found in enumerate(norms) if not isfinite(found)):
            raise named(bad)
    decision = decide(
        chosen,
        before,
        [counts[at] for at in taking_part],
        norms=norms,
        products=inner,
        started=start is not None,
        seed=seed,
    )
    value = np.empty(vectors[0].size, np.float32)
    finite = run(
        lambda piece: combine(
            decision.combination,
            [vector[piece] for vector in vectors],
            value[piece],
            None if start is None else start[piece],
        ),
        pieces,
    )
    if not all(list(finite)):
        bad = tuple(at for at, vector in enumerate(vectors) if not all_finite(vector))
        raise named(bad) if bad else LocalError("the updates are finite, their sum is not: beyond float32")
    return Aggregate(
        value,
        _spread(decision.weights, taking_part, len(updates), 0.0),
        _spread(decision.scores, taking_part, len(updates), float("nan")),
    )


def decide(
    chosen: Rule,
    before: Sequence[PreAggregation],
    samples: Sequence[int],
    *,
    norms: Sequence[float] = (),
    products: Float64s | None = None,
    started: bool = False,
    seed: int = 0,
) -> Decision:
    """What is done to the columns of n vectors, from numbers about them.

    `samples` (n,) are above 0; `norms` (n,) are L2 norms, needed by a clipped mean only; `products` (n, n) is the Gram matrix,
    where `pre_aggregation.needs_gram`; `started`: whether there is a last aggregate, which it is then centred by for
    centered_clipping. Raises UserError as `pre_aggregation.check`, LocalError for numbers that are missing or not finite.
    """
    n = len(samples)
    check(chosen, before, n)
    if isinstance(chosen, FederatedAverage):
        clipped = chosen.clip_norm is not None
        factors = chosen.mean.factors(samples, norms if clipped else [0.0] * n)
        row = tuple((at, factor.parameters) for at, factor in enumerate(factors) if factor.parameters)
        plain = tuple((at, factor.float_buffers) for at, factor in enumerate(factors) if factor.float_buffers)
        scores = tuple(norms) if clipped else ()
        return Decision(Combination("sum", (row,)), Combination("sum", (plain,)), _factors(row, n), scores)
    if needs_gram(chosen, before) and (products is None or products.shape != (n, n) or not_finite(products)):
        raise LocalError(f"{chosen.kind} needs a finite Gram matrix of {n} vectors")
    matrix, products = mix(before, n, products, seed)
    match chosen:
        case Median():
            both = median(rows_of(matrix))
            return Decision(both, both, (), ())
        case TrimmedMean():
            both = Combination("trimmed_mean", rows_of(matrix), chosen.f)
            return Decision(both, both, (), ())
    assert products is not None
    found = weights_from_gram(chosen, products)
    scores = () if before else found.scores
    if isinstance(chosen, Bulyan):
        selected = [row for row, weight in zip(rows_of(matrix), found.weights, strict=True) if weight]
        both = Combination("mean_around_median", tuple(selected), 2 * chosen.f)
        return Decision(both, both, (), scores)
    row = row_of(weights_of(matrix, found.weights) if before else found.weights)
    combination = Combination("sum", (row,), start=float32(found.start) if started else 0.0)
    # Clipped differences to a start say nothing about running statistics: the median is the robust rule without a parameter.
    buffers = median(rows_of(matrix)) if isinstance(chosen, CenteredClipping) else combination
    return Decision(combination, buffers, _factors(row, n), scores)


def combine(
    combination: Combination, vectors: Sequence[Float32s], out: Float32s, start: Float32s | None = None
) -> bool:
    """out = what the combination makes of these n vectors' columns, all float32 (d,); `out` overlaps none of them. `start`:
    the last aggregate's columns, where the combination has a factor for it.

    Returns whether all that entered it and the result are finite; if not, summation.all_finite finds the vector, or finite
    vectors added up beyond float32. Raises LocalError for other shapes, and in a thread whose arithmetic is not IEEE 754's.
    """
    require_ieee_arithmetic()
    check_combination(combination, len(vectors))
    for vector in vectors:
        if vector.dtype != np.float32 or vector.shape != out.shape:
            raise LocalError(f"{vector.dtype} of shape {vector.shape} cannot be combined into {out.shape}")
    if combination.operation != "sum":
        return combine_columns(combination, vectors, out)
    terms = [(vectors[at], factor) for at, factor in combination.rows[0]]
    if combination.start:
        if start is None:
            raise LocalError("the last aggregate is needed and is not given")
        terms.insert(0, (start, combination.start))
    if not terms:  # every factor is too small for float32
        out[:] = 0
        return True
    return weighted_sum(terms, out)


def measure(
    updates: Sequence[Float32s] | Float32s, value: Float32s, *, run: Run = map
) -> tuple[Measured, ...]:
    """What outlier detection looks at: each update's norm, and its distance and direction from what was made of them.

    Raises NotFiniteError for updates that hold NaN or infinity, LocalError for shapes and types.
    """
    vectors = [*updates, value]
    _check_vectors(vectors, None)
    products = total(run(lambda piece: gram([vector[piece] for vector in vectors]), _pieces(value.size)))
    if bad := not_finite(products):
        raise NotFiniteError(bad)
    return measured_from_gram(products.tolist())


def _pieces(size: int) -> list[slice]:
    return [slice(begin, begin + PIECE) for begin in range(0, size, PIECE)] or [slice(0, 0)]


def _as_counts(weights: Sequence[float] | ArrayLike | None, n: int) -> list[int]:
    """Weights as integers in the same proportion: floats are fractions with a power of two below, so this is exact, and
    sums of them do not depend on their order."""
    if weights is None:
        return [1] * n
    given = np.asarray(weights).tolist()
    if not isinstance(given, list) or len(given) != n:
        raise LocalError(f"{n} updates need {n} weights, not {given!r:.80}")
    for at, weight in enumerate(given):
        if not isinstance(weight, int | float) or not isfinite(weight) or weight < 0:
            raise LocalError(f"the weight of update {at} cannot be {weight!r}")
    exact = [Fraction(weight) for weight in given]
    common = lcm(*(fraction.denominator for fraction in exact))
    return [int(fraction * common) for fraction in exact]


def _check_vectors(vectors: Sequence[Float32s], start: Float32s | None) -> None:
    for vector in [*vectors] if start is None else [*vectors, start]:
        if getattr(vector, "dtype", None) != np.float32 or vector.shape != (vectors[0].size,):
            raise LocalError(
                f"updates are flat float32 vectors of one length ({np.size(vectors[0])}), not "
                f"{getattr(vector, 'dtype', type(vector).__name__)} of shape {np.shape(vector)}"
            )


def _factors(row: Row, n: int) -> tuple[float, ...]:
    factors = dict(row)
    return tuple(factors.get(at, 0.0) for at in range(n))


def _spread(values: Sequence[float], positions: Sequence[int], n: int, otherwise: float) -> tuple[float, ...]:
    """Values at their positions among n, `otherwise` elsewhere; nothing for no values."""
    if not values:
        return ()
    at = dict(zip(positions, values, strict=True))
    return tuple(at.get(position, otherwise) for position in range(n))

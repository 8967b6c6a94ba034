"""Rules of combining: what a run chooses, what each rule assumes, and when it refuses.

Theory of operation
    A rule makes one vector of n contributions of which some may be arbitrary (Byzantine). It declares

        shape       how it runs when no member holds all vectors:
                    sum               factors are known before any vector is seen: a tree adds on the way
                    coordinate_wise   each column by itself: the owner of a stripe of columns sees that stripe of all
                    vector_wise       factors come from the n x n matrix of inner products, then it is a sum
        needs_gram  whether that matrix is needed before columns are combined. Bulyan is coordinate-wise and needs it, too
        minimum     of how many contributions at least
        tolerated   how many of n may be arbitrary

    Robust rules count heads. The number of samples in a header is the contributor's own claim, and a liar would claim the
    majority; only federated_average weighs by it.

    What comes before a rule is in pre_aggregation.py, what a rule computes in vector_wise.py and coordinate_wise.py;
    docs/aggregation.md says when to pick which.

This module knows no numpy.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Final, Literal

import msgspec

from p2pcoord.aggregation.mean import Mean
from p2pcoord.float32 import MAX_FLOAT32
from p2pcoord.kinds import made, require

Shape = Literal["sum", "coordinate_wise", "vector_wise"]

MAX_ITERATIONS: Final = 1_000
"""Of the iterative rules. Papers take 1 to 10; an iteration costs n * n operations, so a thousand are nothing beside the sum."""


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """Base of the rules; made by `rule`. Instances are checked when they are made (UserError)."""

    kind: ClassVar[str]
    shape: ClassVar[Shape]
    needs_gram: ClassVar[bool] = False
    paper: ClassVar[str]

    @property
    def minimum(self) -> int:
        """The fewest vectors that this rule, with these parameters, can combine."""
        return 1

    def tolerated(self, n: int) -> int:
        """How many of n vectors may be arbitrary, by the paper."""
        return 0

    def refusal(self, n: int) -> str:
        """Why n vectors cannot be combined and what would be allowed; empty if they can."""
        return "" if n >= self.minimum else f"{self.kind} needs at least 1 vector, there are {n}"


class FederatedAverage(Rule, frozen=True, kw_only=True):
    """The mean, by samples or by head, each update clipped to `clip_norm` first (None: not clipped). See mean.py."""

    kind: ClassVar[str] = "federated_average"
    shape: ClassVar[Shape] = "sum"
    paper: ClassVar[str] = (
        "McMahan et al. 2017 (FedAvg, algorithm 1); clipping: McMahan et al. 2018, algorithm 1"
    )
    weighted: bool = True
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        clip_norm = self.clip_norm
        require(
            clip_norm is None or _positive(clip_norm),
            f"clip_norm must be a positive number, it is {clip_norm}",
        )

    @property
    def mean(self) -> Mean:
        """The factors' definition."""
        return Mean(self.weighted, self.clip_norm)


class Median(Rule, frozen=True, kw_only=True):
    """In each column the middle value; of an even number the mean of the two in the middle."""

    kind: ClassVar[str] = "median"
    shape: ClassVar[Shape] = "coordinate_wise"
    paper: ClassVar[str] = "Yin et al. 2018, definition 1"

    def tolerated(self, n: int) -> int:
        return (n - 1) // 2


class TrimmedMean(Rule, frozen=True, kw_only=True):
    """In each column the mean without the f smallest and the f largest values."""

    kind: ClassVar[str] = "trimmed_mean"
    shape: ClassVar[Shape] = "coordinate_wise"
    paper: ClassVar[str] = "Yin et al. 2018, definition 2"
    f: int

    def __post_init__(self) -> None:
        require_f(self.kind, self.f)

    @property
    def minimum(self) -> int:
        return 2 * self.f + 1

    def tolerated(self, n: int) -> int:
        return self.f

    def refusal(self, n: int) -> str:
        return too_few(self.kind, self.f, n, 2, 1)


class Krum(Rule, frozen=True, kw_only=True):
    """The vector whose n - f - 2 nearest others are nearest, by the sum of squared distances; the first of equals."""

    kind: ClassVar[str] = "krum"
    shape: ClassVar[Shape] = "vector_wise"
    needs_gram: ClassVar[bool] = True
    paper: ClassVar[str] = "Blanchard et al. 2017, section 4"
    f: int

    def __post_init__(self) -> None:
        require_f(self.kind, self.f)

    @property
    def minimum(self) -> int:
        return 2 * self.f + 3

    def tolerated(self, n: int) -> int:
        return self.f

    def refusal(self, n: int) -> str:
        return too_few(self.kind, self.f, n, 2, 3)


class MultiKrum(Rule, frozen=True, kw_only=True):
    """The mean of the m vectors that Krum scores best.

    m is n - f - 2 unless given (Damaskinos et al. 2019); the paper's experiments take n - f, and more could not all be honest.
    """

    kind: ClassVar[str] = "multi_krum"
    shape: ClassVar[Shape] = "vector_wise"
    needs_gram: ClassVar[bool] = True
    paper: ClassVar[str] = "Blanchard et al. 2017, section 6"
    f: int
    m: int | None = None

    def __post_init__(self) -> None:
        require_f(self.kind, self.f)
        require(self.m is None or self.m >= 1, f"multi_krum's m must be at least 1, it is {self.m}")

    @property
    def minimum(self) -> int:
        return max(2 * self.f + 3, (self.m or 0) + self.f)

    def chosen(self, n: int) -> int:
        """How many of n vectors enter the mean."""
        return n - self.f - 2 if self.m is None else self.m

    def tolerated(self, n: int) -> int:
        return self.f

    def refusal(self, n: int) -> str:
        refused = too_few(self.kind, self.f, n, 2, 3)
        if not refused and self.m is not None and self.m > n - self.f:
            return (
                f"multi_krum with m = {self.m} and f = {self.f} needs at least {self.m + self.f} vectors (m + f), "
                f"there are {n}: with {n}, m may be at most {n - self.f}"
            )
        return refused


class Bulyan(Rule, frozen=True, kw_only=True):
    """Krum chooses n - 2f vectors, one after the other; in each column, of their values the n - 4f nearest to their median
    are averaged."""

    kind: ClassVar[str] = "bulyan"
    shape: ClassVar[Shape] = "coordinate_wise"
    needs_gram: ClassVar[bool] = True
    paper: ClassVar[str] = "El Mhamdi et al. 2018 (Bulyan)"
    f: int

    def __post_init__(self) -> None:
        require_f(self.kind, self.f)

    @property
    def minimum(self) -> int:
        return 4 * self.f + 3

    def tolerated(self, n: int) -> int:
        return self.f

    def refusal(self, n: int) -> str:
        return too_few(self.kind, self.f, n, 4, 3)


class GeometricMedian(Rule, frozen=True, kw_only=True):
    """The point with the smallest sum of distances to all vectors, by `iterations` steps of Weiszfeld's method in which no
    distance counts as less than `smoothing` (an L2 norm)."""

    kind: ClassVar[str] = "geometric_median"
    shape: ClassVar[Shape] = "vector_wise"
    needs_gram: ClassVar[bool] = True
    paper: ClassVar[str] = "Pillutla et al. 2022 (RFA), algorithm 2"
    smoothing: float = 1e-6  # RFA's experiments
    iterations: int = (
        10  # RFA takes 3 of its costly ones and sees no gain beyond; ours cost nothing beside the sum
    )

    def __post_init__(self) -> None:
        require(_positive(self.smoothing), f"smoothing must be a positive number, it is {self.smoothing}")
        _require_iterations(self.iterations)

    def tolerated(self, n: int) -> int:
        return (n - 1) // 2


class CenteredClipping(Rule, frozen=True, kw_only=True):
    """From the last aggregate, `iterations` steps by the mean of the vectors' differences to it, each difference clipped to
    an L2 norm of `radius`."""

    kind: ClassVar[str] = "centered_clipping"
    shape: ClassVar[Shape] = "vector_wise"
    needs_gram: ClassVar[bool] = True
    paper: ClassVar[str] = "Karimireddy et al. 2021 (centered clipping)"
    radius: float
    iterations: int = 1  # the paper proves, and in experiments takes, a single one

    def __post_init__(self) -> None:
        require(_positive(self.radius), f"radius must be a positive number, it is {self.radius}")
        _require_iterations(self.iterations)

    def tolerated(self, n: int) -> int:
        return n // 10


RULES: Final[dict[str, type[Rule]]] = {
    chosen.kind: chosen
    for chosen in (
        FederatedAverage,
        Median,
        TrimmedMean,
        Krum,
        MultiKrum,
        Bulyan,
        GeometricMedian,
        CenteredClipping,
    )
}
"""By name."""


def rule(kind: str, **options: Any) -> Rule:
    """The rule of this kind; options are the fields of its class.

    Raises UserError for an unknown kind, an option that is missing or that the kind does not have, and values out of range.
    """
    return made("aggregation rule", RULES, kind, options, choices=", ".join(sorted(RULES)))


def too_few(kind: str, f: int, n: int, per_byzantine: int, besides: int) -> str:
    """The refusal of what needs per_byzantine * f + besides vectors and has n; empty if that is enough."""
    needed = per_byzantine * f + besides
    if n >= needed:
        return ""
    most = (n - besides) // per_byzantine
    allowed = f"with {n}, f may be at most {most}" if most >= 0 else f"even f = 0 needs {besides}"
    return f"{kind} with f = {f} needs at least {needed} vectors ({per_byzantine}f + {besides}), there are {n}: {allowed}"


def require_f(kind: str, f: int) -> None:
    """Raises UserError for a number of arbitrary vectors that is none."""
    require(f >= 0, f"{kind}'s f must be at least 0, it is {f}")


def _positive(value: float) -> bool:
    return math.isfinite(value) and 0 < value <= MAX_FLOAT32


def _require_iterations(iterations: int) -> None:
    require(
        1 <= iterations <= MAX_ITERATIONS, f"iterations must be 1 to {MAX_ITERATIONS}, they are {iterations}"
    )

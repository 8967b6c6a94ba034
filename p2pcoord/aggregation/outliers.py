"""Outlier detection: whose updates stand out over rounds, and whom to propose for exclusion.

Theory of operation
    Three things are measured of each update in a round (`Measured`): its norm, its distance to the aggregate, and the cosine
    of its angle to the aggregate. All follow from the Gram matrix of the updates and the aggregate (`measured_from_gram`).

    In one round, a value becomes a deviation from the round's median, so that training, which shrinks all of them, moves
    nobody:

        norm       value / median - 1              both ways: too long, and too short to be work
        distance   value / median - 1              farther only
        cosine     median - value                  lower only: pointing elsewhere

    Over rounds, deviations of all contributors in the last `window` rounds are pooled, and their median absolute deviation says
    what is usual: scale = 1.4826 * median |deviation|, which for normal values is the standard deviation. A contributor's
    score is the median of its own deviations in these rounds, in units of the scale; the largest of the measures counts
    (the modified z-score, Iglewicz and Hoaglin 1993, whose threshold is 3.5). Medians throughout: fewer than half, by
    whatever they send, move neither the centre nor the scale, and one bad round in three accuses nobody.

    It is a proposal, no evidence: a member with unusual data stands out as well. And it sees nothing of an attack that stays
    within what is usual. Robust rules are what protects a round; this says where to look.

    A detector keeps nothing: history goes in, history comes out.

This module knows no numpy.
"""

from __future__ import annotations

import math
from statistics import median
from typing import TYPE_CHECKING, Final, Literal, get_args

import msgspec

from p2pcoord.errors import LocalError, UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Measure = Literal["norm", "distance", "cosine"]
MEASURES: Final[tuple[Measure, ...]] = get_args(Measure)

NORMAL: Final = 1.4826
"""1 / 0.6745: the median absolute deviation of normal values in standard deviations."""

LEAST_SCALE: Final = 0.01
"""One percent (or 0.01 of a cosine): where most members agree to the last bits, a difference that small is still nothing."""

MAX_SCORE: Final = 1e6
"""What stands out infinitely gets this: scores travel in metrics, and infinity has no JSON."""


class Measured(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Of one update in one round: L2 norm, L2 distance to the aggregate, cosine of its angle to it (0 if one has no
    direction)."""

    norm: float
    distance: float
    cosine: float


Round = dict[str, Measured]
"""By contributor."""


class History(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What was measured in the last rounds, the newest last. State: it goes where the run's state goes."""

    rounds: tuple[Round, ...] = ()


class Detector(msgspec.Struct, frozen=True, kw_only=True):
    """What is looked at, and from when on something is said. Checked when it is made (UserError)."""

    measures: tuple[Measure, ...] = MEASURES
    threshold: float = 3.5  # Iglewicz and Hoaglin 1993
    window: int = (
        10  # rounds: long enough for a median, short enough that who has recovered is soon left alone
    )
    least_rounds: int = 3  # in which a contributor was seen, before it is proposed: no single round decides

    def __post_init__(self) -> None:
        known = ", ".join(MEASURES)
        if not self.measures or any(measure not in MEASURES for measure in self.measures):
            raise UserError(f"measures must be some of {known}, they are {list(self.measures)}")
        if not (math.isfinite(self.threshold) and self.threshold > 0):
            raise UserError(f"threshold must be a positive number, it is {self.threshold}")
        if not 1 <= self.least_rounds <= self.window:
            raise UserError(
                f"least_rounds must be 1 to window ({self.window}), it is {self.least_rounds}: nobody would be seen so often"
            )

    def observe(self, history: History, measured: Mapping[str, Measured]) -> History:
        """The history with one more round. Raises LocalError for a number that is not finite."""
        for contributor, found in measured.items():
            if not all(math.isfinite(value) for value in (found.norm, found.distance, found.cosine)):
                raise LocalError(f"{contributor}: {found}")
        return History((*history.rounds, dict(measured))[-self.window :])

    def scores(self, history: History) -> dict[str, float]:
        """How far each contributor of these rounds stands out, 0 (not at all) to MAX_SCORE."""
        result: dict[str, float] = {}
        for measure in self.measures:
            own: dict[str, list[float]] = {}
            for measured in history.rounds:
                for contributor, deviation in _deviations(measure, measured).items():
                    own.setdefault(contributor, []).append(deviation)
            pool = [abs(deviation) for found in own.values() for deviation in found]
            scale = max(NORMAL * median(pool), LEAST_SCALE) if pool else LEAST_SCALE
            for contributor, found in own.items():
                usual = median(found)
                outwards = abs(usual) if measure == "norm" else max(usual, 0.0)
                result[contributor] = max(result.get(contributor, 0.0), min(outwards / scale, MAX_SCORE))
        return result

    def proposals(self, history: History) -> tuple[str, ...]:
        """Whom to exclude: above the threshold, seen in `least_rounds` or more, in the newest round as well; the most
        outstanding first."""
        if not history.rounds:
            return ()
        scores = self.scores(history)
        seen = {
            contributor: sum(contributor in measured for measured in history.rounds)
            for contributor in history.rounds[-1]
        }
        found = [
            contributor
            for contributor, times in seen.items()
            if times >= self.least_rounds and scores[contributor] > self.threshold
        ]
        return tuple(sorted(found, key=lambda contributor: (-scores[contributor], contributor)))


def measured_from_gram(products: Sequence[Sequence[float]]) -> tuple[Measured, ...]:
    """What is measured of n updates, from the Gram matrix (n + 1, n + 1) of them and, last, the aggregate; not centred."""
    (*_, with_aggregate) = products
    *dots, square = with_aggregate
    found = []
    for at, dot in enumerate(dots):
        own = products[at][at]
        lengths = math.sqrt(own) * math.sqrt(square)
        cosine = max(-1.0, min(1.0, dot / lengths)) if lengths else 0.0
        found.append(Measured(math.sqrt(own), math.sqrt(max(own + square - 2 * dot, 0.0)), cosine))
    return tuple(found)


def _deviations(measure: Measure, measured: Mapping[str, Measured]) -> dict[str, float]:
    values = {contributor: float(getattr(found, measure)) for contributor, found in measured.items()}
    if not values:
        return {}
    middle = median(values.values())
    if measure == "cosine":
        return {contributor: middle - value for contributor, value in values.items()}
    if not middle:  # more than half are zeros
        return {contributor: MAX_SCORE if value else 0.0 for contributor, value in values.items()}
    return {contributor: min(value / middle - 1, MAX_SCORE) for contributor, value in values.items()}

"""What comes before a rule, and whether the two go together.

Theory of operation
    A pre-aggregation replaces the vectors by means of some of them, so that what is left varies less: honest vectors that differ
    much (each member has data of its own) leave room for a bad one to hide in. The rule then has to hold for the number of
    vectors that are left. `check` asks all stages, when a run is configured and when a round has fewer contributions than
    expected.

    What a pre-aggregation computes is in mixing.py.

This module knows no numpy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Final

import msgspec

from p2pcoord.aggregation.rules import FederatedAverage, Rule, require_f, too_few
from p2pcoord.errors import UserError
from p2pcoord.kinds import made, require

if TYPE_CHECKING:
    from collections.abc import Sequence


class PreAggregation(msgspec.Struct, frozen=True, kw_only=True):
    """Base of what comes before a rule; made by `pre_aggregation`. Each vector that it leaves is the mean of some."""

    kind: ClassVar[str]
    needs_gram: ClassVar[bool] = False
    paper: ClassVar[str]

    def left(self, n: int) -> int:
        """How many vectors it makes of n."""
        return n

    def needed(self, rows: int) -> int:
        """Of how many vectors it makes at least `rows`."""
        return rows

    def refusal(self, n: int) -> str:
        """Why it cannot take n vectors and what would be allowed; empty if it can."""
        return ""


class Bucketing(PreAggregation, frozen=True, kw_only=True):
    """In a random order, each `size` vectors become their mean; the last bucket may be smaller.

    As many of what it leaves may be arbitrary as of what it was given: one bad vector spoils its bucket.
    """

    kind: ClassVar[str] = "bucketing"
    paper: ClassVar[str] = "Karimireddy et al. 2022, algorithm 1"
    size: int

    def __post_init__(self) -> None:
        require(self.size >= 1, f"bucketing's size must be at least 1, it is {self.size}")

    def left(self, n: int) -> int:
        return -(-n // self.size)

    def needed(self, rows: int) -> int:
        return (rows - 1) * self.size + 1


class NearestNeighbourMixing(PreAggregation, frozen=True, kw_only=True):
    """Each vector becomes the mean of the n - f nearest to it, itself among them."""

    kind: ClassVar[str] = "nearest_neighbour_mixing"
    needs_gram: ClassVar[bool] = True
    paper: ClassVar[str] = "Allouah et al. 2023 (NNM)"
    f: int

    def __post_init__(self) -> None:
        require_f(self.kind, self.f)

    def needed(self, rows: int) -> int:
        return max(rows, 2 * self.f + 1)

    def refusal(self, n: int) -> str:
        return too_few(self.kind, self.f, n, 2, 1)


PRE_AGGREGATIONS: Final[dict[str, type[PreAggregation]]] = {
    chosen.kind: chosen for chosen in (Bucketing, NearestNeighbourMixing)
}
"""By name."""

MAX_PRE_AGGREGATIONS: Final = 4
"""One is usual, two are in papers."""


def pre_aggregation(kind: str, **options: Any) -> PreAggregation:
    """The pre-aggregation of this kind; options and errors as of `rule`."""
    choices = ", ".join(sorted(PRE_AGGREGATIONS))
    return made("pre-aggregation", PRE_AGGREGATIONS, kind, options, choices=choices)


def needs_gram(chosen: Rule, before: Sequence[PreAggregation] = ()) -> bool:
    """Whether the matrix of inner products is needed to combine by this rule after these pre-aggregations."""
    return chosen.needs_gram or any(stage.needs_gram for stage in before)


def minimum(chosen: Rule, before: Sequence[PreAggregation] = ()) -> int:
    """The fewest contributions of which these pre-aggregations leave what the rule can combine."""
    least = chosen.minimum
    for stage in reversed(before):
        least = stage.needed(least)
    return least


def refusal(chosen: Rule, before: Sequence[PreAggregation], n: int) -> str:
    """Why n contributions cannot be combined so, and what would be allowed; empty if they can."""
    if before and isinstance(chosen, FederatedAverage):
        return (
            f"{before[0].kind} before federated_average is a mean of means, and protects no more than the mean: use "
            "federated_average alone, or a robust rule"
        )
    if len(before) > MAX_PRE_AGGREGATIONS:
        return f"{len(before)} pre-aggregations: at most {MAX_PRE_AGGREGATIONS} may follow each other"
    left = n
    for stage in before:
        refused = stage.refusal(left)
        if refused:
            return refused + _before(n, left)
        left = stage.left(left)
    refused = chosen.refusal(left)
    if not refused:
        return ""
    enough = f"; {minimum(chosen, before)} contributions would do" if left != n else ""
    return refused + _before(n, left) + enough


def check(chosen: Rule, before: Sequence[PreAggregation], n: int) -> None:
    """Raises UserError with the `refusal` if n contributions cannot be combined so."""
    refused = refusal(chosen, before, n)
    if refused:
        raise UserError(refused)


def _before(n: int, left: int) -> str:
    return f" (pre-aggregation leaves {left} of {n})" if left != n else ""

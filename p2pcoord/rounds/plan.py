"""The plan of a round: who does which part, signed by the coordinator.

A plan is replaced only by one of a higher (term, revision). A revision keeps the assignments by index: a replacement has the
index of the assignment that it replaces and another member, and an (origin round, index) counts once, whoever did it.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from itertools import pairwise

import msgspec

from p2pcoord.errors import RemoteError
from p2pcoord.identity import Statement

# A round's record names every contribution in up to 76 bytes, and a body holds 64 KiB; the rest is for metrics.
MAX_ASSIGNMENTS = 800

Ranges = tuple[tuple[int, int], ...]


class Assignment(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One part of a round. `ranges` are half-open intervals of the training data (empty in mode own)."""

    index: int
    member: str
    ranges: Ranges


class Plan(Statement, frozen=True, tag="plan"):
    """`parent` is the root of the state of version - 1, from which all train; `barrier_ns` is how long the coordinator
    waits from when it sends the plan."""

    term: int
    version: int
    revision: int
    parent: bytes
    assignments: tuple[Assignment, ...]
    barrier_ns: int
    coordinator: str
    signature: bytes = b""

    @property
    def rank(self) -> tuple[int, int, int]:
        return self.version, self.term, self.revision

    @property
    def members(self) -> tuple[str, ...]:
        """Each once, in order of assignments."""
        return tuple(dict.fromkeys(assignment.member for assignment in self.assignments))

    def of(self, member: str) -> tuple[Assignment, ...]:
        return tuple(assignment for assignment in self.assignments if assignment.member == member)


def check_plan(plan: Plan, train_length: int) -> None:
    """Raises RemoteError("bad_plan") for indices that repeat or are too many, and ranges outside the training data."""
    indices = [assignment.index for assignment in plan.assignments]
    if not 1 <= len(indices) <= MAX_ASSIGNMENTS or sorted(indices) != list(range(len(indices))):
        raise RemoteError("bad_plan", f"{len(indices)} assignments, not numbered from 0")
    for assignment in plan.assignments:
        if any(not 0 <= low < high <= train_length for low, high in assignment.ranges):
            raise RemoteError("bad_plan", f"assignment {assignment.index} lies outside the training data")


def size(ranges: Ranges) -> int:
    return sum(high - low for low, high in ranges)


def deal(length: int, parts: int, version: int, offset: int) -> list[Ranges]:
    """Cuts `length` samples into `parts` nearly equal ranges, beginning elsewhere each version.

    `offset` is a number drawn per version: without it the same member would see the same samples in every round. Ranges
    that pass the end go on at the beginning. With fewer samples than parts, some parts share a sample.
    """
    if length <= 0:
        return [()] * parts
    start = (offset * version) % length
    cuts = [start + length * i // parts for i in range(parts + 1)]
    return [_wrapped(low, max(high, low + 1), length) for low, high in pairwise(cuts)]


def _wrapped(low: int, high: int, length: int) -> Ranges:
    low, high = low % length, low % length + (high - low)
    if high <= length:
        return ((low, high),)
    return ((low, length), (0, high - length))


def split(length: int, parts: int) -> list[Ranges]:
    """Cuts `length` samples into `parts` nearly equal consecutive ranges, each sample in exactly one; some may be empty."""
    cuts = [length * i // parts for i in range(parts + 1)]
    return [((low, high),) if high > low else () for low, high in pairwise(cuts)]


def shares(length: int, members: int) -> tuple[Ranges, ...]:
    """The validation data over so many members; empty where each validates its own."""
    return tuple(split(length, members)) if length else ()


def replaced(assignments: Sequence[Assignment], index: int, member: str) -> tuple[Assignment, ...]:
    """The assignments with the one of this index given to `member`."""
    return tuple(msgspec.structs.replace(a, member=member) if a.index == index else a for a in assignments)


def least_loaded(
    assignments: Sequence[Assignment], candidates: Sequence[str], finished: Container[int]
) -> str:
    """The first of the candidates that have the fewest assignments to finish yet. `finished` are indices."""
    load = dict.fromkeys(candidates, 0)
    for assignment in assignments:
        if assignment.member in load and assignment.index not in finished:
            load[assignment.member] += 1
    return min(load, key=load.__getitem__)


def inherited(plan: Plan, living: Sequence[str], finished: Container[int]) -> tuple[Assignment, ...]:
    """An earlier coordinator's assignments; those whose member is gone and that nobody finished go to others."""
    assignments = plan.assignments
    for assignment in plan.assignments:
        if assignment.index not in finished and assignment.member not in living:
            substitute = least_loaded(assignments, living, finished)
            assignments = replaced(assignments, assignment.index, substitute)
    return assignments

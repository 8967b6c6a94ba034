"""Sorting many short columns at once: comparisons in an order that does not depend on what is compared.

Theory of operation
    A sorting network is a list of comparators (i, j), i < j: the smaller of lanes i and j goes to i, the larger to j. Since
    the list is fixed, a lane may be a whole block of columns, and a comparator is numpy.minimum and numpy.maximum of two
    blocks: no branch, all SIMD, and nothing rounded. Batcher's odd-even merge sort (Knuth, The Art of Computer Programming 3,
    algorithm 5.2.2M) takes 63 comparators for 16 lanes; the best known is 60. Comparators, or halves of them, whose output
    nobody needs are left out: the median of 16 needs 92 of 126 operations.

    A `Program` is the network as operations on numbered registers: the first n are the inputs, which are only read, the others
    are buffers, reused as soon as nobody needs what they hold.

    NaN passes through every comparator into both outputs, so it reaches every lane that is computed in full; infinities end in
    the first and the last lane. Looking at these two shows whether all inputs are finite, for two operations more.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from p2pcoord.layout import Float32s


class Operation(NamedTuple):
    """out = the element-wise minimum (or maximum) of registers `left` and `right`; `out` may be one of the two."""

    maximum: bool
    left: int
    right: int
    out: int


class Program(msgspec.Struct, frozen=True):
    """`lanes`: in which register each needed lane is in the end, by lane."""

    operations: tuple[Operation, ...]
    buffers: int
    lanes: dict[int, int]


def comparators(n: int) -> list[tuple[int, int]]:
    """A network that sorts n lanes, the smallest first."""
    found: list[tuple[int, int]] = []
    top = 1 << max((n - 1).bit_length() - 1, 0)
    p = top
    while p and n > 1:
        q, r, distance = top, 0, p
        while True:
            found += [(i, i + distance) for i in range(n - distance) if i & p == r]
            if q == p:
                break
            distance, q, r = q - p, q >> 1, p
        p >>= 1
    return found


@lru_cache(maxsize=64)
def program(n: int, needed: frozenset[int]) -> Program:
    """Operations that bring the needed lanes of n sorted ones about."""
    wanted, halves = set(needed), []
    for i, j in reversed(comparators(n)):
        smaller, larger = i in wanted, j in wanted
        if smaller or larger:
            halves.append((i, j, smaller, larger))
            wanted |= {i, j}
    lane = list(range(n))  # the register that holds it
    free: list[int] = []
    registers = n
    operations: list[Operation] = []

    def buffer() -> int:
        nonlocal registers
        if free:
            return free.pop()
        registers += 1
        return registers - 1

    for i, j, smaller, larger in reversed(halves):
        left, right = lane[i], lane[j]
        if smaller and larger:
            lane[i] = buffer()
            operations.append(Operation(False, left, right, lane[i]))
            lane[j] = right if right >= n else left if left >= n else buffer()
            operations.append(Operation(True, left, right, lane[j]))
            released = [left] if lane[j] == right else []
        else:
            result = right if right >= n else left if left >= n else buffer()
            operations.append(Operation(larger, left, right, result))
            lane[j if larger else i] = result
            released = [left] if result == right else [right] if result == left else []
        free += [register for register in released if register >= n]
    return Program(tuple(operations), registers - n, {at: lane[at] for at in sorted(needed)})


def run(chosen: Program, inputs: Sequence[Float32s], buffers: Sequence[Float32s]) -> list[Float32s]:
    """The needed lanes, in their order. Inputs and buffers have one shape; lanes are buffers, or inputs where n is 1."""
    registers = [*inputs, *buffers]
    minimum, maximum = np.minimum, np.maximum
    for larger, left, right, out in chosen.operations:
        (maximum if larger else minimum)(registers[left], registers[right], out=registers[out])
    return [registers[register] for register in chosen.lanes.values()]

"""Shampoo's blocks: how tensors are cut, and which member recomputes which block's preconditioners.

Theory of operation
    A tensor without its sides of length 1 is cut along every side into pieces of at most `block_size`; the blocks are
    numbered tensor by tensor, in row-major order. A block with k sides has k symmetric statistics (and as many inverse
    roots), one as wide as each side, of which the lower triangles are kept, row by row: half of the bytes. Small sides are
    not merged, unlike in Anil et al. 2020: a convolution keeps the order that Gupta et al. 2018 give it.

    The roots of a block depend on nothing but the state, the gradient and the block's number, which every member has. So a
    round may divide them: `preconditioner_work` gives the longest work first to whoever has the least so far (Graham 1969,
    as Shi et al. 2023 do), which is at most 4/3 of the best division.

This module knows no numpy: who does what is decided without it.
"""

from __future__ import annotations

import heapq
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING

import msgspec

from p2pcoord.errors import LocalError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeAlias

    Shapes: TypeAlias = Sequence[tuple[int, ...]]


class Block(msgspec.Struct, frozen=True):
    """A part of a tensor: where it begins along each side of the tensor (without those of length 1), and how far it goes."""

    tensor: int
    """Position of the tensor in the shapes."""
    starts: tuple[int, ...]
    sides: tuple[int, ...]

    @property
    def packed_count(self) -> int:
        """Elements of its statistics; its inverse roots have as many."""
        return sum(side * (side + 1) // 2 for side in self.sides)

    @property
    def work(self) -> int:
        """What an eigenvalue decomposition of each of its statistics costs, up to a constant."""
        return sum(side**3 for side in self.sides)

    @property
    def parts(self) -> tuple[slice, ...]:
        return tuple(slice(start, start + side) for start, side in zip(self.starts, self.sides, strict=True))


def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without sides of length 1; a scalar is a vector of one."""
    return tuple(side for side in shape if side != 1) or (1,)


def blocks(shapes: Shapes, block_size: int) -> tuple[Block, ...]:
    """The blocks of tensors of these shapes, in their order. Raises LocalError for a block size below 1."""
    if block_size < 1:
        raise LocalError(f"a block's side is at least 1, not {block_size}")
    return _blocks(tuple(map(tuple, shapes)), block_size)


@lru_cache(maxsize=16)
def _blocks(shapes: tuple[tuple[int, ...], ...], block_size: int) -> tuple[Block, ...]:
    found: list[Block] = []
    for tensor, shape in enumerate(shapes):
        sides = squeezed(shape)
        corners = product(
            *(range(0, side, block_size) for side in sides)
        )  # none for a tensor without elements
        found.extend(
            Block(
                tensor,
                starts,
                tuple(min(block_size, side - start) for side, start in zip(sides, starts, strict=True)),
            )
            for starts in corners
        )
    return tuple(found)


def preconditioner_work(
    shapes: Shapes, members: Sequence[str], *, block_size: int
) -> dict[str, tuple[int, ...]]:
    """Which blocks' inverse roots each member computes: member -> numbers of blocks in `blocks`, ascending.

    A pure function of its arguments; the order of `members` matters, so give the signed one. Raises LocalError for no
    members and for one that is there twice.
    """
    if not members or len(set(members)) != len(members):
        raise LocalError(f"the work needs different members, at least one: {list(members)[:8]}")
    work = [block.work for block in blocks(shapes, block_size)]
    loads = [(0, position) for position in range(len(members))]
    given: list[list[int]] = [[] for _ in members]
    for number in sorted(range(len(work)), key=lambda number: (-work[number], number)):
        load, position = heapq.heappop(loads)
        given[position].append(number)
        heapq.heappush(loads, (load + work[number], position))
    return {member: tuple(sorted(numbers)) for member, numbers in zip(members, given, strict=True)}

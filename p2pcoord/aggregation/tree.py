"""The aggregation tree: who sends its vector to whom, and in which order sums are taken.

Theory of operation
    Contributions are summed on the way to a root, and the result comes down the same edges. Each member combines, in this
    order: its own contribution, then what each child sends, children in their order. A leaf sends its contribution as it
    is (its signed root covers these bytes), and the receiver applies its factor; a member with children sends a partial
    sum, in which all factors are applied, and which is added as it is. So a member receives at most fan_out vectors from
    below and the result from above, and the result's bits depend on the tree and the signed factors, on nothing else.

    The tree is part of the signed attempt. `build_tree` is what a coordinator uses; a receiver that wants no more than a
    valid tree calls `check_tree`, so that later coordinators may choose other shapes (sites, slow links) without a new
    protocol. A tree is written in breadth-first order with parent positions that never decrease: one tree, one encoding,
    and every parent comes before its children, so a cycle cannot be written down.

    With n members and fan-out k the depth is about log_k(n): at 64 KiB to 1 GiB per vector the links' bandwidth decides,
    and a link carries k vectors instead of n.
"""

from __future__ import annotations

from functools import cached_property
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Annotated, Final

import msgspec

from p2pcoord.errors import LocalError, RemoteError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MAX_MEMBERS: Final = 1 << 14
"""16,384 members in one tree; the virtual world is run with up to 10,000."""


class Input(msgspec.Struct, frozen=True):
    """One summand of a member's sum: from whom, and whether it is a partial sum (else a contribution)."""

    member: str
    partial: bool


class Tree(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, dict=True):
    """`members` in breadth-first order, the root first; `parents[i]` is the position of the parent of `members[i + 1]`.

    Children are ordered as they come in `members`. Raises ValueError when this is no tree written in that order.
    """

    members: Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=MAX_MEMBERS)]
    parents: Annotated[tuple[int, ...], msgspec.Meta(max_length=MAX_MEMBERS)]

    def __post_init__(self) -> None:
        # ValueError, because msgspec turns it into the ValidationError by which wire.decode blames a peer.
        if len(self.parents) != len(self.members) - 1:
            raise ValueError(f"{len(self.members)} members with {len(self.parents)} parents")
        if len(set(self.members)) != len(self.members):
            raise ValueError("a member comes twice")
        if any(not 0 <= parent <= at for at, parent in enumerate(self.parents)):
            raise ValueError("a member comes before its parent")
        if any(before > after for before, after in pairwise(self.parents)):
            raise ValueError("members are not in breadth-first order")

    @property
    def root(self) -> str:
        """The member where the sum of all arises."""
        return self.members[0]

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {member: at for at, member in enumerate(self.members)}

    @cached_property
    def _children(self) -> tuple[tuple[str, ...], ...]:
        children: list[list[str]] = [[] for _ in self.members]
        for member, parent in zip(self.members[1:], self.parents, strict=True):
            children[parent].append(member)
        return tuple(tuple(of_one) for of_one in children)

    def __contains__(self, member: str) -> bool:
        return member in self._positions

    def _position(self, member: str) -> int:
        if member not in self._positions:
            raise LocalError(f"{member} is not in the tree")
        return self._positions[member]

    def children(self, member: str) -> tuple[str, ...]:
        """Who sends to `member`, in the order of its sum. Raises LocalError for who is not in the tree (as all below)."""
        return self._children[self._position(member)]

    def parent(self, member: str) -> str | None:
        """To whom `member` sends, and who sends it the result; None for the root."""
        at = self._position(member)
        return None if at == 0 else self.members[self.parents[at - 1]]

    def inputs(self, member: str) -> tuple[Input, ...]:
        """What `member` sums, in order: its own contribution, then its children's contributions and partial sums."""
        return (
            Input(member, partial=False),
            *(Input(child, partial=bool(self.children(child))) for child in self.children(member)),
        )

    def level(self, member: str) -> int:
        """Edges between `member` and the root."""
        at, level = self._position(member), 0
        while at:
            at, level = self.parents[at - 1], level + 1
        return level

    @property
    def depth(self) -> int:
        """Edges between the root and the farthest member: the last in breadth-first order is one."""
        return self.level(self.members[-1])

    @property
    def fan_out(self) -> int:
        """The most children that any member has."""
        return max(len(children) for children in self._children)


def build_tree(
    contributors: Sequence[str],
    fan_out: int,
    root: str | None = None,
    *,
    apart: Callable[[str, str], bool] | None = None,
) -> Tree:
    """The complete tree over `contributors` in their signed order, each member with up to `fan_out` children.

    `root`: where the sum arises; the order is rotated until it comes first, so that trees with different roots (one per
    stripe) also have different interior members. None: the first. `apart(one, other)`: whether these two must not be parent
    and child; who then finds no place is not in the tree, so those with many such pairs come last in a good order. Raises
    LocalError for a fan-out below 1, no contributors or one that comes twice, or a root that is none of them.
    """
    order = tuple(contributors)
    if fan_out < 1 or not 1 <= len(order) <= MAX_MEMBERS or len(set(order)) != len(order):
        raise LocalError(
            f"no tree of fan-out {fan_out} over {len(order)} contributors, {len(set(order))} distinct"
        )
    if root is not None:
        if root not in order:
            raise LocalError(f"{root} is no contributor")
        at = order.index(root)
        order = order[at:] + order[:at]
    if apart is None:
        return Tree(order, tuple((at - 1) // fan_out for at in range(1, len(order))))
    members, parents, rest = [order[0]], [], list(order[1:])
    for at, parent in enumerate(members):  # it grows on the way: breadth first
        children = list(islice((one for one in rest if not apart(parent, one)), fan_out))
        members += children
        parents += [at] * len(children)
        rest = [one for one in rest if one not in children]
    return Tree(tuple(members), tuple(parents))


def check_tree(tree: Tree, contributors: Sequence[str], fan_out: int) -> None:
    """Check a tree that a coordinator sent: it covers exactly the contributors, and nobody has more than `fan_out` children.

    (That it is a tree at all is checked when it is decoded.) Raises RemoteError "bad_tree".
    """
    known = set(contributors)
    extra = [member for member in tree.members if member not in known]
    if extra:
        raise RemoteError("bad_tree", f"{extra[0]} and {len(extra) - 1} more are no contributors")
    missing = [member for member in contributors if member not in tree]
    if missing:
        raise RemoteError("bad_tree", f"{missing[0]} and {len(missing) - 1} more contributors are not in it")
    if tree.fan_out > fan_out:
        raise RemoteError("bad_tree", f"a member has {tree.fan_out} children, at most {fan_out} are allowed")

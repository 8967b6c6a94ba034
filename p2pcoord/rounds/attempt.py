"""An attempt: one signed way to make a version, from exactly these contributions, over exactly this tree.

What is right in a round is the newest attempt, not anyone's gossip. A loss that makes its sum impossible is answered with
attempt n + 1 over those who are left; partial sums are addressed by the attempt, so no vector ever mixes two sets of
contributors. Everything a voter needs in order to check the sum's meaning is inside (weights, factors, scalars of the step)
or named by hash (headers).

A member combines its own contributions, then what its children send, in their order (`aggregation/tree.py`); one that has
a single contribution and no children sends nothing: its contribution is fetched as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec

from p2pcoord.aggregation.contribution import MAX_COUNT, ContributionHeader, check_header
from p2pcoord.aggregation.mean import Factors, Mean
from p2pcoord.aggregation.tree import Tree, check_tree
from p2pcoord.content import ContentRef
from p2pcoord.errors import LocalError, RemoteError
from p2pcoord.identity import Authority, Statement
from p2pcoord.optimization.optimizer import StepParameters
from p2pcoord.rounds.plan import Ranges


class Entry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One contribution in an attempt: whose, for what, by which header (hash), and its factors."""

    origin_round: int
    assignment: int
    contributor: str
    header: bytes
    content: ContentRef
    factors: Factors

    @property
    def slot(self) -> tuple[int, int]:
        return self.origin_round, self.assignment


class Attempt(Statement, frozen=True, tag="attempt"):
    """`parent` is the state stepped from; `entries` are ordered as they are summed; `validation` is dealt to the tree's
    members in their order (empty: each validates its own data)."""

    term: int
    version: int
    number: int
    parent: ContentRef
    entries: tuple[Entry, ...]
    tree: Tree
    step: StepParameters
    validation: tuple[Ranges, ...]
    coordinator: str
    signature: bytes = b""

    @property
    def rank(self) -> tuple[int, int, int]:
        return self.version, self.term, self.number

    def of(self, member: str) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.contributor == member)

    def sends_partial(self, member: str) -> bool:
        """Whether `member` sums something (else its one contribution is fetched as it is)."""
        return bool(self.tree.children(member)) or len(self.of(member)) > 1


class Partial(Statement, frozen=True, tag="partial"):
    """`sender`'s partial sum in an attempt (by hash): all contributions of its subtree."""

    attempt: bytes
    sender: str
    content: ContentRef
    signature: bytes = b""


class Result(Statement, frozen=True, tag="result"):
    """The sum of all, by the tree's root."""

    attempt: bytes
    sender: str
    content: ContentRef
    norm: float
    signature: bytes = b""


def contributors_in_order(headers: Sequence[ContributionHeader]) -> list[str]:
    """Each contributor once, in the order in which its first contribution is summed."""
    return list(dict.fromkeys(header.contributor for header in headers))


def make_attempt(
    authority: Authority,
    headers: Sequence[ContributionHeader],
    *,
    term: int,
    version: int,
    number: int,
    parent: ContentRef,
    mean: Mean,
    tree: Tree,
    step: StepParameters,
    validation: Sequence[Ranges],
) -> Attempt:
    """Signs an attempt over these contributions, summed in order of (origin round, assignment), over a tree of their
    contributors."""
    headers = sorted(headers, key=lambda header: header.slot)
    factors = mean.factors([h.samples for h in headers], [h.norm for h in headers])
    entries = tuple(
        Entry(h.origin_round, h.assignment, h.contributor, authority.hash(h), h.content, f)
        for h, f in zip(headers, factors, strict=True)
    )
    return authority.sign(
        Attempt(term, version, number, parent, entries, tree, step, tuple(validation), authority.peer_id)
    )


def check_attempt(
    attempt: Attempt,
    headers: Mapping[bytes, ContributionHeader],
    authority: Authority,
    *,
    mean: Mean,
    fan_out: int,
    content_bytes: int,
    most_samples: Callable[[int], int] = lambda assignment: MAX_COUNT,
) -> None:
    """What a voter checks of an attempt: every header is signed and fits, each slot counts once, the factors follow from
    the headers, the tree covers exactly the contributors. `most_samples`: of an assignment. Raises RemoteError."""
    if not attempt.entries:
        raise RemoteError("bad_attempt", "no contributions")
    chosen = []
    for entry in attempt.entries:
        header = headers.get(entry.header)
        if header is None:
            raise RemoteError("bad_attempt", f"the header of {entry.contributor} is missing")
        check_header(header, authority, content_bytes, most_samples(header.assignment))
        same = (header.slot, header.contributor, header.content) == (
            entry.slot,
            entry.contributor,
            entry.content,
        )
        if not same:
            raise RemoteError("bad_attempt", f"entry and header of {entry.contributor} differ")
        chosen.append(header)
    if len({entry.slot for entry in attempt.entries}) != len(attempt.entries):
        raise RemoteError("bad_attempt", "an assignment counts twice")
    if [entry.slot for entry in attempt.entries] != sorted(entry.slot for entry in attempt.entries):
        raise RemoteError("bad_attempt", "contributions out of order")
    check_tree(attempt.tree, contributors_in_order(chosen), fan_out)
    try:
        factors = mean.factors([h.samples for h in chosen], [h.norm for h in chosen])
    except LocalError as error:  # what the headers say has no mean
        raise RemoteError("bad_attempt", str(error)) from None
    if tuple(entry.factors for entry in attempt.entries) != factors:
        raise RemoteError("bad_attempt", "the factors do not follow from the headers")
    if len(headers) > len(attempt.entries):
        # All of them would be kept, written to the log and passed on.
        raise RemoteError("bad_attempt", "a header that no entry names")

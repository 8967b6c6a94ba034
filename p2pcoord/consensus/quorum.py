"""Committees and quorums: who has a vote, and when enough of them have spoken.

A committee is a list of voters; while it changes it is *joint*: it also lists the outgoing voters, and then every decision
needs a majority of both (Ongaro, "Consensus: Bridging Theory and Practice", section 4.3). Two quorums of one committee
always share a voter, and so do a quorum of a joint committee and one of either half: that is all of safety.

This module knows nothing of records, terms or time.
"""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from p2pcoord.errors import RemoteError

# 7 voters survive 3 failures; more only slow every commit down. etcd advises the same upper bound.
COMMITTEE_SIZES = (1, 3, 5, 7)

# One more than the largest size: a committee founded as {A} grows to {A, B} when A leaves a run of two.
MAX_VOTERS = 8

# Signatures under one statement of a committee: all voters of both halves of the largest joint one. Who counts may know
# fewer voters than who collected (its log may lack the joint committee), so the bound is this and not its own committee's size.
MAX_SIGNATURES = 2 * MAX_VOTERS


class Committee(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Voters in order of rotation, and the outgoing voters while the committee is joint (else empty)."""

    voters: tuple[str, ...]
    outgoing: tuple[str, ...] = ()

    @property
    def joint(self) -> bool:
        return bool(self.outgoing)

    @property
    def everyone(self) -> tuple[str, ...]:
        """All who have a vote, incoming first, none twice."""
        return self.voters + tuple(peer for peer in self.outgoing if peer not in self.voters)

    def is_quorum(self, peers: Collection[str]) -> bool:
        """Whether `peers` hold a majority, in both halves when joint."""
        return has_majority(self.voters, peers) and (not self.joint or has_majority(self.outgoing, peers))

    def check(self) -> None:
        """Raises RemoteError unless both halves are free of repetition and within bounds."""
        for half in (self.voters, self.outgoing):
            if len(half) > MAX_VOTERS or len(set(half)) != len(half):
                raise RemoteError("bad_committee", f"{len(half)} voters, {len(set(half))} distinct")
        if not self.voters:
            raise RemoteError("bad_committee", "no voters")


def majority(size: int) -> int:
    return size // 2 + 1


def has_majority(voters: Collection[str], peers: Collection[str]) -> bool:
    return sum(voter in peers for voter in voters) >= majority(len(voters))


def largest_odd(available: int, limit: int) -> int:
    """The largest committee size that `available` peers can fill, at most `limit`; 0 when there is nobody."""
    return max((size for size in COMMITTEE_SIZES if size <= min(available, limit)), default=0)

"""Which committee a run should have: the largest odd number of living, reachable members that hold the state.

A pure function of what the coordinator sees. Voters that live stay, in their order (so rotation is steady); voters that left
go at once; voters that are silent are replaced as soon as somebody can, and dropped without replacement only after much
longer, since two of three voters reached still make a quorum.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from p2pcoord.consensus.quorum import Committee, largest_odd


def wanted_voters(
    current: Committee,
    *,
    silent: Collection[str],
    gone: Collection[str],
    candidates: Sequence[str],
    limit: int,
) -> tuple[str, ...]:
    """The voters this committee should have.

    `silent` voters may be replaced; `gone` ones (left, excluded, or silent for very long) must go; `candidates` are living,
    reachable members outside the committee that hold the state, in order of preference.
    """
    living = [peer for peer in current.voters if peer not in silent and peer not in gone]
    pool = living + [peer for peer in candidates if peer not in current.voters and peer not in gone]
    size = largest_odd(len(pool), limit)
    if size >= len(current.voters):
        unchanged = size == len(current.voters) == len(living)
        return current.voters if unchanged else tuple(pool[:size])
    if not any(peer in gone for peer in current.voters):
        return current.voters
    pool += [peer for peer in current.voters if peer in silent and peer not in gone]
    return tuple(pool[: largest_odd(len(pool), limit)]) or current.voters

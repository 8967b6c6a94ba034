"""The status document (schema 1): what a node knows of itself and of the run, as plain values for JSON.

A pure read of `Peer` and the driver; docs/commands.md lists the fields. `join_line` is filled in for the local socket only:
the secret is in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from node.reporting.event_words import with_departed
from p2pcoord.consensus.quorum import majority
from p2pcoord.consensus.record import Record, Round
from p2pcoord.gossip.membership import PeerState
from p2pcoord.peer import Peer
from p2pcoord.rounds.rounds import Rounds
from p2pcoord.synchronization.state_tracker import local_state

SCHEMA = 1

# Of those who have left, whose names the newest events and commits may still need.
MAX_DEPARTED = 100


def status_document(
    peer: Peer,
    run_id: bytes,
    addresses: tuple[str, ...],
    rejected: dict[str, dict[str, int]],
    now: int,
) -> dict[str, Any]:
    """`rejected`: kind -> who -> count, of the transport; what the peer rejected is added. `now`: monotonic ns."""
    rounds = peer.work
    assert isinstance(rounds, Rounds)
    agreement = peer.agreement
    ledger = agreement.voter.ledger
    tracker = rounds.tracker.state()
    metrics = rounds.metrics.newest
    return {
        "schema": SCHEMA,
        "run_id": run_id.hex(),
        "name": peer.settings.name,
        "peer_id": peer.me,
        "addresses": list(addresses),
        "role": role_of(peer, peer.me),
        "term": agreement.voter.term,
        "coordinator": coordinator_of(peer),
        "version": rounds.participant.version,
        "rounds": rounds.setting.rules.rounds,
        "state_held": rounds.participant.held,
        "lineage": ledger.hashes[ledger.certified].hex(),
        "height": ledger.certified,
        "round": rounds.status(now),
        "quorum": quorum_of(peer, now),
        "training_step": tracker.training_step,
        "best": {"version": tracker.best_version, "state": tracker.best_checkpoint.hex()},
        "metrics": {name: getattr(metrics, name) for name in metrics.__struct_fields__} if metrics else {},
        "history": [[version, loss] for version, loss in tracker.loss_history],
        "members": [_member(peer, member, now) for member in peer.roster.everyone],
        "departed": {member: name_of(peer, member) for member in peer.roster.departed[-MAX_DEPARTED:]},
        "last_commit": _last_commit(rounds),
        "rejected": _rejected(peer.rejected, rejected),
    }


def names_of(peer: Peer) -> Iterable[tuple[str, str]]:
    """(id, name) of this peer and of all that are, or were, members."""
    everyone = dict.fromkeys((peer.me, *peer.roster.everyone))
    here = [(member, name_of(peer, member)) for member in everyone]
    gone = [(member, name_of(peer, member)) for member in peer.roster.departed if member not in everyone]
    return with_departed(here, gone)


def name_of(peer: Peer, member: str) -> str:
    """What a member calls itself; "" when that is not known."""
    if member == peer.me:
        return peer.settings.name
    record = peer.gossip.book.get(member) if peer.gossip else None
    return record.name if record else peer.roster.name_of(member)


def coordinator_of(peer: Peer) -> str | None:
    """Who coordinates, as this peer knows. A voter hears it or knows of none; a member without a vote has it from the records."""
    voter = peer.agreement.voter
    if voter.coordinator is not None or voter.is_voter():
        return voter.coordinator
    return voter.ledger.coordinator_of(voter.ledger.last.term)


def role_of(peer: Peer, member: str) -> str:
    """coordinator, voter, leaf, member, excluded, or joining."""
    agreement = peer.agreement
    if not peer.roster.is_member(member):
        return "excluded" if peer.roster.excluded(member) else "joining"
    if member == coordinator_of(peer):
        return "coordinator"
    if member in agreement.committee.everyone:
        return "voter"
    record = peer.gossip.book.get(member) if peer.gossip else None
    return "leaf" if record is not None and not record.reachable and record.links else "member"


def quorum_of(peer: Peer, now: int) -> dict[str, Any]:
    """Who votes, who of them can be reached from here, and whether a coordinator with a quorum is at work.

    A voter knows that by the heartbeats it hears, or by the answers to its own. A member without a vote hears none: for it a
    quorum is held until too many voters are known to be silent; those it has not met yet are not.

    While the committee changes, a majority of the outgoing voters is needed too: `outgoing` counts them, else it is None.
    """
    committee = peer.agreement.committee
    reachable = [voter for voter in committee.everyone if peer.fit(voter)]
    votes = peer.me in committee.everyone
    silent = (PeerState.SUSPECT, PeerState.DEAD)
    heard = [
        v for v in committee.everyone if not peer.gossip or peer.gossip.membership.state(v) not in silent
    ]

    def count(half: Sequence[str]) -> dict[str, int]:
        reached = sum(voter in reachable for voter in half)
        return {"voters": len(half), "reachable": reached, "needed": majority(len(half))}

    return count(committee.voters) | {
        "outgoing": count(committee.outgoing) if committee.joint else None,
        "held": peer.agreement.quorum_held(now) if votes else committee.is_quorum(heard),
        "missing": [voter for voter in committee.everyone if voter not in reachable],
    }


def _member(peer: Peer, member: str, now: int) -> dict[str, Any]:
    record = peer.gossip.book.get(member) if peer.gossip else None
    view = peer.gossip.membership.view(member, now) if peer.gossip else None
    rounds = peer.work if isinstance(peer.work, Rounds) else None
    version = rounds.participant.version if rounds else 0
    local = local_state(record)
    # Gossip comes later than the commits themselves.
    shown = max(local.last_sync, proven_version(rounds.last_record if rounds else None, member))
    theirs = version if member == peer.me else shown
    seen = view.last_seen if view is not None else None
    return {
        "peer_id": member,
        "name": name_of(peer, member),
        "role": role_of(peer, member),
        "alive": member == peer.me or peer.alive(member),
        "state": "alive" if member == peer.me else view.state.value if view else "unknown",
        "phi": 0.0 if member == peer.me or view is None else min(view.phi, 1e6) + 0.0,  # never -0.0
        "version": theirs,
        "staleness": max(version - theirs, 0),
        "excluded": peer.roster.excluded(member),
        "last_seen_s": None if seen is None else (now - seen) / 1e9,
        "addresses": list(record.addresses) if record else [],
        "device": record.profile.device if record else "",
        "program_version": record.program_version if record else "",
        "local_step": local.local_step,
        "local_loss": local.local_loss,
        "gradient_norm": local.gradient_norm,
    }


def proven_version(record: Record | None, member: str) -> int:
    """Which version `member` has at least, by the newest commit: its coordinator has that one, who contributed had the one
    that it trained from."""
    if record is None or not isinstance(record.body, Round):
        return 0
    if record.header.coordinator == member:
        return record.body.version
    trained = (c.origin_round - 1 for c in record.body.contributors if c.contributor == member)
    return max(trained, default=0)


def _last_commit(rounds: Rounds) -> dict[str, Any] | None:
    record = rounds.last_record
    if record is None or not isinstance(record.body, Round):
        return None
    body, metrics = record.body, dict(record.body.metrics)
    return {
        "version": body.version,
        "coordinator": record.header.coordinator,
        "term": record.header.term,
        "contributors": [
            {"peer_id": c.contributor, "weight": c.weight, "origin_round": c.origin_round}
            for c in body.contributors
        ],
        "computation_s": metrics.get("computation_time", 0.0),
        "communication_s": metrics.get("communication_time", 0.0),
    }


def _rejected(*sources: dict[str, dict[str, int]]) -> dict[str, Any]:
    by_kind: dict[str, int] = {}
    by_peer: dict[str, int] = {}
    for source in sources:
        for kind, who in source.items():
            for peer, count in who.items():
                by_kind[kind] = by_kind.get(kind, 0) + count
                by_peer[peer] = by_peer.get(peer, 0) + count
    return {"total": sum(by_kind.values()), "by_kind": by_kind, "by_peer": by_peer}

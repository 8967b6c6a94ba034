"""Each invariant sees what breaks it: runs of a clean world, in which one thing is changed by hand."""

from collections.abc import Callable

import msgspec
import pytest

from p2pcoord.consensus.messages import AppendReply, VoteReply
from p2pcoord.consensus.record import Exclusion, Members, Round
from p2pcoord.consensus.statements import Acknowledgement, Certificate, Vote
from p2pcoord.consensus.voter import Role
from p2pcoord.effects import Emit, Failed
from p2pcoord.rounds.rounds import Rounds
from p2pcoord.wire import encode
from simulations import quadratic
from simulations.invariants import Invariants
from simulations.machine import Machine
from simulations.network import SECOND
from simulations.training import Training
from simulations.world import World, WorldSettings


def settled(seconds: int = 4) -> tuple[World, list[Machine]]:
    """Three machines that have certified a few versions, the first of them the coordinator."""
    world = World(1)
    machines = [world.found("m0"), world.join("m1"), world.join("m2")]
    world.run(seconds * SECOND)
    assert world.invariants.version > 3
    assert world.invariants.violations == []
    coordinator = world.coordinator()
    assert coordinator is not None
    return world, sorted(machines, key=lambda machine: machine is not coordinator)


def seen(world: World) -> list[str]:
    return [violation.invariant for violation in world.invariants.violations]


def test_a_clean_world_breaks_none() -> None:
    world, machines = settled(10)
    heights = {m.peer.agreement.voter.ledger.certified for m in machines if m.peer}
    assert len(heights) == 1
    assert world.invariants.certificates >= world.invariants.version


def test_two_coordinators_of_a_term_are_seen() -> None:
    world, machines = settled()
    other = machines[1].peer
    assert other is not None
    other.agreement.voter.role = Role.COORDINATOR
    world.invariants.observe(machines[1], other)
    assert seen(world) == ["coordinator"]


def test_a_term_that_nobody_asked_for_is_seen() -> None:
    world, machines = settled()
    peer = machines[1].peer
    assert peer is not None
    peer.agreement.voter.term += 2
    world.invariants.observe(machines[1], peer)
    assert seen(world) == ["term"]


def test_a_certified_prefix_that_shrinks_is_seen() -> None:
    world, machines = settled()
    peer = machines[1].peer
    assert peer is not None
    peer.agreement.voter.ledger.certified -= 1
    world.invariants.observe(machines[1], peer)
    assert "back" in seen(world)


def test_another_record_at_a_certified_height_is_seen() -> None:
    world, machines = settled()
    peer = machines[1].peer
    assert peer is not None
    ledger = peer.agreement.voter.ledger
    ledger.hashes[ledger.certified] = bytes(32)
    machines[1].life += 1  # looked at as a whole, like after a restart
    world.invariants.observe(machines[1], peer)
    assert "chain" in seen(world)


@pytest.mark.parametrize(
    ("spoil", "invariant"),
    [
        (lambda c: msgspec.structs.replace(c, signatures=c.signatures[:1]), "certificate"),
        (
            lambda c: msgspec.structs.replace(c, signatures=tuple((v, bytes(64)) for v, _ in c.signatures)),
            "certificate",
        ),
    ],
)
def test_a_certificate_without_a_quorum_of_true_signatures_is_seen(
    spoil: Callable[[Certificate], Certificate], invariant: str
) -> None:
    world, machines = settled()
    peer = machines[0].peer
    assert peer is not None
    ledger = peer.agreement.voter.ledger
    ledger.certificates[ledger.certified] = spoil(ledger.certificates[ledger.certified])
    world.invariants._checked.clear()
    machines[0].life += 1
    world.invariants.observe(machines[0], peer)
    assert invariant in seen(world)


def test_a_signer_that_has_the_record_on_no_disk_is_seen() -> None:
    world, machines = settled()
    peer = machines[0].peer
    assert peer is not None
    for machine in machines:
        world.invariants._disks[machine.id].records.pop()
    world.invariants._checked.clear()
    machines[0].life += 1
    world.invariants.observe(machines[0], peer)
    assert set(seen(world)) == {"durable"}


def test_a_second_vote_in_a_term_is_seen() -> None:
    world, machines = settled()
    voter, one, other = (machine.id for machine in machines)
    for candidate in (one, one, other):
        assert seen(world) == []
        vote = Vote(9, candidate, bytes(32), voter)
        world.invariants.spoken(machines[0], encode(VoteReply(9, vote)))
    assert seen(world) == ["vote"]


def test_an_acknowledgement_in_a_term_that_is_not_the_voters_is_seen() -> None:
    world, machines = settled()
    term = world.invariants._disks[machines[1].id].term
    for other in (term - 1, term + 1):
        ack = Acknowledgement(other, 99, bytes(32), machines[1].id)
        world.invariants.signed(machines[1], encode(AppendReply(other, True, 99, 0, (ack,))))
    assert seen(world) == ["acknowledged"] * 2


def test_an_acknowledgement_in_a_term_that_is_on_no_disk_is_seen() -> None:
    world, machines = settled()
    term = world.invariants._disks[machines[1].id].term + 1
    ack = Acknowledgement(term, 99, bytes(32), machines[1].id)
    world.invariants.spoken(machines[1], encode(AppendReply(term, True, 99, 0, (ack,))))
    assert seen(world) == ["acknowledged"]


def test_a_second_record_acknowledged_at_a_height_is_seen() -> None:
    world, machines = settled()
    term = world.invariants._disks[machines[1].id].term
    for name in (bytes(32), bytes(32), b"x" * 32):
        assert seen(world) == []
        ack = Acknowledgement(term, 99, name, machines[1].id)
        world.invariants.spoken(machines[1], encode(AppendReply(term, True, 99, 0, (ack,))))
    assert seen(world) == ["acknowledged"]


def test_evidence_against_a_machine_that_does_not_lie_is_seen() -> None:
    world, machines = settled()
    accounts = world.invariants
    accounts.liars.add(machines[2].id)
    pair = (Vote(1, "a", b"", machines[1].id), Vote(1, "b", b"", machines[1].id))
    for machine in machines[1:]:
        body = Members(excluded=(Exclusion(machine.id, "two votes", 0, pair),))
        accounts._extend(msgspec.structs.replace(accounts.chain[-1], body=body))
        world._emit(machines[0], Emit("evidence", {"peer": machine.id, "reason": "two votes"}))
    assert seen(world).count("evidence") == 2
    assert all(machines[1].id in v.detail for v in accounts.violations if v.invariant == "evidence")


def test_a_version_that_does_not_follow_is_seen_and_so_is_an_assignment_that_counts_twice() -> None:
    world, _ = settled()
    rounds = [record.body for record in world.invariants.chain if record.header.kind == "round"]
    world.invariants._round(rounds[-1])  # type: ignore[arg-type]  # the kind says that it is a round
    assert set(seen(world)) == {"version"}
    assert len(seen(world)) > 2  # the version, its parent, and its assignments


def test_a_first_version_that_was_not_made_from_the_state_in_genesis_is_seen() -> None:
    world, _ = trained()
    accounts = world.invariants
    first = next(record.body for record in accounts.chain if isinstance(record.body, Round))
    for parent in (accounts.states[0], bytes(32)):
        assert seen(world) == []
        anew = Invariants(world.keyring, world.run_id, world.genesis, world.machines)
        anew._round(msgspec.structs.replace(first, parent=parent))
        accounts.violations += anew.violations
    assert seen(world) == ["version"]


def test_a_certificate_across_a_cut_is_seen() -> None:
    world, machines = settled()
    peer = machines[0].peer
    assert peer is not None
    accounts = world.invariants
    accounts.sides = (0, frozenset((machines[0].id,)))
    accounts._checked.clear()
    machines[0].life += 1
    accounts.observe(machines[0], peer)
    assert seen(world) == ["side"]


def test_a_log_that_comes_back_shorter_is_seen() -> None:
    world, machines = settled()
    machine = machines[1]
    world.crash(machine)
    del machine.disk._file[len(machine.disk._file) // 2 :]
    world.start(machine)
    assert seen(world) == ["log"]


def test_a_peer_that_stops_is_seen() -> None:
    world, machines = settled()
    machine = machines[0]
    while not machine.persists:
        world.run(world.now + SECOND // 1000)
    world.feed(machine, "complete", machine.persists[0].id, Failed("the disk is full"))
    assert seen(world) == ["halt"]
    assert "the disk is full" in world.invariants.violations[0].detail


def trained() -> tuple[World, Machine]:
    """Three machines that have certified real rounds, and one of them, whose peer holds an attempt."""
    world = World(1, WorldSettings(rules=quadratic.rules(rounds=1_000), gossip=True))
    Training(world)
    machines = [world.found("m0"), world.join("m1"), world.join("m2")]
    world.run(6 * SECOND)
    assert world.invariants.version > 3
    assert world.invariants.rebuilt == world.invariants.version
    for _ in range(5_000):
        for machine in machines:
            work = machine.peer.work if machine.peer else None
            if isinstance(work, Rounds) and work.participant.current is not None:
                assert world.invariants.violations == []
                return world, machine
        world.run(world.now + SECOND // 1000)
    raise AssertionError("no attempt in five seconds")


def test_a_state_that_its_attempts_contributions_do_not_give_is_seen() -> None:
    world, _ = trained()
    world.invariants.rebuild = lambda attempt: bytes(32)
    world.run(world.now + 3 * SECOND)
    assert seen(world) == ["sum"]


def test_a_round_by_others_than_its_attempt_says_is_seen() -> None:
    world, _ = trained()
    accounts = world.invariants
    body = next(r.body for r in reversed(accounts.chain) if isinstance(r.body, Round))
    accounts._made_of(msgspec.structs.replace(body, contributors=body.contributors[1:]), lambda _: body.state)
    accounts._made_of(msgspec.structs.replace(body, attempt=bytes(32)), lambda _: body.state)
    assert seen(world) == ["attempt", "attempt"]


def test_an_assignment_that_is_trained_again_is_seen_in_one_life_and_across_a_restart() -> None:
    world, machine = trained()
    accounts = world.invariants
    slots = accounts._disks[machine.id].slots
    assert slots
    slot = max(slots)
    accounts.trains(machine, slot)
    assert seen(world) == ["trained"]
    world.crash(machine)
    accounts.violations.clear()
    world.start(machine)
    accounts.trains(machine, max(accounts._disks[machine.id].slots))
    accounts.trained(machine, (999, 0))
    accounts.trains(machine, (999, 0))
    assert seen(world) == ["trained", "trained"]


def test_a_member_that_gets_more_vectors_than_the_tree_has_for_it_is_seen() -> None:
    world, machine = trained()
    for number in range(4):  # fan-out 2, and the result
        world.invariants.receives(machine, bytes([number] * 32))
    assert "vectors" in seen(world)

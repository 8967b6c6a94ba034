"""Real rounds on the quadratic workload, in the virtual world."""

import pytest

from simulations import quadratic
from simulations.machine import Machine
from simulations.network import MILLISECOND, SECOND
from simulations.training import Training
from simulations.world import World, WorldSettings


def test_five_peers_train_real_rounds_and_hold_one_state() -> None:
    world = World(1, WorldSettings(rules=quadratic.rules(rounds=8)))
    training = Training(world)
    world.found("m0")
    for name in ("m1", "m2", "m3", "m4"):
        world.join(name)
    world.run(15 * SECOND)
    assert world.invariants.violations == []
    assert world.invariants.version == 8
    newest = world.invariants.states[-1]
    for machine in world.machines.values():
        assert newest in machine.disk.content
    # Every state ever certified is the step of its parent: the bytes are there, and the loss fell.
    first, last = (
        quadratic.validate(training.made[root], ((0, 40),))[1]
        for root in (world.invariants.states[1], newest)
    )
    assert last < first
    assert training.fetched > 0


def test_at_fifteen_peers_no_member_gets_more_than_its_childrens_vectors_and_the_result() -> None:
    world, _ = network(15, rounds=4)
    world.run(30 * SECOND)
    assert world.invariants.violations == []
    assert world.invariants.version == 4
    assert world.invariants.rebuilt == 4
    assert world.invariants.most_vectors == 3  # fan-out 2


def network(peers: int, rounds: int) -> tuple[World, Training]:
    rules = quadratic.rules(rounds=rounds, minimum_members=peers)
    world = World(2, WorldSettings(rules=rules, gossip=True))
    training = Training(world)
    world.found("m0")
    for index in range(1, peers):
        world.join(f"m{index}")
    return world, training


@pytest.mark.parametrize("after_ms", [0, 2, 5])
def test_a_power_cut_between_record_and_certificate_costs_no_state_and_stops_nothing(after_ms: int) -> None:
    """Whoever signed that a version can be made anew must be able to, also when all who know how die in one moment."""
    world, _ = network(4, rounds=1_000)
    cuts = 0

    def power_cut() -> None:
        for machine in list(world.machines.values()):
            world.crash(machine)
            world.later(SECOND // 10, world.start, machine)

    def on_phase(machine: Machine, phase: str) -> None:
        nonlocal cuts
        if phase == "completed" and world.invariants.version % 3 == 2 and cuts < 3:
            cuts += 1
            world.later(after_ms * MILLISECOND, power_cut)

    world.on_phase = on_phase
    world.run(25 * SECOND)
    assert world.invariants.violations == []
    assert cuts == 3
    assert world.now - world.invariants.version_at < 5 * SECOND
    assert world.invariants.version > 15


@pytest.mark.parametrize("seed", range(6))
def test_a_sole_voter_hands_over_before_it_leaves_however_fast_the_rounds_are(seed: int) -> None:
    """Rounds that follow each other faster than a learner's answers used to keep it from ever being ready."""
    world = World(seed, WorldSettings(rules=quadratic.rules(rounds=10_000, minimum_members=1), gossip=True))
    Training(world)
    founder = world.found("m0")
    other = world.join("m1")
    world.run(8 * SECOND)
    assert founder.peer is not None and founder.peer.agreement.is_coordinator
    assert other.peer is not None and other.peer.is_member
    assert founder.peer.agreement.committee.voters == (founder.id,)
    world.leave(founder)
    world.run(world.now + 3 * SECOND)
    assert founder.peer is not None and founder.peer.left
    world.lose_disk(founder)
    before = world.invariants.version
    world.run(world.now + 5 * SECOND)
    assert world.invariants.version > before
    assert world.invariants.violations == []

"""When nothing can be done, heartbeats slow down; when something can, they are quick at once."""

from simulations import quadratic
from simulations.machine import Machine
from simulations.network import SECOND
from simulations.training import Training
from simulations.world import World, WorldSettings


def resting(world: World) -> bool:
    coordinator = world.coordinator()
    assert isinstance(coordinator, Machine)
    assert coordinator.peer is not None
    return coordinator.peer.agreement.replication.resting


def test_a_run_that_waits_for_members_rests_with_its_committee_grown_and_begins_when_they_come() -> None:
    world = World(1, WorldSettings(rules=quadratic.rules(rounds=1000, minimum_members=4)))
    Training(world)
    world.found("m0")
    for name in ("m1", "m2"):
        world.join(name)
    world.run(10 * SECOND)
    coordinator = world.coordinator()
    assert coordinator is not None
    assert coordinator.peer is not None
    assert len(coordinator.peer.agreement.committee.voters) == 3
    assert resting(world)
    assert world.invariants.version == 0
    assert world.told["waiting-for-members"] == 3  # with one, two and three of them
    fourth = world.join("m3")
    world.run(13 * SECOND)
    assert world.invariants.version >= 1
    assert not resting(world)
    world.lose_disk(fourth)
    world.run(world.now + 15 * SECOND)
    begun = world.invariants.version
    world.run(world.now + 5 * SECOND)
    assert world.invariants.version > begun  # only the first round waits
    assert world.invariants.violations == []


def test_a_run_that_is_over_rests() -> None:
    world = World(1, WorldSettings(rules=quadratic.rules(rounds=2)))
    Training(world)
    world.found("m0")
    for name in ("m1", "m2"):
        world.join(name)
    world.run(15 * SECOND)
    assert world.invariants.version == 2
    assert resting(world)

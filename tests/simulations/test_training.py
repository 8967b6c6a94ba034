"""Real rounds on the quadratic workload, in the virtual world."""

from simulations import quadratic
from simulations.network import SECOND
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

"""What a new coordinator takes over from what the members show it."""

import msgspec

from p2pcoord.rounds.messages import Reoffered
from p2pcoord.rounds.phases import Phase
from p2pcoord.rounds.plan import Assignment
from tests.round_runner import RoundWorld, collecting
from tests.script_runner import authority_of, peer_id

A, B = (peer_id(letter) for letter in "AB")


def test_a_plan_shown_by_a_member_must_be_one_that_a_coordinator_signed() -> None:
    world = RoundWorld()
    world.execute("committee A B C D minimum=5")
    world.execute("begin A")
    coordinator = world.coordinator("A")
    assert coordinator.phase is Phase.INITIALIZATION
    plan = collecting().coordinator("A").collection.plan
    assert plan is not None
    cases = {
        "bad_signature": msgspec.structs.replace(plan, signature=b""),
        "bad_plan": authority_of("A").sign(msgspec.structs.replace(plan, parent=bytes(32))),
        "not_coordinator": authority_of("B").sign(msgspec.structs.replace(plan, coordinator=peer_id("B"))),
    }
    for kind, shown in cases.items():
        world.inject("B", "A", Reoffered(1, shown, ()))
        assert world.rejected("A").pop(kind) == 1
    own = authority_of("A").sign(msgspec.structs.replace(plan, assignments=(Assignment(3, "x", ()),)))
    world.inject("B", "A", Reoffered(1, own, ()))
    assert world.rejected("A")["bad_plan"] == 2


def test_a_new_coordinator_keeps_the_newest_plan_that_it_is_shown() -> None:
    world = RoundWorld()
    world.execute("committee A B C D")
    for letter in "ABCD":
        world.execute(f"hold {letter} train")
    world.execute("begin A")
    world.execute("cut A->B")
    world.execute("break D train bad sample")  # its part goes to A in a revision that B does not see
    world.execute("settle")
    seen = {letter: world.participant(letter).plan for letter in "BC"}
    assert [plan.revision for plan in seen.values() if plan is not None] == [0, 1]
    world.execute("crash A")
    world.execute("heal")
    for letter in "BCD":
        world.execute(f"release {letter}")
    world.execute("run 5s")
    for letter in "BCD":
        assert [body.version for body in world.commits(letter)] == [1]
    assert ("D", 1, 3) not in world.trainings  # as the plan that B saw would have it
    assert len(world.trainings) == len(set(world.trainings)) == 4

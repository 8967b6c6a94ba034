"""What a member trains, keeps and offers, and whose plan it believes."""

import msgspec

from p2pcoord.consensus.messages import RecordsRequest
from p2pcoord.rounds.frames import Slot
from p2pcoord.rounds.messages import Offering, PlanMessage, Reoffer, Reoffered
from p2pcoord.rounds.plan import Assignment, Plan
from p2pcoord.wire import decode
from tests.round_runner import holding
from tests.script_runner import authority_of, peer_id

A, B, C, D = (peer_id(letter) for letter in "ABCD")


def test_the_slot_is_on_disk_before_its_header_is_sent() -> None:
    world = holding("B train")
    world.execute("disk B manual")
    world.execute("release B")
    world.execute("settle")
    assert ("B", 1, 1) in world.trainings
    assert world.messages(Offering, "B") == []
    machine = world.machines["B"]
    frames = [decode(data, Slot) for persist in machine.pending for data in persist.frames]
    assert [frame.header.slot for frame in frames] == [(1, 1)]
    world.execute("durable B")
    sent = world.messages(Offering, "B")
    assert [m.header for m in sent if isinstance(m, Offering)] == [frames[0].header]


def test_who_dies_before_its_slot_is_on_disk_has_said_nothing_and_signs_one_header_after_all() -> None:
    world = holding("B train", "A train", "C train")
    world.execute("disk B manual")
    world.execute("release B")
    world.execute("settle")
    world.execute("crash B")
    assert world.messages(Offering, "B") == []
    world.execute("restart B")
    world.execute("release A")
    world.execute("release C")
    world.execute("run 2s")
    headers = {m.header for m in world.messages(Offering, "B") if isinstance(m, Offering)}
    assert len({header.slot for header in headers}) == len(headers)
    assert world.participant("B").version == 1


def test_a_restart_keeps_the_slot_and_does_not_train_it_again() -> None:
    world = holding("A train", "C train")
    before = world.participant("B").training.slots
    assert set(before) == {(1, 1)}
    world.execute("crash B")
    world.execute("restart B")
    assert world.participant("B").training.slots == before
    world.execute("release A")
    world.execute("release C")
    world.execute("run 2s")
    assert world.trainings.count(("B", 1, 1)) == 1
    assert B in {c.contributor for c in world.commits("A")[-1].contributors}


def test_a_slot_whose_bytes_are_gone_is_trained_anew() -> None:
    world = holding("A train", "C train")
    world.execute("crash B")
    world.contents["B"] = {
        root: data for root, data in world.contents["B"].items() if root == world.rules.state_zero.root
    }
    world.execute("restart B")
    assert world.participant("B").training.slots == {}


def test_one_assignment_is_trained_at_a_time_and_one_given_to_another_is_cancelled() -> None:
    world = holding("B train", "C train")
    world.execute("crash C")
    world.execute("settle")
    plan = world.coordinator("A").collection.plan
    assert plan is not None
    both = tuple(Assignment(a.index, B, a.ranges) for a in plan.assignments)
    world.inject("A", "B", PlanMessage(revised(plan, both), 5))
    assert world.execute("held B") == ["B has to train 1.1"]
    none = tuple(Assignment(a.index, A, a.ranges) for a in plan.assignments)
    world.inject("A", "B", PlanMessage(revised(plan, none, by=2), 5))
    assert world.execute("held B") == []
    assert world.cancelled["B"] != []


def revised(plan: Plan, assignments: tuple[Assignment, ...], by: int = 1) -> Plan:
    return authority_of("A").sign(
        msgspec.structs.replace(plan, revision=plan.revision + by, assignments=assignments)
    )


def test_a_plan_is_believed_only_from_the_coordinator_of_its_term_for_the_present_state() -> None:
    world = holding("B train", "C train")
    plan = world.participant("B").plan
    assert plan is not None
    newer = revised(plan, plan.assignments)
    cases = {
        "bad_signature": msgspec.structs.replace(newer, signature=plan.signature),
        "not_coordinator": authority_of("C").sign(msgspec.structs.replace(newer, coordinator=C)),
        "bad_plan": authority_of("A").sign(msgspec.structs.replace(newer, parent=bytes(32))),
    }
    for number, (kind, bad) in enumerate(cases.items()):
        world.inject("C", "B", PlanMessage(bad, 5))
        assert world.rejected("B")[kind] == 1
        assert sum(world.rejected("B").values()) == number + 1
    assert world.participant("B").plan == plan
    world.inject("C", "B", PlanMessage(newer, 5))  # who passes it on does not matter
    assert world.participant("B").plan == newer
    world.inject("A", "B", PlanMessage(plan, 5))  # an older revision is no fault
    assert world.participant("B").plan == newer


def test_a_plan_from_beyond_what_is_certified_here_waits_for_the_records() -> None:
    world = holding("B train", "C train")
    plan = world.participant("B").plan
    assert plan is not None
    world.execute("run 1s")
    world.sent.clear()
    world.inject("A", "B", PlanMessage(revised(plan, plan.assignments), 99))
    assert world.messages(RecordsRequest, "B", "A") != []
    assert world.participant("B").plan == plan


def test_only_who_coordinates_is_told_what_a_member_has() -> None:
    world = holding("A train", "C train")
    world.sent.clear()
    world.inject("C", "B", Reoffer(2, 1, 5))
    assert world.messages(Reoffered, "B") == []
    world.inject("A", "B", Reoffer(2, 1, 5))
    told = world.messages(Reoffered, "B", "A")
    assert len(told) == 1
    assert isinstance(told[0], Reoffered)
    assert [header.slot for header in told[0].headers] == [(1, 1)]
    assert told[0].plan == world.participant("B").plan


def test_a_plan_of_a_later_round_that_nobody_signed_stops_nothing() -> None:
    """It waits for its records unchecked; found wrong then, it is let go."""
    world = holding("B train", options="A B C members D rounds=4")
    plan = Plan(1, 2, 0, bytes(32), (Assignment(0, D, ((0, 1),)),), 10**9, D, b"junk")
    world.inject("D", "A", PlanMessage(plan, 0))
    world.execute("release B")
    world.execute("run 30s")
    assert world.participant("A").version == 4


def test_what_an_attempt_does_not_list_is_offered_again() -> None:
    """Also after a first attempt: what somebody took over then may be lost on its way."""
    world = holding("A fetch", "B fetch", options="A B C barrier=300s")
    training = world.participant("B").training
    assert not training._owes_offers()
    entry = training.book.current
    assert entry is not None
    entry.attempt = msgspec.structs.replace(entry.attempt, entries=entry.attempt.entries[:1])
    assert training._owes_offers()
    training._offer_at = 0
    world.sent.clear()
    world.execute("run 1s")
    assert len(world.messages(Offering, "B", "A")) == 1

"""The phases that a coordinator drives, through whole peers. The course of rounds is told in tests/scripts/rounds."""

import msgspec

from p2pcoord.effects import Emit
from p2pcoord.rounds.messages import PlanAccepted, PlanMessage
from p2pcoord.rounds.phases import Phase
from tests.round_runner import RoundWorld, collecting, holding, started


def test_fewer_members_than_the_run_asks_for_hold_the_round_back_and_the_run_rests() -> None:
    world = started("A", "B", "C", "minimum=4")
    world.execute("run 3s")
    assert world.coordinator("A").waits_for_members
    assert world.messages(PlanMessage) == []
    replication = world.peer("A").agreement.replication
    assert replication.resting
    assert replication.interval_ns == replication.timing.resting_heartbeat_ns


def test_refusals_in_a_row_back_off_longer_each_time_up_to_a_minute() -> None:
    world = collecting()
    coordinator = world.coordinator("A")
    outbox = world.peer("A").outbox
    waits = []
    for _ in range(8):
        coordinator._refuse("no good", 0)
        waits += [e.fields["retry_s"] for e in outbox.take() if isinstance(e, Emit) and "retry_s" in e.fields]
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]


def test_after_a_refusal_members_take_the_new_plan_although_the_old_one_was_revised() -> None:
    world = RoundWorld()
    world.execute("committee A B C")
    world.execute("hold C train")
    world.execute("hold A validate")
    world.execute("begin A")
    world.execute("break C train bad sample")
    world.execute("settle")
    before = world.coordinator("A").collection.plan
    assert before is not None
    assert before.revision == 1
    world.execute("break A validate out of memory")
    world.sent.clear()
    world.execute("run 2s")
    after = world.coordinator("A").collection.plan
    assert after is not None
    assert after.revision == 2
    assert [m.revision for m in world.messages(PlanAccepted, "B", "A") if isinstance(m, PlanAccepted)] == [2]
    assert world.trainings.count(("A", 1, 2)) == 1


def test_a_coordinator_whose_own_state_is_late_waits_for_it_and_time_moves_on() -> None:
    world = RoundWorld()
    world.execute("committee A B C")
    world.execute("hold A step")
    world.execute("begin A")
    world.execute("run 20s")  # longer than shares of the validation are waited for
    assert world.coordinator("A").phase is Phase.VALIDATION
    world.execute("release A")
    world.execute("run 1s")
    assert world.commits("A") != []


def test_the_duty_is_handed_over_between_rounds_only() -> None:
    world = RoundWorld()
    world.execute("committee A B C rounds=3 rotation=1")
    world.execute("hold C train")
    world.execute("begin A")
    coordinator = world.coordinator("A")
    assert not coordinator.idle
    world.execute("run 3s")
    assert world.peer("A").agreement.is_coordinator
    assert world.commits("A") == []
    world.execute("release C")
    world.execute("run 1s")
    assert not world.peer("A").agreement.is_coordinator
    assert not coordinator.active
    assert {record.header.term for record in world.peer("B").agreement.voter.ledger.records[5:]} == {
        2,
        3,
        4,
        5,
    }


def test_what_its_own_check_refuses_is_not_ordered() -> None:
    world = holding("C validate")
    coordinator = world.coordinator("A")
    assert coordinator.phase is Phase.VALIDATION
    height = world.peer("A").agreement.voter.ledger.height
    totals = coordinator.participant.holdings.totals
    coordinator.participant.holdings.totals = msgspec.structs.replace(totals, training_step=7)
    record = coordinator.conclusion.record
    coordinator.conclusion.record = lambda state, metrics, before: record(state, metrics, totals)  # type: ignore[method-assign]
    world.execute("release C")
    printed = world.execute("settle")
    assert any("attempt-refused reason='its totals do not follow" in line for line in printed)
    assert world.peer("A").agreement.voter.ledger.height == height


def test_a_validation_whose_time_is_over_and_that_cannot_conclude_yet_is_looked_at_again_later() -> None:
    """A deadline in the past would keep the process busy."""
    world = holding("B validate", options="A B C barrier=1s")
    coordinator = world.coordinator("A")
    coordinator.participant.judge.check = lambda *_: None  # type: ignore[method-assign]
    world.execute("run 1500ms")
    assert coordinator.phase is Phase.VALIDATION
    now = world.machines["A"].clock
    coordinator.tick(now)
    deadline = coordinator.next_deadline()
    assert deadline is not None
    assert deadline > now

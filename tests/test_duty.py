"""The coordinator's duty besides the rounds: when it looks, and in which order it orders."""

from p2pcoord.duty import LEARNING_INTERVAL_NS, TEND_INTERVAL_NS, Duty
from p2pcoord.effects import NEVER
from tests.round_runner import collecting, started
from tests.script_runner import peer_id


class Busy:
    """Work in which nothing else may be ordered."""

    idle = False
    reconfigurable = False


class Between:
    """Work between two rounds."""

    idle = True
    reconfigurable = True


def test_who_does_not_coordinate_has_no_duty() -> None:
    world = started("A B C", "rounds=1")
    assert world.peer("A").duty.next_deadline() < NEVER
    assert world.peer("B").duty.next_deadline() == NEVER


def test_the_coordinator_looks_a_few_times_a_second_and_at_once_when_something_waits() -> None:
    world = started("A B C", "rounds=1")
    duty, now = world.peer("A").duty, world.machines["A"].clock + 10 * TEND_INTERVAL_NS
    duty.tick(Busy(), now)
    assert duty.next_deadline() == now + TEND_INTERVAL_NS
    duty.hasten(now + 1)
    assert duty.next_deadline() == now + 1
    duty.hasten(now + 2)
    assert duty.next_deadline() == now + 1


def test_while_a_learner_is_fed_the_coordinator_looks_more_often() -> None:
    world = started("A B C members D", "size=3", "rounds=1")
    peer, now = world.peer("A"), world.machines["A"].clock + 10 * TEND_INTERVAL_NS
    peer.agreement.replication.learners = (peer_id("D"),)
    peer.duty.tick(Busy(), now)
    assert peer.duty.next_deadline() == now + LEARNING_INTERVAL_NS


def test_after_enough_rounds_the_duty_is_handed_over_when_the_work_is_idle() -> None:
    world = started("A B C", "rounds=1")
    world.execute("run 1s")
    peer, now = world.peer("A"), world.machines["A"].clock
    patient = Duty(peer.agreement, peer.admissions, peer.neighbours, rotation_rounds=2)
    patient.begin(now)
    patient.tick(Between(), now)
    due = Duty(peer.agreement, peer.admissions, peer.neighbours, rotation_rounds=1)
    due.begin(now)
    due.tick(Busy(), now)
    assert peer.agreement.replication.transferring is None
    due.hasten(now)
    due.tick(Between(), now)
    assert peer.agreement.replication.transferring is not None


def test_no_round_begins_once_the_coordinator_is_leaving() -> None:
    world = collecting()
    peer, now = world.peer("A"), world.machines["A"].clock
    assert peer.duty.between_rounds(Between(), now)
    peer.leave(now)
    assert not peer.duty.between_rounds(Between(), now)

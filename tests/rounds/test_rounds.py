"""The rounds of a run through whole peers: both sides together, over deaths, changes of the duty and restarts."""

import msgspec
import pytest

from p2pcoord.consensus.record import Round
from p2pcoord.effects import Emit, Persist
from p2pcoord.frames import decode_frames
from p2pcoord.rounds.messages import AttemptMessage, AttemptRequest, ResultMessage
from p2pcoord.rounds.participant import ANSWER_INTERVAL_NS
from p2pcoord.rounds.phases import Phase
from p2pcoord.rounds.rounds import Rounds
from tests.round_runner import RoundWorld, started
from tests.script_runner import authority_of


def versions(world: RoundWorld, letter: str = "A") -> list[int]:
    ledger = world.peer(letter).agreement.voter.ledger
    return [r.body.version for r in ledger.records[: ledger.certified + 1] if isinstance(r.body, Round)]


@pytest.mark.parametrize("voters", ["A", "A B", "A B C D E"])
def test_runs_of_all_sizes_make_their_rounds_and_all_members_hold_the_same_state(voters: str) -> None:
    world = started(voters, "rounds=3")
    world.execute("run 1s")
    letters = voters.replace(" ", "")
    for letter in letters:
        assert versions(world, letter) == [1, 2, 3]
        assert world.rounds(letter).over
        assert world.participant(letter).state == world.participant("A").state
        assert world.rounds(letter).tracker.state() == world.rounds("A").tracker.state()
    assert len(world.trainings) == 3 * len(letters)


def test_members_without_a_vote_train_too() -> None:
    world = started("A B C members D", "size=3", "rounds=2")
    world.execute("run 5s")
    assert world.participant("D").version == 2
    assert {who for who, _, _ in world.trainings} == set("ABCD")


def test_a_run_that_is_over_rests_and_wakes_nobody() -> None:
    world = started("A B C", "rounds=1")
    world.execute("run 2s")
    replication = world.peer("A").agreement.replication
    assert replication.resting
    assert replication.interval_ns == replication.timing.resting_heartbeat_ns
    assert world.coordinator("A").next_deadline() is None


def test_a_run_at_work_does_not_rest() -> None:
    world = RoundWorld()
    world.execute("committee A B C")
    world.execute("hold B train")
    world.execute("begin A")
    world.execute("run 2s")
    replication = world.peer("A").agreement.replication
    assert replication.interval_ns == replication.timing.heartbeat_ns


def test_when_the_coordinator_dies_the_next_one_goes_on_and_nothing_is_trained_twice() -> None:
    for hold in ("A validate", "A step", "A combine", "A fetch", "B train"):
        world = RoundWorld()
        world.execute("committee A B C")
        world.execute(f"hold {hold}")
        world.execute("begin A")
        world.execute("crash A")
        if hold.startswith("B"):
            world.execute("release B")
        world.execute("run 5s")
        assert versions(world, "B") == versions(world, "C") == [1], hold
        by_bc = [(version, assignment) for who, version, assignment in world.trainings if who != "A"]
        assert len(set(by_bc)) == len(by_bc), hold
        assert {(1, 1), (1, 2)} <= set(by_bc), hold


def test_a_coordinator_that_restarts_with_all_others_goes_on_from_the_log() -> None:
    world = RoundWorld()
    world.execute("committee A B C rounds=2")
    world.execute("hold B validate")
    world.execute("hold A validate")
    world.execute("begin A")
    for letter in "ABC":
        world.execute(f"crash {letter}")
    for letter in "ABC":
        world.execute(f"restart {letter}")
    world.execute("release A")
    world.execute("release B")
    world.execute("run 6s")
    assert versions(world) == [1, 2]
    first = [(version, assignment) for _, version, assignment in world.trainings if version == 1]
    assert sorted(first) == [(1, 0), (1, 1), (1, 2)]


def test_who_asks_for_an_attempt_is_given_it_with_its_headers_and_the_result_when_that_is_known() -> None:
    world = RoundWorld()
    world.execute("committee A B C")
    world.execute("hold A validate")
    world.execute("begin A")
    name = world.coordinator("A").aggregation.name
    world.sent.clear()
    world.inject("C", "A", AttemptRequest(name))
    (answer,) = world.messages(AttemptMessage, "A", "C")
    assert isinstance(answer, AttemptMessage)
    assert authority_of("A").hash(answer.attempt) == name
    assert len(answer.headers) == 3
    assert len(world.messages(ResultMessage, "A", "C")) == 1
    world.sent.clear()
    world.inject("C", "A", AttemptRequest(bytes(32)))
    for _ in range(100):
        world.inject("C", "A", AttemptRequest(name))
    assert world.messages(AttemptMessage) == []
    world.machines["A"].clock += ANSWER_INTERVAL_NS
    world.inject("C", "A", AttemptRequest(name))
    assert len(world.messages(AttemptMessage, "A", "C")) == 1


def test_a_voter_that_missed_the_attempt_gets_it_when_the_record_comes() -> None:
    world = RoundWorld()
    world.execute("committee A B C")
    world.execute("hold A fetch")
    world.execute("begin A")
    world.participant("C").book.clear()
    world.sent.clear()
    world.execute("crash B")  # so that C is needed for the quorum
    world.execute("run 20ms")
    world.execute("release A")
    world.execute("run 5s")
    assert versions(world) == [1]
    assert world.messages(AttemptMessage, "A", "C") != []


def test_the_status_tells_the_phase_and_how_long_it_waits_at_most() -> None:
    world = RoundWorld()
    world.execute("committee A B C barrier=2s")
    world.execute("hold B train")
    world.execute("begin A")
    status = world.rounds("A").status(world.machines["A"].clock)
    assert status["number"] == 1
    assert status["phase"] == Phase.GRADIENT_COLLECTION
    assert 0 < status["deadline_s"] <= 2
    member = world.rounds("B").status(world.machines["B"].clock)
    assert (member["number"], member["phase"]) == (1, "local_training")
    world.execute("release B")
    world.execute("run 1s")
    assert world.rounds("B").status(0)["phase"] == "completed"


def test_metrics_follow_the_certified_rounds_and_come_back_after_a_restart() -> None:
    world = started("A B C", "rounds=3")
    world.execute("run 1s")
    before = list(world.rounds("B").metrics)
    assert [metrics.version for metrics in before] == [1, 2, 3]
    assert before[-1].loss < before[0].loss
    world.execute("crash B")
    world.execute("restart B")
    assert list(world.rounds("B").metrics) == before
    assert world.rounds("B").tracker.state() == world.rounds("A").tracker.state()


def test_who_makes_up_for_rounds_tells_that_once_and_then_only_new_ones() -> None:
    world = started("A B C", "rounds=6")
    rounds = world.rounds("B")
    ledger = world.peer("A").agreement.voter.ledger
    world.execute("run 1s")
    records = ledger.records[: ledger.certified + 1]
    outbox = rounds.setting.outbox
    outbox.take()
    rounds.certified(records, 0)
    told = [
        (e.event, e.fields["version"], e.fields.get("late"))
        for e in outbox.take()
        if isinstance(e, Emit) and e.event in ("commit", "caught-up")
    ]
    assert told[:-1] == [("commit", version, True) for version in range(1, 7)]
    assert told[-1] == ("caught-up", 6, None)
    newest = [record for record in records if isinstance(record.body, Round)][-1]
    rounds.certified([newest], 0)
    assert "caught-up" not in [e.event for e in outbox.take() if isinstance(e, Emit)]


def test_local_steps_go_on_after_a_restart_and_after_a_compaction() -> None:
    world = started("A B C", "rounds=5")
    world.execute("run 1s")
    before = world.rounds("B").local_progress().steps
    assert before > 0
    world.peer("B")._rewrite_log()
    persist = next(effect for effect in world.peer("B").outbox.take() if isinstance(effect, Persist))
    world.execute("crash B")
    world.execute("restart B")
    assert world.rounds("B").local_progress().steps == before
    again = Rounds(world.rounds("B").setting)
    again.restore((), decode_frames(persist.frames), frozenset(), 0)
    assert again.local_progress().steps == before


def test_a_peer_forgets_the_bodies_of_old_rounds_as_it_goes_and_again_after_a_restart() -> None:
    def forgotten() -> list[bool]:
        ledger = world.peer("B").agreement.voter.ledger
        return [record.body is None for record in ledger.records if record.header.kind == "round"]

    world = RoundWorld()
    world.execute("committee A B C rounds=6")
    machine = world.machines["B"]
    machine.settings = msgspec.structs.replace(machine.settings, kept_bodies=2)
    world.execute("crash B")
    world.execute("restart B")
    world.execute("begin A")
    world.execute("run 2s")
    assert forgotten() == [True] * 4 + [False] * 2
    assert [metrics.version for metrics in world.rounds("B").metrics] == [1, 2, 3, 4, 5, 6]
    world.execute("crash B")
    world.execute("restart B")
    assert forgotten() == [True] * 4 + [False] * 2
    assert [metrics.version for metrics in world.rounds("B").metrics] == [1, 2, 3, 4, 5, 6]

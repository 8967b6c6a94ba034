"""A member's side of rounds, through whole peers: what it trains and keeps, whom it believes, and how it judges records."""

import math

import msgspec
import pytest

from p2pcoord.consensus.record import Counted, Record, Round, make_record
from p2pcoord.content import ContentRef
from p2pcoord.effects import Send
from p2pcoord.frames import Slot
from p2pcoord.messages import (
    AttemptMessage,
    AttemptRequest,
    Offering,
    PartialMessage,
    PlanMessage,
    RecordsRequest,
    Reoffer,
    Reoffered,
    ResultMessage,
)
from p2pcoord.rounds.attempt import Partial, Result
from p2pcoord.rounds.participant import MAX_ATTEMPTS_KEPT
from p2pcoord.rounds.plan import Assignment, Plan
from p2pcoord.wire import decode
from tests.round_runner import RoundWorld
from tests.script_runner import authority_of, letter_of, peer_id

A, B, C = (peer_id(letter) for letter in "ABC")


def world_of(*holds: str, options: str = "A B C") -> RoundWorld:
    world = RoundWorld()
    world.execute("committee " + options)
    for hold in holds:
        world.execute("hold " + hold)
    world.execute("begin A")
    return world


def rejected(world: RoundWorld, letter: str = "B") -> dict[str, int]:
    return {kind: sum(by.values()) for kind, by in world.peer(letter).rejected.items()}


# What is trained, and what is persisted


def test_the_slot_is_on_disk_before_its_header_is_sent() -> None:
    world = world_of("B train")
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
    world = world_of("B train", "A train", "C train")
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
    world = world_of("A train", "C train")
    before = world.participant("B").slots
    assert set(before) == {(1, 1)}
    world.execute("crash B")
    world.execute("restart B")
    assert world.participant("B").slots == before
    world.execute("release A")
    world.execute("release C")
    world.execute("run 2s")
    assert world.trainings.count(("B", 1, 1)) == 1
    assert B in {c.contributor for c in last_round(world).contributors}


def test_a_slot_whose_bytes_are_gone_is_trained_anew() -> None:
    world = world_of("A train", "C train")
    world.execute("crash B")
    world.contents["B"] = {root: data for root, data in world.contents["B"].items() if root == zero(world)}
    world.execute("restart B")
    assert world.participant("B").slots == {}


def zero(world: RoundWorld) -> bytes:
    return world.rules.state_zero.root


def last_round(world: RoundWorld, letter: str = "A") -> Round:
    ledger = world.peer(letter).agreement.voter.ledger
    bodies = [r.body for r in ledger.records[: ledger.certified + 1] if isinstance(r.body, Round)]
    return bodies[-1]


def test_one_assignment_is_trained_at_a_time_and_one_given_to_another_is_cancelled() -> None:
    world = world_of("B train", "C train")
    world.execute("crash C")
    world.execute("settle")
    plan = world.coordinator("A").plan
    assert plan is not None
    both = tuple(Assignment(a.index, B, a.ranges) for a in plan.assignments)
    world.inject("A", "B", PlanMessage(revised(plan, both), 5))
    assert world.execute("held B") == ["B has to train 1.1"]
    none = tuple(Assignment(a.index, A, a.ranges) for a in plan.assignments)
    world.inject("A", "B", PlanMessage(revised(plan, none, by=2), 5))
    assert world.execute("held B") == []
    assert not world.participant("B").busy or world.cancelled["B"]


def revised(plan: Plan, assignments: tuple[Assignment, ...], by: int = 1) -> Plan:
    return authority_of("A").sign(
        msgspec.structs.replace(plan, revision=plan.revision + by, assignments=assignments)
    )


def test_who_lacks_the_state_fetches_it_before_it_trains() -> None:
    world = RoundWorld()
    world.contents["C"] = {}
    world.execute("committee A B C rounds=2")
    assert not world.participant("C").held
    world.execute("begin A")
    world.execute("run 3s")
    assert world.participant("C").held
    assert C in {c.contributor for c in last_round(world).contributors}


def test_after_a_commit_only_the_newest_states_stay_on_disk() -> None:
    world = world_of(options="A B C rounds=3")
    world.execute("run 1s")
    for letter in "ABC":
        assert world.participant(letter).version == 3
        assert len(world.contents[letter]) == 2
        assert world.participant(letter).state.root in world.contents[letter]
    assert world.contents["A"].keys() == world.contents["B"].keys()


# Whom it believes


def test_a_plan_is_believed_only_from_the_coordinator_of_its_term_for_the_present_state() -> None:
    world = world_of("B train", "C train")
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
        assert rejected(world)[kind] == 1
        assert sum(rejected(world).values()) == number + 1
    assert world.participant("B").plan == plan
    world.inject("C", "B", PlanMessage(newer, 5))  # who passes it on does not matter
    assert world.participant("B").plan == newer
    world.inject("A", "B", PlanMessage(plan, 5))  # an older revision is no fault
    assert world.participant("B").plan == newer


def test_a_plan_from_beyond_what_is_certified_here_waits_for_the_records() -> None:
    world = world_of("B train", "C train")
    plan = world.participant("B").plan
    assert plan is not None
    world.execute("run 1s")
    world.sent.clear()
    world.inject("A", "B", PlanMessage(revised(plan, plan.assignments), 99))
    assert world.messages(RecordsRequest, "B", "A") != []
    assert world.participant("B").plan == plan


def test_an_attempt_is_believed_only_with_the_scalars_that_follow_from_the_run_and_from_its_coordinator() -> (
    None
):
    world = world_of("A fetch")
    good = world.messages(AttemptMessage, "A", "B")[0]
    assert isinstance(good, AttemptMessage)
    step = msgspec.structs.replace(good.attempt.step, learning_rate=good.attempt.step.learning_rate * 2)
    other = ContentRef(bytes(32), good.attempt.parent.size_bytes)
    cases = [
        ("bad_attempt", authority_of("A").sign(msgspec.structs.replace(good.attempt, number=2, step=step))),
        (
            "bad_attempt",
            authority_of("A").sign(msgspec.structs.replace(good.attempt, number=2, parent=other)),
        ),
        ("bad_signature", msgspec.structs.replace(good.attempt, number=2)),
        ("not_coordinator", authority_of("C").sign(msgspec.structs.replace(good.attempt, coordinator=C))),
    ]
    for number, (kind, attempt) in enumerate(cases):
        world.inject("A", "B", AttemptMessage(attempt, good.headers))
        assert rejected(world)[kind] >= 1
        assert sum(rejected(world).values()) == number + 1
    assert world.participant("B").current == good.attempt


def test_an_older_attempt_never_replaces_a_newer_one_and_few_are_kept() -> None:
    world = world_of("A fetch")
    good = world.messages(AttemptMessage, "A", "B")[0]
    assert isinstance(good, AttemptMessage)
    for number in [*range(20, 10, -1)]:
        attempt = authority_of("A").sign(msgspec.structs.replace(good.attempt, number=number))
        world.inject("A", "B", AttemptMessage(attempt, good.headers))
        current = world.participant("B").current
        assert current is not None
        assert current.number == 20
    assert len(world.participant("B")._attempts) == MAX_ATTEMPTS_KEPT


def test_a_result_is_believed_only_from_the_root_of_the_tree_and_only_when_it_can_be_one() -> None:
    world = world_of("A fetch")
    current = world.participant("B").current
    assert current is not None
    name = authority_of("A").hash(current)
    content = ContentRef(b"\x01" * 32, world.rules.contribution_bytes)
    root = letter_of(current.tree.root)
    bad = [
        authority_of("C").sign(Result(name, C, content, 1.0)),
        msgspec.structs.replace(
            authority_of("C").sign(Result(name, C, content, 1.0)), sender=current.tree.root
        ),
        authority_of(root).sign(Result(name, current.tree.root, ContentRef(b"\x01" * 32, 1), 1.0)),
        authority_of(root).sign(Result(name, current.tree.root, content, math.inf)),
    ]
    for result in bad:
        world.inject("C", "B", ResultMessage(result))
    assert rejected(world) == {"bad_result": 3, "bad_signature": 1}
    world.inject("C", "B", ResultMessage(authority_of("A").sign(Result(bytes(32), A, content, 1.0))))
    assert rejected(world) == {
        "bad_result": 3,
        "bad_signature": 1,
    }  # of another attempt: too late is no fault


def test_a_partial_sum_is_taken_from_a_child_only() -> None:
    world = world_of("A fetch")
    current = world.participant("A").current
    assert current is not None
    name = authority_of("A").hash(current)
    size = world.rules.contribution_bytes
    small = authority_of("B").sign(Partial(name, B, ContentRef(bytes(32), 1)))
    world.inject("B", "A", PartialMessage(small))
    assert rejected(world, "A") == {"bad_partial": 1}
    forged = authority_of("C").sign(Partial(name, B, ContentRef(bytes(32), size)))
    world.inject("B", "A", PartialMessage(forged))
    assert rejected(world, "A") == {"bad_partial": 1, "bad_signature": 1}
    upwards = authority_of("A").sign(Partial(name, A, ContentRef(bytes(32), size)))
    world.inject("A", "B", PartialMessage(upwards))
    assert rejected(world, "B") == {}


def test_only_who_coordinates_is_told_what_a_member_has() -> None:
    world = world_of("A train", "C train")
    world.sent.clear()
    world.inject("C", "B", Reoffer(2, 1, 5))
    assert world.messages(Reoffered, "B") == []
    world.inject("A", "B", Reoffer(2, 1, 5))
    told = world.messages(Reoffered, "B", "A")
    assert len(told) == 1
    assert isinstance(told[0], Reoffered)
    assert [header.slot for header in told[0].headers] == [(1, 1)]
    assert told[0].plan == world.participant("B").plan


# How it judges a record


def judged(**changes: object) -> tuple[RoundWorld, Round, Record]:
    """B has stepped; the record that A would propose, changed."""
    world = world_of("A validate", "B validate", "C validate")
    coordinator = world.coordinator("A")
    attempt, result, state = coordinator.attempt, coordinator.result, coordinator._agreed_state()
    assert attempt is not None
    assert result is not None
    assert state is not None
    body = Round(
        1,
        attempt.parent.root,
        coordinator.attempt_name,
        tuple(
            Counted(e.assignment, e.contributor, e.origin_round, e.factors.float_buffers)
            for e in attempt.entries
        ),
        result.content.root,
        state.root,
        state.size_bytes,
        (("loss", 0.5),),
    )
    body = msgspec.structs.replace(body, **changes)
    record = make_record(authority_of("A"), height=6, term=2, previous=bytes(32), committee=4, body=body)
    return world, body, record


def verdict(**changes: object) -> str | None:
    world, body, record = judged(**changes)
    return world.participant("B").check(record, body, 0)


def test_a_record_that_says_what_was_computed_here_is_appended() -> None:
    assert verdict() == ""


def test_a_voter_waits_for_a_record_whose_attempt_it_has_not_seen_and_asks_for_it() -> None:
    world, body, record = judged(attempt=b"\x05" * 32)
    world.peer("B").outbox.take()
    assert world.participant("B").check(record, body, 0) is None
    (asked,) = [effect for effect in world.peer("B").outbox.take() if isinstance(effect, Send)]
    assert asked.to == A
    world._leave(world.machines["B"], asked)
    assert world.messages(AttemptRequest, "B", "A") == [AttemptRequest(b"\x05" * 32)]


def test_a_voter_waits_for_a_record_of_a_later_version() -> None:
    assert verdict(version=2) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": 0}, "certified already"),
        ({"parent": bytes(32)}, "not the state of version 0"),
        ({"contributors": ()}, "contributors are not those of its attempt"),
        ({"metrics": (("loss", math.nan),)}, "not finite"),
        ({"metrics": (("loss", 1.0), ("x", math.inf))}, "not finite"),
        ({"result": bytes(32)}, "root signed"),
        ({"state": bytes(32)}, "another state"),
        ({"state_bytes": 1}, "another state"),
    ],
)
def test_a_voter_refuses_a_record_that_says_anything_else(changes: dict[str, object], reason: str) -> None:
    said = verdict(**changes)
    assert said is not None
    assert reason in said


def test_a_voter_refuses_another_contributor_and_another_weight() -> None:
    world, body, record = judged()
    participant = world.participant("B")
    for changes in ({"contributor": B}, {"weight": 0.5}, {"assignment": 9}, {"origin_round": 0}):
        first = msgspec.structs.replace(body.contributors[0], **changes)
        forged = msgspec.structs.replace(body, contributors=(first, *body.contributors[1:]))
        assert participant.check(record, forged, 0) == "its contributors are not those of its attempt"


def test_a_silenced_voter_appends_nothing() -> None:
    world, body, record = judged()
    world.peer("B").agreement.voter.silenced = "wrong twice"
    assert world.participant("B").check(record, body, 0) == "wrong twice"

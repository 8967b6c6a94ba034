"""How a voter judges the record of a round, and what becomes of one that computes something else."""

import math

import msgspec
import pytest

from p2pcoord.consensus.record import Counted, Round, Totals
from p2pcoord.effects import Done, Outcome, Send, Stepped
from p2pcoord.rounds.messages import AttemptRequest
from simulations import quadratic
from tests.round_runner import RoundWorld, holding
from tests.script_runner import peer_id

A, B = (peer_id(letter) for letter in "AB")


def judged(**changes: object) -> tuple[RoundWorld, Round]:
    """B has stepped; the body that A would propose, changed."""
    world = holding("A validate", "B validate", "C validate")
    coordinator = world.coordinator("A")
    attempt, result, state = (
        coordinator.aggregation.attempt,
        coordinator.aggregation.result,
        coordinator.conclusion.agreed_state(),
    )
    assert attempt is not None
    assert result is not None
    assert state is not None
    body = Round(
        1,
        attempt.parent.root,
        coordinator.aggregation.name,
        tuple(
            Counted(e.assignment, e.contributor, e.origin_round, e.factors.float_buffers)
            for e in attempt.entries
        ),
        result.content.root,
        state.root,
        state.size_bytes,
        (("loss", 0.5),),
        Totals(0, 1, 0.5, state.root),
    )
    return world, msgspec.structs.replace(body, **changes)


def verdict(**changes: object) -> str | None:
    world, body = judged(**changes)
    return world.participant("B").judge.check(A, body, 0)


def test_a_record_that_says_what_was_computed_here_is_appended() -> None:
    assert verdict() == ""


def test_a_voter_waits_for_a_record_whose_attempt_it_has_not_seen_and_asks_for_it() -> None:
    world, body = judged(attempt=b"\x05" * 32)
    world.peer("B").outbox.take()
    assert world.participant("B").judge.check(A, body, 0) is None
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
        ({"totals": Totals(3, 1, 0.5, bytes(32))}, "totals do not follow"),
    ],
)
def test_a_voter_refuses_a_record_that_says_anything_else(changes: dict[str, object], reason: str) -> None:
    said = verdict(**changes)
    assert said is not None
    assert reason in said


def test_a_voter_refuses_another_contributor_and_another_weight() -> None:
    world, body = judged()
    participant = world.participant("B")
    for changes in ({"contributor": B}, {"weight": 0.5}, {"assignment": 9}, {"origin_round": 0}):
        first = msgspec.structs.replace(body.contributors[0], **changes)
        forged = msgspec.structs.replace(body, contributors=(first, *body.contributors[1:]))
        assert participant.judge.check(A, forged, 0) == "its contributors are not those of its attempt"


def test_a_silenced_voter_appends_nothing() -> None:
    world, body = judged()
    world.peer("B").agreement.voter.silenced = "wrong twice"
    assert world.participant("B").judge.check(A, body, 0) == "wrong twice"


def other_state(world: RoundWorld, letter: str, versions: int) -> None:
    """`letter` computes wrong states for so many rounds."""
    left = [versions]

    def twist(outcome: Outcome) -> Outcome:
        left[0] -= 1
        if left[0] < 0:
            return outcome
        wrong = world._keep(letter, bytes(quadratic.STATE_BYTES - 1) + bytes([left[0] + 1]))
        return Done(Stepped(wrong, True))

    world.twists[letter, "step"] = twist


def test_another_state_computed_twice_silences_the_voter_and_the_others_go_on() -> None:
    world = RoundWorld()
    world.execute("committee A B C rounds=4")
    other_state(world, "B", 1)
    world.execute("begin A")
    world.execute("run 2s")
    assert world.participant("B").judge.mismatches == 1
    assert not world.peer("B").agreement.voter.silenced
    world = RoundWorld()
    world.execute("committee A B C rounds=4")
    other_state(world, "B", 2)
    world.execute("begin A")
    world.execute("run 2s")
    assert world.peer("B").agreement.voter.silenced
    assert [body.version for body in world.commits("A")] == [1, 2, 3, 4]
    assert world.participant("B").state == world.participant("A").state

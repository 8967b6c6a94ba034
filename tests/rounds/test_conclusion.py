"""What members report of an attempt: states, and shares of the validation; and what refuses it."""

import math

import msgspec
import pytest

from p2pcoord.consensus.record import MAX_BODY_BYTES
from p2pcoord.effects import Done, Outcome, Stepped, Validated
from p2pcoord.metrics.training_metrics import metrics_of
from p2pcoord.rounds.conclusion import MAX_MEASURES, MAX_MEASURES_BYTES
from p2pcoord.rounds.messages import Share
from p2pcoord.rounds.plan import MAX_ASSIGNMENTS
from p2pcoord.wire import encode
from simulations import quadratic
from tests.round_runner import RoundWorld
from tests.script_runner import peer_id

C = peer_id("C")


def twisted(outcome: Outcome, **changes: object) -> Outcome:
    assert isinstance(outcome, Done)
    return Done(msgspec.structs.replace(outcome.value, **changes))


def test_a_share_that_is_not_finite_is_left_out_of_the_metrics_and_the_round_is_made() -> None:
    world = RoundWorld()
    world.twists["C", "validate"] = lambda outcome: twisted(outcome, loss_sum=math.nan)
    world.execute("committee A B C")
    printed = world.execute("begin A")
    metrics = metrics_of(world.commits("A")[0])
    whole = sum(high - low for low, high in ((0, 13), (13, 26)))
    assert metrics.validation_samples == whole == 26  # of 40: C's 14 are missing
    assert math.isfinite(metrics.loss)
    assert any("validation-failed peer=C" in line for line in printed)


def measured(names: list[str]) -> Outcome:
    return Done(Validated(5, 1.0, dict.fromkeys(names, 1.0)))


@pytest.mark.parametrize(
    "names",
    [[f"m{i}" for i in range(MAX_MEASURES + 1)], ["x" * MAX_MEASURES_BYTES + "y"]],
    ids=["too many", "too long"],
)
def test_one_member_does_not_fill_the_record_with_what_it_measures(names: list[str]) -> None:
    world = RoundWorld()
    world.twists["B", "validate"] = lambda outcome: measured(names)
    world.execute("committee A B C")
    world.execute("begin A")
    assert metrics_of(world.commits("A")[0]).measures == {}


def test_a_measure_counts_once_in_a_share() -> None:
    world = RoundWorld()
    world.execute("committee A B C")
    world.execute("hold A validate")
    world.execute("hold C validate")
    world.execute("begin A")
    coordinator = world.coordinator("A")
    world.inject("C", "A", Share(coordinator.aggregation.name, 5, 1.0, (("m", 1.0), ("m", 1.0))))
    assert coordinator.conclusion.shares[peer_id("C")].failed
    world.inject("D", "A", Share(coordinator.aggregation.name, 5, 1.0, ()))
    assert peer_id("D") not in coordinator.conclusion.shares


def test_a_state_that_is_not_finite_refuses_the_attempt() -> None:
    world = RoundWorld()
    for letter in "ABC":
        world.twists[letter, "step"] = lambda outcome: twisted(outcome, finite=False)
    world.execute("committee A B C")
    printed = world.execute("begin A")
    assert any("attempt-refused reason='the new state is not finite'" in line for line in printed)
    assert world.commits("A") == []


def test_voters_that_computed_different_states_refuse_the_attempt_when_no_quorum_agrees() -> None:
    world = RoundWorld()
    for letter in "BC":
        wrong = quadratic.STATE_ZERO[:-1] + letter.encode()
        world.twists[letter, "step"] = lambda outcome, letter=letter, wrong=wrong: Done(  # type: ignore[misc]
            Stepped(world._keep(letter, wrong), True)
        )
    world.execute("committee A B C")
    world.execute("begin A")
    printed = world.execute("run 5s")
    assert any("voters computed different states" in line for line in printed)
    assert world.commits("A") == []


def test_a_share_of_more_samples_than_were_dealt_is_left_out_of_the_metrics() -> None:
    """Counted, it would make the loss of all that of this member."""
    world = RoundWorld()
    world.twists["C", "validate"] = lambda outcome: twisted(outcome, samples=1 << 53, loss_sum=0.0)
    world.execute("committee A B C")
    printed = world.execute("begin A")
    metrics = metrics_of(world.commits("A")[0])
    assert metrics.validation_samples == 26
    assert metrics.loss > 0
    assert any("validation-failed peer=C" in line for line in printed)


def test_what_few_measure_is_left_out_and_spoils_no_mean() -> None:
    world = RoundWorld()
    for letter, names in {"A": ["m"], "B": ["m"], "C": [f"{i:032}" for i in range(MAX_MEASURES)]}.items():
        world.twists[letter, "validate"] = lambda outcome, names=names: measured(names)
    world.execute("committee A B C")
    world.execute("begin A")
    assert metrics_of(world.commits("A")[0]).measures == {"m": 2 / 10}


def test_a_record_has_room_for_the_most_contributors_and_all_that_may_be_measured() -> None:
    """A coordinator that cannot make its own record would stop."""
    world = RoundWorld()
    world.execute("committee A B C")
    world.execute("begin A")
    body = world.commits("A")[0]
    one = msgspec.structs.replace(body.contributors[0], origin_round=1 << 33, weight=0.1)
    each = MAX_MEASURES_BYTES // MAX_MEASURES
    measures = tuple((f"measure.{i:0{each}}", 0.1) for i in range(MAX_MEASURES))
    largest = msgspec.structs.replace(
        body,
        version=1 << 33,
        contributors=tuple(msgspec.structs.replace(one, assignment=i) for i in range(MAX_ASSIGNMENTS)),
        metrics=(*body.metrics, *measures),
    )
    assert len(encode(largest)) < MAX_BODY_BYTES - 500

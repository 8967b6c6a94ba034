"""The coordinator's side of rounds, through whole peers. The course of rounds is told in tests/scripts/rounds."""

import math

import msgspec
import pytest

from p2pcoord.aggregation.contribution import ContributionHeader
from p2pcoord.consensus.record import Round
from p2pcoord.content import ContentRef
from p2pcoord.effects import Done, Emit, Outcome, Stepped, Validated
from p2pcoord.messages import AttemptMessage, Offering, PlanAccepted, PlanMessage, Reoffered, Share
from p2pcoord.metrics.training_metrics import metrics_of
from p2pcoord.rounds.coordinator import FAILURES_BEFORE_EXCLUSION, MAX_MEASURES
from p2pcoord.rounds.phases import Phase
from p2pcoord.rounds.plan import Assignment
from simulations import quadratic
from tests.round_runner import RoundWorld, started
from tests.script_runner import authority_of, peer_id


def header(world: RoundWorld, letter: str, assignment: int, **changes: object) -> ContributionHeader:
    """What a liar may sign for the round under way."""
    content = ContentRef(bytes([assignment]) * 32, world.rules.contribution_bytes)
    base = world.rules.state_zero.root
    said = ContributionHeader(1, assignment, 1, peer_id(letter), base, content, 10, 3, 0.5, 1.0, 7)
    return authority_of(letter).sign(msgspec.structs.replace(said, **changes))


def rejected(world: RoundWorld, letter: str = "A") -> dict[str, int]:
    return {kind: sum(by.values()) for kind, by in world.peer(letter).rejected.items()}


def commits(world: RoundWorld, letter: str = "A") -> list[Round]:
    ledger = world.peer(letter).agreement.voter.ledger
    bodies = [record.body for record in ledger.records[: ledger.certified + 1]]
    return [body for body in bodies if isinstance(body, Round)]


def twisted(outcome: Outcome, **changes: object) -> Outcome:
    assert isinstance(outcome, Done)
    return Done(msgspec.structs.replace(outcome.value, **changes))


def collecting() -> RoundWorld:
    """A, B and C have a plan; nobody has finished."""
    world = RoundWorld()
    world.execute("committee A B C")
    for letter in "ABC":
        world.execute(f"hold {letter} train")
    world.execute("begin A")
    assert world.coordinator("A").phase is Phase.LOCAL_TRAINING
    return world


# Who counts


def test_the_contributors_of_every_commit_are_those_of_its_attempt() -> None:
    world = RoundWorld()
    world.execute("committee A B C D rounds=3 fan_out=4")
    world.execute("hold A fetch")
    world.execute("begin A")
    world.execute("crash D")
    world.execute("release A")
    world.execute("run 2s")
    attempts = {}
    for message in world.messages(AttemptMessage, "A"):
        assert isinstance(message, AttemptMessage)
        attempts[authority_of("A").hash(message.attempt)] = message.attempt
    bodies = commits(world)
    assert [body.version for body in bodies] == [1, 2, 3]
    for body in bodies:
        attempt = attempts[body.attempt]
        assert [(c.assignment, c.contributor) for c in body.contributors] == [
            (e.assignment, e.contributor) for e in attempt.entries
        ]


def test_a_header_for_an_assignment_that_was_never_given_to_its_sender_does_not_count() -> None:
    world = collecting()
    world.inject("B", "A", Offering(header(world, "B", 2)))
    assert world.coordinator("A").headers == {}
    world.inject("B", "A", Offering(header(world, "B", 1)))
    assert set(world.coordinator("A").headers) == {(1, 1)}
    assert rejected(world) == {}


def test_an_assignment_counts_once_and_what_was_counted_first_stays() -> None:
    world = collecting()
    first = header(world, "B", 1)
    world.inject("B", "A", Offering(first))
    world.inject("B", "A", Offering(first))
    assert world.coordinator("A").headers == {(1, 1): first}


def test_offers_by_strangers_are_refused() -> None:
    world = collecting()
    world.inject("D", "A", Offering(header(world, "D", 1)))
    assert rejected(world) == {"stranger": 1}
    assert world.coordinator("A").headers == {}


def test_nobody_offers_what_another_made() -> None:
    world = collecting()
    world.inject("B", "A", Offering(header(world, "C", 2)))
    assert rejected(world) == {"bad_contribution": 1}
    assert world.coordinator("A").headers == {}


@pytest.mark.parametrize(
    "changes", [{"base": bytes(32)}, {"origin_round": 0}, {"origin_round": 2}], ids=["base", "old", "early"]
)
def test_an_offer_for_another_round_or_from_another_base_is_too_late_and_no_fault(
    changes: dict[str, object],
) -> None:
    world = collecting()
    world.inject("B", "A", Offering(header(world, "B", 1, **changes)))
    assert rejected(world) == {}
    assert world.coordinator("A").headers == {}


@pytest.mark.parametrize(
    ("changes", "kind"),
    [({"norm": math.inf}, "bad_contribution"), ({"content": ContentRef(bytes(32), 1)}, "bad_contribution")],
)
def test_an_impossible_header_is_refused(changes: dict[str, object], kind: str) -> None:
    world = collecting()
    world.inject("B", "A", Offering(header(world, "B", 1, **changes)))
    assert rejected(world) == {kind: 1}
    assert world.coordinator("A").headers == {}


def test_a_plan_shown_by_a_member_must_be_one_that_a_coordinator_signed() -> None:
    world = RoundWorld()
    world.execute("committee A B C D minimum=5")
    world.execute("begin A")
    coordinator = world.coordinator("A")
    assert coordinator.phase is Phase.INITIALIZATION
    plan = collecting().coordinator("A").plan
    assert plan is not None
    cases = {
        "bad_signature": msgspec.structs.replace(plan, signature=b""),
        "bad_plan": authority_of("A").sign(msgspec.structs.replace(plan, parent=bytes(32))),
        "not_coordinator": authority_of("B").sign(msgspec.structs.replace(plan, coordinator=peer_id("B"))),
    }
    for kind, shown in cases.items():
        world.inject("B", "A", Reoffered(2, 1, shown, (), ()))
        assert rejected(world).pop(kind) == 1
    own = authority_of("A").sign(msgspec.structs.replace(plan, assignments=(Assignment(3, "x", ()),)))
    world.inject("B", "A", Reoffered(2, 1, own, (), ()))
    assert rejected(world)["bad_plan"] == 2


# When a round begins, and what it is refused for


def test_fewer_members_than_the_run_asks_for_hold_the_round_back_and_the_run_rests() -> None:
    world = started("A", "B", "C", "minimum=4")
    world.execute("run 3s")
    assert world.coordinator("A").waits_for_members
    assert world.messages(PlanMessage) == []
    replication = world.peer("A").agreement.replication
    assert replication.resting
    assert replication.interval_ns == replication.timing.resting_heartbeat_ns


def test_a_share_that_is_not_finite_is_left_out_of_the_metrics_and_the_round_is_made() -> None:
    world = RoundWorld()
    world.twists["C", "validate"] = lambda outcome: twisted(outcome, loss_sum=math.nan)
    world.execute("committee A B C")
    printed = world.execute("begin A")
    metrics = metrics_of(commits(world)[0])
    whole = sum(high - low for low, high in ((0, 13), (13, 26)))
    assert metrics.validation_samples == whole == 26  # of 40: C's 14 are missing
    assert math.isfinite(metrics.loss)
    assert any("validation-failed peer=C" in line for line in printed)


def measured(names: list[str]) -> Outcome:
    return Done(Validated(5, 1.0, dict.fromkeys(names, 1.0)))


@pytest.mark.parametrize(
    "names", [[f"m{i}" for i in range(MAX_MEASURES + 1)], ["x" * 65]], ids=["too many", "too long"]
)
def test_one_member_does_not_fill_the_record_with_what_it_measures(names: list[str]) -> None:
    world = RoundWorld()
    world.twists["B", "validate"] = lambda outcome: measured(names)
    world.execute("committee A B C")
    world.execute("begin A")
    assert metrics_of(commits(world)[0]).measures == {}


def test_a_measure_counts_once_in_a_share() -> None:
    world = RoundWorld()
    world.execute("committee A B C")
    world.execute("hold A validate")
    world.execute("hold C validate")
    world.execute("begin A")
    coordinator = world.coordinator("A")
    world.inject("C", "A", Share(coordinator.attempt_name, 5, 1.0, (("m", 1.0), ("m", 1.0))))
    assert coordinator.shares[peer_id("C")].failed
    world.inject("D", "A", Share(coordinator.attempt_name, 5, 1.0, ()))
    assert peer_id("D") not in coordinator.shares


def test_a_state_that_is_not_finite_refuses_the_attempt() -> None:
    world = RoundWorld()
    for letter in "ABC":
        world.twists[letter, "step"] = lambda outcome: twisted(outcome, finite=False)
    world.execute("committee A B C")
    printed = world.execute("begin A")
    assert any("attempt-refused reason='the new state is not finite'" in line for line in printed)
    assert commits(world) == []


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
    before = world.coordinator("A").plan
    assert before is not None
    assert before.revision == 1
    world.execute("break A validate out of memory")
    world.sent.clear()
    world.execute("run 2s")
    after = world.coordinator("A").plan
    assert after is not None
    assert after.revision == 2
    assert [m.revision for m in world.messages(PlanAccepted, "B", "A") if isinstance(m, PlanAccepted)] == [2]
    assert world.trainings.count(("A", 1, 2)) == 1


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
    assert commits(world) == []


def test_another_state_computed_twice_silences_the_voter_and_the_others_go_on() -> None:
    world = RoundWorld()
    world.execute("committee A B C rounds=4")
    other_state(world, "B", 1)
    world.execute("begin A")
    world.execute("run 2s")
    assert world.participant("B").mismatches == 1
    assert not world.peer("B").agreement.voter.silenced
    world = RoundWorld()
    world.execute("committee A B C rounds=4")
    other_state(world, "B", 2)
    world.execute("begin A")
    world.execute("run 2s")
    assert world.peer("B").agreement.voter.silenced
    assert [body.version for body in commits(world)] == [1, 2, 3, 4]
    assert world.participant("B").state == world.participant("A").state


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
        assert [body.version for body in commits(world, letter)] == [1]
    assert ("D", 1, 3) not in world.trainings  # as the plan that B saw would have it
    assert len(world.trainings) == len(set(world.trainings)) == 4


# Who is put out


def test_who_is_late_several_rounds_in_a_row_is_excluded_for_a_while() -> None:
    world = RoundWorld()
    world.execute("committee A B C rounds=20 barrier=1s")
    world.execute("hold C train")
    world.execute("begin A")
    world.execute(f"run {FAILURES_BEFORE_EXCLUSION - 1}s")
    assert world.peer("A").roster.is_member(peer_id("C"))
    printed = world.execute("run 2s")
    assert any("excluded peer=C reason='failed 3 rounds: late'" in line for line in printed)


def test_two_headers_in_one_slot_exclude_their_signer() -> None:
    world = collecting()
    world.inject("B", "A", Offering(header(world, "B", 1)))
    other = ContentRef(b"\x07" * 32, world.rules.contribution_bytes)
    world.inject("B", "A", Offering(header(world, "B", 1, content=other)))
    world.execute("run 1s")
    for letter in "AC":
        assert "two ContributionHeader" in world.peer(letter).roster.excluded(peer_id("B"))


# The duty


def test_the_duty_is_handed_over_between_rounds_only() -> None:
    world = RoundWorld()
    world.execute("committee A B C rounds=3 rotation=1")
    world.execute("hold C train")
    world.execute("begin A")
    coordinator = world.coordinator("A")
    assert not coordinator.idle
    world.execute("run 3s")
    assert world.peer("A").agreement.is_coordinator
    assert commits(world) == []
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

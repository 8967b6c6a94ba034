"""A member's side of rounds, through whole peers: which attempt it takes up."""

import math

import msgspec

from p2pcoord.content import ContentRef
from p2pcoord.rounds.attempt import make_attempt
from p2pcoord.rounds.messages import AttemptMessage
from p2pcoord.rounds.setting import MAX_IN_FLIGHT
from p2pcoord.wire import encode
from tests.round_runner import header, holding
from tests.script_runner import authority_of, letter_of, peer_id

C = peer_id("C")


def test_an_attempt_is_believed_only_with_the_scalars_that_follow_from_the_run_and_from_its_coordinator() -> (
    None
):
    world = holding("A fetch")
    good = world.messages(AttemptMessage, "A", "B")[0]
    assert isinstance(good, AttemptMessage)
    steps = [
        msgspec.structs.replace(good.attempt.step, learning_rate=wrong)
        for wrong in (good.attempt.step.learning_rate * 2, math.inf)
    ]
    other = ContentRef(bytes(32), good.attempt.parent.size_bytes)
    cases = [
        *(
            (
                "bad_attempt",
                authority_of("A").sign(msgspec.structs.replace(good.attempt, number=2, step=step)),
            )
            for step in steps
        ),
        (
            "bad_attempt",
            authority_of("A").sign(msgspec.structs.replace(good.attempt, number=2, parent=other)),
        ),
        ("bad_signature", msgspec.structs.replace(good.attempt, number=2)),
        ("not_coordinator", authority_of("C").sign(msgspec.structs.replace(good.attempt, coordinator=C))),
    ]
    for number, (kind, attempt) in enumerate(cases):
        world.inject("A", "B", AttemptMessage(attempt, good.headers))
        assert world.rejected("B")[kind] >= 1
        assert sum(world.rejected("B").values()) == number + 1
    assert world.participant("B").current == good.attempt


def test_a_member_refuses_an_attempt_over_more_samples_than_its_plan_deals() -> None:
    world = holding("A combine", "B combine", "C combine")
    sent = world.messages(AttemptMessage, "A", "B")[0]
    assert isinstance(sent, AttemptMessage)
    lie = header(world, "C", 2, samples=50)
    attempt = sent.attempt
    a = authority_of("A")
    headers = [*(said for said in sent.headers if said.contributor != lie.contributor), lie]
    made = make_attempt(
        a,
        headers,
        term=attempt.term,
        version=1,
        number=2,
        parent=attempt.parent,
        mean=world.rules.mean,
        tree=attempt.tree,
        step=attempt.step,
        validation=attempt.validation,
    )
    world.inject("A", "B", AttemptMessage(made, tuple(headers)))
    assert world.rejected("B") == {"bad_contribution": 1}


def test_an_attempt_whose_validation_is_dealt_otherwise_is_refused() -> None:
    world = holding("A fetch")
    good = world.messages(AttemptMessage, "A", "B")[0]
    assert isinstance(good, AttemptMessage)
    for validation in (good.attempt.validation[1:], good.attempt.validation[::-1], ()):
        said = msgspec.structs.replace(good.attempt, number=2, validation=validation, signature=b"")
        world.inject("A", "B", AttemptMessage(authority_of("A").sign(said), good.headers))
    assert world.rejected("B") == {"bad_attempt": 3}


def test_attempts_without_end_do_not_fill_what_may_be_in_flight() -> None:
    world = holding("A combine", "A fetch", "B combine", "B fetch", "C combine", "C fetch")
    good = world.messages(AttemptMessage, "A", "B")[0]
    assert isinstance(good, AttemptMessage)
    tree = good.attempt.tree
    root = letter_of(tree.root)
    for number in range(2, 400):
        said = msgspec.structs.replace(good.attempt, number=number, signature=b"")
        world._arrive("A", root, encode(AttemptMessage(authority_of("A").sign(said), good.headers)))
    assert world.rejected(root)["overloaded"] > 0
    assert len(world.participant(root).setting._then) < MAX_IN_FLIGHT

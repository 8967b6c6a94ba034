"""From a result to the new state: whose result is believed."""

import math

import msgspec

from p2pcoord.content import ContentRef
from p2pcoord.rounds.attempt import Result
from p2pcoord.rounds.messages import ResultMessage
from tests.round_runner import holding
from tests.script_runner import authority_of, letter_of, peer_id

A, C = (peer_id(letter) for letter in "AC")


def test_a_result_is_believed_only_from_the_root_of_the_tree_and_only_when_it_can_be_one() -> None:
    world = holding("A fetch")
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
    assert world.rejected("B") == {"bad_result": 3, "bad_signature": 1}
    world.inject("C", "B", ResultMessage(authority_of("A").sign(Result(bytes(32), A, content, 1.0))))
    assert world.rejected("B") == {
        "bad_result": 3,
        "bad_signature": 1,
    }  # of another attempt: too late is no fault


def test_a_step_that_failed_is_tried_again() -> None:
    """A sole voter whose disk was full for a moment: nobody else could make the version."""
    world = holding("A step", options="A members B rounds=3 size=1")
    printed = world.execute("break A step No space left on device")
    assert any("step-failed" in line for line in printed)
    world.execute("release A")
    world.execute("run 10s")
    assert world.participant("A").version == 3


def test_a_coordinator_orders_only_what_it_could_make_anew_itself() -> None:
    """Its own acknowledgement says so, and counts with its voters'."""
    world = holding("A step", options="A B C rounds=1")
    world.execute("run 3s")
    assert world.commits("A") == []
    assert world.coordinator("A").conclusion.agreed_state() is not None  # B and C have it
    world.execute("release A")
    world.execute("run 3s")
    assert [body.version for body in world.commits("A")] == [1]


def test_a_state_from_another_result_than_the_certified_one_is_no_fault_of_who_computed_it() -> None:
    world = holding("A step", options="A B C rounds=1")
    current = world.participant("B").book.current
    assert current is not None
    assert current.result is not None
    other = ContentRef(b"\x05" * 32, current.result.content.size_bytes)
    current.result = msgspec.structs.replace(current.result, content=other)
    current.state = ContentRef(b"\x06" * 32, 28)
    world.execute("release A")
    world.execute("run 3s")
    assert [body.version for body in world.commits("B")] == [1]
    assert world.participant("B").judge.mismatches == 0

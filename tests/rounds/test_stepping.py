"""From a result to the new state: whose result is believed."""

import math

import msgspec

from p2pcoord.content import ContentRef
from p2pcoord.messages import ResultMessage
from p2pcoord.rounds.attempt import Result
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

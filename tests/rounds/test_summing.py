"""A member's part in the sum: whose partial sums it takes."""

from p2pcoord.content import ContentRef
from p2pcoord.rounds.attempt import Partial
from p2pcoord.rounds.messages import PartialMessage
from tests.round_runner import holding
from tests.script_runner import authority_of, peer_id

A, B = (peer_id(letter) for letter in "AB")


def test_a_partial_sum_is_taken_from_a_child_only() -> None:
    world = holding("A fetch")
    current = world.participant("A").current
    assert current is not None
    name = authority_of("A").hash(current)
    size = world.rules.contribution_bytes
    small = authority_of("B").sign(Partial(name, B, ContentRef(bytes(32), 1)))
    world.inject("B", "A", PartialMessage(small))
    assert world.rejected("A") == {"bad_partial": 1}
    forged = authority_of("C").sign(Partial(name, B, ContentRef(bytes(32), size)))
    world.inject("B", "A", PartialMessage(forged))
    assert world.rejected("A") == {"bad_partial": 1, "bad_signature": 1}
    upwards = authority_of("A").sign(Partial(name, A, ContentRef(bytes(32), size)))
    world.inject("A", "B", PartialMessage(upwards))
    assert world.rejected("B") == {}

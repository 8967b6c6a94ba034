"""A coordinator's attempts, through whole peers. What a loss leads to is told in tests/scripts/rounds."""

import msgspec

from p2pcoord.content import ContentRef
from p2pcoord.rounds.attempt import Partial
from p2pcoord.rounds.messages import AttemptMessage, PartialMessage
from tests.round_runner import RoundWorld, holding
from tests.script_runner import authority_of, letter_of, peer_id


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
    bodies = world.commits("A")
    assert [body.version for body in bodies] == [1, 2, 3]
    for body in bodies:
        attempt = attempts[body.attempt]
        assert [(c.assignment, c.contributor) for c in body.contributors] == [
            (e.assignment, e.contributor) for e in attempt.entries
        ]


def test_a_root_that_says_it_passed_its_sum_up_is_still_what_everybody_waits_for() -> None:
    """It has nothing to pass up; believed, it would never be left out."""
    world = holding("A combine", "B combine", "C combine")
    aggregation = world.coordinator("A").aggregation
    assert aggregation.attempt is not None
    root = letter_of(aggregation.attempt.tree.root)
    lie = Partial(aggregation.name, peer_id(root), ContentRef(bytes(32), world.rules.contribution_bytes))
    world.inject(root, "A", PartialMessage(authority_of(root).sign(lie)))
    leaf = next(letter for letter in "ABC" if letter != root and letter != "A")
    unsigned = msgspec.structs.replace(lie, sender=peer_id(leaf), signature=bytes(64))
    world.inject(leaf, "A", PartialMessage(unsigned))
    assert aggregation.blocking() or root == "A"
    assert world.rejected("A")["bad_signature"] == 1

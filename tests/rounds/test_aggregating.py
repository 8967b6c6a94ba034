"""A coordinator's attempts, through whole peers. What a loss leads to is told in tests/scripts/rounds."""

from p2pcoord.messages import AttemptMessage
from tests.round_runner import RoundWorld
from tests.script_runner import authority_of


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

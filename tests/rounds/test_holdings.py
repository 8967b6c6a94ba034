"""What a peer has of the run: the state and its bytes."""

from tests.round_runner import RoundWorld, holding
from tests.script_runner import peer_id

C = peer_id("C")


def test_who_lacks_the_state_fetches_it_before_it_trains() -> None:
    world = RoundWorld()
    world.contents["C"] = {}
    world.execute("committee A B C rounds=2")
    assert not world.participant("C").held
    world.execute("begin A")
    world.execute("run 3s")
    assert world.participant("C").held
    assert C in {c.contributor for c in world.commits("A")[-1].contributors}


def test_after_a_commit_only_the_newest_states_stay_on_disk() -> None:
    world = holding(options="A B C rounds=3")
    world.execute("run 1s")
    for letter in "ABC":
        assert world.participant(letter).version == 3
        assert len(world.contents[letter]) == 2
        assert world.participant(letter).state.root in world.contents[letter]
    assert world.contents["A"].keys() == world.contents["B"].keys()

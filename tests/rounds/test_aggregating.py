"""A coordinator's attempts, through whole peers. What a loss leads to is told in tests/scripts/rounds."""

from itertools import combinations, pairwise

import msgspec
import pytest

from p2pcoord.aggregation.tree import Tree
from p2pcoord.content import ContentRef
from p2pcoord.effects import Failed, Fetch, FetchReport, Outcome
from p2pcoord.rounds.aggregating import MAX_ATTEMPT_BACKOFF_NS, RESENT_AT_ONCE
from p2pcoord.rounds.attempt import Partial
from p2pcoord.rounds.messages import AttemptMessage, Obstacle, PartialMessage
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


def tree_of(world: RoundWorld) -> Tree:
    attempt = world.coordinator("A").aggregation.attempt
    assert attempt is not None
    return attempt.tree


def accuse(world: RoundWorld, letter: str, culprit: str) -> list[str]:
    """What came of it half a second later."""
    obstacle = Obstacle(world.coordinator("A").aggregation.name, peer_id(culprit), "no source has it")
    printed = world.inject(letter, "A", obstacle)
    return printed + world.execute("run 500ms")


def neighbours(tree: Tree, letter: str) -> str:
    me = peer_id(letter)
    parent = tree.parent(me)
    return "".join(map(letter_of, (*tree.children(me), *([parent] if parent else []))))


SIX = ("C combine", "C fetch", "A combine", "B combine", "D combine", "E combine", "F combine")


def test_a_pair_that_fails_is_kept_apart_and_counts_against_neither() -> None:
    world = holding(*SIX, options="A B C members D E F")
    accused = neighbours(tree_of(world), "E")[0]
    printed = accuse(world, "E", accused)
    assert not any("lost" in line for line in printed)
    tree = tree_of(world)
    assert world.coordinator("A").aggregation.number == 2
    assert len(tree.members) == 6
    assert accused not in neighbours(tree, "E")


def test_who_is_accused_by_two_is_left_out() -> None:
    world = holding(*SIX, options="A B C members D E F")
    culprit = next(
        letter for letter in "BCDEF" if len(neighbours(tree_of(world), letter).replace("A", "")) > 1
    )
    one, other = neighbours(tree_of(world), culprit).replace("A", "")[:2]
    obstacle = Obstacle(world.coordinator("A").aggregation.name, peer_id(culprit), "no source has it")
    world.inject(one, "A", obstacle)
    printed = accuse(world, other, culprit)
    assert any(f"lost peer={culprit} reason='several" in line for line in printed)
    assert peer_id(culprit) not in tree_of(world)


def test_who_accuses_in_one_attempt_after_the_other_is_the_one_left_out() -> None:
    world = holding(*SIX, options="A B C members D E F")
    accuse(world, "E", neighbours(tree_of(world), "E")[0])
    printed = accuse(world, "E", neighbours(tree_of(world), "E")[0])
    assert any("lost peer=E reason='it accuses" in line for line in printed)
    assert set(tree_of(world).members) == {peer_id(letter) for letter in "ABCDF"}


def test_members_that_dial_out_only_are_not_parent_and_child() -> None:
    world = holding("A train", options="A B C members D E F")
    around = world.participant("A").setting.neighbours
    leaves = {peer_id(letter) for letter in "BCE"}
    around.leaf = lambda peer: peer in leaves  # type: ignore[method-assign]
    around.apart = lambda one, other: {one, other} <= leaves  # type: ignore[method-assign]
    world.execute("hold A combine fetch")
    world.execute("release A train")
    world.execute("settle")
    tree = tree_of(world)
    assert len(tree.members) == 6
    assert not any({parent, child} <= leaves for parent in tree.members for child in tree.children(parent))


def test_two_that_cannot_do_without_each_other_are_left_out_in_turn() -> None:
    """One alone is half of them, and that suffices here: the round goes on."""
    world = holding(
        "A combine", "A train", "B combine", "C combine", options="A members B C barrier=1s share=0.3"
    )
    world.execute("run 1500ms")
    assert len(tree_of(world).members) == 2
    root = letter_of(tree_of(world).root)
    other = "C" if root == "B" else "B"
    accuse(world, root, other)
    assert len(tree_of(world).members) == 1


def test_attempts_that_follow_each_other_back_off() -> None:
    world = holding(*SIX, options="A B C members D E F")
    aggregation = world.coordinator("A").aggregation
    waits = []
    for _ in range(10):
        aggregation.sign(aggregation.headers, tree_of(world), 0)
        waits.append(aggregation.not_before)
    assert waits[0] == 100_000_000
    assert all(later >= sooner for sooner, later in pairwise(waits))
    assert waits[-1] == MAX_ATTEMPT_BACKOFF_NS


def test_when_many_owe_something_all_hear_of_the_attempt_again_in_turn() -> None:
    world = holding("A combine", "A fetch")
    aggregation = world.coordinator("A").aggregation
    told: list[str] = []
    aggregation._tell = lambda member, now: told.append(member)  # type: ignore[method-assign]
    aggregation.setting.neighbours.alive = lambda peer: True  # type: ignore[method-assign]
    owing = [f"peer{number}" for number in range(2 * RESENT_AT_ONCE + 3)]
    aggregation.tell_again(owing, 0)
    assert told == owing[:RESENT_AT_ONCE]
    aggregation.tell_again(owing, 1)
    aggregation.tell_again(owing, 2)
    assert set(told) == set(owing)


def test_what_a_member_says_of_its_parent_counts_for_nothing() -> None:
    """It has no need of its parent's bytes; two children together could have it left out at no cost."""
    world = holding(*SIX, options="A B C members D E F fan_out=2")
    aggregation = world.coordinator("A").aggregation
    tree = tree_of(world)
    parent = next(member for member in tree.members if len(tree.children(member)) == 2)
    for child in tree.children(parent):
        accuse(world, letter_of(child), letter_of(parent))
    assert world.coordinator("A").aggregation is aggregation
    assert tree_of(world) == tree


class BrokenLink(RoundWorld):
    """No bulk bytes pass between two members; messages do."""

    def __init__(self, pair: str) -> None:
        super().__init__()
        self.pair = pair

    def _fetch(self, letter: str, effect: Fetch) -> Outcome:
        if letter in self.pair:
            other = peer_id(self.pair.replace(letter, ""))
            sources = tuple(source for source in effect.sources if source != other)
            if not sources:
                return Failed("no source has it", FetchReport({}, {}))
            effect = msgspec.structs.replace(effect, sources=sources)
        return super()._fetch(letter, effect)


@pytest.mark.parametrize("pair", ["AB", "AD", "BE"])
def test_a_broken_link_costs_neither_of_its_two_anything_be_one_the_coordinator_or_not(pair: str) -> None:
    world = BrokenLink(pair)
    world.execute("committee A B C members D E F rounds=20 fan_out=4")
    printed = world.execute("begin A")
    for _ in range(60):
        printed += world.execute("run 500ms")
    commits = world.commits("A")
    assert len(commits) == 20
    assert all({c.contributor for c in body.contributors} == set(map(peer_id, "ABCDEF")) for body in commits)
    assert not [line for line in printed if "excluded" in line]


def test_one_machine_that_can_be_dialled_and_many_that_cannot_make_versions() -> None:
    """The tree has no place for all of them at a time, so they take turns, and less than the minimum share is enough."""
    world = RoundWorld()
    world.execute("committee A members B C D E F G fan_out=2 rounds=6 barrier=2s share=0.5")
    leaves = set(map(peer_id, "BCDEFG"))
    around = world.participant("A").setting.neighbours
    around.leaf = lambda peer: peer in leaves  # type: ignore[method-assign]
    around.apart = lambda one, other: {one, other} <= leaves  # type: ignore[method-assign]
    for one, other in combinations("BCDEFG", 2):
        world.execute(f"cut {one} {other}")
    world.execute("begin A")
    world.execute("run 60s")
    assert len(world.commits("A")) == 6
    assert {c.contributor for body in world.commits("A") for c in body.contributors} > {peer_id("A")}

"""Whom to probe, and through whom: everybody has a turn, and only who can help is asked."""

import random

from p2pcoord.gossip.probe_targets import HELPERS, ProbeTargets
from p2pcoord.gossip.suspicion import Member, State


def targets(members: dict[str, Member], seed: int = 7) -> ProbeTargets:
    made = ProbeTargets(members, random.Random(seed))
    for peer in members:
        made.add(peer)
    return made


def table(peers: str, **links: tuple[str, ...]) -> dict[str, Member]:
    return {peer: Member(peer, 1, links.get(peer, ())) for peer in peers}


def test_each_member_has_its_turn_once_a_round_in_an_order_that_changes():
    order = targets(table("abcdefgh"))
    rounds = []
    for _ in range(6):
        turns = [order.next(()) for _ in range(8)]
        rounds.append("".join(member.peer for member in turns if member))
    assert all(sorted(turns) == list("abcdefgh") for turns in rounds)
    assert len(set(rounds)) == 6


def test_a_new_member_has_its_turn_in_this_round_at_a_random_place():
    places = set()
    for seed in range(30):
        members = table("abcd")
        order = targets(members, seed)
        order.next(())
        members["new"] = Member("new", 1, ())
        order.add("new")
        turns = [member.peer for member in (order.next(()) for _ in range(4)) if member]
        places.add(turns.index("new"))
    assert places == {0, 1, 2, 3}


def test_the_dead_the_gone_and_the_probed_are_skipped_and_the_dead_take_turns_of_their_own():
    members = table("abcde")
    order = targets(members)
    assert order.next_dead() is None
    members["a"].state = members["b"].state = State.DEAD
    del members["c"]
    assert {member.peer for member in (order.next({"d"}) for _ in range(4)) if member} == {"e"}
    assert order.next("de") is None
    dead = [member.peer for member in (order.next_dead() for _ in range(4)) if member]
    assert sorted(dead[:2]) == ["a", "b"]
    assert dead[:2] == dead[2:]


def test_any_living_members_help_but_leaves_and_the_target():
    members = table("abcdefgh", h=("a",))
    members["a"].state, members["b"].state = State.DEAD, State.SUSPECT
    order = targets(members)
    asked: set[str] = set()
    for _ in range(50):
        helpers = order.helpers(members["c"])
        assert len(set(helpers)) == HELPERS
        asked.update(helpers)
    assert asked == set("defg")


def test_a_leaf_is_helped_by_who_it_names_and_by_nobody_else():
    members = table("abcdef", a=("b", "c", "d", "stranger"))
    members["b"].state, members["c"].state = State.DEAD, State.SUSPECT
    order = targets(members)
    assert set(order.helpers(members["a"])) == {"c", "d"}

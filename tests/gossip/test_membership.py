"""Membership: the state that follows from what connection, heartbeats, probing and records say."""

import itertools
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcoord.errors import LocalError
from p2pcoord.gossip.membership import Changed, Membership, PeerState
from p2pcoord.gossip.records import PeerRecord
from p2pcoord.gossip.suspicion import MAX_MEMBERS, Alive, Dead, Suspect

MILLISECOND = 1_000_000
SECOND = 1000 * MILLISECOND
ALIVE, SUSPECT, DEAD, LEFT, UNKNOWN = (
    PeerState.ALIVE,
    PeerState.SUSPECT,
    PeerState.DEAD,
    PeerState.LEFT,
    PeerState.UNKNOWN,
)


def record(incarnation: int = 1, **state: object) -> PeerRecord:
    return PeerRecord("a", incarnation, 1, name="a", signature=sha256(b"a").digest(), **state)


def membership() -> Membership:
    made = Membership("me")
    made.add("a")
    return made


EVENTS = {
    "heard": lambda view: view.heard("a", 1),
    "record 1": lambda view: view.record(record(1)),
    "record 2": lambda view: view.record(record(2)),
    "leaving 2": lambda view: view.record(record(2, leaving=True)),
    "goodbye": lambda view: view.left("a"),
    "suspect 1": lambda view: view.probed(Suspect("a", 1, "b")),
    "dead 1": lambda view: view.probed(Dead("a", 1)),
    "alive 1": lambda view: view.probed(Alive("a", 1)),
    "alive 2": lambda view: view.probed(Alive("a", 2)),
    "closed": lambda view: view.disconnected("a"),
    "redial failed": lambda view: view.redial_failed("a"),
    "connected": lambda view: view.connected("a", 1),
}


@pytest.mark.parametrize(
    ("story", "states"),
    [
        (["heard"], [ALIVE]),
        (["record 1"], [ALIVE]),
        (["connected", "closed", "redial failed", "connected"], [ALIVE, SUSPECT, DEAD, ALIVE]),
        (["connected", "closed", "connected"], [ALIVE, SUSPECT, ALIVE]),
        (["redial failed"], [UNKNOWN]),
        (["record 1", "suspect 1", "alive 2"], [ALIVE, SUSPECT, ALIVE]),
        (["record 1", "suspect 1", "alive 1"], [ALIVE, SUSPECT, ALIVE]),
        (["record 1", "suspect 1", "dead 1", "record 1", "heard"], [ALIVE, SUSPECT, DEAD, DEAD, DEAD]),
        (["record 1", "dead 1", "record 2"], [ALIVE, DEAD, ALIVE]),
        (["record 2", "suspect 1", "dead 1"], [ALIVE, ALIVE, ALIVE]),
        (["record 1", "leaving 2", "heard", "alive 2"], [ALIVE, LEFT, LEFT, LEFT]),
        (["record 1", "goodbye", "closed", "redial failed"], [ALIVE, LEFT, LEFT, LEFT]),
        (["record 1", "goodbye", "record 2"], [ALIVE, LEFT, ALIVE]),
        # Two alarms: the end of one does not end the other.
        (
            ["connected", "suspect 1", "closed", "alive 1", "connected"],
            [ALIVE, SUSPECT, SUSPECT, SUSPECT, ALIVE],
        ),
        (["connected", "closed", "redial failed", "alive 1"], [ALIVE, SUSPECT, DEAD, DEAD]),
    ],
)
def test_the_states_follow_the_story(story, states):
    view = membership()
    seen = []
    for event in story:
        before = view.state("a")
        changed = EVENTS[event](view)
        seen.append(view.state("a"))
        if before is not seen[-1]:
            assert changed[0].before is before
            assert changed[-1].after is seen[-1]
        else:
            assert changed == []
    assert seen == states


def test_a_closed_connection_that_cannot_be_redialled_fails_at_once():
    view = membership()
    view.connected("a", 5)
    view.disconnected("a")
    assert (view.alive("a"), view.reachable("a")) == (True, False)
    assert view.redial_failed("a") == [Changed("a", SUSPECT, DEAD)]
    assert (view.alive("a"), view.reachable("a")) == (False, False)


def test_a_frozen_peer_is_suspected_by_phi_in_the_same_step_and_relieved_by_its_next_heartbeat():
    view = membership()
    view.watch("a", 150 * MILLISECOND, 0)
    now = 0
    for _ in range(40):
        now += 150 * MILLISECOND
        view.heartbeat("a", 150 * MILLISECOND, now)
    assert view.view("a", now).phi < 0.1
    due = view.next_deadline()
    assert due - now < 2 * SECOND
    assert view.tick(due) == [Changed("a", ALIVE, SUSPECT)]
    assert not view.reachable("a")
    held = view.view("a", due)
    assert held.phi >= 8
    assert held.last_seen == now
    assert view.heartbeat("a", 150 * MILLISECOND, due + SECOND) == [Changed("a", SUSPECT, ALIVE)]
    view.tick(view.next_deadline())
    assert view.unwatch("a") == [Changed("a", SUSPECT, ALIVE)]


def test_a_leaf_is_reachable_only_for_the_members_it_names():
    view = membership()
    view.record(record(1, reachable=False, links=("b", "c")))
    assert view.alive("a")
    assert not view.reachable("a")
    view.record(record(1, reachable=False, links=("b", "me")))
    assert view.reachable("a")


def test_a_leaf_that_moved_on_has_not_failed_and_one_that_vanished_has():
    view = membership()
    view.record(record(1, reachable=False, links=("me",)))
    view.connected("a", 1)
    view.record(record(1, reachable=False, links=("b",)))
    view.disconnected("a")
    view.redial_failed("a")
    assert view.state("a") is ALIVE
    view.record(record(1, reachable=False, links=("me",)))
    view.disconnected("a")
    view.redial_failed("a")
    assert view.state("a") is DEAD


def test_strangers_change_nothing_and_members_are_bounded():
    view = Membership("me")
    for event in EVENTS.values():
        assert event(view) == []
    assert view.state("a") is UNKNOWN
    assert view.reachable("me")
    for index in range(MAX_MEMBERS):
        view.add(str(index))
    with pytest.raises(LocalError):
        view.add("one more")


@given(st.lists(st.sampled_from(sorted(EVENTS)), max_size=12))
def test_every_change_is_told_and_a_restart_with_a_connection_always_brings_a_peer_back(story):
    view = membership()
    told = UNKNOWN
    for event in story:
        for change in EVENTS[event](view):
            assert change.before is told
            assert change.before is not change.after
            told = change.after
        assert view.state("a") is told
        assert not view.reachable("a") or view.alive("a")
    view.record(record(99))
    view.connected("a", 1)
    assert view.state("a") is ALIVE


@given(st.permutations(["suspect 1", "closed", "connected", "alive 1"]))
def test_facts_of_different_detectors_do_not_depend_on_the_order_between_them(order):
    """Connection news in its order and probing news in its order, interleaved in any way, end the same."""
    if order.index("closed") > order.index("connected") or order.index("suspect 1") > order.index("alive 1"):
        return
    view = membership()
    for event in itertools.chain(["heard"], order):
        EVENTS[event](view)
    assert view.state("a") is ALIVE

"""Which connections a peer keeps, and when it dials."""

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from p2pcoord.effects import Dial, Done, Failed
from p2pcoord.links import (
    CHECK_INTERVAL_NS,
    FIRST_BACKOFF_NS,
    FULL_MESH,
    MAX_BACKOFF_NS,
    MAX_DIALS,
    RANDOM_LINKS,
    Links,
)
from p2pcoord.outbox import Outbox

SECOND = 1_000_000_000


class Kept:
    """Links, what they ask for, and whom they could not reach."""

    def __init__(self, bootstrap: tuple[str, ...] = (), *, hidden: tuple[str, ...] = ()) -> None:
        self.outbox = Outbox("me")
        self.failed: list[str] = []
        self.links = Links(
            "me",
            self.outbox,
            Random(1),
            bootstrap,
            addresses=lambda peer: () if peer in hidden else (f"/{peer}",),
            failed=lambda peer, now: self.failed.append(peer),
        )
        self.links.start(0)

    def dials(self) -> list[Dial]:
        return [effect for effect in self.outbox.take() if isinstance(effect, Dial)]

    def dialled(self) -> list[str]:
        return [dial.peer for dial in self.dials()]

    def tick(self, now: int) -> list[Dial]:
        self.links.tick(now)
        return self.dials()


def names(count: int) -> list[str]:
    return [f"p{i}" for i in range(count)]


def connect_when_dialled(kept: Kept, now: int) -> set[str]:
    """Lets every dial succeed until nobody is dialled any more."""
    for _ in range(100):
        dials = kept.tick(now)
        if not dials:
            break
        for dial in dials:
            kept.links.complete(dial.id, Done(), now)
            kept.links.on_connected(dial.peer, now)
        now += CHECK_INTERVAL_NS
    return set(kept.links.connected)


def test_a_small_run_is_a_full_mesh() -> None:
    kept = Kept()
    kept.links.want(["me", *names(FULL_MESH)], [])
    assert connect_when_dialled(kept, 0) == set(names(FULL_MESH))


def test_in_a_larger_run_a_peer_keeps_those_it_needs_and_a_few_at_random() -> None:
    kept = Kept()
    everyone = names(FULL_MESH + 20)
    kept.links.want(["me", *everyone], ["p0", "p1", "gone"])
    connected = connect_when_dialled(kept, 0)
    assert {"p0", "p1"} <= connected
    assert RANDOM_LINKS <= len(connected) <= RANDOM_LINKS + 2


def test_who_was_chosen_at_random_stays_while_it_is_a_member() -> None:
    kept = Kept()
    everyone = names(FULL_MESH + 20)
    kept.links.want(everyone, [])
    chosen = connect_when_dialled(kept, 0)
    kept.links.want(everyone, [])
    assert kept.tick(99 * SECOND) == []
    gone = min(chosen)
    kept.links.want([member for member in everyone if member != gone], [])
    more = connect_when_dialled(kept, 200 * SECOND) - chosen
    assert len(more) == 1


@given(st.integers(FULL_MESH + 1, 300), st.integers(0, 7))
def test_connections_stay_flat_as_the_run_grows(members: int, needed: int) -> None:
    kept = Kept()
    kept.links.want(names(members), names(needed))
    assert len(connect_when_dialled(kept, 0)) <= RANDOM_LINKS + needed


def test_few_dials_are_under_way_at_a_time() -> None:
    kept = Kept()
    kept.links.want(names(FULL_MESH), [])
    first = kept.tick(0)
    assert len(first) == MAX_DIALS
    assert kept.tick(CHECK_INTERVAL_NS) == []
    kept.links.complete(first[0].id, Failed("refused"), SECOND)
    assert len(kept.tick(2 * CHECK_INTERVAL_NS)) == 1


def test_a_dial_that_fails_is_tried_again_after_twice_as_long_up_to_half_a_minute() -> None:
    kept = Kept()
    kept.links.want(["other"], [])
    now, waits, failed_at = 0, [], 0
    for _ in range(200):
        for dial in kept.tick(now):
            waits.append(now - failed_at)
            failed_at = now
            kept.links.complete(dial.id, Failed("refused"), now)
        now += CHECK_INTERVAL_NS
    assert [wait // FIRST_BACKOFF_NS for wait in waits[1:6]] == [1, 2, 4, 8, 16]
    assert set(waits[6:]) == {MAX_BACKOFF_NS}
    assert len(waits) > 8
    assert set(kept.failed) == {"other"}


def test_a_connection_ends_the_waiting() -> None:
    kept = Kept()
    kept.links.want(["other"], [])
    for now in (0, 1, 3, 7):
        for dial in kept.tick(now * SECOND):
            kept.links.complete(dial.id, Failed("refused"), now * SECOND)
    kept.links.on_connected("other", 8 * SECOND)
    kept.links.on_disconnected("other", 8 * SECOND)
    (dial,) = kept.dials()
    kept.links.complete(dial.id, Failed("refused"), 8 * SECOND)
    assert kept.tick(9 * SECOND)  # one second again, not sixteen


def test_a_connection_that_closed_is_dialled_again_at_once_and_a_failure_is_told() -> None:
    kept = Kept()
    kept.links.want(["other"], [])
    kept.links.on_connected("other", 0)
    kept.links.on_disconnected("other", 5)
    (dial,) = kept.dials()
    assert (dial.peer, dial.addresses) == ("other", ("/other",))
    assert kept.failed == []
    assert kept.links.complete(dial.id, Failed("refused"), 6)
    assert kept.failed == ["other"]
    assert not kept.links.complete(dial.id, Failed("refused"), 6)


def test_a_connection_to_somebody_who_is_not_wanted_may_close() -> None:
    kept = Kept()
    kept.links.on_connected("stranger", 0)
    kept.links.on_disconnected("stranger", 5)
    assert kept.dials() == []


def test_who_has_no_addresses_cannot_be_dialled_and_that_is_told_at_once() -> None:
    kept = Kept(hidden=("leaf",))
    kept.links.want(["leaf"], [])
    kept.links.on_connected("leaf", 0)
    kept.links.on_disconnected("leaf", 5)
    assert kept.dials() == []
    assert kept.failed == ["leaf"]


def test_who_is_connected_or_being_dialled_is_not_dialled_again() -> None:
    kept = Kept()
    kept.links.want(["other"], [])
    kept.links.dial("other", 0)
    kept.links.dial("other", 0)
    assert kept.dialled() == ["other"]
    assert kept.tick(CHECK_INTERVAL_NS) == []
    kept.links.on_connected("third", 0)
    kept.links.dial("third", 0)
    assert kept.dials() == []


def test_a_peer_that_knows_nobody_dials_the_addresses_it_was_given_and_only_then() -> None:
    kept = Kept(("host:1", "host:2"))
    dials = kept.tick(0)
    assert [(dial.peer, dial.addresses) for dial in dials] == [("", ("host:1",)), ("", ("host:2",))]
    kept.links.complete(dials[0].id, Failed("refused"), 0)
    assert kept.failed == []  # an address is no member: its failure says nothing of anybody
    kept.links.complete(dials[1].id, Done(), 0)
    kept.links.on_connected("founder", 0)
    assert kept.tick(60 * SECOND) == []
    kept.links.on_disconnected("founder", 61 * SECOND)
    assert len(kept.tick(62 * SECOND)) == 2


def test_addresses_that_do_not_answer_are_tried_less_and_less_often() -> None:
    kept = Kept(("host:1",))
    tries = 0
    for second in range(120):
        for dial in kept.tick(second * SECOND):
            tries += 1
            kept.links.complete(dial.id, Failed("refused"), second * SECOND)
    assert tries == 8  # at 0, 1, 3, 7, 15, 31, 61, 91 s


def test_a_peer_with_less_than_half_of_its_links_dials_the_addresses_it_was_given_too() -> None:
    kept = Kept(("host:1",), hidden=("a", "b", "c", "d"))
    kept.links.want(["a", "b", "c", "d"], [])
    kept.links.on_connected("a", 0)
    assert [dial.addresses for dial in kept.tick(0)] == [("host:1",)]
    other = Kept(("host:1",), hidden=("a", "b", "c", "d"))
    other.links.want(["a", "b", "c", "d"], [])
    for peer in ("a", "b"):
        other.links.on_connected(peer, 0)
    assert other.tick(0) == []


def test_who_has_just_lost_everybody_tries_the_addresses_it_was_given_without_waiting() -> None:
    kept = Kept(("host:1",))
    for second in (0, 1, 3, 7):
        for dial in kept.tick(second * SECOND):
            kept.links.complete(dial.id, Failed("refused"), second * SECOND)
    kept.links.on_connected("founder", 8 * SECOND)
    kept.links.on_disconnected("founder", 8 * SECOND)
    assert len(kept.tick(8 * SECOND)) == 1

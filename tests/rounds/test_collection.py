"""What a coordinator counts of what is offered to its plan. Its revisions are told in tests/scripts/rounds."""

import math

import msgspec
import pytest

from p2pcoord.content import ContentRef
from p2pcoord.rounds.collection import MAX_OFFERED_EARLY, Collection
from p2pcoord.rounds.messages import Offering
from p2pcoord.rounds.plan import MAX_ASSIGNMENTS
from p2pcoord.rounds.reliability import SUSPECT_PATIENCE_NS
from p2pcoord.wire import encode
from tests.round_runner import collecting, header
from tests.script_runner import authority_of, peer_id


def test_a_header_for_an_assignment_that_was_never_given_to_its_sender_does_not_count() -> None:
    world = collecting()
    world.inject("B", "A", Offering(header(world, "B", 2)))
    assert world.coordinator("A").collection.headers == {}
    world.inject("B", "A", Offering(header(world, "B", 1)))
    assert set(world.coordinator("A").collection.headers) == {(1, 1)}
    assert world.rejected("A") == {}


def test_an_assignment_counts_once_and_what_was_counted_first_stays() -> None:
    world = collecting()
    first = header(world, "B", 1)
    world.inject("B", "A", Offering(first))
    world.inject("B", "A", Offering(first))
    assert world.coordinator("A").collection.headers == {(1, 1): first}


def test_offers_by_strangers_are_refused() -> None:
    world = collecting()
    world.inject("D", "A", Offering(header(world, "D", 1)))
    assert world.rejected("A") == {"stranger": 1}
    assert world.coordinator("A").collection.headers == {}


def test_nobody_offers_what_another_made() -> None:
    world = collecting()
    world.inject("B", "A", Offering(header(world, "C", 2)))
    assert world.rejected("A") == {"bad_contribution": 1}
    assert world.coordinator("A").collection.headers == {}


@pytest.mark.parametrize(
    "changes", [{"base": bytes(32)}, {"origin_round": 0}, {"origin_round": 2}], ids=["base", "old", "early"]
)
def test_an_offer_for_another_round_or_from_another_base_is_too_late_and_no_fault(
    changes: dict[str, object],
) -> None:
    world = collecting()
    world.inject("B", "A", Offering(header(world, "B", 1, **changes)))
    assert world.rejected("A") == {}
    assert world.coordinator("A").collection.headers == {}


@pytest.mark.parametrize(
    ("changes", "kind"),
    [({"norm": math.inf}, "bad_contribution"), ({"content": ContentRef(bytes(32), 1)}, "bad_contribution")],
)
def test_an_impossible_header_is_refused(changes: dict[str, object], kind: str) -> None:
    world = collecting()
    world.inject("B", "A", Offering(header(world, "B", 1, **changes)))
    assert world.rejected("A") == {kind: 1}
    assert world.coordinator("A").collection.headers == {}


def test_two_headers_in_one_slot_exclude_their_signer() -> None:
    world = collecting()
    world.inject("B", "A", Offering(header(world, "B", 1)))
    other = ContentRef(b"\x07" * 32, world.rules.contribution_bytes)
    world.inject("B", "A", Offering(header(world, "B", 1, content=other)))
    world.execute("run 1s")
    for letter in "AC":
        assert "two ContributionHeader" in world.peer(letter).roster.excluded(peer_id("B"))


def test_more_samples_than_there_are_are_refused_and_more_than_were_dealt_do_not_count() -> None:
    world = collecting()
    world.inject("B", "A", Offering(header(world, "B", 1, samples=world.rules.train_length + 1)))
    assert world.rejected("A") == {"bad_contribution": 1}
    world.inject("B", "A", Offering(header(world, "B", 1, samples=35)))  # of 100, over three
    assert world.coordinator("A").collection.headers == {}
    world.inject("C", "A", Offering(header(world, "C", 2, samples=33)))
    assert set(world.coordinator("A").collection.headers) == {(1, 2)}


def test_what_two_members_offer_does_not_crowd_out_the_others() -> None:
    world = collecting()
    for letter in "BC":
        for assignment in range(MAX_ASSIGNMENTS):
            world._arrive(letter, "A", encode(Offering(header(world, letter, assignment % 256))))
            other = msgspec.structs.replace(header(world, letter, 1), assignment=assignment)
            world._arrive(letter, "A", encode(Offering(authority_of(letter).sign(other))))
    collection = world.coordinator("A").collection
    assert set(collection._offered) == {(1, peer_id("B")), (2, peer_id("C"))}
    world.execute("release A")
    world.execute("settle")
    assert set(collection.headers) == {(1, 0), (1, 1), (1, 2)}


def test_before_there_is_a_plan_each_member_has_room_for_a_few_offers() -> None:
    world = collecting()
    collection = world.coordinator("A").collection
    fresh = Collection(collection.setting, collection._reliability, 1, collection.parent, 0)
    for assignment in range(200):
        fresh.admit(peer_id("B"), header(world, "B", assignment))
    fresh.admit(peer_id("C"), header(world, "C", 2))
    assert len(fresh._offered) == MAX_OFFERED_EARLY + 1


def test_what_was_offered_by_who_was_suspected_until_now_counts_as_soon_as_it_is_fit() -> None:
    """A coordinator may remember from an earlier term that a member was silent; what that one offers comes once."""
    world = collecting()
    coordinator = world.coordinator("A")
    coordinator.reliability._suspect_since[peer_id("B")] = -SUSPECT_PATIENCE_NS
    coordinator.collection.admit(peer_id("B"), header(world, "B", 1))
    assert coordinator.collection.headers == {}
    world.execute("run 1s")
    assert set(coordinator.collection.headers) == {(1, 1)}

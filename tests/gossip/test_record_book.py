"""The record book: who is believed, what is kept, and when our own record is published."""

import itertools
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcoord.errors import LocalError
from p2pcoord.gossip.record_book import (
    MAX_OTHER_RECORDS,
    MAX_TOMBSTONES,
    Equivocation,
    IncarnationRaised,
    OwnRecordChanged,
    RecordChanged,
    Rejected,
)
from p2pcoord.gossip.records import MAX_RECORD_BYTES
from p2pcoord.gossip.version_vector import MAX_COUNTER, Stamp
from p2pcoord.wire import encode
from tests.gossip.signed_records import Verifier, book, record, state

SECOND = 1_000_000_000
replace = msgspec.structs.replace


# Our own record ----------------------------------------------------------------------------------------------------


def test_changes_are_gathered_for_the_interval_and_published_once():
    mine = book()
    for step in range(1, 100):
        assert mine.update(replace(mine.draft, local_step=step), step)
        assert mine.tick(step) == []
    assert mine.own.local_step == 0
    assert mine.next_deadline() == 3 * SECOND
    (published,) = mine.tick(3 * SECOND)
    assert published == OwnRecordChanged(mine.own, urgent=False)
    assert (mine.own.local_step, mine.own.version) == (99, 2)
    assert Verifier()(mine.own)
    assert mine.next_deadline() is None


@pytest.mark.parametrize(
    "change",
    [{"addresses": ("/ip4/10.0.0.1/tcp/1",)}, {"leaving": True}, {"reachable": False, "links": ("a",)}],
)
def test_what_others_must_know_at_once_is_published_at_once(change):
    mine = book()
    mine.update(replace(mine.draft, **change), SECOND)
    assert mine.next_deadline() <= SECOND
    assert mine.tick(SECOND) == [OwnRecordChanged(mine.own, urgent=True)]


def test_a_flapping_address_is_slowed_down_but_a_goodbye_is_not():
    mine = book()
    published = 0
    for step in range(1000):
        now = SECOND + step * SECOND // 1000
        address = (f"/ip4/10.0.0.{step % 2}/tcp/1",)
        mine.update(replace(mine.draft, addresses=address), now)
        published += len(mine.tick(now))
    assert 2 <= published <= 6
    mine.update(replace(mine.draft, leaving=True), now + 1)
    assert mine.tick(now + 1) == [OwnRecordChanged(mine.own, urgent=True)]


def test_a_change_that_is_taken_back_is_not_published():
    mine = book()
    assert mine.update(replace(mine.draft, queue_length=1), 1)
    assert not mine.update(replace(mine.draft, queue_length=0), 2)
    assert mine.tick(10 * SECOND) == []
    assert mine.own.version == 1


def test_a_record_that_nobody_would_accept_is_our_own_error():
    mine = book()
    addresses = tuple(str(index) * 192 for index in range(10, 32))
    with pytest.raises(LocalError, match="fewer addresses"):
        mine.update(replace(mine.draft, addresses=addresses), 1)


def test_the_interval_grows_with_the_run_so_that_the_stream_does_not():
    mine = book()
    mine.admit(f"m{index}" for index in range(1000))
    mine.merge("x", [record(f"m{index}") for index in range(1000)], 0)
    assert 1001 / (mine.update_interval_ns / SECOND) <= 51


# What others say ---------------------------------------------------------------------------------------------------


def test_a_newer_record_is_taken_and_an_older_one_is_not_even_checked():
    verify = Verifier()
    mine = book(verify=verify)
    new, old = record("a", 2, 1), record("a", 1, 9)
    assert mine.merge("b", [new], 1) == [RecordChanged(new)]
    assert mine.merge("c", [old, new, replace(old, signature=b"x")], 2) == []
    assert verify.calls == 1
    newer = record("a", 2, 2, local_loss=math.nan)
    assert mine.merge("b", [newer, newer], 3) == [RecordChanged(newer)]
    assert verify.calls == 2


def test_a_bad_signature_ends_the_message_and_is_blamed_on_its_sender():
    mine = book()
    forged = replace(record("a", 1, 1), local_step=7)
    outputs = mine.merge("liar", [record("b"), forged, record("c")], 1)
    assert [type(output) for output in outputs] == [RecordChanged, Rejected]
    assert (outputs[1].sender, outputs[1].kind) == ("liar", "bad_signature")
    assert set(state(mine)) == {"me", "b"}


def test_two_contents_under_one_stamp_are_evidence_once_and_all_hold_the_same_one():
    first, second = record("a", 1, 5, local_step=1), record("a", 1, 5, local_step=2)
    held = set()
    for order in itertools.permutations([first, second]):
        mine = book()
        outputs = mine.merge("b", [*order, *order], 1)
        assert [output for output in outputs if isinstance(output, Equivocation)] == [Equivocation(*order)]
        held.add(mine.get("a"))
    assert len(held) == 1


def test_an_altered_copy_of_a_held_record_is_no_evidence_against_its_owner():
    mine = book()
    mine.merge("b", [record("a", 1, 5)], 1)
    outputs = mine.merge("liar", [replace(record("a", 1, 5), local_step=3)], 2)
    assert [(output.sender, output.kind) for output in outputs] == [("liar", "bad_signature")]


def test_our_own_past_is_outbid_by_a_higher_incarnation():
    mine = book()
    outputs = mine.merge("b", [record("me", 4, 17, local_step=3)], 1)
    assert outputs == [IncarnationRaised(5), OwnRecordChanged(mine.own, urgent=True)]
    assert mine.own.stamp == Stamp(5, 1)
    assert mine.merge("b", [record("me", 4, 18)], 2) == []


def test_what_our_key_did_not_sign_does_not_raise_our_incarnation():
    mine = book()
    (rejected,) = mine.merge("liar", [replace(record("me", 9, 1), local_step=1)], 1)
    assert rejected.kind == "bad_signature"
    assert mine.own.incarnation == 1
    (rejected,) = mine.merge("liar", [record("me", MAX_COUNTER, 1)], 1)
    assert rejected.kind == "bad_incarnation"


def test_records_too_large_or_too_many_are_refused():
    mine = book()
    big = record("a", addresses=tuple(str(index) * 96 for index in range(10, 34)))
    assert len(encode(big)) > MAX_RECORD_BYTES
    assert mine.merge("b", [big], 1)[0].kind == "oversized"
    for index in range(MAX_OTHER_RECORDS - 1):  # ours is one of them until we are admitted
        assert isinstance(mine.merge("b", [record(f"s{index}")], 1)[0], RecordChanged)
    assert mine.merge("b", [record("one more")], 1)[0].kind == "too_many_records"
    mine.admit(["member"])
    assert isinstance(mine.merge("b", [record("member")], 1)[0], RecordChanged)
    mine.admit(["s0"])
    assert isinstance(mine.merge("b", [record("one more")], 1)[0], RecordChanged)


@pytest.mark.parametrize("admitted", [True, False])
def test_old_gossip_does_not_raise_the_long_dead_but_a_restart_does(admitted):
    mine = book()
    if admitted:
        mine.admit(["a"])
    mine.merge("b", [record("a", 3, 8)], 1)
    mine.forget("a")
    assert mine.get("a") is None
    assert mine.merge("b", [record("a", 3, 9), record("a", 2, 1)], 3) == []
    assert mine.merge("b", [record("a", 4, 1)], 4) == [RecordChanged(record("a", 4, 1))]


def test_tombstones_of_strangers_are_bounded():
    mine = book()
    for index in range(MAX_TOMBSTONES + 50):
        mine.merge("b", [record(f"s{index}")], 1)
        mine.forget(f"s{index}")
    assert len(mine._tombstones) == MAX_TOMBSTONES
    assert len(mine.records()) == 1


RECORDS = st.lists(
    st.builds(
        record, st.sampled_from("abc"), st.integers(1, 2), st.integers(1, 3), local_step=st.integers(0, 1)
    ),
    max_size=6,
)


@given(RECORDS, RECORDS, RECORDS, st.randoms(use_true_random=False))
def test_records_merge_to_the_same_in_any_order_and_grouping(a, b, c, shuffle):
    mine, other = book(), book()
    mine.merge("x", [*a, *b, *c], 1)
    mixed = [*c, *a, *b, *a, *c]
    shuffle.shuffle(mixed)
    other.merge("x", mixed[:3], 1)
    other.merge("y", mixed[3:], 2)
    assert state(mine) == state(other)

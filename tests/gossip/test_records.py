"""State records: who is believed, what is kept, and that exchanges bring everybody to the same under a small budget."""

import itertools
import math
import random
from hashlib import sha256

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcoord.errors import LocalError
from p2pcoord.gossip.records import (
    MAX_OTHER_RECORDS,
    MAX_RECORD_BYTES,
    MAX_TOMBSTONES,
    MAX_WANTED,
    CapabilityProfile,
    Equivocation,
    IncarnationRaised,
    Output,
    OwnRecordChanged,
    PeerRecord,
    RecordBook,
    RecordChanged,
    RecordSettings,
    Rejected,
    SendAck,
    SendSyn,
    SendSynAck,
)
from p2pcoord.gossip.version_vector import MAX_COUNTER, Stamp, Wanted
from p2pcoord.identity import Authority, Ed25519Signer, verify_ed25519
from p2pcoord.wire import decode, encode

SECOND = 1_000_000_000
replace = msgspec.structs.replace


def sign(record: PeerRecord) -> PeerRecord:
    """A keyed hash in place of Ed25519: nobody in these tests signs for another but where it says so."""
    content = encode(replace(record, signature=b""))
    return replace(record, signature=sha256(record.peer.encode() + content).digest())


class Verifier:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, record: PeerRecord) -> bool:
        self.calls += 1
        return sign(record).signature == record.signature


def record(peer: str, incarnation: int = 1, version: int = 1, **state: object) -> PeerRecord:
    return sign(PeerRecord(peer, incarnation, version, name=f"name of {peer}", **state))


def book(
    own: str = "me", settings: RecordSettings | None = None, verify: Verifier | None = None
) -> RecordBook:
    rng = random.Random(own)
    return RecordBook(record(own), sign, verify or Verifier(), rng, 0, settings)


def exchange(a: RecordBook, b: RecordBook, now: int) -> list[Output]:
    """One syn, syn-ack, ack from a to b over the wire; what both learned."""
    a.partner(b.own.peer, alive=True)
    a._next_exchange = now
    (syn,) = [output for output in a.tick(now) if isinstance(output, SendSyn)]
    learned: list[Output] = []
    for output in b.receive_syn(a.own.peer, decode(encode(syn.digest), type(syn.digest)), now):
        assert isinstance(output, SendSynAck)
        for answer in a.receive_syn_ack(b.own.peer, output.records, output.wanted, now):
            if isinstance(answer, SendAck):
                learned += b.receive_ack(a.own.peer, answer.records, now)
            else:
                learned.append(answer)
    return learned


def state(of: RecordBook) -> dict[str, PeerRecord]:
    return {each.peer: each for each in of.records()}


# Our own record ----------------------------------------------------------------------------------------------------


def test_changes_are_gathered_for_the_interval_and_published_once():
    mine = book()
    for step in range(1, 100):
        assert mine.update(replace(mine.draft, local_step=step), step) == []
    assert mine.own.local_step == 0
    assert mine.next_deadline() == 3 * SECOND
    (published,) = mine.tick(3 * SECOND)
    assert published == OwnRecordChanged(mine.own)
    assert (mine.own.local_step, mine.own.version) == (99, 2)
    assert Verifier()(mine.own)
    assert mine.next_deadline() is None


@pytest.mark.parametrize(
    "change",
    [{"addresses": ("/ip4/10.0.0.1/tcp/1",)}, {"leaving": True}, {"reachable": False, "links": ("a",)}],
)
def test_what_others_must_know_at_once_is_published_and_spread_at_once(change):
    mine = book()
    for peer in "abcdef":
        mine.partner(peer, alive=True)
    outputs = mine.update(replace(mine.draft, **change), SECOND)
    assert outputs[0] == OwnRecordChanged(mine.own)
    assert len({output.to for output in outputs[1:] if isinstance(output, SendSyn)}) == 3


def test_a_flapping_address_is_slowed_down_but_a_goodbye_is_not():
    mine = book()
    published = 0
    for step in range(1000):
        now = SECOND + step * SECOND // 1000
        address = (f"/ip4/10.0.0.{step % 2}/tcp/1",)
        published += len(mine.update(replace(mine.draft, addresses=address), now)) + len(mine.tick(now))
    assert 2 <= published <= 6
    assert mine.update(replace(mine.draft, leaving=True), now + 1)


def test_a_change_that_is_taken_back_is_not_published():
    mine = book()
    mine.update(replace(mine.draft, queue_length=1), 1)
    mine.update(replace(mine.draft, queue_length=0), 2)
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
    assert mine.merge("b", [new], 1) == [RecordChanged(new, None)]
    assert mine.merge("c", [old, new, replace(old, signature=b"x")], 2) == []
    assert verify.calls == 1
    newer = record("a", 2, 2, local_loss=math.nan)
    assert mine.merge("b", [newer, newer], 3) == [RecordChanged(newer, new)]
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
    assert outputs == [IncarnationRaised(5), OwnRecordChanged(mine.own)]
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
    mine, other = book(), book("other")
    if admitted:
        mine.admit(["a"])
        other.admit(["a"])
    for each in (mine, other):
        each.merge("b", [record("a", 3, 8)], 1)
    mine.forget("a")
    exchange(mine, other, SECOND)
    exchange(other, mine, 2 * SECOND)
    assert mine.get("a") is None
    assert mine.merge("b", [record("a", 3, 9), record("a", 2, 1)], 3) == []
    assert mine.merge("b", [record("a", 4, 1)], 4) == [RecordChanged(record("a", 4, 1), None)]


def test_tombstones_of_strangers_are_bounded():
    mine = book()
    for index in range(MAX_TOMBSTONES + 50):
        mine.merge("b", [record(f"s{index}")], 1)
        mine.forget(f"s{index}")
    assert len(mine._tombstones) == MAX_TOMBSTONES
    assert len(mine.records()) == 1


def test_a_record_signed_with_ed25519_survives_the_wire_and_not_a_changed_byte():
    authority = Authority(Ed25519Signer(bytes(range(32))), verify_ed25519, b"run" * 8)
    profile = CapabilityProfile("cuda:0", 80 << 30, 16, 10**9, 12.5)
    signed = authority.sign(
        PeerRecord(
            authority.peer_id, 1, 1, "lab", ("/ip4/10.0.0.1/tcp/4001",), profile=profile, local_loss=2.5
        )
    )
    assert authority.verify(signed.peer, decode(encode(signed), PeerRecord))
    assert not authority.verify(signed.peer, replace(signed, queue_length=1))
    assert len(encode(signed)) < 400


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


# Exchanges ---------------------------------------------------------------------------------------------------------


def test_one_exchange_brings_both_sides_what_they_lack():
    a, b = book("a"), book("b")
    a.admit(["m", "n"])
    b.admit(["m", "n"])
    a.merge("x", [record("m", 1, 1), record("n", 1, 1)], 0)
    b.merge("x", [record("m", 1, 2), record("s", 1, 1)], 0)
    exchange(a, b, SECOND)
    assert state(a) == state(b)
    assert set(state(a)) == {"a", "b", "m", "n", "s"}


def test_who_knows_fewer_admissions_learns_the_rest_from_exchanges_it_opens():
    a, b = book("a"), book("b")
    a.admit(["m", "n"])
    b.admit(["m"])
    a.merge("x", [record("m"), record("n")], 0)
    exchange(b, a, SECOND)
    assert set(state(b)) == {"a", "b", "m", "n"}


def test_a_joiner_that_knows_no_order_learns_everybody():
    old, joiner = book("old"), book("joiner")
    members = [f"m{index}" for index in range(20)]
    old.admit(members)
    old.merge("x", map(record, members), 0)
    exchange(joiner, old, SECOND)
    exchange(joiner, old, 2 * SECOND)
    assert set(members) < set(state(joiner))


def test_no_message_goes_over_its_budget_and_a_record_of_any_size_finds_room():
    mine = book()
    members = [f"m{index}" for index in range(200)]
    mine.admit(members)
    mine.merge("x", map(record, members), 0)
    large = record("m0", 1, 2, addresses=tuple(str(index) * 90 for index in range(10, 26)))
    assert 2500 < len(encode(large)) < MAX_RECORD_BYTES
    mine.merge("x", [large], 0)
    empty = book("empty").digest()
    found = False
    for _ in range(60):
        records = mine.delta(empty, MAX_RECORD_BYTES)
        assert sum(len(encode(each)) for each in records) <= MAX_RECORD_BYTES
        found = found or large in records
    assert found


def test_a_small_budget_starves_no_record_while_others_change_all_the_time():
    settings = RecordSettings(message_budget_bytes=MAX_RECORD_BYTES)
    source, sink = book("source", settings), book("sink", settings)
    hot, cold = [f"h{index}" for index in range(60)], [f"c{index}" for index in range(200)]
    for each in (source, sink):
        each.admit([*hot, *cold])
    source.merge("x", map(record, cold), 0)
    exchanges = 0
    while not set(cold) <= set(state(sink)):
        exchanges += 1
        source.merge("x", [record(peer, 1, exchanges) for peer in hot], 0)
        exchange(sink, source, exchanges * SECOND)
        assert exchanges < 40
    print(f"200 resting records among 60 that change each round, 4 KiB a message: {exchanges} exchanges")


def test_an_answer_is_not_given_twice_in_a_moment_and_unasked_wishes_get_nothing():
    mine = book()
    digest = book("other").digest()
    assert mine.receive_syn("other", digest, SECOND)
    assert mine.receive_syn("other", digest, SECOND + 1) == []
    assert mine.receive_syn("other", digest, 2 * SECOND)
    assert mine.receive_syn_ack("other", (), (Wanted("me", Stamp(0, 0)),), SECOND) == []


def test_no_more_is_asked_for_than_an_answer_can_hold():
    mine, other = book(), book("other")
    members = [f"m{index}" for index in range(300)]
    for each in (mine, other):
        each.admit(members)
    other.merge("x", map(record, members), 0)
    (answer,) = mine.receive_syn("other", other.digest(), SECOND)
    assert len(answer.wanted) == MAX_WANTED


def test_an_impossible_digest_is_rejected():
    bad = replace(book("other").digest(), incarnations=(1,))
    (rejected,) = book().receive_syn("other", bad, 1)
    assert rejected.kind == "bad_digest"


@pytest.mark.parametrize("peers", [25, 100])
def test_everybody_learns_everything_within_few_periods_at_a_small_budget(peers):
    settings = RecordSettings(message_budget_bytes=MAX_RECORD_BYTES)
    names = [f"peer{index:03}" for index in range(peers)]
    books = {name: book(name, settings) for name in names}
    for each in books.values():
        each.admit(names)
        for name in names:
            each.partner(name, alive=True)
    largest = 0
    for step in range(1, 400):
        now = step * SECOND // 10
        for name, each in books.items():
            for output in each.tick(now):
                if not isinstance(output, SendSyn):
                    continue
                for answer in books[output.to].receive_syn(name, output.digest, now):
                    largest = max(largest, sum(len(encode(one)) for one in answer.records))
                    for ack in each.receive_syn_ack(output.to, answer.records, answer.wanted, now):
                        if isinstance(ack, SendAck):
                            largest = max(largest, sum(len(encode(one)) for one in ack.records))
                            books[output.to].receive_ack(name, ack.records, now)
        if all(len(each.records()) == peers for each in books.values()):
            break
    print(f"{peers} peers know each other after {step / 10} s; largest message {largest} bytes")
    assert largest <= MAX_RECORD_BYTES
    assert step / 10 < 15

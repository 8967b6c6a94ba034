"""Exchanges: that they bring everybody to the same records, under a small budget."""

import random

import msgspec
import pytest

from p2pcoord.errors import LocalError
from p2pcoord.gossip.exchange import MAX_WANTED, Exchange, SendAck, SendSyn, SendSynAck
from p2pcoord.gossip.record_book import Output, RecordBook
from p2pcoord.gossip.records import MAX_RECORD_BYTES, PeerRecord
from p2pcoord.gossip.version_vector import Stamp, Wanted
from p2pcoord.wire import decode, encode
from tests.gossip.signed_records import book, record, state

SECOND = 1_000_000_000
replace = msgspec.structs.replace


def exchanges(of: RecordBook, budget_bytes: int = 4 * MAX_RECORD_BYTES) -> Exchange:
    return Exchange(of, random.Random(of.own.peer), 0, budget_bytes)


class Peer:
    """A book and its exchanges."""

    def __init__(self, own: str, budget_bytes: int = 4 * MAX_RECORD_BYTES) -> None:
        self.own = own
        self.book = book(own)
        self.exchange = exchanges(self.book, budget_bytes)

    def knows(self, *records: PeerRecord) -> None:
        self.book.merge("x", records, 0)

    @property
    def state(self) -> dict[str, PeerRecord]:
        return state(self.book)


def exchange(a: Peer, b: Peer, now: int) -> list[Output]:
    """One syn, syn-ack, ack from a to b over the wire; what both learned."""
    a.exchange.partner(b.own, alive=True)
    a.exchange.hurry(now)
    syn = next(o for o in a.exchange.tick(now) if isinstance(o, SendSyn) and o.to == b.own)
    learned: list[Output] = []
    for output in b.exchange.receive_syn(a.own, decode(encode(syn.digest), type(syn.digest)), now):
        assert isinstance(output, SendSynAck)
        for answer in a.exchange.receive_syn_ack(b.own, output.records, output.wanted, now):
            if isinstance(answer, SendAck):
                learned += b.book.merge(a.own, answer.records, now)
            else:
                learned.append(answer)
    return learned


def test_what_is_urgent_is_told_to_several_at_once_and_the_rest_to_one_a_period():
    mine = Peer("me")
    for peer in "abcdef":
        mine.exchange.partner(peer, alive=True)
    due = mine.exchange.next_deadline()
    assert due is not None
    assert mine.exchange.tick(due - 1) == []
    assert len(mine.exchange.tick(due)) == 1
    mine.exchange.hurry(due + 5)
    assert mine.exchange.next_deadline() == due + 5
    told = mine.exchange.tick(due + 5)
    assert len({output.to for output in told if isinstance(output, SendSyn)}) == 3
    later = mine.exchange.next_deadline()
    assert later is not None
    assert 0.9 * SECOND <= later - due - 5 <= 1.1 * SECOND
    assert len(mine.exchange.tick(later)) == 1


def test_the_dead_are_asked_now_and_then_and_who_is_no_partner_never():
    mine = Peer("me")
    assert mine.exchange.next_deadline() is None
    for peer in "abcd":
        mine.exchange.partner(peer, alive=True)
    mine.exchange.partner("dead", alive=False)
    mine.exchange.partner("me", alive=True)
    mine.exchange.partner("gone", alive=True)
    mine.exchange.no_partner("gone")
    mine.exchange.partner("forgotten", alive=False)
    mine.exchange.forget("forgotten")
    asked: list[str] = []
    for _ in range(200):
        due = mine.exchange.next_deadline()
        assert due is not None
        asked += [output.to for output in mine.exchange.tick(due) if isinstance(output, SendSyn)]
    assert set(asked) == {*"abcd", "dead"}
    assert 20 <= asked.count("dead") <= 60  # 1 in 5


@pytest.mark.parametrize("admitted", [True, False])
def test_a_partner_that_still_holds_a_forgotten_record_does_not_bring_it_back(admitted):
    mine, other = Peer("me"), Peer("other")
    for each in (mine, other):
        if admitted:
            each.book.admit(["a"])
        each.knows(record("a", 3, 8))
    mine.book.forget("a")
    mine.exchange.forget("a")
    exchange(mine, other, SECOND)
    exchange(other, mine, 2 * SECOND)
    assert mine.book.get("a") is None


def test_one_exchange_brings_both_sides_what_they_lack():
    a, b = Peer("a"), Peer("b")
    a.book.admit(["m", "n"])
    b.book.admit(["m", "n"])
    a.knows(record("m", 1, 1), record("n", 1, 1))
    b.knows(record("m", 1, 2), record("s", 1, 1))
    exchange(a, b, SECOND)
    assert a.state == b.state
    assert set(a.state) == {"a", "b", "m", "n", "s"}


def test_who_knows_fewer_admissions_learns_the_rest_from_exchanges_it_opens():
    a, b = Peer("a"), Peer("b")
    a.book.admit(["m", "n"])
    b.book.admit(["m"])
    a.knows(record("m"), record("n"))
    exchange(b, a, SECOND)
    assert set(b.state) == {"a", "b", "m", "n"}


def test_a_joiner_that_knows_no_order_learns_everybody():
    old, joiner = Peer("old"), Peer("joiner")
    members = [f"m{index}" for index in range(20)]
    old.book.admit(members)
    old.knows(*map(record, members))
    exchange(joiner, old, SECOND)
    exchange(joiner, old, 2 * SECOND)
    assert set(members) < set(joiner.state)


def test_no_message_goes_over_its_budget_and_a_record_of_any_size_finds_room():
    mine = Peer("me")
    members = [f"m{index}" for index in range(200)]
    mine.book.admit(members)
    mine.knows(*map(record, members))
    large = record("m0", 1, 2, addresses=tuple(str(index) * 90 for index in range(10, 26)))
    assert 2500 < len(encode(large)) < MAX_RECORD_BYTES
    mine.knows(large)
    empty = Peer("empty").exchange.digest()
    found = False
    for _ in range(60):
        records = mine.exchange.delta(empty, MAX_RECORD_BYTES)
        assert sum(len(encode(each)) for each in records) <= MAX_RECORD_BYTES
        found = found or large in records
    assert found


def test_a_smgroupbudget_starves_no_record_while_others_change_groupthe_time():
    source, sink = Peer("source", MAX_RECORD_BYTES), Peer("sink", MAX_RECORD_BYTES)
    hot, cold = [f"h{index}" for index in range(60)], [f"c{index}" for index in range(200)]
    for each in (source, sink):
        each.book.admit([*hot, *cold])
    source.knows(*map(record, cold))
    rounds = 0
    while not set(cold) <= set(sink.state):
        rounds += 1
        source.knows(*(record(peer, 1, rounds) for peer in hot))
        exchange(sink, source, rounds * SECOND)
        assert rounds < 40
    print(f"200 resting records among 60 that change each round, 4 KiB a message: {rounds} exchanges")


def test_an_answer_is_not_given_twice_in_a_moment_and_unasked_wishes_get_nothing():
    mine = exchanges(book())
    digest = exchanges(book("other")).digest()
    assert mine.receive_syn("other", digest, SECOND)
    assert mine.receive_syn("other", digest, SECOND + 1) == []
    assert mine.receive_syn("other", digest, 2 * SECOND)
    assert mine.receive_syn_ack("other", (), (Wanted("me", Stamp(0, 0)),), SECOND) == []


def test_no_more_is_asked_for_than_an_answer_can_hold():
    mine, other = Peer("me"), Peer("other")
    members = [f"m{index}" for index in range(300)]
    for each in (mine, other):
        each.book.admit(members)
    other.knows(*map(record, members))
    (answer,) = mine.exchange.receive_syn("other", other.exchange.digest(), SECOND)
    assert len(answer.wanted) == MAX_WANTED


def test_an_impossible_digest_is_rejected():
    bad = replace(exchanges(book("other")).digest(), incarnations=(1,))
    (rejected,) = exchanges(book()).receive_syn("other", bad, 1)
    assert rejected.kind == "bad_digest"


def test_a_budget_that_cannot_hold_a_record_is_our_own_error():
    with pytest.raises(LocalError, match="must hold one record"):
        exchanges(book(), MAX_RECORD_BYTES - 1)


@pytest.mark.parametrize("peers", [25, 100])
def test_everybody_learns_everything_within_few_periods_at_a_smgroupbudget(peers):
    names = [f"peer{index:03}" for index in range(peers)]
    group = {name: Peer(name, MAX_RECORD_BYTES) for name in names}
    for each in group.values():
        each.book.admit(names)
        for name in names:
            each.exchange.partner(name, alive=True)
    largest = 0
    for step in range(1, 400):
        now = step * SECOND // 10
        for name, each in group.items():
            for output in each.exchange.tick(now):
                if not isinstance(output, SendSyn):
                    continue
                for answer in group[output.to].exchange.receive_syn(name, output.digest, now):
                    largest = max(largest, sum(len(encode(one)) for one in answer.records))
                    for ack in each.exchange.receive_syn_ack(output.to, answer.records, answer.wanted, now):
                        if isinstance(ack, SendAck):
                            largest = max(largest, sum(len(encode(one)) for one in ack.records))
                            group[output.to].book.merge(name, ack.records, now)
        if all(len(each.state) == peers for each in group.values()):
            break
    print(f"{peers} peers know each other after {step / 10} s; largest message {largest} bytes")
    assert largest <= MAX_RECORD_BYTES
    assert step / 10 < 15

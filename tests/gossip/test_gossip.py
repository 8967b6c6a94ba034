"""Gossip of one peer: records, probing and membership hear of each other's findings here."""

from collections.abc import Sequence
from random import Random

import msgspec
import pytest

from p2pcoord.effects import Send
from p2pcoord.errors import RemoteError
from p2pcoord.gossip.gossip import Gossip
from p2pcoord.gossip.membership import Changed, PeerState
from p2pcoord.gossip.messages import (
    ExchangeEnd,
    ExchangeReply,
    ExchangeRequest,
    Ping,
    PingAck,
    PingNack,
    PingRequest,
)
from p2pcoord.gossip.records import PeerRecord
from p2pcoord.messages import AnyMessage, decode_message
from p2pcoord.outbox import Outbox
from p2pcoord.rounds.messages import JoinReply
from tests.script_runner import authority_of, peer_id

A, B, C, D = (peer_id(letter) for letter in "ABCD")
SECOND = 1_000_000_000


def record(letter: str, incarnation: int = 1, version: int = 1, **changes: object) -> PeerRecord:
    said = PeerRecord(peer_id(letter), incarnation, version, letter.lower(), (f"/{letter}",))
    return authority_of(letter).sign(msgspec.structs.replace(said, **changes))


class Node:
    """Gossip of one letter, with all that comes out of it."""

    def __init__(self, letter: str = "A", members: str = "ABC") -> None:
        self.letter = letter
        self.outbox = Outbox(peer_id(letter))
        self.began: list[int] = []
        self.changes: list[Changed] = []
        self.rejections: list[tuple[str, str]] = []
        self.equivocations: list[tuple[PeerRecord, PeerRecord]] = []
        self.gossip = Gossip(
            authority_of(letter),
            self.outbox,
            PeerRecord(peer_id(letter), 1, 1, letter.lower(), (f"/{letter}",)),
            lambda purpose: Random(letter + purpose),
            0,
            began=self.began.append,
            changed=self._changed,
            reject=self._reject,
            evidence=lambda one, other: self.equivocations.append((one, other)),
        )
        for member in members:
            self.gossip.admit(peer_id(member), 0)

    def _changed(self, changes: Sequence[Changed], now: int) -> None:
        self.changes += changes

    def _reject(self, peer: str, error: RemoteError) -> None:
        self.rejections.append((peer, error.kind))

    def state(self, letter: str) -> PeerState:
        return self.gossip.membership.state(peer_id(letter))

    def sent(self) -> list[tuple[str, AnyMessage]]:
        effects = [effect for effect in self.outbox.take() if isinstance(effect, Send)]
        return [(effect.to, decode_message(effect.data)) for effect in effects]

    def hears(self, sender: str, message: AnyMessage, now: int = 0) -> bool:
        return self.gossip.receive(peer_id(sender), message, now)


def talk(nodes: dict[str, Node], until: int, step: int = SECOND // 4) -> None:
    """All messages arrive at once."""
    for now in range(0, until, step):
        for node in nodes.values():
            node.gossip.tick(now)
        for _ in range(200):
            mail = [(node, to, m) for node in nodes.values() for to, m in node.sent()]
            if not mail:
                break
            for node, to, message in mail:
                target = next((n for n in nodes.values() if n.gossip.me == to), None)
                if target is not None:
                    target.gossip.heard(node.gossip.me, now)
                    target.hears(node.letter, message, now)


def connect_all(nodes: dict[str, Node]) -> None:
    for node in nodes.values():
        for other in nodes.values():
            if node is not other:
                node.gossip.connected(other.gossip.me, 0)


def test_a_member_is_unknown_until_something_is_heard_of_it() -> None:
    node = Node()
    assert node.state("B") is PeerState.UNKNOWN
    node.hears("B", ExchangeEnd((record("B"),)))
    assert node.state("B") is PeerState.ALIVE
    assert node.changes == [Changed(B, PeerState.UNKNOWN, PeerState.ALIVE)]


def test_what_a_peer_says_of_itself_spreads_to_all_and_all_hold_all_alive() -> None:
    nodes = {letter: Node(letter) for letter in "ABC"}
    connect_all(nodes)
    nodes["B"].gossip.update(0, local_step=42)
    talk(nodes, 20 * SECOND)
    for node in nodes.values():
        assert {letter: node.state(letter) for letter in "ABC"} == dict.fromkeys("ABC", PeerState.ALIVE)
        assert node.rejections == []
    told = nodes["A"].gossip.book.get(B)
    assert told is not None
    assert told.local_step == 42


def test_who_stops_answering_is_suspected_and_then_dead_to_all_others() -> None:
    nodes = {letter: Node(letter, "ABCD") for letter in "ABCD"}
    connect_all(nodes)
    talk(nodes, 10 * SECOND)
    silent = nodes.pop("D")
    assert silent.state("A") is PeerState.ALIVE
    talk({**nodes}, 60 * SECOND)
    for node in nodes.values():
        assert node.state("D") is PeerState.DEAD
        before = [change.before for change in node.changes if change.after is PeerState.DEAD]
        assert before == [PeerState.SUSPECT]
        assert node.state("B") is PeerState.ALIVE


@pytest.mark.parametrize(("change", "told"), [({"addresses": ("/new",)}, 3), ({"local_step": 1}, 0)])
def test_what_others_must_know_at_once_is_told_to_several_in_the_same_step(
    change: dict[str, object], told: int
) -> None:
    node = Node("A", "ABCDE")
    node.gossip.tick(SECOND)
    node.sent()
    now = SECOND + SECOND // 4
    node.gossip.update(now, **change)
    opened = [to for to, m in node.sent() if isinstance(m, ExchangeRequest)]
    assert len(opened) == len(set(opened)) == told
    assert (node.gossip.book.own.version == 2) is bool(told)


def test_a_ping_is_answered_for_oneself() -> None:
    node = Node()
    node.sent()
    assert node.hears("B", Ping(7, 1, (), ()))
    answers = [(to, m) for to, m in node.sent() if isinstance(m, PingAck)]
    assert [(to, m.sequence, m.subject) for to, m in answers] == [(B, 7, A)]


def test_a_request_to_probe_is_done_and_its_answer_passed_on() -> None:
    node = Node()
    node.gossip.connected(C, 0)
    node.sent()
    assert node.hears("B", PingRequest(9, 1, (), (), C))
    (ping,) = [m for to, m in node.sent() if isinstance(m, Ping) and to == C]
    node.hears("C", PingAck(ping.sequence, 1, (), (), C), 1)
    passed = [(to, m.sequence, m.subject) for to, m in node.sent() if isinstance(m, PingAck)]
    assert passed == [(B, 9, C)]


def test_records_ride_on_probes() -> None:
    node = Node()
    node.hears("B", Ping(1, 1, (), (record("C", local_step=5),)))
    told = node.gossip.book.get(C)
    assert told is not None
    assert told.local_step == 5
    assert node.state("C") is PeerState.ALIVE


@pytest.mark.parametrize("forged", [False, True])
def test_a_record_counts_only_with_its_owners_signature(forged: bool) -> None:
    node = Node()
    said = record("C")
    if forged:
        said = authority_of("B").sign(said)
    node.hears("B", ExchangeEnd((said,)))
    assert (node.gossip.book.get(C) is None) == forged
    assert [peer for peer, _ in node.rejections] == ([B] if forged else [])


def test_two_records_of_one_stamp_are_evidence() -> None:
    node = Node()
    one, other = record("B", local_step=1), record("B", local_step=2)
    node.hears("B", ExchangeEnd((one,)))
    node.hears("C", ExchangeEnd((other,)))
    assert len(node.equivocations) == 1
    assert set(node.equivocations[0]) == {one, other}


def test_a_higher_incarnation_of_ours_that_others_hold_is_outbid_and_made_durable() -> None:
    node = Node()
    node.hears("B", ExchangeEnd((record("A", incarnation=5),)))
    assert node.began
    assert node.began[-1] > 5
    assert node.gossip.book.draft.incarnation == node.began[-1]


def test_who_says_goodbye_has_left_and_is_no_partner_any_more() -> None:
    node = Node()
    node.gossip.connected(B, 0)
    node.hears("B", ExchangeEnd((record("B", leaving=True),)))
    assert node.state("B") is PeerState.LEFT
    node.sent()
    for second in range(1, 30):
        node.gossip.tick(second * SECOND)
    assert not [m for to, m in node.sent() if to == B and isinstance(m, ExchangeRequest)]


def test_who_is_let_go_is_not_held_any_more() -> None:
    node = Node()
    node.gossip.connected(B, 0)
    node.gossip.remove(B, 1)
    assert node.state("B") is PeerState.UNKNOWN
    assert B not in node.gossip.membership.peers()
    assert Changed(B, PeerState.ALIVE, PeerState.LEFT) in node.changes
    node.gossip.remove(A, 1)  # never oneself
    assert node.state("A") is PeerState.ALIVE


def test_an_exchange_tells_each_side_what_it_lacks() -> None:
    a, b = Node("A", "AB"), Node("B", "AB")
    a.gossip.connected(B, 0)
    for second in range(1, 10):
        a.gossip.tick(second * SECOND)
        opened = [m for _, m in a.sent() if isinstance(m, ExchangeRequest)]
        if opened:
            break
    b.hears("A", opened[0], SECOND)
    (reply,) = [m for to, m in b.sent() if isinstance(m, ExchangeReply)]
    assert B in {one.peer for one in reply.records}
    a.hears("B", reply, SECOND)
    (end,) = [m for to, m in a.sent() if isinstance(m, ExchangeEnd)]
    assert A in {one.peer for one in end.records}
    b.hears("A", end, SECOND)
    assert b.gossip.book.get(A) == a.gossip.book.own
    assert a.gossip.book.get(B) == b.gossip.book.own


def test_messages_of_other_parts_are_left_to_them() -> None:
    node = Node()
    assert not node.hears("B", JoinReply(""))
    assert node.hears("B", PingNack(1, 1, (), (), C))


def test_a_peer_that_slept_suspects_nobody_for_it() -> None:
    node = Node()
    node.gossip.connected(B, 0)
    node.gossip.heartbeat(B, SECOND // 10, 0)
    late = 100 * SECOND
    node.gossip.gap(late)
    node.gossip.tick(late)
    assert node.state("B") is PeerState.ALIVE

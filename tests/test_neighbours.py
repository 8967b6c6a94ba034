"""The peers around one peer: who lives, who is fit for work, who may vote, and which links are watched."""

from random import Random

import msgspec
import pytest

from p2pcoord.consensus.messages import Append
from p2pcoord.effects import Dial, Done, Effect, Emit, Failed, Reach, Send
from p2pcoord.errors import RemoteError
from p2pcoord.gossip.membership import PeerState
from p2pcoord.gossip.messages import ExchangeEnd, Ping
from p2pcoord.gossip.records import PeerRecord
from p2pcoord.links import FULL_MESH
from p2pcoord.messages import ReachReply, ReachRequest, decode_message
from p2pcoord.neighbours import MAX_LEAF_LINKS, MAX_REACHING, Neighbours
from p2pcoord.outbox import Outbox
from p2pcoord.peer import Peer
from p2pcoord.peer_settings import PeerSettings, Restored
from p2pcoord.rounds.messages import JoinReply
from p2pcoord.rounds.participation import Roster
from p2pcoord.wire import encode
from tests.script_runner import SECRET, ScriptedWork, authority_of, frames_of, history, peer_id

A, B, C, D = (peer_id(letter) for letter in "ABCD")


def record(letter: str, **changes: object) -> PeerRecord:
    said = PeerRecord(peer_id(letter), 1, 1, letter.lower(), (f"/{letter}",))
    return authority_of(letter).sign(msgspec.structs.replace(said, **changes))


class Around:
    """The neighbours of A in a run of A, B, C, D, whose records it has (`leaves` cannot be dialled)."""

    def __init__(self, *, gossip: bool = True, leaves: str = "", founder: bool = True) -> None:
        self.outbox = Outbox(A)
        self.changes = 0
        self.roster = Roster(authority_of("A"), SECRET)
        genesis, records, _ = history("ABC", "ABCD", SECRET)
        self.roster.apply([genesis, *records])
        self.neighbours = Neighbours(authority_of("A"), self.outbox, self.roster, self._changed)
        if gossip:
            self.neighbours.start_gossip(
                PeerRecord(A, 1, 1, "a", ("/A",), reachable=founder),
                (),
                Random,
                0,
                began=lambda incarnation: None,
                reject=lambda peer, error: None,
            )
            self.neighbours.follow((A, B, C), 0)
            for letter in "BCD":
                said = record(letter, reachable=letter not in leaves)
                self.neighbours.receive(peer_id(letter), ExchangeEnd((said,)), 0)

    def _changed(self) -> None:
        self.changes += 1

    def connect(self, *letters: str) -> None:
        for letter in letters:
            self.neighbours.on_connected(peer_id(letter), 0)

    def take(self, kind: type[Effect]) -> list[Effect]:
        return [effect for effect in self.outbox.take() if isinstance(effect, kind)]

    def dial(self) -> Dial:
        (dial,) = self.take(Dial)
        assert isinstance(dial, Dial)
        return dial


# Without gossip: the links are given


def test_without_gossip_who_is_connected_lives_and_is_fit_and_nobody_else() -> None:
    around = Around(gossip=False)
    n = around.neighbours
    assert n.alive(A)
    assert n.fit(A)
    assert not n.alive(B)
    around.connect("B")
    assert n.alive(B)
    assert n.fit(B)
    assert n.voter_candidates([]) == [B]
    n.on_disconnected(B, 0)
    assert not n.alive(B)
    assert not n.fit(B)


def test_without_gossip_nothing_of_it_is_read_or_said() -> None:
    around = Around(gossip=False)
    assert not around.neighbours.receive(B, Ping(1, 1, (), ()), 0)
    around.neighbours.send(B, JoinReply(""), 0)
    assert [type(effect) for effect in around.outbox.take()] == [Send]
    assert around.neighbours.next_deadline() >= 1 << 60


# Alive and fit, by state


def test_a_member_that_was_never_heard_of_is_not_waited_for() -> None:
    around = Around()
    assert around.neighbours.gossip is not None
    assert not around.neighbours.alive(peer_id("E"))
    assert not around.neighbours.fit(peer_id("E"))


def test_who_is_alive_is_fit_only_with_a_connection_in_a_run_that_is_a_full_mesh() -> None:
    around = Around()
    around.connect("B")
    assert around.neighbours.alive(C)  # its record said so
    assert not around.neighbours.fit(C)
    assert around.neighbours.fit(B)
    assert around.neighbours.fit(A)


def test_in_a_large_run_nobody_needs_a_connection_to_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    around = Around()
    monkeypatch.setattr("p2pcoord.neighbours.FULL_MESH", 3)
    assert FULL_MESH > 3
    assert around.neighbours.fit(C)


def test_a_closed_connection_makes_a_suspect_that_is_dialled_at_once_waited_for_and_given_nothing_new() -> (
    None
):
    around = Around()
    around.connect("B")
    around.changes = 0
    around.outbox.take()
    around.neighbours.on_disconnected(B, 1)
    assert around.dial().peer == B
    assert around.neighbours.alive(B)
    assert not around.neighbours.fit(B)
    assert around.changes == 1


def test_a_redial_that_fails_tells_a_lost_peer_from_a_lost_connection_in_the_same_step() -> None:
    around = Around()
    around.connect("B", "C")
    around.outbox.take()
    around.neighbours.on_disconnected(B, 1)
    lost = around.dial()
    around.neighbours.on_disconnected(C, 1)
    back = around.dial()
    around.changes = 0
    assert around.neighbours.complete(lost.id, Failed("refused"), 2)
    assert not around.neighbours.alive(B)
    assert around.changes == 1
    told = [e.fields for e in around.take(Emit) if isinstance(e, Emit) and e.event == "failed"]
    assert told == [{"peer": B, "was": "suspect"}]
    around.neighbours.complete(back.id, Done(), 2)
    around.connect("C")
    assert around.neighbours.fit(C)


def test_the_dead_live_again_when_they_connect() -> None:
    around = Around()
    around.connect("B")
    around.outbox.take()
    around.neighbours.on_disconnected(B, 1)
    around.neighbours.complete(around.dial().id, Failed("refused"), 2)
    around.outbox.take()
    around.connect("B")
    assert around.neighbours.fit(B)
    told = [e.fields for e in around.take(Emit) if isinstance(e, Emit) and e.event == "alive"]
    assert told == [{"peer": B, "was": "dead", "now": "alive"}]


def test_an_outcome_that_belongs_to_nobody_here_is_left_to_others() -> None:
    assert not Around().neighbours.complete(12345, Done(), 0)


# Voters


def test_voter_candidates_are_connected_fit_and_reachable_in_order_of_admission() -> None:
    around = Around(leaves="C")
    around.connect("D", "C", "B")
    assert around.neighbours.voter_candidates([]) == [B, D]
    assert around.neighbours.voter_candidates([B]) == [D]
    around.neighbours.on_disconnected(D, 1)
    assert around.neighbours.voter_candidates([]) == [B]


def test_a_leaf_that_nobody_can_dial_works_but_is_no_voter_candidate() -> None:
    around = Around(leaves="C")
    around.connect("C")
    assert around.neighbours.fit(C)
    assert around.neighbours.voter_candidates([]) == []


# Reaching each other


def test_who_does_not_know_whether_it_can_be_dialled_asks_whom_it_meets_until_one_says_yes() -> None:
    around = Around(founder=False)
    n = around.neighbours
    assert n.gossip is not None
    n.on_connected(B, 0)
    asked = [decode_message(e.data) for e in around.take(Send) if isinstance(e, Send)]
    assert ReachRequest(("/A",)) in asked
    n.receive(B, ReachReply(False), 1)
    assert not n.gossip.book.draft.reachable
    assert n.gossip.book.draft.links == (B,)
    n.receive(B, ReachReply(True), 2)  # not asked again
    n.receive(C, ReachReply(True), 2)
    assert not n.gossip.book.draft.reachable
    n.on_connected(C, 2)
    n.receive(C, ReachReply(True), 3)
    assert n.gossip.book.draft.reachable
    assert n.gossip.book.draft.links == ()


def test_a_leaf_names_few_of_those_it_stays_connected_to() -> None:
    around = Around(founder=False)
    n = around.neighbours
    assert n.gossip is not None
    n.connected.update(f"peer{i}" for i in range(MAX_LEAF_LINKS + 3))
    n.on_connected(B, 0)
    n.receive(B, ReachReply(False), 1)
    assert len(n.gossip.book.draft.links) == MAX_LEAF_LINKS


@pytest.mark.parametrize(
    ("outcome", "said"), [(Done(True), True), (Done(False), False), (Failed("x"), False)]
)
def test_who_is_asked_dials_back_and_says_what_came_of_it(outcome: Done | Failed, said: bool) -> None:
    around = Around()
    around.connect("B")
    around.outbox.take()
    around.neighbours.receive(B, ReachRequest(("/b",)), 0)
    (reach,) = around.take(Reach)
    assert isinstance(reach, Reach)
    assert (reach.peer, reach.addresses) == (B, ("/b",))
    assert around.neighbours.complete(reach.id, outcome, 1)
    (send,) = around.take(Send)
    assert isinstance(send, Send)
    assert (send.to, decode_message(send.data)) == (B, ReachReply(said))


def test_nobody_makes_this_peer_dial_without_end() -> None:
    around = Around()
    around.connect("B")
    around.outbox.take()
    for number in range(100):
        around.neighbours.receive(B, ReachRequest((f"/b{number}",)), 0)
        around.neighbours.receive(f"stranger{number}", ReachRequest(("/s",)), 0)
    assert len(around.take(Reach)) == MAX_REACHING
    with pytest.raises(RemoteError, match="17 addresses"):
        around.neighbours.receive(B, ReachRequest(("/b",) * 17), 0)


# Links that matter


def gossiping(letter: str, voters: str = "ABC") -> Peer:
    """A peer of a run of A, B, C in term 1 of A, connected to the others."""
    genesis, records, certificates = history(voters, "ABC", SECRET)
    settings = PeerSettings(letter.lower(), SECRET, 5, 10, gossip=True, addresses=(f"/{letter}",))
    peer = Peer(authority_of(letter), genesis, settings)
    peer.work = ScriptedWork()
    peer.start(Restored(tuple(frames_of(letter, genesis, records, certificates)), b"entropy"), 0)
    for other in "ABC":
        if other != letter:
            peer.connected(peer_id(other), 0)
    return peer


def heartbeat(peer: Peer, term: int = 1) -> bytes:
    ledger = peer.agreement.voter.ledger
    return encode(Append(term, 150_000_000, ledger.height, ledger.hashes[-1], (), None, None))


def test_heartbeats_are_expected_of_the_coordinator_and_of_nobody_else() -> None:
    peer = gossiping("B")
    assert peer.gossip is not None
    assert peer.gossip.membership.watched() == []
    peer.receive(A, heartbeat(peer), 10)
    peer.receive(C, heartbeat(peer), 11)  # it orders nothing in this term, but is watched until the next tick
    peer.tick(12)
    assert peer.gossip.membership.watched() == [A]


def test_who_has_no_vote_expects_no_heartbeats_as_none_are_sent_to_it() -> None:
    """Not even after it lost its vote or was a learner, and was sent some."""
    peer = gossiping("B", voters="A")
    assert peer.gossip is not None
    peer.receive(A, heartbeat(peer), 10)
    peer.tick(12)
    assert peer.gossip.membership.watched() == []


def test_a_coordinator_that_falls_silent_is_suspected_and_one_that_is_no_longer_watched_is_not() -> None:
    peer = gossiping("B")
    assert peer.gossip is not None
    now = 0
    for _ in range(5):
        now += 150_000_000
        peer.receive(A, heartbeat(peer), now)
        peer.receive(C, encode(Ping(1, 1, (), ())), now)
        peer.tick(now)
    assert peer.fit(A)
    membership = peer.gossip.membership
    silent_at = membership.next_deadline()
    assert silent_at is not None
    assert now < silent_at < now + 10_000_000_000
    membership.tick(silent_at - 1)
    assert membership.state(A) is PeerState.ALIVE
    membership.tick(silent_at)
    assert membership.state(A) is PeerState.SUSPECT
    assert not peer.fit(A)
    assert peer.alive(A)
    assert membership.state(C) is PeerState.ALIVE
    peer.gossip.watch_only([], now)
    assert membership.state(A) is PeerState.ALIVE


# The certified roster


def test_who_is_let_go_is_forgotten() -> None:
    around = Around()
    around.connect("D")
    assert around.neighbours.gossip is not None
    assert D in around.neighbours.gossip.membership.peers()
    around.roster._members.pop(D)
    around.neighbours.follow((A, B, C), 1)
    assert D not in around.neighbours.gossip.membership.peers()
    assert not around.neighbours.alive(D)


def test_who_is_sent_something_without_a_connection_is_dialled() -> None:
    around = Around()
    around.outbox.take()
    around.neighbours.send(C, JoinReply(""), 0)
    kinds = [type(effect) for effect in around.outbox.take()]
    assert kinds == [Dial, Send]
    around.connect("B")
    around.outbox.take()
    around.neighbours.send(B, JoinReply(""), 0)
    assert [type(effect) for effect in around.outbox.take()] == [Send]


def test_two_leaves_cannot_be_linked_unless_one_says_so() -> None:
    around = Around(leaves="BC")
    neighbours = around.neighbours
    assert not neighbours.leaf(B)  # nobody has tried yet
    for letter in "BC":
        said = record(letter, version=2, reachable=False, links=(D,))
        neighbours.receive(peer_id(letter), ExchangeEnd((said,)), 0)
    assert neighbours.leaf(B)
    assert not neighbours.leaf(D)
    assert neighbours.apart(B, C)
    assert not neighbours.apart(B, D)
    said = record("B", version=3, reachable=False, links=(C, D))
    neighbours.receive(B, ExchangeEnd((said,)), 0)
    assert not neighbours.apart(B, C)

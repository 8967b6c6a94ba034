"""The status document: what is known of others and no more, and who votes, counted in both halves while the committee changes."""

import msgspec

from node.reporting.document import coordinator_of, proven_version, quorum_of, role_of
from node.reporting.event_words import enough_reached, in_words
from p2pcoord.consensus.quorum import Committee
from p2pcoord.consensus.record import CommitteeChange, Counted, make_record
from p2pcoord.peer import Peer
from p2pcoord.peer_settings import PeerSettings, Restored
from p2pcoord.wire import encode
from tests.node.storage.signed_run import SignedRun
from tests.script_runner import ScriptedWork, authority_of, peer_id, scripted_round

NOW = 1_000_000_000


def peer_of(signed: SignedRun, *connected: str) -> Peer:
    """A with its log, and with connections to these."""
    peer = Peer(signed.authorities[0], signed.ledger.records[0], PeerSettings("lab1", None, 5, 10))
    peer.work = ScriptedWork()
    peer.start(Restored(tuple(encode(frame) for frame in signed.frames), bytes(32)), NOW)
    for other in connected:
        peer.connected(other, NOW)
    return peer


def test_a_committee_of_its_own_is_counted_once() -> None:
    signed = SignedRun().complete()
    _, b, c = signed.peers
    quorum = quorum_of(peer_of(signed, b), NOW)
    assert quorum == {
        "voters": 3, "reachable": 2, "needed": 2, "outgoing": None, "held": False, "missing": [c]
    }  # fmt: skip
    assert enough_reached(quorum)
    assert not enough_reached(quorum_of(peer_of(signed), NOW))


def test_a_joint_committee_lacks_a_quorum_when_either_half_does() -> None:
    signed = SignedRun().complete()
    a, b, c = signed.peers
    signed.append(CommitteeChange(Committee((a,), (a, b, c))))  # B and C go, and are not there to agree
    quorum = quorum_of(peer_of(signed), NOW)
    assert quorum == {
        "voters": 1, "reachable": 1, "needed": 1, "held": False, "missing": [b, c],
        "outgoing": {"voters": 3, "reachable": 1, "needed": 2},
    }  # fmt: skip
    assert not enough_reached(quorum)
    told = in_words("quorum-lost", quorum, lambda peer: {b: "lab2", c: "lab3"}[peer])
    assert (
        told
        == "waiting for quorum: 1 of 1 needed, and 1 of 2 needed of the outgoing voters; missing lab2, lab3"
    )
    assert enough_reached(quorum_of(peer_of(signed, c), NOW))


def test_a_voter_that_hears_no_coordinator_knows_of_none() -> None:
    signed = SignedRun().complete()
    peer = peer_of(signed)
    a = signed.peers[0]
    assert peer.agreement.voter.ledger.coordinator_of(peer.agreement.voter.ledger.last.term) == a
    assert (role_of(peer, a), coordinator_of(peer)) == ("voter", None)
    peer.agreement.voter.coordinator = a
    assert (role_of(peer, a), coordinator_of(peer)) == ("coordinator", a)


A, B, C, D = (peer_id(letter) for letter in "ABCD")


def counted(peer: str, origin_round: int) -> Counted:
    return Counted(0, peer, origin_round, 0.5)


def test_the_newest_commit_shows_which_version_its_coordinator_and_contributors_have() -> None:
    contributors = (counted(B, 8), counted(C, 6))
    body = msgspec.structs.replace(scripted_round(8), contributors=contributors)
    record = make_record(authority_of("A"), height=9, term=1, previous=bytes(32), committee=0, body=body)
    assert [proven_version(record, member) for member in (A, B, C, D)] == [8, 7, 5, 0]
    assert proven_version(None, A) == 0

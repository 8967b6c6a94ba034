"""How peers come in, go, and are put out: what each peer does with a request, and what a coordinator orders of it."""

import msgspec
import pytest

from p2pcoord.consensus.messages import RecordsRequest
from p2pcoord.consensus.record import Admission, Exclusion, Members
from p2pcoord.consensus.statements import Farewell, Vote
from p2pcoord.effects import Emit, Send
from p2pcoord.gossip.records import CapabilityProfile
from p2pcoord.messages import GenesisReply, GenesisRequest, decode_message
from p2pcoord.peer import Peer
from p2pcoord.peer_settings import PeerSettings, Restored
from p2pcoord.rounds.admissions import MAX_EXCLUSIONS, REQUEST_INTERVAL_NS, Admissions
from p2pcoord.rounds.messages import EvidenceMessage, JoinReply, JoinRequest, LeaveRequest
from p2pcoord.rounds.participation import MAX_ADMISSIONS, MAX_NAME_LENGTH, join_proof
from p2pcoord.wire import encode
from tests.round_runner import RoundWorld, started
from tests.script_runner import RUN, SECRET, authority_of, history, letter_of, peer_id

A, B, C, D, E = (peer_id(letter) for letter in "ABCDE")
MIB = 1 << 20


def world_of() -> RoundWorld:
    """A coordinates, B and C vote, D is a member without a vote; the run is at rest."""
    world = started("A B C members D", "size=3", "minimum=9")
    world.execute("run 1s")
    return world


def admission(peer: str = E, name: str = "eve", secret: bytes = SECRET) -> Admission:
    return Admission(peer, name, join_proof(secret, RUN, peer))


def admissions(world: RoundWorld, letter: str = "A") -> Admissions:
    return world.peer(letter).admissions


def answers(world: RoundWorld, source: str, target: str, message: msgspec.Struct) -> list[tuple[str, object]]:
    """To whom the target says what, when it gets this."""
    machine = world.machines[target]
    effects = world.peer(target).receive(peer_id(source), encode(message), machine.clock)
    said = [(letter_of(e.to), decode_message(e.data)) for e in effects if isinstance(e, Send)]
    return [
        (to, what)
        for to, what in said
        if isinstance(what, JoinReply | JoinRequest | LeaveRequest | EvidenceMessage | GenesisReply)
    ]


def rejected(world: RoundWorld, letter: str = "A") -> dict[str, int]:
    return {kind: sum(by.values()) for kind, by in world.peer(letter).rejected.items()}


def farewell(letter: str, by: str = "") -> Farewell:
    return authority_of(by or letter).sign(Farewell(peer_id(letter), 5))


# Joining


def test_the_coordinator_answers_a_joiner_and_orders_its_admission() -> None:
    world = world_of()
    assert answers(world, "E", "A", JoinRequest(admission())) == [("E", JoinReply(""))]
    pending = admissions(world).pending()
    assert pending is not None
    assert pending.admitted == (admission(),)
    world.execute("run 1s")
    assert world.peer("C").roster.is_member(E)
    assert admissions(world).pending() is None


@pytest.mark.parametrize("by", ["B", "D"])
def test_any_member_passes_a_joiners_own_request_on_towards_the_coordinator(by: str) -> None:
    world = world_of()
    request = JoinRequest(admission())
    said = answers(world, "E", by, request)
    assert said[-1] == ("E", JoinReply(""))
    ((target, passed),) = said[:-1]
    assert passed == request
    assert target in ("A" if by == "B" else "ABC")


def test_a_request_goes_on_once_more_from_a_voter_that_got_it_from_a_member_without_a_vote_and_never_round() -> (
    None
):
    world = world_of()
    request = JoinRequest(admission())
    assert answers(world, "D", "B", request) == [("A", request)]
    assert answers(world, "C", "B", request) == []
    assert answers(world, "A", "B", request) == []
    assert answers(world, "B", "D", request) == []


def test_a_joiner_with_another_secret_is_told_so_and_counted() -> None:
    world = world_of()
    said = answers(world, "E", "A", JoinRequest(admission(secret=b"guess")))
    assert said == [("E", JoinReply("wrong secret"))]
    assert rejected(world) == {"wrong_secret": 1}
    assert admissions(world).pending() is None


def test_who_is_excluded_is_told_why() -> None:
    world = world_of()
    admissions(world).exclude(Exclusion(D, "sent nonsense", 5))
    world.execute("run 1s")
    assert not world.peer("A").roster.is_member(D)
    assert answers(world, "D", "A", JoinRequest(admission(D))) == [("D", JoinReply("sent nonsense"))]
    assert rejected(world) == {"not_admitted": 1}


@pytest.mark.parametrize(("memory_mib", "refused"), [(511, True), (512, False), (0, False)])
def test_a_machine_with_too_little_memory_is_told_what_the_run_needs_and_one_that_does_not_know_is_let_in(
    memory_mib: int, refused: bool
) -> None:
    world = world_of()
    settings = admissions(world)._settings
    admissions(world)._settings = msgspec.structs.replace(settings, minimum_memory_bytes=512 * MIB)
    profile = CapabilityProfile(memory_bytes=memory_mib * MIB)
    ((_, reply),) = answers(world, "E", "A", JoinRequest(admission(), profile))
    expected = "this run needs 512 MiB of memory; the machine has 511" if refused else ""
    assert reply == JoinReply(expected)
    assert (admissions(world).pending() is None) == refused
    assert rejected(world) == {}  # a small machine is no fault


def test_a_member_that_asks_again_is_not_answered_and_not_admitted_twice() -> None:
    world = world_of()
    assert answers(world, "B", "A", JoinRequest(admission(B))) == []
    assert admissions(world).pending() is None


def test_at_the_bound_the_longest_silent_joiner_is_dropped_and_who_asks_again_stays() -> None:
    world = world_of()
    joiners = [f"joiner{i}" for i in range(MAX_ADMISSIONS)]
    for peer in [*joiners, joiners[0], "one more"]:
        answers(world, "B", "A", JoinRequest(admission(peer)))
    pending = admissions(world).pending()
    assert pending is not None
    waiting = [one.peer for one in pending.admitted]
    assert len(waiting) == MAX_ADMISSIONS
    assert joiners[0] in waiting
    assert joiners[1] not in waiting
    assert waiting[-1] == "one more"


def test_a_stranger_reads_nothing_a_joiner_with_proof_does_and_who_only_asked_does_until_it_disconnects() -> (
    None
):
    world = world_of()
    a = world.peer("A")
    assert a.may_read(D)
    assert not a.may_read(E)
    (said,) = answers(world, "E", "A", GenesisRequest(admission()))
    assert isinstance(said[1], GenesisReply)
    assert a.may_read(E)
    a.disconnected(E, world.machines["A"].clock)
    assert not a.may_read(E)
    answers(world, "E", "A", JoinRequest(admission()))
    assert a.may_read(E)


def test_a_proof_counts_for_its_owner_only() -> None:
    world = world_of()
    assert answers(world, "E", "A", GenesisRequest(admission(peer_id("F")))) == []
    assert rejected(world) == {"wrong_secret": 1}
    assert not world.peer("A").may_read(E)


# A joiner's own wish


def joiner(name: str = "eve") -> Peer:
    genesis = history("A", "A", SECRET)[0]
    peer = Peer(authority_of("E"), genesis, PeerSettings(name, SECRET, 5, 10, rules=RoundWorld().rules))
    peer.start(Restored((), b"entropy"), 0)
    return peer


def requests(peer: Peer, now: int) -> list[JoinRequest]:
    sent = [decode_message(e.data) for e in peer.tick(now) if isinstance(e, Send)]
    return [message for message in sent if isinstance(message, JoinRequest)]


def test_a_joiner_asks_once_a_second_and_only_when_it_is_connected() -> None:
    peer = joiner()
    assert requests(peer, 0) == []
    peer.connected(A, 10)
    assert len(requests(peer, 10)) == 1
    assert requests(peer, 10 + REQUEST_INTERVAL_NS - 1) == []
    assert len(requests(peer, 10 + REQUEST_INTERVAL_NS)) == 1


def test_a_joiner_asks_each_of_its_connections_in_turn_and_for_the_records_too() -> None:
    peer = joiner()
    for other in (A, B):
        peer.connected(other, 0)
    asked = []
    for second in range(4):
        sent = [e for e in peer.tick(second * REQUEST_INTERVAL_NS) if isinstance(e, Send)]
        asked += [letter_of(e.to) for e in sent if isinstance(decode_message(e.data), JoinRequest)]
        assert any(isinstance(decode_message(e.data), RecordsRequest) for e in sent)
    assert sorted(asked) == ["A", "A", "B", "B"]


def test_a_long_name_is_cut_before_it_is_sent() -> None:
    peer = joiner("x" * 100)
    peer.connected(A, 0)
    (request,) = requests(peer, 0)
    assert request.admission.name == "x" * MAX_NAME_LENGTH
    assert request.admission == admission(name="x" * MAX_NAME_LENGTH)


def test_a_refusal_is_told_to_people() -> None:
    peer = joiner()
    told = [e for e in peer.receive(A, encode(JoinReply("wrong secret")), 0) if isinstance(e, Emit)]
    assert [(e.event, e.fields) for e in told] == [("join-refused", {"by": A, "reason": "wrong secret"})]


# Leaving


def test_who_leaves_says_so_every_second_until_it_is_let_go() -> None:
    world = world_of()
    world.execute("cut D->A")
    world.execute("cut D->B")
    world.execute("cut D->C")
    world.execute("leave D")
    world.execute("run 2s")
    assert admissions(world, "D").leaving
    assert not admissions(world, "D").left
    world.execute("heal")
    world.execute("run 2s")
    assert admissions(world, "D").left
    assert not world.peer("A").roster.is_member(D)


def test_who_is_let_go_by_the_goodbye_of_an_earlier_life_asks_to_be_admitted_again() -> None:
    world = world_of()
    earlier = LeaveRequest(farewell("D"))
    world.inject("D", "A", earlier)
    printed = world.execute("run 3s")
    assert any(line.strip().startswith("A: left") for line in printed), printed
    assert world.peer("A").roster.is_member(D)
    world.inject("D", "A", earlier)
    world.execute("run 3s")
    assert world.peer("A").roster.is_member(D)


def test_a_goodbye_is_signed_by_who_leaves() -> None:
    world = world_of()
    assert answers(world, "D", "A", LeaveRequest(farewell("D", by="B"))) == []
    assert rejected(world) == {"bad_signature": 1}
    assert admissions(world).pending() is None


def test_a_goodbye_goes_on_towards_the_coordinator_and_is_ordered_there() -> None:
    world = world_of()
    request = LeaveRequest(farewell("D"))
    assert answers(world, "D", "B", request) == [("A", request)]
    assert answers(world, "B", "A", request) == []
    pending = admissions(world).pending()
    assert pending is not None
    assert pending.left == (request.farewell,)
    assert admissions(world).gone() == {D}


def test_the_goodbye_of_a_stranger_is_nothing() -> None:
    world = world_of()
    assert answers(world, "E", "A", LeaveRequest(farewell("E"))) == []
    assert rejected(world) == {}
    assert admissions(world).pending() is None


def test_a_voter_loses_its_vote_before_it_is_let_go() -> None:
    world = world_of()
    answers(world, "B", "A", LeaveRequest(farewell("B")))
    assert admissions(world).gone() == {B}
    assert admissions(world).pending() is None  # not while it is of the committee
    printed = [line.strip() for line in world.execute("run 5s")]
    # Its peer did not say it, and asks to be a member again.
    assert printed[:2] == ["A: committee voters=[A C D] outgoing=[A B C]", "A: left peer=B"]
    assert "A: admitted peer=B name=b" in printed


# Exclusion


def votes(letter: str) -> tuple[Vote, Vote]:
    authority = authority_of(letter)
    one, other = (Vote(1, candidate, bytes(32), peer_id(letter)) for candidate in (A, B))
    return authority.sign(one), authority.sign(other)


def test_evidence_leads_to_an_exclusion_for_good_that_carries_it() -> None:
    world = world_of()
    world.inject("D", "B", EvidenceMessage(votes("C")))
    world.execute("run 1s")
    for letter in "ABCD":
        roster = world.peer(letter).roster
        assert "two Vote statements in one slot" in roster.excluded(C)
    bodies = [record.body for record in world.peer("A").agreement.voter.ledger.records]
    (exclusion,) = [e for body in bodies if isinstance(body, Members) for e in body.excluded]
    assert exclusion.until == 0
    assert exclusion.evidence == votes("C")


def test_two_statements_that_do_not_contradict_each_other_are_held_against_who_sends_them() -> None:
    world = world_of()
    one, other = votes("C")
    same = EvidenceMessage((one, one))
    different_slots = EvidenceMessage((one, authority_of("C").sign(msgspec.structs.replace(other, term=2))))
    forged = EvidenceMessage((one, authority_of("D").sign(other)))
    for message in (same, different_slots, forged):
        world.inject("D", "A", message)
    assert rejected(world) == {"bad_evidence": 3}
    assert admissions(world).pending() is None


def test_only_a_member_can_be_excluded() -> None:
    world = world_of()
    world.inject("D", "A", EvidenceMessage(votes("E")))
    assert rejected(world) == {}
    assert admissions(world).pending() is None


def test_a_voter_passes_evidence_on_to_the_coordinator() -> None:
    world = world_of()
    assert answers(world, "D", "B", EvidenceMessage(votes("C"))) == [("A", EvidenceMessage(votes("C")))]


def test_joiners_without_number_and_an_exclusion_make_a_record_that_every_voter_accepts() -> None:
    world = world_of()
    asked = admissions(world)
    for number in range(MAX_ADMISSIONS):
        peer = f"12D3KooWJoiner{number:04}"
        asked._joiners[peer] = admission(peer)
    asked.exclude(Exclusion(D, "late", 2))
    pending = asked.pending()
    assert pending is not None
    assert [exclusion.peer for exclusion in pending.excluded] == [D]
    assert len(pending.admitted) == MAX_ADMISSIONS - 1
    assert world.peer("B").roster.check(pending) == ""


def test_who_is_to_be_excluded_does_not_leave_before_and_return_at_once() -> None:
    world = world_of()
    asked = admissions(world)
    answers(world, "D", "A", LeaveRequest(farewell("D")))
    asked.exclude(Exclusion(D, "late", 2))
    pending = asked.pending()
    assert pending is not None
    assert (len(pending.left), len(pending.excluded)) == (0, 1)
    world.execute("run 1s")
    roster = world.peer("A").roster
    assert roster.excluded(D) == "late"
    assert roster.is_listed(D)


def test_evidence_against_who_has_left_is_kept_for_its_return() -> None:
    world = world_of()
    world.inject("C", "B", EvidenceMessage(votes("D")))  # not heard by A, which lets D go
    asked = admissions(world, "B")
    assert asked.distrusts(D)
    for letter in "ABC":
        world.peer(letter).roster._members.pop(D)
    asked.certified(0)
    assert asked.distrusts(D)
    (said,) = answers(world, "D", "B", JoinRequest(admission(D)))
    assert said == ("D", JoinReply("there is evidence against it"))


def test_evidence_is_not_replaced_by_a_lesser_reason() -> None:
    world = world_of()
    world.execute("cut A B")
    world.execute("cut A C")  # nothing is certified
    world.inject("D", "A", EvidenceMessage(votes("C")))
    admissions(world).exclude(Exclusion(C, "late", 2))
    assert admissions(world)._exclusions[C].evidence is not None


def test_evidence_that_the_coordinator_found_outlives_it() -> None:
    """It is told to all voters at once, as one alone may end before the record is certified."""
    world = world_of()
    said = answers(world, "D", "A", EvidenceMessage(votes("C")))
    assert ("B", EvidenceMessage(votes("C"))) in said


def test_evidence_is_told_again_however_much_there_is_against_others_that_have_left() -> None:
    world = world_of()
    admitted = admissions(world, "D")
    one, other = (authority_of("C").sign(Vote(1, candidate, bytes(32), C)) for candidate in (A, B))
    for number in range(MAX_EXCLUSIONS):
        peer = f"gone{number}"
        admitted._exclusions[peer] = Exclusion(peer, "signed two", 0, (one, other))
    world.execute("cut D A")  # it is told once in vain
    admitted.see(one)
    admitted.see(other)
    world.execute("run 1s")
    world.execute("heal")
    world.execute("run 20s")
    assert world.peer("A").roster.excluded_for_good(C)

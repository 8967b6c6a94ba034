"""The edge of a peer: nothing that arrives raises, everything wrong is counted, and it speaks only after it wrote."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pcoord.consensus.messages import (
    Append,
    AppendReply,
    Grants,
    PreVoteReply,
    PreVoteRequest,
    Records,
    RecordsRequest,
    TermNotice,
    TransferRequest,
    VoteReply,
    VoteRequest,
    Votes,
)
from p2pcoord.consensus.quorum import MAX_SIGNATURES, Committee
from p2pcoord.consensus.record import (
    Admission,
    CommitteeChange,
    Exclusion,
    Members,
    Opening,
    Record,
    Round,
    make_genesis,
    make_record,
)
from p2pcoord.consensus.statements import Acknowledgement, Farewell, Grant, Header, Transfer, Vote
from p2pcoord.consensus.voter import Appended, Certified, Owner, Standing, Truncated
from p2pcoord.effects import Cancelled, Done, Effect, Emit, Failed, Halt, Persist, Send
from p2pcoord.errors import LocalError, RemoteError
from p2pcoord.frames import PeerFrame
from p2pcoord.messages import decode_message
from p2pcoord.peer import MAX_COUNTED_PEERS, OTHERS, Peer
from p2pcoord.peer_settings import Restored
from p2pcoord.rounds.messages import EvidenceMessage
from p2pcoord.rounds.participation import join_proof
from p2pcoord.wire import decode, encode
from tests.script_runner import (
    CONFIG,
    RUN,
    SECRET,
    World,
    authority_of,
    certificate_by,
    frames_of,
    history,
    make_peer,
    peer_id,
    scripted_round,
    seen,
    settings_of,
)

A, B, C, D = (peer_id(letter) for letter in "ABCD")
MS = 1_000_000


def started(letter: str = "A", voters: str = "ABC", *, now: int = 0) -> Peer:
    """A voter after the history of a script's `committee`; everything it wrote so far is durable."""
    genesis, records, certificates = history(voters, voters, SECRET)
    frames = frames_of(letter, genesis, records, certificates)
    peer = make_peer(letter, genesis, settings_of(letter))
    written(peer, peer.start(Restored(tuple(frames), b"entropy"), now), now)
    return peer


def written(peer: Peer, effects: Iterable[Effect], now: int) -> list[Effect]:
    """All effects, once every Persist among them (and those that follow) is durable."""
    result = list(effects)
    waiting = [effect for effect in result if isinstance(effect, Persist)]
    while waiting:
        more = peer.complete(waiting.pop(0).id, Done(), now)
        waiting += [effect for effect in more if isinstance(effect, Persist)]
        result += more
    return result


def timeout(peer: Peer) -> tuple[list[Effect], int]:
    """What the peer does up to its election timeout, as a driver would tick it; and the time then."""
    effects: list[Effect] = []
    now, deadline = 0, peer.agreement.election.deadline
    while now < deadline:
        now = peer.next_deadline()
        effects += peer.tick(now)
    return effects, now


def counted(peer: Peer) -> dict[str, int]:
    return {kind: sum(by_peer.values()) for kind, by_peer in peer.rejected.items()}


def sent(effects: Iterable[Effect], to: str = "") -> list[object]:
    return [decode_message(e.data) for e in effects if isinstance(e, Send) and to in ("", e.to)]


def elected(voters: str = "ABC") -> tuple[Peer, int]:
    """A, coordinator of term 2 with its opening certified."""
    world = World()
    world.execute("committee " + " ".join(voters))
    world.execute("timeout A")
    world.execute("settle")
    world.execute("tick A 150ms")
    world.execute("settle")
    machine = world.machines["A"]
    assert machine.peer is not None
    return machine.peer, machine.clock


# Bytes


@settings(max_examples=50)
@given(st.lists(st.binary(max_size=300), max_size=4))
def test_garbage_is_counted_and_does_nothing_else(garbage: list[bytes]) -> None:
    peer = PEERS["A"]
    before = seen(peer)
    total = sum(counted(peer).values())
    for data in garbage:
        effects = peer.receive(B, data, 0)
        assert all(isinstance(effect, Emit) and effect.event == "rejected" for effect in effects)
    assert sum(counted(peer).values()) == total + len(garbage)
    assert seen(peer) == before


PEERS = {"A": started()}
RECORDS: list[Record] = history("ABC", "ABC", SECRET)[1]


def real_messages() -> list[tuple[str, str, bytes]]:
    """(from, to, bytes) of an election, of rounds, and of a voter that catches up."""
    world = World()
    seen: list[tuple[str, str, bytes]] = []
    arrive = world._arrive

    def record(source: str, target: str, data: bytes) -> None:
        seen.append((source, target, data))
        arrive(source, target, data)

    world._arrive = record  # type: ignore[method-assign]
    for command in (
        "committee A B C",
        "timeout A",
        "settle",
        "cut A C",
        "propose A 3",
        "settle",
        "heal",
        "tick A 150ms",
        "settle",
        "transfer A B",
        "settle",
    ):
        world.execute(command)
    return seen


SEEN = real_messages()


@settings(max_examples=150)
@given(st.data())
def test_a_damaged_message_never_raises_and_never_moves_a_term_or_a_certificate(data: st.DataObject) -> None:
    source, target, original = data.draw(st.sampled_from(SEEN))
    damaged = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    peer = started(target)
    peer.receive(peer_id(source), bytes(damaged), 0)
    if bytes(damaged) != original:
        status = seen(peer)
        honest = started(target)
        honest.receive(peer_id(source), original, 0)
        assert status.certified in (4, seen(honest).certified)
        assert status.term in (1, seen(honest).term)


@settings(max_examples=100)
@given(st.data())
def test_true_messages_in_any_order_from_anybody_never_raise(data: st.DataObject) -> None:
    peer = started("B")
    for _ in range(data.draw(st.integers(1, 8))):
        _, _, message = data.draw(st.sampled_from(SEEN))
        written(peer, peer.receive(peer_id(data.draw(st.sampled_from("ACD"))), message, 0), 0)
    assert not peer.halted


def test_rejections_are_counted_by_kind_and_by_peer_and_bounded() -> None:
    peer = started()
    for number in range(MAX_COUNTED_PEERS + 10):
        peer.receive(f"peer {number}", b"\xff", 0)
    peer.receive("peer 0", b"\xff", 0)
    by_peer = peer.rejected["malformed"]
    assert by_peer["peer 0"] == 2
    assert by_peer[OTHERS] == 10
    assert len(by_peer) == MAX_COUNTED_PEERS + 1
    assert peer.rejected["malformed"]["peer 0"] == 2


# Lies


def lies() -> dict[str, tuple[str, str, msgspec.Struct]]:
    """What is wrong: (kind it is counted as, sender, message), to A in term 1 of the committee A, B, C."""
    _, records, certificates = history("ABC", "ABC", SECRET)
    last = records[-1].header
    name = authority_of("A").hash(last)
    opening = records[0].body
    old_votes = opening.votes  # type: ignore[union-attr]
    proof = certificates[4]

    def grants(*letters: str, term: int = 2) -> Grants:
        return Grants(tuple(authority_of(x[-1]).sign(Grant(term, B, peer_id(x[0]))) for x in letters))

    def votes(*letters: str) -> Votes:
        return Votes(tuple(authority_of(x[-1]).sign(Vote(2, B, name, peer_id(x[0]))) for x in letters))

    newer = msgspec.structs.replace(last, height=9, term=1, signature=b"")
    foreign = msgspec.structs.replace(
        authority_of("B").sign(msgspec.structs.replace(last, coordinator=B, signature=b""))
    )
    return {
        "grants without a quorum": ("unproven", B, TermNotice(2, grants("B"))),
        "the same grant twice": ("unproven", B, TermNotice(2, grants("B", "B"))),
        "grants of strangers": ("unproven", B, TermNotice(2, grants("B", "D"))),
        "a forged grant": ("bad_signature", B, TermNotice(2, grants("B", "C~B"))),
        "no grants": ("bad_proof", B, TermNotice(2, Grants(()))),
        "no votes": ("bad_proof", B, TermNotice(2, Votes(()))),
        "grants of several terms": (
            "bad_proof",
            B,
            TermNotice(2, Grants(grants("B").grants + grants("C", term=3).grants)),
        ),
        "grants of another term": ("unproven", B, TermNotice(5, grants("B", "C"))),
        "endless grants": ("bad_proof", B, TermNotice(2, Grants(grants("B").grants * (MAX_SIGNATURES + 1)))),
        "endless votes": ("unproven", B, TermNotice(2, Votes(votes("B").votes * (MAX_SIGNATURES + 1)))),
        "endless signatures": (
            "bad_certificate",
            B,
            TermNotice(
                2, msgspec.structs.replace(proof, term=2, signatures=proof.signatures * MAX_SIGNATURES)
            ),
        ),
        "votes without a quorum": ("unproven", B, TermNotice(2, votes("B"))),
        "a forged vote": ("bad_signature", B, TermNotice(2, votes("B", "C~B"))),
        "a certificate of another term": (
            "unproven",
            B,
            TermNotice(2, msgspec.structs.replace(proof, term=2)),
        ),
        "a header that its coordinator did not sign": (
            "bad_signature",
            B,
            PreVoteRequest(2, proof, newer, old_votes),
        ),
        "a header by another": ("bad_header", B, PreVoteRequest(2, proof, foreign, old_votes)),
        "a header of a term beyond the candidate's": (
            "bad_header",
            B,
            PreVoteRequest(2, proof, msgspec.structs.replace(last, term=7), old_votes),
        ),
        "an order without a right": (
            "not_coordinator",
            B,
            Append(1, 150 * MS, 4, name, (), None, None),
        ),
        "an order in a term of one's own": (
            "unproven",
            B,
            Append(2, 150 * MS, 4, name, (), None, votes("B")),
        ),
        "another's votes": (
            "not_coordinator",
            C,
            Append(2, 150 * MS, 4, name, (), None, votes("B", "C")),
        ),
        "a forged certificate": (
            "bad_certificate",
            B,
            Records((next_record(records),), certificate_by(["B", "C~B"], next_record(records)), 5),
        ),
        "records beyond their certificate": (
            "gap",
            B,
            Records(
                (next_record(records), next_record(records, 6)),
                certificate_by("BC", next_record(records)),
                5,
            ),
        ),
        "no records": ("gap", B, Records((), certificate_by("BC", next_record(records)), 5)),
    }


def next_record(records: list[Record], height: int = 5) -> Record:
    return make_record(
        authority_of("A"),
        height=height,
        term=1,
        previous=authority_of("A").hash(records[-1].header),
        committee=4,
        body=scripted_round(1),
    )


@pytest.mark.parametrize("case", lies())
def test_a_lie_is_counted_and_changes_nothing(case: str) -> None:
    kind, sender, message = lies()[case]
    peer = started("A")
    before = seen(peer)
    effects = peer.receive(sender, encode(message), 0)
    assert peer.rejected == {kind: {sender: 1}}
    assert not any(isinstance(reply, PreVoteReply | VoteReply | AppendReply) for reply in sent(effects))
    after = seen(peer)
    if case != "another's votes":  # whose term is proven, whoever shows it
        assert after == before
        assert not any(isinstance(effect, Persist) for effect in effects)
    assert after.certified == before.certified


def test_who_is_no_member_gets_no_records() -> None:
    peer = started("A")
    assert peer.receive(D, encode(RecordsRequest(1)), 0) == []
    (answer,) = sent(peer.receive(B, encode(RecordsRequest(1)), 0))
    assert isinstance(answer, Records)


def test_grants_and_votes_that_are_not_the_sender_s_own_count_for_nothing() -> None:
    peer = started("A")
    _, now = timeout(peer)
    grant = authority_of("C").sign(Grant(2, A, C))
    peer.receive(B, encode(PreVoteReply(2, grant)), now)
    peer.receive(B, encode(PreVoteReply(2, authority_of("B").sign(Grant(2, C, B)))), now)
    peer.receive(B, encode(PreVoteReply(2, msgspec.structs.replace(grant, voter=B))), now)
    assert counted(peer) == {"bad_grant": 2, "bad_signature": 1}
    assert seen(peer).term == 1
    written(peer, peer.receive(C, encode(PreVoteReply(2, grant)), now), now)
    assert seen(peer).role == "candidate"

    last = peer.agreement.voter.ledger.hashes[-1]
    vote = authority_of("C").sign(Vote(2, A, last, C))
    peer.receive(B, encode(VoteReply(2, vote)), now)
    peer.receive(B, encode(VoteReply(2, authority_of("B").sign(Vote(2, A, b"other", B)))), now)
    peer.receive(B, encode(VoteReply(2, msgspec.structs.replace(vote, voter=B))), now)
    assert counted(peer) == {"bad_grant": 2, "bad_signature": 2, "bad_vote": 2}
    assert seen(peer).role == "candidate"
    written(peer, peer.receive(C, encode(VoteReply(2, vote)), now), now)
    assert seen(peer).role == "coordinator"


def test_a_stranger_s_replies_leave_no_trace_at_the_coordinator() -> None:
    peer, now = elected()
    known = set(peer.agreement.replication.progress)
    for number in range(100):
        for term in (1, 2, 3):
            peer.receive(f"stranger {number}", encode(AppendReply(term, True, 5, 5)), now)
    assert set(peer.agreement.replication.progress) == known


def test_a_lying_coordinator_gets_no_acknowledgement_for_a_round_without_its_body() -> None:
    world = World()
    for command in ("committee A B C", "timeout A", "settle"):
        world.execute(command)
    coordinator, voter = world.machines["A"].peer, world.machines["B"].peer
    assert coordinator is not None
    assert voter is not None
    ledger = coordinator.agreement.voter.ledger
    record = make_record(
        authority_of("A"),
        height=6,
        term=2,
        previous=ledger.hashes[5],
        committee=4,
        body=scripted_round(1),
    )
    message = Append(2, 150 * MS, 5, ledger.hashes[5], (Record(record.header, None),), None, None)
    effects = voter.receive(A, encode(message), world.machines["B"].clock)
    assert counted(voter) == {"bad_record": 1}
    assert not sent(effects)
    assert voter.agreement.voter.ledger.height == 5


def voter_with_an_uncertified_round() -> tuple[World, Peer]:
    """B, which holds A's round at height 6 of term 2 and acknowledged it; A's log and clocks are the world's."""
    world = World()
    for command in (
        "committee A B C",
        "timeout A",
        "settle",
        "tick A 150ms",
        "settle",
        "propose A",
        "deliver A->B",
    ):
        world.execute(command)
    voter = world.machines["B"].peer
    assert voter is not None
    assert seen(voter).height == 6
    return world, voter


def test_two_records_of_one_coordinator_for_one_place_get_one_acknowledgement() -> None:
    world, voter = voter_with_an_uncertified_round()
    ledger = voter.agreement.voter.ledger
    held = ledger.hashes[6]
    other = make_record(
        authority_of("A"),
        height=6,
        term=2,
        previous=ledger.hashes[5],
        committee=4,
        body=scripted_round(6, b"another"),
    )
    append = Append(2, 150 * MS, 5, ledger.hashes[5], (other,), None, None)
    effects = voter.receive(A, encode(append), world.machines["B"].clock)
    assert counted(voter) == {"equivocation": 1}
    assert not [message for message in sent(effects) if isinstance(message, AppendReply)]
    (evidence,) = [message for message in sent(effects, C) if isinstance(message, EvidenceMessage)]
    assert {statement.coordinator for statement in evidence.evidence if isinstance(statement, Header)} == {A}
    assert not sent(effects, A)
    assert ledger.hashes[6] == held


def test_a_record_that_cannot_replace_others_leaves_them_as_they_were() -> None:
    world, voter = voter_with_an_uncertified_round()
    ledger = voter.agreement.voter.ledger
    before = list(ledger.records)
    name = ledger.hashes[5]
    votes = Votes(tuple(authority_of(x).sign(Vote(3, C, name, peer_id(x))) for x in "AC"))
    short = Opening(votes.votes[:1])
    opening = make_record(authority_of("C"), height=6, term=3, previous=name, committee=4, body=short)
    append = Append(3, 150 * MS, 5, name, (opening,), None, votes)
    effects = voter.receive(C, encode(append), world.machines["B"].clock)
    assert counted(voter) == {"bad_votes": 1}
    assert ledger.records == before
    # The term is proven, so it is entered; nothing of the log is written.
    frames = [decode(f, PeerFrame) for e in effects if isinstance(e, Persist) for f in e.frames]  # type: ignore[arg-type,var-annotated]
    assert all(isinstance(frame, Standing) for frame in frames)


def test_a_committee_of_strangers_is_not_acknowledged_and_what_was_begun_can_be_ended() -> None:
    peer = started("B")
    ledger = peer.agreement.voter.ledger

    def change(committee: Committee) -> Record:
        return make_record(
            authority_of("A"),
            height=ledger.height + 1,
            term=1,
            previous=ledger.hashes[-1],
            committee=ledger.committee_height,
            body=CommitteeChange(committee),
        )

    assert "no member" in str(peer._check(change(Committee((A, B, D), (A, B, C)))))
    assert peer._check(change(Committee((A, B, C), (A, B, C)))) == ""
    # C is excluded between J and N: N still ends what J began.
    ledger.append(change(Committee((A, C), (A, B, C))))
    excluded = Members(excluded=(Exclusion(C, "liar", 0),))
    peer.roster.apply(
        [make_record(authority_of("A"), height=6, term=1, previous=bytes(32), committee=5, body=excluded)]
    )
    assert not peer.roster.is_member(C)
    assert peer._check(change(Committee((A, C)))) == ""


def test_the_coordinator_proposes_only_what_voters_accept() -> None:
    """A record that every voter refuses would stay uncertified, and nothing could be ordered after it."""
    peer, now = elected()
    height = seen(peer).height
    peer.admissions._farewells[D] = authority_of("D").sign(Farewell(D, 3))
    peer.admissions._joiners[D] = Admission(D, "x" * 100, join_proof(SECRET, RUN, D))
    for _ in range(5):
        now = max(peer.next_deadline(), now)
        written(peer, peer.tick(now), now)
    assert seen(peer).height == height


# Persist, then speak


def check_order(effects: Iterable[Effect]) -> None:
    """Every vote, acknowledgement and term that is spoken of was written by a Persist that the Send waits for."""
    frames: dict[int, list[object]] = {}
    for effect in effects:
        if isinstance(effect, Persist):
            frames[effect.id] = [decode(frame, PeerFrame) for frame in effect.frames]  # type: ignore[arg-type]
        if isinstance(effect, Send):
            message = decode_message(effect.data)
            needed = [
                number
                for number, written_ in frames.items()
                if any(isinstance(f, Standing) for f in written_)
                or (isinstance(message, AppendReply) and any(isinstance(f, Appended) for f in written_))
            ]
            assert effect.after >= max(needed, default=0)


def test_no_vote_acknowledgement_or_term_is_spoken_of_before_it_is_written() -> None:
    sends = 0
    for target in "ABC":
        peer = started(target)
        for source, receiver, data in SEEN:
            if receiver == target:
                effects = peer.receive(peer_id(source), data, 0)
                check_order(effects)
                sends += sum(isinstance(effect, Send) for effect in effects)
                written(peer, effects, 0)
    assert sends > 10


def test_a_vote_waits_for_the_write_of_the_vote() -> None:
    peer = started("B")
    ledger = peer.agreement.voter.ledger
    grants = Grants(tuple(authority_of(x).sign(Grant(2, A, peer_id(x))) for x in "AB"))
    request_ = VoteRequest(2, grants, ledger.last, peer.agreement.voter.last_votes())
    effects = peer.receive(A, encode(request_), 0)
    persists = [effect for effect in effects if isinstance(effect, Persist)]
    (reply,) = [effect for effect in effects if isinstance(effect, Send)]
    frame = decode(persists[-1].frames[-1], PeerFrame)  # type: ignore[arg-type,var-annotated]
    assert isinstance(frame, Standing)
    assert (frame.term, frame.voted_for) == (2, A)
    assert reply.after == persists[-1].id


def test_a_request_for_votes_waits_for_the_candidate_s_own_vote() -> None:
    peer = started("A")
    _, now = timeout(peer)
    effects = peer.receive(B, encode(PreVoteReply(2, authority_of("B").sign(Grant(2, A, B)))), now)
    (persist,) = [effect for effect in effects if isinstance(effect, Persist)]
    requests = [effect for effect in effects if isinstance(effect, Send)]
    assert {effect.to for effect in requests} == {B, C}
    assert all(effect.after == persist.id for effect in requests)


# Completions


def test_the_completion_of_an_unknown_effect_is_ignored() -> None:
    peer = started()
    before = seen(peer)
    for effect_id in (0, 1, 17, 1 << 40):
        for outcome in (Done(), Failed("no"), Cancelled()):
            assert peer.complete(effect_id, outcome, 0) == []
    assert seen(peer) == before
    assert not peer.halted


@pytest.mark.parametrize("outcome", [Failed("disk full"), Cancelled()])
def test_a_persist_that_fails_halts_the_peer_for_good(outcome: Failed | Cancelled) -> None:
    peer = started("A")
    _, now = timeout(peer)
    effects = peer.receive(B, encode(PreVoteReply(2, authority_of("B").sign(Grant(2, A, B)))), now)
    (persist,) = [effect for effect in effects if isinstance(effect, Persist)]
    (halt,) = peer.complete(persist.id, outcome, now)
    assert isinstance(halt, Halt)
    assert "the log could not be written" in halt.reason
    assert peer.halted == halt.reason
    assert peer.receive(B, b"\xff", now) == []
    assert peer.tick(now + 10_000 * MS) == []
    assert peer.complete(persist.id, Done(), now) == []
    assert peer.connected(B, now) == []
    assert peer.leave(now) == []


# Logs


@pytest.mark.parametrize(
    "spoil",
    [
        lambda frames: [b"\xff"],
        lambda frames: frames[1:],  # no owner
        lambda frames: [encode(Owner(B, b"r" * 32)), *frames[1:]],
        lambda frames: [encode(Owner(A, b"another run")), *frames[1:]],
        lambda frames: [
            frames[0],
            encode(Appended(make_genesis(authority_of("A"), b"another"))),
            *frames[2:],
        ],
        lambda frames: [*frames, encode(Truncated(1))],  # below the certified
        lambda frames: frames[:3] + frames[5:],  # a record is missing
        lambda frames: [*frames, frames[3]],
        lambda frames: [
            *frames,
            encode(Certified(certificate_by("A", RECORDS[-1]))),
        ],
        lambda frames: [*frames, encode(VoteReply(1, None))],
    ],
)
def test_a_log_that_is_another_s_or_contradicts_itself_is_refused(spoil: object) -> None:
    genesis, records, certificates = history("ABC", "ABC", SECRET)
    frames = spoil(frames_of("A", genesis, records, certificates))  # type: ignore[operator]
    peer = make_peer("A", genesis, settings_of("A"))
    with pytest.raises(LocalError):
        peer.start(Restored(tuple(frames), b"entropy"), 0)


def test_a_peer_goes_on_from_its_log() -> None:
    peer = started("B")
    status = seen(peer)
    assert (status.height, status.certified, status.term) == (4, 4, 1)
    assert status.voters == (A, B, C)
    assert status.members == (A, B, C)
    assert status.role == "follower"


def test_entropy_and_purpose_decide_every_random_draw() -> None:
    one, other = started("A"), started("A")
    assert one.agreement.election.deadline == other.agreement.election.deadline
    assert one.random("x").random() == other.random("x").random()
    assert one.random("x").random() != one.random("y").random()


def test_a_transfer_to_another_or_of_another_term_is_too_late_and_no_fault() -> None:
    peer, now = elected()
    for transfer in (Transfer(1, A, B), Transfer(2, B, C), Transfer(2, B, A)):
        peer.receive(B, encode(TransferRequest(authority_of("B").sign(transfer))), now)
    assert seen(peer).role == "coordinator"
    assert seen(peer).term == 2


def test_an_acknowledgement_of_another_record_is_counted() -> None:
    peer, now = elected()
    peer.agreement.propose(scripted_round(1))
    written(peer, peer._finish(now), now)
    ack = authority_of("B").sign(Acknowledgement(2, 6, b"r" * 32, B))
    peer.receive(B, encode(AppendReply(2, True, 6, 5, (ack,))), now)
    assert counted(peer) == {"bad_ack": 1}
    assert seen(peer).certified == 5


def test_a_remote_error_knows_its_kind() -> None:
    error = RemoteError("kind", "detail")
    assert (error.kind, error.detail, str(error)) == ("kind", "detail", "kind: detail")


def test_the_genesis_of_a_run_is_the_same_for_all() -> None:
    assert make_genesis(authority_of("A"), CONFIG) == make_genesis(authority_of("A"), CONFIG)


@pytest.mark.parametrize(("rounds", "marked"), [(1, {}), (2, {"late": True})])
def test_who_came_while_this_peer_was_away_is_marked_as_history(rounds: int, marked: dict[str, bool]) -> None:
    peer = started()

    def record(body: Members | Round) -> Record:
        return make_record(authority_of("A"), height=9, term=1, previous=bytes(32), committee=0, body=body)

    certified = [record(Members((Admission(D, "lab4", b""),)))]
    certified += [record(scripted_round(version)) for version in range(1, rounds + 1)]
    peer._on_certified(certified, 0)
    [told] = [e for e in peer.outbox.take() if isinstance(e, Emit) and e.event == "admitted"]
    assert told.fields == {"peer": D, "name": "lab4"} | marked

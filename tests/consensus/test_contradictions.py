"""Peers that contradict themselves: what the others make of it, from the messages alone."""

import msgspec

from p2pcoord.consensus.messages import Append, AppendReply, Records, VoteReply, Votes
from p2pcoord.consensus.record import Opening, Record, make_record
from p2pcoord.consensus.statements import Acknowledgement, Vote
from p2pcoord.consensus.voter import AnyFrame, Voter
from p2pcoord.messages import decode_message
from p2pcoord.outbox import Outbox
from p2pcoord.peer import Peer
from p2pcoord.rounds.messages import EvidenceMessage
from p2pcoord.wire import encode
from tests.script_runner import World, authority_of, certificate_by, peer_id, scripted_round

A, B, C = (peer_id(letter) for letter in "ABC")
MS = 1_000_000


class LyingWorld(World):
    """A coordinates term 2 and has had B acknowledge a round at height 6; nobody else has it."""

    def __init__(self) -> None:
        super().__init__()
        self.run("committee A B C", "timeout A", "settle", "tick A 150ms", "settle")
        self.run("propose A", "deliver A->B", "drop A->C")

    def run(self, *commands: str) -> None:
        for command in commands:
            self.execute(command)

    def peer(self, letter: str) -> Peer:
        peer = self.machines[letter].peer
        assert peer is not None
        return peer

    def hears(self, target: str, source: str, message: msgspec.Struct) -> None:
        self._arrive(source, target, encode(message))

    def accused(self, letter: str) -> set[str]:
        return set(self.peer(letter).admissions._exclusions)

    def excluded(self, letter: str) -> str:
        """What B's ledger says of why this peer is excluded."""
        roster = self.peer("B").roster
        return roster.excluded(peer_id(letter)) if roster.excluded_for_good(peer_id(letter)) else ""


def record_by(letter: str, before: Record, body: msgspec.Struct, term: int = 2) -> Record:
    authority = authority_of(letter)
    height, previous = before.header.height + 1, authority.hash(before.header)
    return make_record(authority, height=height, term=term, previous=previous, committee=4, body=body)  # type: ignore[arg-type]


def other_round(world: LyingWorld) -> Record:
    """Another record by A for height 6 of term 2."""
    return record_by("A", world.peer("A").agreement.voter.ledger.records[5], scripted_round(1, b"another"))


def append_of(record: Record, term: int = 2, votes: Votes | None = None) -> Append:
    return Append(term, 150 * MS, record.header.height - 1, record.header.previous, (record,), None, votes)


def test_a_coordinator_that_orders_two_records_for_one_place_is_voted_out_and_excluded() -> None:
    world = LyingWorld()
    world.hears("B", "A", append_of(other_round(world)))
    assert world.accused("B") == {A}
    assert not world.peer("B").agreement.voter.ledger.holds(
        6, authority_of("A").hash(other_round(world).header)
    )
    world.run("deliver B->C")
    assert world.accused("C") == {A}
    # A goes on with its heartbeats; nobody follows it any more.
    world.run("run 6s")
    assert "two Header statements" in world.excluded("A")
    assert world.peer("B").agreement.voter.coordinator in (B, C)
    assert A not in world.peer("B").agreement.committee.everyone


def test_evidence_against_the_coordinator_is_said_again_until_it_is_heard() -> None:
    world = LyingWorld()
    world.hears("B", "A", append_of(other_round(world)))
    world.run("drop")
    assert world.accused("C") == set()
    world.run("run 6s")
    assert "two Header statements" in world.excluded("A")


def test_a_record_with_a_forged_signature_is_evidence_against_nobody() -> None:
    world = LyingWorld()
    forged = other_round(world)
    forged = Record(msgspec.structs.replace(forged.header, signature=bytes(64)), forged.body)
    world.hears("B", "A", append_of(forged))
    assert world.accused("B") == set()


def test_the_same_record_and_acknowledgement_again_also_after_a_restart_are_no_evidence() -> None:
    world = LyingWorld()
    (record,) = world.peer("A").agreement.voter.ledger.records[6:]
    for _ in range(2):
        world.hears("B", "A", append_of(record))
        world.run("settle", "crash B", "restart B")
    world.run("run 2s")
    assert all(world.accused(letter) == set() for letter in "ABC")


def test_a_record_of_a_higher_term_in_its_place_is_no_evidence() -> None:
    world = LyingWorld()
    name = world.peer("B").agreement.voter.ledger.hashes[5]
    votes = Votes(tuple(authority_of(x).sign(Vote(3, C, name, peer_id(x))) for x in "AC"))
    before = world.peer("B").agreement.voter.ledger.records[5]
    opening = record_by("C", before, Opening(votes.votes), term=3)
    world.hears("B", "C", append_of(opening, 3, votes))
    assert world.peer("B").agreement.voter.ledger.last.term == 3
    assert all(world.accused(letter) == set() for letter in "ABC")


def test_an_older_record_that_gives_way_to_another_of_its_term_is_evidence_and_blocks_nothing() -> None:
    """A ordered two rounds in term 2; C took the other one up, and now coordinates term 3."""
    world = LyingWorld()
    other = other_round(world)
    name = authority_of("A").hash(other.header)
    votes = Votes(tuple(authority_of(x).sign(Vote(3, C, name, peer_id(x))) for x in "AC"))
    opening = record_by("C", other, Opening(votes.votes), term=3)
    append = Append(3, 150 * MS, 5, other.header.previous, (other, opening), None, votes)
    world.hears("B", "C", append)
    assert world.accused("B") == {A}
    assert world.peer("B").agreement.voter.ledger.last == opening.header


def test_a_certified_record_in_place_of_one_of_the_same_term_is_evidence_and_ends_acknowledging_in_it() -> (
    None
):
    """B acknowledged one round at height 6, the others another: whatever A orders above it, B might have acknowledged before."""
    world = LyingWorld()
    other = other_round(world)
    world.hears("B", "C", Records((other,), certificate_by("AC", other), 6))
    assert world.accused("B") == {A}
    voter = world.peer("B").agreement.voter
    assert voter.contradicted is not None
    frames: list[AnyFrame] = voter.compacted_frames()  # type: ignore[assignment]
    again = Voter(authority_of("B"), Outbox(B), world.peer("B").genesis)
    again.restore(frames)
    assert again.contradicted == voter.contradicted
    assert again.ledger.hashes == voter.ledger.hashes
    # After a restart B holds no evidence any more, but its log knows.
    world.run("drop", "crash B", "restart B")
    assert world.accused("B") == set()
    world.queues["B", "A"].clear()
    world.hears("B", "A", append_of(record_by("A", other, scripted_round(2))))
    replies = [decode_message(data) for data in world.queues["B", "A"]]
    (reply,) = [reply for reply in replies if isinstance(reply, AppendReply)]
    assert reply.match_height == 7
    assert reply.acknowledgements == ()


def test_who_acknowledges_two_records_for_one_place_is_excluded() -> None:
    world = LyingWorld()
    world.run("settle")
    assert world.peer("A").agreement.voter.ledger.certified == 6
    lie = authority_of("C").sign(Acknowledgement(2, 6, b"r" * 32, C))
    truth = authority_of("C").sign(Acknowledgement(2, 6, world.peer("A").agreement.voter.ledger.hashes[6], C))
    for ack in (truth, lie):  # both too late to count
        world.hears("A", "C", AppendReply(2, True, 6, 5, (ack,)))
    assert world.accused("A") == {C}
    world.run("run 2s")
    assert "two Acknowledgement statements" in world.excluded("C")


def test_who_votes_twice_is_excluded_when_the_loser_sees_the_opening() -> None:
    world = LyingWorld()
    world.run("settle", "run 1s")
    last = world.peer("B").agreement.voter.last_votes()
    vote = next(vote for vote in last if vote.voter in (B, C) and vote.candidate == A)
    liar, loser = ("C", "B") if vote.voter == C else ("B", "C")
    other = authority_of(liar).sign(Vote(2, peer_id(loser), vote.last, peer_id(liar)))
    world.hears(loser, liar, VoteReply(2, other))
    assert world.accused(loser) == {peer_id(liar)}
    world.run("run 2s")
    assert "two Vote statements" in world.peer("A").roster.excluded(peer_id(liar))


def test_a_voter_whose_two_votes_reach_one_candidate_is_accused_although_the_second_is_not_for_it() -> None:
    world = World()
    for command in ("committee A B C", "timeout A", "deliver A->B", "deliver B->A"):
        world.execute(command)
    peer = world.machines["A"].peer
    assert peer is not None
    assert peer.agreement.voter.role == "candidate"
    last = peer.agreement.voter.ledger.hashes[-1]
    for candidate in (B, A):
        vote = authority_of("C").sign(Vote(2, candidate, last, C))
        world._arrive("C", "A", encode(VoteReply(2, vote)))
    assert set(peer.admissions._exclusions) == {C}


def test_evidence_reaches_who_is_already_excluded_for_a_time() -> None:
    world = LyingWorld()
    world.run("settle")
    admissions = world.peer("A").admissions
    admissions.exclude(world.peer("A").roster.exclusion_of(C, "slow"))
    pair = tuple(authority_of("C").sign(Vote(1, x, bytes(32), C)) for x in (A, B))
    world.hears("A", "B", EvidenceMessage((pair[0], pair[1])))
    world.run("run 2s")
    assert "two Vote statements" in world.excluded("C")

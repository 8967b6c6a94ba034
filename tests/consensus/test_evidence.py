import msgspec
import pytest

from p2pcoord.aggregation.contribution import ContributionHeader
from p2pcoord.consensus.evidence import MAX_REMEMBERED, EvidenceBook, SignedStatement, contradict, signer_of
from p2pcoord.consensus.record import Admission, Exclusion, Members, make_record
from p2pcoord.consensus.statements import Acknowledgement, Header, Vote
from p2pcoord.content import ContentRef
from p2pcoord.rounds.participation import Roster, join_proof
from tests.script_runner import RUN, SECRET, authority_of, peer_id

B = peer_id("B")


def by_b(statement: SignedStatement) -> SignedStatement:
    return authority_of("B").sign(statement)


def header(content: bytes, incarnation: int = 1) -> ContributionHeader:
    return ContributionHeader(
        3, 1, incarnation, B, b"s" * 32, ContentRef(content * 32, 28), 10, 2, 0.5, 1.0, 9
    )


PAIRS = [
    (Vote(4, peer_id("A"), b"l", B), Vote(4, peer_id("C"), b"l", B)),
    (Vote(4, peer_id("A"), b"l", B), Vote(4, peer_id("A"), b"m", B)),
    (Acknowledgement(4, 7, b"r", B), Acknowledgement(4, 7, b"q", B)),
    (Header(7, 4, b"p", 0, "round", b"x", B), Header(7, 4, b"p", 0, "round", b"y", B)),
    (header(b"x"), header(b"y")),
]
HARMLESS = [
    (Vote(4, peer_id("A"), b"l", B), Vote(5, peer_id("C"), b"l", B)),
    (Acknowledgement(4, 7, b"r", B), Acknowledgement(5, 7, b"q", B)),
    (Acknowledgement(4, 7, b"r", B), Acknowledgement(4, 8, b"q", B)),
    (header(b"x"), header(b"y", incarnation=2)),
    (Vote(4, peer_id("A"), b"l", B), Vote(4, peer_id("A"), b"l", B)),
]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_two_contents_in_one_slot_are_evidence(first: SignedStatement, second: SignedStatement) -> None:
    book = EvidenceBook(authority_of("A"))
    assert book.see(by_b(first)) is None
    assert book.see(by_b(second)) == (by_b(first), by_b(second))
    assert signer_of(first) == B


@pytest.mark.parametrize(("first", "second"), HARMLESS)
def test_other_slots_and_repetitions_are_none(first: SignedStatement, second: SignedStatement) -> None:
    book = EvidenceBook(authority_of("A"))
    assert book.see(by_b(first)) is None
    assert book.see(by_b(second)) is None
    assert not contradict(by_b(first), by_b(second), authority_of("A"))


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_a_statement_that_another_key_signed_accuses_nobody(
    first: SignedStatement, second: SignedStatement
) -> None:
    forged = msgspec.structs.replace(second, signature=authority_of("C").sign(second).signature)
    assert not contradict(by_b(first), forged, authority_of("A"))


def test_what_is_remembered_is_bounded() -> None:
    book = EvidenceBook(authority_of("A"))
    for height in range(MAX_REMEMBERED + 10):
        book.see(Acknowledgement(1, height, b"r", B))
    assert len(book) == MAX_REMEMBERED


def test_evidence_excludes_for_good_and_nothing_else_does() -> None:
    roster = Roster(authority_of("A"), SECRET)
    admitted = Members((Admission(B, "b", join_proof(SECRET, RUN, B)),))
    roster.apply(
        [make_record(authority_of("A"), height=1, term=1, previous=bytes(32), committee=0, body=admitted)]
    )
    pair = (by_b(PAIRS[0][0]), by_b(PAIRS[0][1]))
    assert roster.check(Members(excluded=(Exclusion(B, "two votes", 0, pair),))) == ""
    assert "shows nothing" in roster.check(
        Members(excluded=(Exclusion(B, "two votes", 0, (pair[0], pair[0])),))
    )
    other = roster.check(Members(excluded=(Exclusion(peer_id("A"), "two votes", 0, pair),)))
    assert "shows nothing" in other

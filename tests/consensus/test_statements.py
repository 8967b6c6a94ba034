"""What a quorum of signatures proves: votes that elect, acknowledgements that certify."""

from __future__ import annotations

import msgspec
import pytest

from p2pcoord.aggregation.contribution import ContributionHeader
from p2pcoord.consensus.evidence import SignedStatement
from p2pcoord.consensus.quorum import MAX_SIGNATURES, Committee
from p2pcoord.consensus.statements import (
    Acknowledgement,
    Certificate,
    Header,
    Vote,
    certificate_of,
    check_votes,
)
from p2pcoord.content import ContentRef
from p2pcoord.errors import RemoteError
from p2pcoord.messages import decode_message
from p2pcoord.rounds.messages import EvidenceMessage
from p2pcoord.wire import encode
from tests.script_runner import authority_of, peer_id

A, B, C = (peer_id(letter) for letter in "ABC")
LAST = b"l" * 32


def votes(by: str) -> list[Vote]:
    return [authority_of(letter).sign(Vote(2, B, LAST, peer_id(letter))) for letter in by]


def check(ballots: list[Vote], *committees: Committee) -> None:
    check_votes(authority_of("A"), ballots, term=2, candidate=B, last=LAST, committees=committees)


def certificate(by: str) -> Certificate:
    return certificate_of(
        authority_of(letter).sign(Acknowledgement(2, 5, LAST, peer_id(letter))) for letter in by
    )


def test_a_quorum_of_any_committee_that_may_count_elects_its_candidate() -> None:
    check(votes("BC"), Committee((A, B, C)))
    check(votes("BC"), Committee((A,)), Committee((A, B, C)))
    with pytest.raises(RemoteError, match="bad_votes"):
        check(votes("B"), Committee((A, B, C)))
    with pytest.raises(RemoteError, match="bad_votes"):
        check(votes("AC"), Committee((A, C)))  # a quorum, for a peer without a vote in it


def test_more_votes_than_any_committee_has_voters_are_not_even_checked() -> None:
    forged = msgspec.structs.replace(votes("B")[0], signature=b"s" * 64)
    with pytest.raises(RemoteError, match="more votes"):
        check([forged] * (MAX_SIGNATURES + 1), Committee((A, B, C)))


def test_votes_of_voters_that_the_judge_does_not_know_do_no_harm() -> None:
    check(votes("BCDEF"), Committee((A, B, C)))


def test_the_order_of_acknowledgements_does_not_matter_to_a_certificate() -> None:
    assert certificate("CAB") == certificate("ABC")


def test_only_those_whose_signatures_hold_count_as_signers_of_a_certificate() -> None:
    good = certificate("ABC")
    assert good.signers(authority_of("A")) == {A, B, C}
    forged = msgspec.structs.replace(good, signatures=((A, b"s" * 64), *good.signatures[1:]))
    assert forged.signers(authority_of("A")) == {B, C}


@pytest.mark.parametrize(
    "statement",
    [
        Vote(2, B, bytes(40_000), A),
        Vote(2, "z" * 40_000, LAST, A),
        Acknowledgement(2, 5, bytes(40_000), A),
        Header(5, 2, LAST, 4, "z" * 40_000, LAST, A),
        ContributionHeader(1, 1, 1, A, bytes(40_000), ContentRef(LAST, 10), 1, 1, 1.0, 1.0, 1),
    ],
    ids=lambda statement: type(statement).__name__,
)
def test_a_statement_too_large_for_any_record_is_not_taken_in(statement: SignedStatement) -> None:
    signed = authority_of("A").sign(statement)
    with pytest.raises(RemoteError, match="bad_type"):
        decode_message(encode(EvidenceMessage((signed, signed))))

"""Messages on the wire: every kind of consensus and participation there and back, and what is refused."""

from __future__ import annotations

from typing import get_args

import msgspec
import pytest

from p2pcoord.consensus.messages import (
    MAX_INTERVAL_NS,
    MIN_INTERVAL_NS,
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
from p2pcoord.consensus.record import Admission, Members, make_genesis, make_record
from p2pcoord.consensus.statements import Farewell, Grant, Transfer, Vote
from p2pcoord.errors import RemoteError
from p2pcoord.messages import MAX_INTEGER, AnyMessage, decode_message
from p2pcoord.rounds.messages import JoinReply, JoinRequest, LeaveRequest
from p2pcoord.wire import MAX_MESSAGE_BYTES, Message, encode
from tests.script_runner import CONFIG, authority_of, certificate_by, peer_id

A, B = peer_id("A"), peer_id("B")
GENESIS = make_genesis(authority_of("A"), CONFIG)
RECORD = make_record(
    authority_of("A"),
    height=1,
    term=1,
    previous=authority_of("A").hash(GENESIS.header),
    committee=0,
    body=Members((Admission(B, "b", b"p" * 32),)),
)
GRANT = authority_of("A").sign(Grant(2, B, A))
VOTE = authority_of("A").sign(Vote(2, B, b"l" * 32, A))
CERTIFICATE = certificate_by("AB", RECORD)
FAREWELL = authority_of("A").sign(Farewell(A, 3))
ACKS = CERTIFICATE.acknowledgements()

MESSAGES: list[AnyMessage] = [
    PreVoteRequest(2, None, GENESIS.header, ()),
    PreVoteRequest(2, CERTIFICATE, RECORD.header, (VOTE,), authority_of("A").sign(Transfer(1, A, B))),
    PreVoteReply(2, GRANT),
    PreVoteReply(2, None, "why not"),
    VoteRequest(2, Grants((GRANT,)), RECORD.header, (VOTE, VOTE)),
    VoteReply(2, VOTE),
    TermNotice(2, Votes((VOTE,))),
    TransferRequest(Transfer(1, A, B, b"s" * 64)),
    Append(1, MIN_INTERVAL_NS, 0, b"h" * 32, (RECORD, RECORD), CERTIFICATE, Votes((VOTE,))),
    Append(1, MAX_INTERVAL_NS, 0, b"h" * 32, (), None, None),
    AppendReply(1, True, 5, 3, ACKS, "waits"),
    RecordsRequest(MAX_INTEGER),
    Records((RECORD,), CERTIFICATE, 9),
    JoinRequest(Admission(B, "b", b"")),
    JoinReply("wrong secret"),
    LeaveRequest(FAREWELL),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_comes_back_as_it_was_sent(message: AnyMessage) -> None:
    assert decode_message(encode(message)) == message


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_no_cut_off_message_is_taken_for_another(message: AnyMessage) -> None:
    data = encode(message)
    for end in range(len(data)):
        with pytest.raises(RemoteError):
            decode_message(data[:end])


def test_every_kind_has_a_tag_of_its_own() -> None:
    tags = [kind.__struct_config__.tag for kind in get_args(AnyMessage)]
    assert all(isinstance(tag, str) for tag in tags)
    assert len(set(tags)) == len(tags)


def test_the_signatures_of_a_certificate_are_acknowledgements() -> None:
    assert [ack.voter for ack in ACKS] == sorted([A, B])
    assert all(authority_of("B").verify(ack.voter, ack) for ack in ACKS)
    assert CERTIFICATE.signers(authority_of("B")) == {A, B}


@pytest.mark.parametrize(
    ("value", "kind"),
    [(-1, "out_of_range"), (MAX_INTEGER + 1, "out_of_range"), (2**64, "malformed"), (-(2**70), "malformed")],
)
def test_impossible_numbers_are_refused(value: int, kind: str) -> None:
    with pytest.raises(RemoteError, match=kind):
        decode_message(encode(RecordsRequest(value)))
    with pytest.raises(RemoteError, match=kind):
        decode_message(encode(AppendReply(1, True, value, 0)))


@pytest.mark.parametrize("interval_ns", [0, MIN_INTERVAL_NS - 1, MAX_INTERVAL_NS + 1])
def test_a_heartbeat_interval_that_floods_or_sleeps_is_refused(interval_ns: int) -> None:
    with pytest.raises(RemoteError, match="out_of_range"):
        decode_message(encode(Append(1, interval_ns, 0, b"", (), None, None)))


def test_a_statement_is_no_message() -> None:
    for value in (GRANT, VOTE, FAREWELL, RECORD, RECORD.header, CERTIFICATE, Grants((GRANT,))):
        with pytest.raises(RemoteError, match="bad_type"):
            decode_message(encode(value))


def test_a_proof_of_another_kind_is_refused() -> None:
    class Loose(Message, frozen=True, tag="term"):
        term: int
        proof: object

    proofs: list[object] = [None, VOTE, [], (VOTE,), "grants", Records((RECORD,), CERTIFICATE, 1)]
    for proof in proofs:
        with pytest.raises(RemoteError, match="bad_type"):
            decode_message(encode(Loose(2, proof)))
    assert decode_message(encode(Loose(2, Votes((VOTE,))))) == TermNotice(2, Votes((VOTE,)))


def test_an_oversized_message_is_refused_by_its_length() -> None:
    request = JoinRequest(Admission(B, "x" * MAX_MESSAGE_BYTES, b""))
    with pytest.raises(RemoteError, match="oversized"):
        decode_message(encode(request))


def test_what_is_signed_is_what_was_sent() -> None:
    received = decode_message(encode(VoteReply(2, VOTE)))
    assert isinstance(received, VoteReply)
    assert received.vote is not None
    assert authority_of("B").verify(A, received.vote)
    assert not authority_of("B").verify(A, msgspec.structs.replace(received.vote, term=3))

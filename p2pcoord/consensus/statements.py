"""What is signed to come to an agreement, and the proofs that signatures of a quorum make.

    statement         who signs it                  what it says
    grant             a voter, in a pre-vote        it would vote for this candidate in this term
    vote              a voter, once in a term       its vote, for a candidate whose log ends with the record named
    transfer          the coordinator of a term     the target is to take over
    acknowledgement   a voter, in its own term      it holds this record durably and checked it
    header            the coordinator of a term     this record stands at this height (`record.py`)
    farewell          a member                      it leaves

Grants and votes of a quorum prove a term (`messages.TermProof`), votes also elect (`check_votes`), and acknowledgements of a
quorum certify a record (`Certificate`). Over which committee to count is not said here: the log says it (`ledger.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated

import msgspec

from p2pcoord.consensus.quorum import MAX_SIGNATURES, Committee
from p2pcoord.errors import RemoteError
from p2pcoord.identity import Authority, PeerId, Sha256, Signature, Statement


class Grant(Statement, frozen=True, tag="grant"):
    """A pre-vote: `voter` would vote for `candidate` in `term`. A quorum of them proves the term."""

    term: int
    candidate: PeerId
    voter: PeerId
    signature: Signature = b""


class Vote(Statement, frozen=True, tag="vote"):
    """`voter`'s one vote in `term`, for `candidate`, whose log ends with the record named `last`."""

    term: int
    candidate: PeerId
    last: Sha256
    voter: PeerId
    signature: Signature = b""


class Transfer(Statement, frozen=True, tag="transfer"):
    """The coordinator of `term` asks `target` to take over; exempts the target from the rule of silence, no more."""

    term: int
    coordinator: PeerId
    target: PeerId
    signature: Signature = b""


class Acknowledgement(Statement, frozen=True, tag="ack"):
    """`voter` holds the record durably and checked it, in `term`, which is its own."""

    term: int
    height: int
    record: Sha256
    voter: PeerId
    signature: Signature = b""


class Header(Statement, frozen=True, tag="header"):
    """The coordinator of `term` gives a record its place in the chain; the body lies beside it (`record.Record`)."""

    height: int
    term: int
    previous: Sha256
    committee: int
    """Height of the last committee record (or genesis) at or below this record, itself included."""
    kind: Annotated[str, msgspec.Meta(max_length=16)]
    body: Sha256
    """sha256 of the body's canonical bytes."""
    coordinator: PeerId
    signature: Signature = b""


class Farewell(Statement, frozen=True, tag="farewell"):
    """A member's own word that it leaves; `height` is what it had certified, so it cannot undo a later admission."""

    peer: PeerId
    height: int
    signature: Signature = b""


class Certificate(
    msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="certificate"
):
    """A quorum of acknowledgements of one record: (voter, signature) in order of voter."""

    term: int
    height: int
    record: Sha256
    signatures: tuple[tuple[PeerId, Signature], ...]

    def acknowledgements(self) -> tuple[Acknowledgement, ...]:
        return tuple(
            Acknowledgement(self.term, self.height, self.record, voter, s) for voter, s in self.signatures
        )

    def signers(self, authority: Authority) -> frozenset[str]:
        """Those whose signatures hold. Raises RemoteError before it checks more of them than a committee has voters."""
        if len(self.signatures) > MAX_SIGNATURES:
            raise RemoteError("bad_certificate", "more signatures than a committee has voters")
        return frozenset(ack.voter for ack in self.acknowledgements() if authority.verify(ack.voter, ack))


def certificate_of(acknowledgements: Iterable[Acknowledgement]) -> Certificate:
    acks = sorted(acknowledgements, key=lambda ack: ack.voter)
    first = acks[0]
    return Certificate(
        first.term, first.height, first.record, tuple((ack.voter, ack.signature) for ack in acks)
    )


def check_votes(
    authority: Authority,
    votes: Sequence[Vote],
    *,
    term: int,
    candidate: str,
    last: bytes,
    committees: Sequence[Committee],
) -> None:
    """Raises RemoteError unless the votes are a quorum of one of `committees` for `candidate`, a voter of it, in `term`."""
    if len(votes) > MAX_SIGNATURES:
        raise RemoteError("bad_votes", "more votes than a committee has voters")
    for vote in votes:
        if (vote.term, vote.candidate, vote.last) != (term, candidate, last):
            raise RemoteError("bad_votes", f"a vote of term {vote.term} for {vote.candidate}")
        authority.check(vote.voter, vote)
    voters = {vote.voter for vote in votes}
    if not any(candidate in committee.everyone and committee.is_quorum(voters) for committee in committees):
        raise RemoteError("bad_votes", f"no quorum of its committee for {candidate} in term {term}")

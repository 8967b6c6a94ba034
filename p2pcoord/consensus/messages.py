"""What voters say to each other: elections, replication, and the records that others fetch."""

from __future__ import annotations

from typing import Final

from p2pcoord.consensus.record import Record
from p2pcoord.consensus.statements import Acknowledgement, Certificate, Grant, Header, Transfer, Vote
from p2pcoord.wire import Message

# Heartbeat intervals that a coordinator may state: below, it would flood; above, its death would go unnoticed for minutes.
MIN_INTERVAL_NS: Final = 1_000_000
MAX_INTERVAL_NS: Final = 30_000_000_000


# Proofs of a term ---------------------------------------------------------------------------------------------------


class Grants(Message, frozen=True, tag="grants"):
    """A quorum of pre-votes for one term."""

    grants: tuple[Grant, ...]


class Votes(Message, frozen=True, tag="votes"):
    """A quorum of votes: proves the term and who coordinates it."""

    votes: tuple[Vote, ...]


TermProof = Grants | Votes | Certificate
"""What shows that a term was reached by a quorum and not by one liar's say-so."""


# Election -----------------------------------------------------------------------------------------------------------


class PreVoteRequest(Message, frozen=True, tag="pre-vote?"):
    """Would you vote for me in `term`? `proof` proves term - 1 (None for term 0); `last` is my last record's header.

    `last_votes` elected the coordinator that signed `last` (empty for genesis). With a `transfer` the rule of silence
    does not hold.
    """

    term: int
    proof: TermProof | None
    last: Header
    last_votes: tuple[Vote, ...]
    transfer: Transfer | None = None


class PreVoteReply(Message, frozen=True, tag="pre-vote"):
    """`grant` is None for no, and then `reason` says why."""

    term: int
    grant: Grant | None
    reason: str = ""


class VoteRequest(Message, frozen=True, tag="vote?"):
    """Vote for me in `term`, which `proof` proves."""

    term: int
    proof: TermProof
    last: Header
    last_votes: tuple[Vote, ...]


class VoteReply(Message, frozen=True, tag="vote-reply"):
    term: int
    vote: Vote | None
    reason: str = ""


class TermNotice(Message, frozen=True, tag="term"):
    """Answers whoever shows a lower term than this one."""

    term: int
    proof: TermProof


class TransferRequest(Message, frozen=True, tag="transfer"):
    """Take over now."""

    transfer: Transfer


# Replication --------------------------------------------------------------------------------------------------------


class Append(Message, frozen=True, tag="append"):
    """The coordinator's records after the one at `previous_height`; without records, its heartbeat.

    `interval_ns` is the time to its next heartbeat. `proof` (votes of this term) is sent until the receiver has answered
    in this term. `certificate` is the newest it has.
    """

    term: int
    interval_ns: int
    previous_height: int
    previous: bytes
    records: tuple[Record, ...]
    certificate: Certificate | None
    proof: Votes | None


class AppendReply(Message, frozen=True, tag="appended"):
    """`holds`: the state of the newest version it has certified is on its disk.

    How far the logs agree (`match_height`; the certified height when `matched` is false), and signed acknowledgements of
    what the coordinator has not certified yet. `waiting` says why a record was not appended yet."""

    term: int
    matched: bool
    match_height: int
    certified_height: int
    acknowledgements: tuple[Acknowledgement, ...] = ()
    waiting: str = ""
    holds: bool = True


class RecordsRequest(Message, frozen=True, tag="records?"):
    """Send me certified records from this height on."""

    from_height: int


class Records(Message, frozen=True, tag="records"):
    """Certified records, and a certificate that covers them. `more` is the height certified at the sender."""

    records: tuple[Record, ...]
    certificate: Certificate
    more: int


ConsensusMessage = (
    PreVoteRequest
    | PreVoteReply
    | VoteRequest
    | VoteReply
    | TermNotice
    | TransferRequest
    | Append
    | AppendReply
    | RecordsRequest
    | Records
)

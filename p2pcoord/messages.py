"""Every message between peers, one frozen struct each. docs/protocol.md describes them in prose.

A message arrives over an authenticated stream, so its sender is known; only what must convince a third party is signed
(`identity.Statement`). `decode_message` is the only way in: size, canonical form and types are checked there, and ranges by
`check_ranges`.
"""

from __future__ import annotations

from typing import Final

import msgspec

from p2pcoord.aggregation.contribution import ContributionHeader
from p2pcoord.consensus.evidence import SignedStatement
from p2pcoord.consensus.record import Admission, Record
from p2pcoord.consensus.statements import (
    Acknowledgement,
    Certificate,
    Farewell,
    Grant,
    Header,
    Transfer,
    Vote,
)
from p2pcoord.content import ContentRef
from p2pcoord.errors import RemoteError
from p2pcoord.gossip.records import CapabilityProfile, PeerRecord
from p2pcoord.gossip.rumors import Rumor
from p2pcoord.gossip.version_vector import Digest, PeerId, Wanted
from p2pcoord.rounds.attempt import Attempt, Partial, Result
from p2pcoord.rounds.plan import Plan
from p2pcoord.wire import decode


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of all messages."""


# Proofs of a term ----------------------------------------------------------------------------------------------------


class Grants(Message, frozen=True, tag="grants"):
    """A quorum of pre-votes for one term."""

    grants: tuple[Grant, ...]


class Votes(Message, frozen=True, tag="votes"):
    """A quorum of votes: proves the term and who coordinates it."""

    votes: tuple[Vote, ...]


TermProof = Grants | Votes | Certificate
"""What shows that a term was reached by a quorum and not by one liar's say-so."""


# Election ------------------------------------------------------------------------------------------------------------


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


# Replication ---------------------------------------------------------------------------------------------------------


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


# Participation -------------------------------------------------------------------------------------------------------


class JoinRequest(Message, frozen=True, tag="join?"):
    """Admit this peer. Any member passes it on to the coordinator; the proof speaks for itself."""

    admission: Admission
    profile: CapabilityProfile = CapabilityProfile()


class JoinReply(Message, frozen=True, tag="join"):
    """`refused` is empty while the request is on its way; the admission itself is a certified record."""

    refused: str


class LeaveRequest(Message, frozen=True, tag="leave"):
    """A member leaves; passed on to the coordinator like a JoinRequest."""

    farewell: Farewell


# Gossip --------------------------------------------------------------------------------------------------------------


class ExchangeRequest(Message, frozen=True, tag="syn"):
    """Opens an exchange of records: what the sender holds."""

    digest: Digest


class ExchangeReply(Message, frozen=True, tag="syn-ack"):
    """What the other lacks, and what is wanted of it."""

    records: tuple[PeerRecord, ...]
    wanted: tuple[Wanted, ...]


class ExchangeEnd(Message, frozen=True, tag="syn-end"):
    records: tuple[PeerRecord, ...]


class Ping(Message, frozen=True, tag="ping"):
    """Are you there? `rumors` and `records` ride along, here and on the three messages below."""

    sequence: int
    incarnation: int
    rumors: tuple[Rumor, ...]
    records: tuple[PeerRecord, ...]


class PingRequest(Message, frozen=True, tag="ping?"):
    """Ping `target` for me."""

    sequence: int
    incarnation: int
    rumors: tuple[Rumor, ...]
    records: tuple[PeerRecord, ...]
    target: PeerId


class PingAck(Message, frozen=True, tag="ping-ack"):
    """`subject` is there: the sender, or the target it was asked to ping."""

    sequence: int
    incarnation: int
    rumors: tuple[Rumor, ...]
    records: tuple[PeerRecord, ...]
    subject: PeerId


class PingNack(Message, frozen=True, tag="ping-nack"):
    """The sender is there, but `subject` has not answered it."""

    sequence: int
    incarnation: int
    rumors: tuple[Rumor, ...]
    records: tuple[PeerRecord, ...]
    subject: PeerId


# Rounds --------------------------------------------------------------------------------------------------------------


class PlanMessage(Message, frozen=True, tag="plan"):
    """The coordinator's plan. Who has certified less than `certified` asks the sender for records first."""

    plan: Plan
    certified: int


class PlanAccepted(Message, frozen=True, tag="plan-accepted"):
    version: int
    term: int
    revision: int


class Offering(Message, frozen=True, tag="offer"):
    """A finished contribution, to the coordinator."""

    header: ContributionHeader


class TrainingFailed(Message, frozen=True, tag="training-failed"):
    """The member could not do its assignment."""

    version: int
    assignment: int
    reason: str


class Reoffer(Message, frozen=True, tag="reoffer?"):
    """A new coordinator asks a member what it has of the round that makes `version`."""

    term: int
    version: int
    certified: int


class Reoffered(Message, frozen=True, tag="reoffer"):
    """The newest plan the member was shown, and what it finished. Both prove themselves, whenever they arrive."""

    version: int
    plan: Plan | None
    headers: tuple[ContributionHeader, ...]


class AttemptMessage(Message, frozen=True, tag="attempt"):
    attempt: Attempt
    headers: tuple[ContributionHeader, ...]


class AttemptRequest(Message, frozen=True, tag="attempt?"):
    """A voter was shown a round record whose attempt it has not seen."""

    attempt: bytes


class PartialMessage(Message, frozen=True, tag="partial"):
    """To the parent, which fetches it, and to the coordinator, which then knows that the subtree is summed."""

    partial: Partial


class ResultMessage(Message, frozen=True, tag="result"):
    """Down the tree, and to voters outside it."""

    result: Result


class Obstacle(Message, frozen=True, tag="obstacle"):
    """`culprit`'s bytes could not be had, or are not finite: the attempt as signed cannot succeed."""

    attempt: bytes
    culprit: str
    reason: str


class Progress(Message, frozen=True, tag="progress"):
    """Bytes are moving, or sums are being taken, for this attempt: it is slow, not stuck."""

    attempt: bytes


class Report(Message, frozen=True, tag="report"):
    """The state that a member computed in this attempt."""

    attempt: bytes
    state: ContentRef
    finite: bool


class Share(Message, frozen=True, tag="share"):
    """A member's share of the validation: sums over samples, or why it failed."""

    attempt: bytes
    samples: int
    loss_sum: float
    measure_sums: tuple[tuple[str, float], ...]
    failed: str = ""


class EvidenceMessage(Message, frozen=True, tag="evidence"):
    """Two statements that contradict each other, for whoever coordinates."""

    evidence: tuple[SignedStatement, SignedStatement]


class GenesisRequest(Message, frozen=True, tag="genesis?"):
    """What a joiner asks first: which run is this? Answered to those whose proof holds."""

    admission: Admission


class GenesisReply(Message, frozen=True, tag="genesis"):
    genesis: Record


class StatusRequest(Message, frozen=True, tag="status?"):
    """For `p2pcoord status --peer`; answered to those whose proof holds."""

    admission: Admission


class StatusReply(Message, frozen=True, tag="status"):
    """The status document, as JSON."""

    document: bytes


class ReachRequest(Message, frozen=True, tag="reach?"):
    """Can you dial me at these addresses? Who cannot be dialled is a leaf: it takes part, and never votes."""

    addresses: tuple[str, ...]


class ReachReply(Message, frozen=True, tag="reach"):
    reachable: bool


AnyMessage = (
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
    | JoinRequest
    | JoinReply
    | LeaveRequest
    | EvidenceMessage
    | GenesisRequest
    | GenesisReply
    | StatusRequest
    | StatusReply
    | ReachRequest
    | ReachReply
    | ExchangeRequest
    | ExchangeReply
    | ExchangeEnd
    | Ping
    | PingRequest
    | PingAck
    | PingNack
    | PlanMessage
    | PlanAccepted
    | Offering
    | TrainingFailed
    | Reoffer
    | Reoffered
    | AttemptMessage
    | AttemptRequest
    | PartialMessage
    | ResultMessage
    | Obstacle
    | Progress
    | Report
    | Share
)

# 2**53: far beyond any term, height or version reached by one a nanosecond in a century, and exact in every language.
MAX_INTEGER: Final = 1 << 53

# Heartbeat intervals that a coordinator may state: below, it would flood; above, its death would go unnoticed for minutes.
MIN_INTERVAL_NS: Final = 1_000_000
MAX_INTERVAL_NS: Final = 30_000_000_000


def decode_message(data: bytes) -> AnyMessage:
    """The message in `data`. Raises RemoteError (see wire.decode), "out_of_range" for impossible numbers."""
    message: AnyMessage = decode(data, AnyMessage)  # type: ignore[arg-type]  # a union is a type to msgspec
    _check_ranges(message)
    return message


def _check_ranges(message: AnyMessage) -> None:
    for name in message.__struct_fields__:
        value = getattr(message, name)
        if isinstance(value, int) and not 0 <= value <= MAX_INTEGER:
            raise RemoteError("out_of_range", f"{type(message).__name__}.{name} is {value}")
    if isinstance(message, Append) and not MIN_INTERVAL_NS <= message.interval_ns <= MAX_INTERVAL_NS:
        raise RemoteError("out_of_range", f"heartbeat interval of {message.interval_ns} ns")

"""What members and the coordinator say to each other: taking part, and the rounds."""

from __future__ import annotations

from p2pcoord.aggregation.contribution import ContributionHeader
from p2pcoord.consensus.evidence import SignedStatement
from p2pcoord.consensus.record import Admission
from p2pcoord.consensus.statements import Farewell
from p2pcoord.content import ContentRef
from p2pcoord.gossip.records import CapabilityProfile
from p2pcoord.rounds.attempt import Attempt, Partial, Result
from p2pcoord.rounds.plan import Plan
from p2pcoord.wire import Message

# Participation ------------------------------------------------------------------------------------------------------


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


class EvidenceMessage(Message, frozen=True, tag="evidence"):
    """Two statements that contradict each other, for whoever coordinates."""

    evidence: tuple[SignedStatement, SignedStatement]


# Rounds -------------------------------------------------------------------------------------------------------------


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


RoundMessage = (
    JoinRequest
    | JoinReply
    | LeaveRequest
    | EvidenceMessage
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

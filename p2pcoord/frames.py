"""Everything a peer writes to its log: the frames of consensus, and three of its own."""

from __future__ import annotations

from collections.abc import Iterable

from p2pcoord.aggregation.contribution import ContributionHeader
from p2pcoord.consensus.log import MAX_PAYLOAD_BYTES
from p2pcoord.consensus.voter import AnyFrame, Frame
from p2pcoord.errors import LocalError, RemoteError
from p2pcoord.rounds.attempt import Attempt, Result
from p2pcoord.wire import decode


class Life(Frame, frozen=True, tag="life"):
    """A life begins. A restart begins a higher incarnation, so nobody takes it for the one that died."""

    incarnation: int
    local_steps: int = 0
    """Optimizer steps of this peer's slots that are no longer in the log."""


class Slot(Frame, frozen=True, tag="slot"):
    """The one header this peer signed in its slot; written before the header is sent."""

    header: ContributionHeader


class Checked(Frame, frozen=True, tag="checked"):
    """An attempt whose round this log is about to hold, with its result: what any other voter needs in order to check the
    round too, even if all who made it die in one moment."""

    attempt: Attempt
    headers: tuple[ContributionHeader, ...]
    result: Result


PeerFrame = AnyFrame | Life | Slot | Checked


def decode_frames(frames: Iterable[bytes]) -> list[PeerFrame]:
    """The frames of a log. Raises LocalError: the file was intact, so what does not decode was written by another program."""
    try:
        return [decode(frame, PeerFrame, limit=MAX_PAYLOAD_BYTES) for frame in frames]  # type: ignore[arg-type]  # a union is a type to msgspec
    except RemoteError as error:
        raise LocalError(f"the log holds what is no frame of this program: {error}") from error

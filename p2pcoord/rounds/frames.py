"""What a member writes to its log for the rounds."""

from __future__ import annotations

from p2pcoord.aggregation.contribution import ContributionHeader
from p2pcoord.consensus.voter import Frame
from p2pcoord.rounds.attempt import Attempt, Result


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

"""Everything a peer writes to its log: the frames of consensus, and two of its own."""

from __future__ import annotations

from p2pcoord.aggregation.contribution import ContributionHeader
from p2pcoord.consensus.voter import AnyFrame, Frame


class Life(Frame, frozen=True, tag="life"):
    """A life begins. A restart begins a higher incarnation, so nobody takes it for the one that died."""

    incarnation: int


class Slot(Frame, frozen=True, tag="slot"):
    """The one header this peer signed in its slot; written before the header is sent."""

    header: ContributionHeader


PeerFrame = AnyFrame | Life | Slot

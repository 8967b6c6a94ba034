"""Everything a peer writes to its log: the frames of consensus and of rounds."""

from __future__ import annotations

from collections.abc import Iterable

from p2pcoord.consensus.log import MAX_PAYLOAD_BYTES
from p2pcoord.consensus.voter import AnyFrame
from p2pcoord.errors import LocalError, RemoteError
from p2pcoord.rounds.frames import Checked, Life, Slot
from p2pcoord.wire import decode

PeerFrame = AnyFrame | Life | Slot | Checked


def decode_frames(frames: Iterable[bytes]) -> list[PeerFrame]:
    """The frames of a log. Raises LocalError: the file was intact, so what does not decode was written by another program."""
    try:
        return [decode(frame, PeerFrame, limit=MAX_PAYLOAD_BYTES) for frame in frames]  # type: ignore[arg-type]  # a union is a type to msgspec
    except RemoteError as error:
        raise LocalError(f"the log holds what is no frame of this program: {error}") from error

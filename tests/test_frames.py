"""The two frames of a peer's own: they come back from the log as they went in."""

import pytest

from p2pcoord.aggregation.contribution import ContributionHeader
from p2pcoord.content import ContentRef
from p2pcoord.errors import LocalError, RemoteError
from p2pcoord.frames import PeerFrame, decode_frames
from p2pcoord.rounds.frames import Life, Slot
from p2pcoord.wire import decode, encode
from tests.script_runner import authority_of, peer_id

HEADER = authority_of("A").sign(
    ContributionHeader(3, 1, 2, peer_id("A"), bytes(32), ContentRef(bytes(32), 44), 10, 3, 0.5, 1.25, 7)
)


@pytest.mark.parametrize("frame", [Life(3), Slot(HEADER)], ids=["life", "slot"])
def test_a_frame_comes_back_as_it_was_written(frame: Life | Slot) -> None:
    assert decode(encode(frame), PeerFrame) == frame  # type: ignore[arg-type]


def test_a_slot_read_back_still_proves_who_signed_it() -> None:
    read: Slot = decode(encode(Slot(HEADER)), Slot)
    authority_of("B").check(peer_id("A"), read.header)


def test_a_frame_of_another_kind_is_refused() -> None:
    with pytest.raises(RemoteError):
        decode(encode(["death", 3]), PeerFrame)  # type: ignore[arg-type]


def test_a_log_that_another_program_wrote_is_refused() -> None:
    written = [encode(Life(3)), encode(Slot(HEADER))]
    assert decode_frames(written) == [Life(3), Slot(HEADER)]
    with pytest.raises(LocalError):
        decode_frames([*written, encode(["death", 3])])

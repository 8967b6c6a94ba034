"""When a log is rewritten, and what of it stays. The frames of consensus that stay: tests/consensus/test_compaction.py."""

from p2pcoord.compaction import Compaction
from p2pcoord.effects import Emit, Persist
from p2pcoord.frames import decode_frames
from p2pcoord.rounds.frames import Checked, Life
from tests.round_runner import RoundWorld, holding


def lived() -> RoundWorld:
    """A has made rounds, and one is on its way."""
    world = holding(options="A B C rounds=6")
    world.execute("run 2s")
    return world


def compaction(world: RoundWorld, *, after_bytes: int = 1, kept_bodies: int = 2) -> Compaction:
    peer = world.peer("A")
    peer.outbox.take()
    return Compaction(peer.agreement.voter, peer.outbox, after_bytes, kept_bodies)


def test_a_log_is_rewritten_when_it_has_grown() -> None:
    world = lived()
    size = world.peer("A").outbox.written_bytes
    assert compaction(world, after_bytes=size - 1).due
    assert not compaction(world, after_bytes=size).due


def test_what_cannot_be_dropped_does_not_make_every_certificate_rewrite_the_log() -> None:
    world = lived()
    of = compaction(world)
    of.compact([])
    assert not of.due
    world.peer("A").outbox.written_bytes *= 2
    assert not of.due
    world.peer("A").outbox.written_bytes += 1
    assert of.due


def test_the_new_log_has_the_bodies_of_the_last_rounds_and_the_frames_that_others_keep() -> None:
    world = lived()
    of = compaction(world, kept_bodies=2)
    of.compact([Life(7)])
    persist, told = world.peer("A").outbox.take()
    assert isinstance(persist, Persist)
    assert isinstance(told, Emit)
    assert persist.replace
    frames = decode_frames(persist.frames)
    assert frames[-1] == Life(7)
    assert not any(isinstance(frame, Checked) for frame in frames)
    records = [frame.record for frame in frames if hasattr(frame, "record")]
    rounds = [record for record in records if record.header.kind == "round"]
    assert [record.body is None for record in rounds] == [True] * (len(rounds) - 2) + [False] * 2

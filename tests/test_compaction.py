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
    of.rewrite([])
    assert not of.due
    world.peer("A").outbox.written_bytes *= 2
    assert not of.due
    world.peer("A").outbox.written_bytes += 1
    assert of.due


def test_with_no_size_to_wait_for_every_certificate_rewrites_the_log() -> None:
    world = lived()
    of = compaction(world, after_bytes=0)
    assert of.due
    of.rewrite([])
    assert of.due


def test_the_new_log_has_the_bodies_of_the_last_rounds_and_the_frames_that_others_keep() -> None:
    world = lived()
    of = compaction(world, kept_bodies=2)
    of.certified(world.peer("A").agreement.voter.ledger.records)
    of.rewrite([Life(7)])
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


def test_bodies_of_old_rounds_are_forgotten_without_a_new_log() -> None:
    world = lived()
    of = compaction(world, kept_bodies=3)
    ledger = world.peer("A").agreement.voter.ledger
    known = list(ledger.records)
    rounds = [record.header.height for record in known if record.header.kind == "round"]

    def forgotten() -> list[int]:
        return [height for height in rounds if ledger.records[height].body is None]

    of.certified(known[: rounds[1] + 1])
    of.certified([known[rounds[1]]])  # the newest once more: it came without its body, which was brought now
    of.certified(known[rounds[1] + 1 : rounds[2] + 1])
    assert forgotten() == []
    of.certified(known[rounds[2] + 1 : rounds[3] + 1])
    assert forgotten() == rounds[:1]
    assert not world.peer("A").outbox.take()

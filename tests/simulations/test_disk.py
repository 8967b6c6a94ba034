"""The made-up disk with the real bytes of the log."""

import pytest

from simulations.disk import Content, Disk, LostFrames
from simulations.randomness import stream

APPENDS = [(b"one", b"two" * 100), (b"three" * 300,), (b"four",)]


def written(seed: int, *, synced: int) -> Disk:
    disk = Disk(stream(seed, "disk"))
    for index, frames in enumerate(APPENDS[: synced + 1]):
        disk.write(frames)
        if index < synced:
            disk.sync()
    return disk


@pytest.mark.parametrize("synced", [0, 1, 2])
def test_a_crash_keeps_what_was_synced_and_at_most_a_beginning_of_the_rest(synced: int) -> None:
    lengths = set()
    for seed in range(60):
        disk = written(seed, synced=synced)
        disk.crash()
        frames = disk.recover()
        whole = [frame for frames in APPENDS for frame in frames]
        kept = sum(len(frames) for frames in APPENDS[:synced])
        assert kept <= len(frames)
        assert list(frames) == whole[: len(frames)]
        lengths.add(len(frames) - kept)
    assert 0 in lengths  # torn within the append
    assert len(lengths) > 1  # and, with other seeds, whole frames of it survive


def test_a_flipped_byte_costs_nothing() -> None:
    for seed in range(60):
        disk = written(seed, synced=3)
        disk.rot()
        assert disk.recover() == (b"one", b"two" * 100, b"three" * 300, b"four")


def test_the_log_goes_on_where_recovery_ended_it() -> None:
    for seed in range(20):
        disk = written(seed, synced=2)
        disk.crash()
        before = disk.recover()
        disk.write((b"after",))
        disk.sync()
        disk.crash()
        assert disk.recover() == (*before, b"after")


def test_synced_frames_that_do_not_come_back_are_a_violation() -> None:
    disk = written(1, synced=3)
    disk.synced.append(b"never written")
    with pytest.raises(LostFrames):
        disk.recover()


def test_content_that_was_not_durable_is_gone_after_a_crash() -> None:
    disk = written(1, synced=1)
    disk.content = {b"durable": Content(b"1", True), b"not yet": Content(b"2", False)}
    disk.crash()
    assert disk.content == {b"durable": Content(b"1", True)}


def test_a_rewrite_that_is_synced_leaves_only_its_frames() -> None:
    disk = written(1, synced=3)
    disk.rewrite((b"all", b"that counts"))
    disk.sync()
    disk.write((b"next",))
    disk.sync()
    disk.crash()
    assert disk.recover() == (b"all", b"that counts", b"next")


def test_a_crash_during_a_rewrite_leaves_the_old_log_or_the_new_one_whole() -> None:
    found = set()
    for seed in range(40):
        disk = written(seed, synced=3)
        before = tuple(disk.synced)
        disk.rewrite((b"new",))
        disk.crash()
        frames = disk.recover()
        assert frames in (before, (b"new",))
        found.add(frames)
        disk.write((b"after",))
        disk.sync()
        disk.crash()
        assert disk.recover() == (*frames, b"after")
    assert len(found) == 2

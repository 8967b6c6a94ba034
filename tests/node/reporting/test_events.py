"""The events file: whole lines, two bounded files, followed across their change, and never an exception into the node."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec
import pytest

from node.reporting import events as events_module
from node.reporting.events import (
    CURRENT,
    MAX_LINE_BYTES,
    PREDECESSOR,
    EventLog,
    follow_events,
    newest_events,
    read_events,
)


class Enough(Exception):
    """Ends a follower that has nothing more to read."""


def enough() -> None:
    raise Enough


def followed(directory: Path, wait: Callable[[], None] = enough) -> list[dict[str, Any]]:
    """What a follower tells until `wait` has enough."""
    found = []
    events = follow_events(directory, wait=wait)
    while True:
        try:
            found.append(next(events))
        except Enough:
            return found


def numbers(found: Iterator[dict[str, Any]] | list[dict[str, Any]]) -> list[int]:
    return [event["n"] for event in found]


def test_a_line_holds_time_event_and_fields(tmp_path: Path) -> None:
    class Kind(StrEnum):
        BAD = "bad"

    class Point(msgspec.Struct):
        x: int

    log = EventLog(tmp_path)
    log.write(
        "commit",
        {
            "root": b"\x01\xff",
            "loss": float("nan"),
            "kind": Kind.BAD,
            "point": Point(3),
            "peers": ("a", "b"),
            "time": 1,
        },
    )
    (line,) = (tmp_path / CURRENT).read_text().splitlines()
    event = json.loads(line)
    assert list(event)[:2] == ["time", "event"]
    assert event["event"] == "commit"
    assert event["time"].endswith("Z")
    assert len(event["time"]) == len("2026-01-01T12:00:00.000Z")
    assert (event["root"], event["loss"], event["kind"]) == ("01ff", None, "bad")
    assert (event["point"], event["peers"]) == ({"x": 3}, ["a", "b"])
    assert (tmp_path / CURRENT).stat().st_mode & 0o777 == 0o600


def test_files_stay_bounded_and_keep_the_newest(tmp_path: Path) -> None:
    log = EventLog(tmp_path, max_file_bytes=2000)
    for n in range(500):
        log.write("tick", {"n": n})
    assert {path.name for path in tmp_path.iterdir()} == {CURRENT, PREDECESSOR}
    assert all(path.stat().st_size <= 2000 for path in tmp_path.iterdir())
    kept = numbers(read_events(tmp_path))
    assert kept == list(range(kept[0], 500))
    assert len(kept) > 30


def test_a_restart_appends_and_heals_a_torn_line(tmp_path: Path) -> None:
    EventLog(tmp_path).write("tick", {"n": 0})
    with (tmp_path / CURRENT).open("ab") as file:
        file.write(b'{"time": "2026-01-01T00:00:00.000Z", "eve')
    EventLog(tmp_path).write("tick", {"n": 1})
    assert numbers(read_events(tmp_path)) == [0, 1]


def test_what_is_no_event_is_skipped(tmp_path: Path) -> None:
    (tmp_path / CURRENT).write_bytes(
        b'\n[1]\n{"event": 3}\n\xff\xfe\n{"event": "tick", "n": 7}\nlast without end'
    )
    assert numbers(read_events(tmp_path)) == [7]


def test_a_full_disk_drops_lines_counts_them_and_says_so_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = EventLog(tmp_path)
    log.write("tick", {"n": 0})

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(events_module.os, "write", full)
    for n in range(1, 4):
        log.write("tick", {"n": n})
    monkeypatch.undo()
    assert log.dropped == 3
    log.write("tick", {"n": 4})
    found = list(read_events(tmp_path))
    assert [event["event"] for event in found] == ["tick", "events-dropped", "tick"]
    assert found[1]["count"] == 3
    log.write("tick", {"n": 5})
    assert [event["event"] for event in read_events(tmp_path)].count("events-dropped") == 1


def test_a_line_cut_short_by_a_full_disk_harms_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = EventLog(tmp_path)
    write = os.write
    monkeypatch.setattr(events_module.os, "write", lambda descriptor, data: write(descriptor, data[:20]))
    log.write("tick", {"n": 0})
    monkeypatch.undo()
    log.write("tick", {"n": 1})
    assert [event.get("n") for event in read_events(tmp_path)] == [None, 1]
    assert log.dropped == 1


def test_nothing_is_raised_into_the_node(tmp_path: Path) -> None:
    class Hostile:
        def __str__(self) -> str:
            raise RuntimeError("no")

    log = EventLog(tmp_path / "gone")
    log.write("tick", {})
    log.write("tick", {"value": Hostile()})
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    log.write("tick", {"value": deep})
    assert log.dropped == 3


def test_a_huge_field_is_left_out_by_name(tmp_path: Path) -> None:
    EventLog(tmp_path).write("rejected", {"n": 1, "detail": "x" * 100_000, "kind": "oversized"})
    (event,) = read_events(tmp_path)
    assert (event["n"], event["kind"], event["left_out"]) == (1, "oversized", ["detail"])
    assert (tmp_path / CURRENT).stat().st_size < MAX_LINE_BYTES


def test_following_survives_the_change_of_files(tmp_path: Path) -> None:
    log = EventLog(tmp_path, max_file_bytes=600)
    left = iter(range(200))

    def write_more() -> None:
        for _ in range(5):  # less than a file holds, so no file is missed
            n = next(left, None)
            if n is None:
                raise Enough
            log.write("tick", {"n": n})

    found = numbers(followed(tmp_path, write_more))
    assert found == list(range(200))


def test_following_waits_for_a_file_that_is_not_there_and_for_whole_lines(tmp_path: Path) -> None:
    steps = iter([b'{"event": "tick", ', b'"n": 1}\n{"event"', b': "tick", "n": 2}\n', None])

    def next_step() -> None:
        step = next(steps)
        if step is None:
            raise Enough
        with (tmp_path / CURRENT).open("ab") as file:
            file.write(step)

    found = numbers(followed(tmp_path, next_step))
    assert found == [1, 2]


def test_following_a_writer_in_another_thread_misses_nothing(tmp_path: Path) -> None:
    log = EventLog(tmp_path, max_file_bytes=20_000)
    done = threading.Event()

    def write() -> None:
        for n in range(2000):
            log.write("tick", {"n": n})
            if n % 50 == 0:
                time.sleep(0.002)
        done.set()

    def wait() -> None:
        if done.is_set():
            raise Enough
        time.sleep(0.0005)

    thread = threading.Thread(target=write)
    thread.start()
    found = numbers(followed(tmp_path, wait))
    thread.join()
    found += [n for n in numbers(followed(tmp_path)) if n > (found[-1] if found else -1)]
    assert found == list(range(2000))


def test_the_newest_events_are_read_from_the_end(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    for n in range(5000):
        log.write("tick", {"n": n})
    newest = numbers(newest_events(tmp_path))
    assert newest == list(range(newest[0], 5000))
    assert 100 < len(newest) < 2000
    assert newest_events(tmp_path / "nowhere") == []

"""The events file: what happened on this node, one JSON object a line, in a bounded pair of files.

Theory of operation
    DIR/events.jsonl        the events now; appended to by the node, read by anybody
    DIR/events.1.jsonl      its predecessor: when the first is full it takes this name, and what had it is gone

    Each line is {"time": UTC with milliseconds, "event": name, ...fields}. Bytes are written in hexadecimal; a number that
    is not finite is null. Lines are written at once and never synced: events explain, they decide nothing, and a lost one
    costs nobody a vote. So writing never fails into the node either: what cannot be written (a full disk) is counted, and
    the first line that gets through again says how many are missing.

A reader needs no agreement with the writer. It reads whole lines only, skips what is no JSON object (the end of a line that a
full disk or a kill cut off), and notices the change of files by their inodes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec

CURRENT: Final = "events.jsonl"
PREDECESSOR: Final = "events.1.jsonl"

MAX_FILE_BYTES: Final = 8 << 20
"""Two files of this size: some 100,000 events, days of rounds, in 16 MiB."""

MAX_LINE_BYTES: Final = 16 << 10
"""The longest honest event lists the contributors of a round by peer id: 200 of them fit."""

MAX_DEPTH: Final = 8
"""Fields are flat, or tables of tables at most; what nests deeper is written as text."""

POLL_S: Final = 0.2
"""How often a follower looks for new lines: faster than a person reads."""

TAIL_BYTES: Final = 64 << 10
"""Some 300 events: the last few with words are among them."""

OPEN_ATTEMPTS: Final = 10
"""A reader opens both files between two changes of names; at 8 MiB a change, two attempts are rare."""


def plain(value: Any, depth: int = 0) -> Any:
    """`value` as JSON has it: bytes in hexadecimal, structs as tables, what JSON does not know as text."""
    if value is None or isinstance(value, bool | int | float | str):
        return str(value) if isinstance(value, str) else value  # an enum's value, not its name
    if isinstance(value, bytes):
        return value.hex()
    if depth >= MAX_DEPTH:
        return str(value)
    if isinstance(value, msgspec.Struct):
        return {name: plain(getattr(value, name), depth + 1) for name in value.__struct_fields__}
    if isinstance(value, Mapping):
        return {str(plain(key, depth + 1)): plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item, depth + 1) for item in value]
    return str(value)


def as_line(event: str, fields: Mapping[str, Any], at: datetime) -> bytes:
    """One event as a line, its end included. Fields that make it longer than MAX_LINE_BYTES are left out, and named."""
    moment = at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    values: dict[str, Any] = {"time": moment, "event": event}
    values |= {name: plain(value) for name, value in fields.items() if name not in values}
    line = msgspec.json.encode(values)
    if len(line) >= MAX_LINE_BYTES:
        sizes = {name: len(msgspec.json.encode(value)) for name, value in values.items()}
        dropped = [name for name, size in sizes.items() if size > MAX_LINE_BYTES // (2 * len(sizes))]
        values = {name: value for name, value in values.items() if name not in dropped}
        line = msgspec.json.encode({**values, "left_out": [name[:64] for name in dropped][:16]})
    return line + b"\n"


class EventLog:
    """Writes the events of one node. Owned by the process that holds the directory; not for several threads."""

    def __init__(self, directory: Path, *, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        self._path = directory / CURRENT
        self._old = directory / PREDECESSOR
        self._limit = max_file_bytes
        self._file: int | None = None
        self._size = 0
        self._torn = False
        self.dropped = 0
        """Events that could not be written, over this log's life."""
        self._untold = 0

    def write(self, event: str, fields: Mapping[str, Any]) -> None:
        """Append one event. Never raises: what cannot be written is counted in `dropped`."""
        try:
            now = datetime.now(UTC)
            line = as_line(event, fields, now)
            if self._untold:
                line = as_line("events-dropped", {"count": self._untold}, now) + line
            self._append(line)
        except Exception:  # a full disk, a directory that is gone, a field that no encoder takes
            self.dropped += 1
            self._untold += 1
        else:
            self._untold = 0

    def _append(self, line: bytes) -> None:
        if self._file is None:
            self._open()
        if self._size and self._size + len(line) > self._limit:
            self.close()
            os.replace(self._path, self._old)
            self._open()
        assert self._file is not None
        data = b"\n" + line if self._torn else line
        written = os.write(self._file, data)
        self._size += written
        self._torn = written < len(data) and (written > 0 or self._torn)
        if written < len(data):
            raise OSError(f"{written} of {len(data)} bytes were written")

    def _open(self) -> None:
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._file).st_size
        # A process that was killed in the middle of a line left it without an end.
        self._torn = self._size > 0 and os.pread(self._file, 1, self._size - 1) != b"\n"

    def close(self) -> None:
        """Give the file back; a later write opens it again. Harmless when repeated."""
        if self._file is not None:
            file, self._file = self._file, None
            with suppress(OSError):
                os.close(file)


# Reading -------------------------------------------------------------------------------------------------------------


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The event in a line; None for what is none."""
    try:
        value = msgspec.json.decode(line)
    except (msgspec.DecodeError, RecursionError):
        return None
    return value if isinstance(value, dict) and isinstance(value.get("event"), str) else None


def read_events(directory: Path) -> Iterator[dict[str, Any]]:
    """All events that the directory still has, oldest first; none when there are no files."""
    for file in _open_both(directory):
        with file:
            yield from _Lines(file).new()


def newest_events(directory: Path) -> list[dict[str, Any]]:
    """Those at the end of the files, oldest first: what a screen needs, without reading 16 MiB for it."""
    found: list[dict[str, Any]] = []
    for file in _open_both(directory):
        with file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(size - TAIL_BYTES, 0))
            if size > TAIL_BYTES:
                file.readline()  # the end of a line that began before
            found += _Lines(file).new()
    return found


def _pause() -> None:
    time.sleep(POLL_S)


def follow_events(directory: Path, *, wait: Callable[[], object] = _pause) -> Iterator[dict[str, Any]]:
    """All events, and then each new one as it comes, without end. `wait` is called when there is nothing new.

    Files may change names under it, and need not exist yet. After more than two changes between two looks the events
    in between are lost, as they are on the disk.
    """
    files = [_Lines(file) for file in _open_both(directory)]
    try:
        while True:
            told = False
            for event in _new(files):
                told = True
                yield event
            _catch_up(directory, files)
            if not told and len(files) <= 1:
                wait()
    finally:
        for lines in files:
            lines.file.close()


class _Lines:
    """Whole lines of a file that may still grow."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self._rest = b""

    @property
    def inode(self) -> int:
        return os.fstat(self.file.fileno()).st_ino

    def new(self) -> Iterator[dict[str, Any]]:
        while block := self.file.read(1 << 16):
            *lines, self._rest = (self._rest + block).split(b"\n")
            for line in lines:
                event = parse_line(line)
                if event is not None:
                    yield event
            if len(self._rest) > MAX_LINE_BYTES:
                self._rest = b"?"  # no line of ours: skipped up to its end


def _new(files: list[_Lines]) -> Iterator[dict[str, Any]]:
    for lines in files:
        yield from lines.new()


def _catch_up(directory: Path, files: list[_Lines]) -> None:
    """Leave only the file that is written now, and what has to be read before it."""
    now = _open_both(directory)
    ours = {lines.inode for lines in files}
    newest = now[-1] if now else None
    if newest is not None and os.fstat(newest.fileno()).st_ino in ours:
        for file in now:
            file.close()
        for lines in files[:-1]:
            lines.file.close()
        del files[:-1]
        return
    for file in now:
        if os.fstat(file.fileno()).st_ino in ours:
            file.close()
        else:
            files.append(_Lines(file))


def _open_both(directory: Path) -> list[BinaryIO]:
    """Predecessor and current file as they are at one moment: no change of names lies between the two."""
    for _ in range(OPEN_ATTEMPTS):
        files: list[BinaryIO] = []
        for name in (CURRENT, PREDECESSOR):
            with suppress(FileNotFoundError):
                files.append((directory / name).open("rb"))
        try:
            unchanged = files and os.fstat(files[0].fileno()).st_ino == (directory / CURRENT).stat().st_ino
        except FileNotFoundError:  # between the two names of a change, or only a predecessor is left
            unchanged = len(files) == 1
        if unchanged or not files:
            return files[::-1]
        for file in files:
            file.close()
    return []

"""A disk that is made up, with the real bytes of the log on it.

The log is written and recovered by `p2pcoord.consensus.log`, as a node does it. A crash keeps all that was synced, and of the
append that was being written a random beginning, of which a sector may hold rubbish: what real disks leave. Rot flips one
byte anywhere. Content (states, contributions) lies beside the log, by root, each with a flag that says whether it would
survive a crash; only what would is given back or shown to others.
"""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

import msgspec

from p2pcoord.consensus.log import append, recover, start

SECTOR_BYTES = 512


class LostFrames(Exception):
    """Recovery gave back something else than all frames that had been synced: a violation."""


class Content(msgspec.Struct):
    """Bytes beside the log."""

    data: bytes
    durable: bool


class Disk:
    """One machine's disk. `synced` are the log's payloads that a crash cannot take."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._tail = start(random.randbytes(8))
        self._file = bytearray()
        self._writing: tuple[bytes, tuple[bytes, ...]] | None = None
        self._replacing = False
        self.synced: list[bytes] = []
        self.content: dict[bytes, Content] = {}
        """By root."""

    def latency(self, low_ns: int, high_ns: int) -> int:
        """How long the next fsync takes."""
        return self._random.randint(low_ns, high_ns)

    # The log

    def write(self, frames: Iterable[bytes]) -> None:
        """Begins an append; `sync` ends it. One at a time."""
        frames = tuple(frames)
        data, self._tail = append(frames, self._tail)
        self._writing = (data, frames)

    def rewrite(self, frames: Iterable[bytes]) -> None:
        """Begins to replace the log by these frames, in one rename; `sync` ends it. A crash finds the old log or the new
        one, whole."""
        frames = tuple(frames)
        data, self._tail = append(frames, start(self._random.randbytes(8)))
        self._writing, self._replacing = (data, frames), True

    def sync(self) -> tuple[bytes, ...]:
        """What is being written is durable from now on; returns its frames."""
        if self._writing is None:
            return ()
        data, frames = self._writing
        if self._replacing:
            self._file.clear()
            self.synced.clear()
        self._file += data
        self.synced += frames
        self._writing, self._replacing = None, False
        return frames

    def crash(self) -> None:
        """The machine dies: the append being written is torn, content that was not durable is gone."""
        if self._writing is not None and self._replacing:
            if self._random.random() < 0.5:
                self.sync()
            self._writing, self._replacing = None, False
        elif self._writing is not None:
            data, self._writing = self._writing[0], None
            torn = bytearray(data[: self._random.randint(0, len(data))])
            if torn and self._random.random() < 0.25:
                at = self._random.randrange(0, len(torn), SECTOR_BYTES)
                end = min(at + SECTOR_BYTES, len(torn))
                torn[at:end] = self._random.choice([bytes(end - at), self._random.randbytes(end - at)])
            self._file += torn
        self.content = {root: content for root, content in self.content.items() if content.durable}

    def rot(self) -> None:
        """One byte of the log changes."""
        if self._file:
            self._file[self._random.randrange(len(self._file))] ^= self._random.randrange(1, 256)

    def recover(self) -> tuple[bytes, ...]:
        """The log's frames after a crash, repaired and cut as a node does it. Raises LostFrames, CorruptLog."""
        recovery = recover(bytes(self._file), self._random.randbytes(8))
        for offset, data in recovery.repairs:
            self._file[offset : offset + len(data)] = data
        del self._file[recovery.valid_length :]
        self._tail = recovery.tail
        kept = list(recovery.payloads[: len(self.synced)])
        if kept != self.synced:
            raise LostFrames(f"{len(self.synced)} frames were synced, {len(recovery.payloads)} came back")
        self.synced = list(recovery.payloads)
        return recovery.payloads

    @property
    def size_bytes(self) -> int:
        return len(self._file)

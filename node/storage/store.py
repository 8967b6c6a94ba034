"""One node's store: the log on disk, above the objects (`objects`) and small files (`directory`).

Theory of operation
    DIR/log                 the frames of `p2pcoord.consensus.log`

    Every append is written and synced before it returns. A log that was torn or damaged repairs itself on
    opening, or is refused. On opening, the newest append is written again and synced: its fsync may have
    failed in the process before, and its pages may be in memory only. Compaction writes a new log in tmp/ and
    renames it.

Everything here blocks; the node calls it from worker threads. Methods may be called from several threads:
appends are done one after another in the order in which they get the lock, so who needs an order calls from
one lane.
"""

import os
import shutil
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from node.storage.directory import (
    MAX_SMALL_FILE_BYTES,
    StorageError,
    check_format,
    claim,
    write_at,
)
from node.storage.objects import DamagedObject, MissingObject, Objects, ObjectWriter
from node.storage.whole_file import sync, sync_directory
from p2pcoord.consensus import log
from p2pcoord.errors import LocalError, UserError

__all__ = ["MAX_SMALL_FILE_BYTES", "DamagedObject", "MissingObject", "ObjectWriter", "StorageError", "Store"]

_LOG_WRITE_BYTES = 4 << 20  # how much of a rewritten log is gathered before it is written


class Store(Objects):
    """One node's directory. Made by `Store.open`; usable as a context manager, which closes it."""

    def __init__(self, path: Path, lock_file: int | None) -> None:
        """Not for use outside: `open` checks and locks the directory first."""
        super().__init__(path, lock_file)
        self._log_lock = threading.Lock()
        self._log_file: int | None = None
        self._tail = log.start()
        self._corrupt: log.CorruptLog | None = None
        # What was recovered is kept until the log's first change, and does not stay in memory after that.
        self._recovery: log.Recovery | None = None

    @classmethod
    def open(cls, path: Path | str, *, read_only: bool = False) -> "Store":
        """Open a directory, or make it (mode 0700) when it is absent or empty; recover the log.

        `read_only` takes no lock and changes nothing, so it works beside a running node. Raises UserError
        when another process uses the directory, when it holds something else, or when it cannot be used. A
        log that must not be used raises only when it is asked for (`recovered`, `append`), so that the node
        can come back under a new key.
        """
        path = Path(path)
        try:
            store = cls(path, None if read_only else claim(path))
            if read_only:
                check_format(path)
        except OSError as error:
            raise UserError(f"cannot use {path} as data directory: {error.strerror or error}") from error
        try:
            store._load()
        except OSError as error:
            store.close()
            raise StorageError(f"cannot read {path}: {error}") from error
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        """Close files and give the directory free. Harmless when repeated. Memory maps stay valid."""
        for writer in tuple(self._writers.values()):
            if writer is not None:
                writer.close()
        with self._log_lock:
            self._failure = self._failure or "it is closed"
            for name in ("_log_file", "_lock_file"):
                descriptor = getattr(self, name)
                if descriptor is not None:
                    setattr(self, name, None)
                    os.close(descriptor)

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # The log

    def recovered(self) -> log.Recovery:
        """What the log held on opening (its repairs are done); forgotten at the log's first change.

        Raises CorruptLog if the log must not be used.
        """
        self._check_log()
        if self._recovery is None:
            raise LocalError(f"the log of {self.path} has changed since it was recovered")
        return self._recovery

    def append(self, payloads: Sequence[bytes]) -> int:
        """Write payloads behind the log and sync: they are durable then. Returns the number of frames.

        Raises StorageError when the disk refuses (the store then takes no change any more: stop the node),
        CorruptLog when the log must not be used, LocalError for a payload that is too large (nothing is
        written then).
        """
        with self._log_lock:
            self._check_log()
            data, tail = log.append(payloads, self._tail)
            with self._writing("the log"):
                write_at(self._opened_log(), self._tail.offset, data)
                sync(self._opened_log(), data_only=True)
            self._tail, self._recovery = tail, None
            return tail.frames

    def rewrite_log(self, payloads: Iterable[bytes]) -> None:
        """Compaction: put a new log with these payloads in the old one's place, in one rename.

        Every frame counts as an append of its own, since the whole file is synced before it gets the name.
        Raises as `append` does.
        """
        with self._log_lock:
            self._check_log()
            self._replace_log(payloads)
            self._recovery = None

    def set_aside_log(self) -> Path:
        """Keep a refused log under another name, which is returned, and begin an empty one, for a new key.

        It may be refused here (CorruptLog), or by whoever read it: another key's, or of another program. Raises
        LocalError for a log that was written to since it was opened: that one is in use.
        """
        with self._log_lock:
            if self._corrupt is None and self._recovery is None:
                raise LocalError("the log is in use: it is not set aside")
            with self._writing("the log"):
                number = 1
                while (kept := self.path / f"log.refused-{number}").exists():
                    number += 1
                os.link(self.path / "log", kept)
                self._replace_log(())
            self._corrupt, self._recovery = None, log.recover(b"", self._tail.chain[: log.SALT_BYTES])
            return kept

    def _replace_log(self, payloads: Iterable[bytes]) -> None:
        with self._writing("the new log"):
            fresh = self.path / "tmp" / "log"
            descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                tail = log.start(os.urandom(log.SALT_BYTES))
                gathered = bytearray()
                for payload in payloads:
                    both, chain = log.frame(payload, tail.chain)
                    gathered += both
                    tail = log.Tail(chain, tail.offset + len(both))
                    if len(gathered) >= _LOG_WRITE_BYTES:
                        write_at(descriptor, tail.offset - len(gathered), gathered)
                        gathered = bytearray()
                write_at(descriptor, tail.offset - len(gathered), gathered)
                sync(descriptor)
                os.rename(fresh, self.path / "log")
                sync_directory(self.path)
            except BaseException:
                os.close(descriptor)
                raise
            old, self._log_file, self._tail = self._log_file, descriptor, tail
            if old is not None:
                os.close(old)

    def _check_log(self) -> None:
        if self._corrupt is not None:
            raise self._corrupt

    def _opened_log(self) -> int:
        if self._log_file is None:
            raise LocalError(f"the store of {self.path} is closed or only for reading")
        return self._log_file

    def _load(self) -> None:
        writable = self._lock_file is not None
        if writable:
            for name in ("objects", "partial", "tmp"):
                (self.path / name).mkdir(mode=0o700, exist_ok=True)
            for leftover in (self.path / "tmp").iterdir():
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                else:
                    leftover.unlink()
            # A process that was killed may have left a name that no directory sync covers yet.
            for directory in (self.path / "objects", *(self.path / "objects").glob("??")):
                sync_directory(directory)
        self.look_again()
        flags = os.O_RDWR | os.O_CREAT if writable else os.O_RDONLY
        with suppress(*(() if writable else (FileNotFoundError,))):
            self._log_file = os.open(self.path / "log", flags | os.O_CLOEXEC, 0o600)
        data = b"" if self._log_file is None else _read_all(self._log_file)
        try:
            recovery = log.recover(data, os.urandom(log.SALT_BYTES))
        except log.CorruptLog as corrupt:
            self._corrupt = corrupt
            return
        self._recovery, self._tail = recovery, recovery.tail
        if writable:
            with self._writing("the log"):
                self._repair(self._opened_log(), data, recovery)

    def _repair(self, log_file: int, data: bytes, recovery: log.Recovery) -> None:
        """Make the file what recovery says. After a crash in here the next opening does it again."""
        write_at(log_file, recovery.proven_length, data[recovery.proven_length : recovery.valid_length])
        for offset, copy in recovery.repairs:
            write_at(log_file, offset, copy)
        os.ftruncate(log_file, recovery.valid_length)
        sync(log_file)
        sync_directory(self.path)


def _read_all(descriptor: int) -> bytes:
    with os.fdopen(os.dup(descriptor), "rb") as file:
        file.seek(0)
        return file.read()

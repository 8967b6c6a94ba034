"""A data directory: one process in it, files that appear whole or not at all, and no write after a failed one.

Theory of operation
    DIR/format              what this directory is, and the layout's version
    DIR/lock                held with flock(2) by the one process that uses the directory; holds its pid
    DIR/tmp/                files on their way to a name; emptied on opening
    DIR/<name>              small files (key, known addresses), mode 0600; DIR/model/... and alike for people

    A file appears under its name only when it is complete: written in tmp/, synced, renamed, and the
    directory synced. So a name is a promise, and after a crash nothing of it has to be repaired.

    **A write that failed is never tried again.** After a failed fsync Linux may mark the unwritten pages
    clean, so that the next fsync says "ok" over lost data ("fsyncgate", 2018; Rebello et al., USENIX ATC
    2020). A directory that saw a failed write or fsync raises `StorageError`, then and on every later change.
    The one exception is a disk that is full while a file in tmp/ or a download is written: the one is removed
    and never had a name, the other is checked before it gets one, and dropping objects may make room.
"""

import errno
import fcntl
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from node.storage.whole_file import is_unfinished, name_durably, sync, sync_directory, whole_file
from p2pcoord.errors import LocalError, UserError

if TYPE_CHECKING:
    from typing_extensions import Buffer

FORMAT = b"p2pcoord data directory, format 1\n"
MAX_SMALL_FILE_BYTES = 4 << 20
"""Keys, addresses and notes; a file that is larger belongs among the objects."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_RESERVED = frozenset({"format", "lock", "log", "objects", "partial", "tmp"})


class StorageError(LocalError):
    """The disk refused a write or a sync, or this store has been refusing changes since one was refused."""


class Directory:
    """Small files that are replaced whole, and the rule that a failed write is the last one."""

    def __init__(self, path: Path, lock_file: int | None) -> None:
        self.path = path
        self._lock_file = lock_file  # None: reading only
        self._failure: str | None = None

    def write_file(self, name: str, data: bytes) -> None:
        """Write or replace a small file of mode 0600, whole or not at all, durably.

        `name` is in lower case. Raises StorageError, and LocalError for another name or too many bytes.
        """
        if not _NAME.fullmatch(name) or name in _RESERVED or name.startswith("log."):
            raise LocalError(f"not a name for a small file: {name!r}")
        if len(data) > MAX_SMALL_FILE_BYTES:
            raise LocalError(
                f"{name}: a small file has at most {MAX_SMALL_FILE_BYTES} bytes, not {len(data)}"
            )

        def fill(path: Path) -> None:
            with self._writing(name, retriable=True):
                _fill(path, data)

        self.replace_file(name, fill)

    def read_file(self, name: str) -> bytes | None:
        """A small file's bytes; None when there is none. Raises LocalError when it is too large."""
        try:
            with (self.path / name).open("rb") as file:
                data = file.read(MAX_SMALL_FILE_BYTES + 1)
        except FileNotFoundError:
            return None
        if len(data) > MAX_SMALL_FILE_BYTES:
            raise LocalError(f"{self.path / name} has more than {MAX_SMALL_FILE_BYTES} bytes")
        return data

    def replace_file(self, name: Path | str, write: Callable[[Path], object]) -> None:
        """Let `write(path)` fill a new file (empty, mode 0600), then put it in the place of `name`, durably.

        `name` is relative, such as "model/latest.safetensors". Readers see the old file or the new one. What
        `write` raises is passed on and changes nothing.
        """
        target = Path(name)
        if target.is_absolute() or ".." in target.parts or not target.name or target.parts[0] in _RESERVED:
            raise LocalError(f"not a place for a file: {str(name)!r}")
        with self._temporary() as (_, path):
            write(path)
            place = self.path / target
            with self._writing(str(place)):
                place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                name_durably(path, place)  # by its name: `write` may have put another file there

    @contextmanager
    def _writing(self, what: str, *, retriable: bool = False) -> Iterator[None]:
        """Around every change: refuses after a failure, and turns a failure into the last one."""
        if self._failure is not None:
            raise StorageError(f"{self.path} takes no more changes: {self._failure}")
        if self._lock_file is None:
            raise LocalError(f"{self.path} is open for reading only")
        try:
            yield
        except OSError as error:
            message = f"writing {what} failed: {error.strerror or error}"
            if not (retriable and error.errno in (errno.ENOSPC, errno.EDQUOT)):
                self._failure = message
            raise StorageError(f"{self.path}: {message}") from error

    @contextmanager
    def _temporary(self) -> Iterator[tuple[int, Path]]:
        """A new file in tmp/ (descriptor, path), removed at the end unless it got another name."""
        path = self.path / "tmp" / os.urandom(8).hex()
        with self._writing(str(path), retriable=True):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            yield descriptor, path
        finally:
            os.close(descriptor)
            with suppress(OSError):
                path.unlink(missing_ok=True)


def claim(path: Path) -> int:
    """Make the directory if need be, check that it is ours, and lock it; the lock file's descriptor."""
    if not (path / "format").exists():
        _refuse_inside_another(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    fresh = check_format(path, may_be_empty=True)
    lock_file = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(lock_file, 20, 0).decode("ascii", "replace").strip()
            who = f"process {holder}" if holder else "another process"
            raise UserError(f"{path} is in use by {who}: stop it, or choose another --data-dir") from None
        os.ftruncate(lock_file, 0)
        write_at(lock_file, 0, f"{os.getpid()}\n".encode())
        if fresh:
            path.chmod(0o700)
            with whole_file(path / "format", mode=0o600) as temporary:
                temporary.write_bytes(FORMAT)
            sync_directory(path.parent)
    except BaseException:
        os.close(lock_file)
        raise
    return lock_file


def _refuse_inside_another(path: Path) -> None:
    """A node's directory is that node's alone: it empties tmp/ and drops what it does not know among its objects."""
    for parent in path.resolve().parents:
        with suppress(OSError):  # not ours to read, or none
            if (parent / "format").read_bytes().startswith(FORMAT[:24]):
                raise UserError(
                    f"{path} lies inside {parent}, which already takes part in a run: choose another --data-dir",
                    exit_code=2,
                )


def check_format(path: Path, *, may_be_empty: bool = False) -> bool:
    """Raise UserError unless this is our data directory, or (if that may be) empty: then return True."""
    try:
        with (path / "format").open("rb") as file:
            found = file.read(len(FORMAT) + 64)
    except FileNotFoundError:
        found = b""
    if found == FORMAT:
        return False
    if found.startswith(FORMAT[:24]):
        theirs = found.decode("utf-8", "replace").strip()
        raise UserError(f"{path} is a {theirs}, this program knows format 1: use the version that made it")
    if not path.exists():
        raise UserError(f"{path} does not exist: no node has run there")
    names = (entry.name for entry in path.iterdir())
    if may_be_empty and all(name == "lock" or is_unfinished(name, "format") for name in names):
        return True
    reason = "is not empty and" if may_be_empty else "exists but"
    raise UserError(f"{path} {reason} is not a p2pcoord data directory: choose another --data-dir")


def _fill(path: Path, data: bytes) -> None:
    """Write a file at once and sync it, mode 0600."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        write_at(descriptor, 0, data)
        sync(descriptor)
    finally:
        os.close(descriptor)


def write_at(descriptor: int, offset: int, data: "Buffer") -> None:
    """Write all of `data`: pwrite(2) may write less than it was given."""
    rest = memoryview(data)
    rest = rest.cast("B") if rest.nbytes else memoryview(b"")
    while rest.nbytes:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written

"""Files that appear whole or not at all: written under another name beside their place, synced, and renamed.

A name is a promise then: what a reader finds under it is complete, and after a crash nothing of it has to be repaired.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(
    path: Path, *, durable: bool = True, replace: bool = True, mode: int = 0o666
) -> Iterator[Path]:
    """A new empty file, which takes the name `path` when the block ends well, and is removed otherwise.

    `durable`: it survives a power failure once this returns. Without `replace` a file that is already there stays, and
    FileExistsError is raised. The umask is taken off `mode`. Raises OSError.
    """
    temporary = temporary_beside(path)
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode))
    try:
        yield temporary
        if durable:
            name_durably(temporary, path, replace=replace)
        else:
            _name(temporary, path, replace=replace)
    finally:
        temporary.unlink(missing_ok=True)


def name_durably(written: Path, path: Path, *, replace: bool = True) -> None:
    """Give a complete file its name; both survive a power failure. Raises OSError."""
    descriptor = os.open(written, os.O_RDWR | os.O_CLOEXEC)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)
    _name(written, path, replace=replace)
    sync_directory(path.absolute().parent)


def _name(written: Path, path: Path, *, replace: bool) -> None:
    if replace:
        os.rename(written, path)
    else:
        os.link(written, path)  # unlike a rename, fails when there is a file


def temporary_beside(path: Path) -> Path:
    """Where a file is until it is complete; `is_unfinished` knows it again after a crash."""
    return path.with_name(f".{path.name}.{os.urandom(8).hex()}")


def is_unfinished(found: str, name: str) -> bool:
    """Whether a file that is called `found` would have become `name`."""
    return found.startswith(f".{name}.")


def sync(descriptor: int, *, data_only: bool = False) -> None:
    """To the medium. macOS's fsync(2) leaves data in the drive's cache; its F_FULLFSYNC does not."""
    if sys.platform == "darwin":
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    elif data_only:
        os.fdatasync(descriptor)  # includes the file's length, not its time stamps
    else:
        os.fsync(descriptor)


def sync_directory(path: Path) -> None:
    """Make a rename in this directory durable. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

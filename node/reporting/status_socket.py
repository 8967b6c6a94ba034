"""The door for the user of this machine: a unix socket in the data directory that tells the node's status.

Who connects gets one JSON document and the end of the stream; nothing is read from it, so there is nothing to parse. The
socket is made with mode 0600 before it listens (the document holds the run's secret, in `join_line`), inside a directory of
mode 0700.

The kernel takes paths of up to 107 bytes for a socket. For a longer one the socket lies in a private directory under the
system's directory for temporary files, and DIR/status.path says where.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Never

import msgspec
import trio

from node.storage.directory import check_format
from node.storage.whole_file import whole_file
from p2pcoord.errors import LocalError, UserError

SOCKET_FILE: Final = "status.sock"
PATH_FILE: Final = "status.path"

MAX_SOCKET_PATH_BYTES: Final = 103
"""sun_path has 108 bytes on Linux and 104 elsewhere, the last of them zero."""

MAX_CONNECTIONS: Final = 16
"""Answered at a time: a person, a script and a watch for each screen."""

ANSWER_S: Final = 5.0
"""A reader that does not read, or a node that does not answer, is given up after this long."""

MAX_DOCUMENT_BYTES: Final = 64 << 20
"""10,000 members at some 500 bytes each are 5 MB."""


async def serve_status(directory: Path, document: Callable[[], Mapping[str, Any]]) -> Never:
    """Answers every connection to DIR/status.sock with `document()`, until cancelled.

    Only the process that holds the directory calls this. Raises LocalError when there can be no socket. An exception in
    `document` is told to who asked, and goes no further.
    """

    async def answer(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async with stream, limit:
                with trio.move_on_after(ANSWER_S):
                    await stream.send_all(_encoded(document))

    limit = trio.CapacityLimiter(MAX_CONNECTIONS)
    with _bound(directory) as listening:
        await trio.serve_listeners(answer, [trio.SocketListener(trio.socket.from_stdlib_socket(listening))])
    raise AssertionError("unreachable")  # serve_listeners ends by cancellation only


def _encoded(document: Callable[[], Mapping[str, Any]]) -> bytes:
    try:
        return msgspec.json.encode(document())
    except Exception as error:  # a person's question must not stop the node; the answer shows our mistake
        return msgspec.json.encode({"error": f"{type(error).__name__}: {error}"})


@contextmanager
def _bound(directory: Path) -> Iterator[socket.socket]:
    """A listening socket at the directory's place for it; gone again at the end."""
    private: Path | None = None
    path = directory.absolute() / SOCKET_FILE
    with suppress(FileNotFoundError):
        (directory / PATH_FILE).unlink()
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        private = Path(tempfile.mkdtemp(prefix="p2pcoord-"))
        path = private / SOCKET_FILE
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with suppress(
            FileNotFoundError
        ):  # an earlier process was killed: the directory's lock says that it is gone
            path.unlink()
        listening.bind(os.fspath(path))
        path.chmod(0o600)
        listening.listen(MAX_CONNECTIONS)
        if private is not None:
            with whole_file(directory / PATH_FILE, durable=False) as temporary:
                temporary.write_text(f"{path}\n")
        yield listening
    except OSError as error:
        raise LocalError(f"no socket for the status at {path}: {error.strerror or error}") from error
    finally:
        listening.close()
        for made in (path, directory / PATH_FILE):
            with suppress(OSError):
                made.unlink()
        if private is not None:
            shutil.rmtree(private, ignore_errors=True)


async def ask_status(directory: Path) -> dict[str, Any]:
    """The status of the node that runs in this directory.

    Raises UserError when the directory is none of ours, or when no node answers there; LocalError when what answers is no
    status.
    """
    await trio.to_thread.run_sync(check_format, directory)
    stream = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    received = bytearray()
    with stream:
        try:
            with trio.fail_after(ANSWER_S):
                await stream.connect(os.fspath(_place(directory)))
                while block := await stream.recv(1 << 16):
                    received += block
                    if len(received) > MAX_DOCUMENT_BYTES:
                        raise LocalError(f"a status of more than {MAX_DOCUMENT_BYTES} bytes")
        except trio.TooSlowError:
            raise UserError(
                f"the node in {directory} does not answer within {ANSWER_S:.0f} s: it is stopped, or very busy"
            ) from None
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM):
                raise UserError(
                    f"the node in {directory} runs for another user: ask as the one who started it"
                ) from None
            raise UserError(_nobody(directory)) from None
    try:
        document = msgspec.json.decode(bytes(received))
    except msgspec.DecodeError:
        raise UserError(f"the node in {directory} ended while it answered: ask again") from None
    if not isinstance(document, dict):
        raise LocalError("what answered is no status")
    if "error" in document:
        raise LocalError(f"the node cannot tell its status: {document['error']}")
    return document


def _place(directory: Path) -> Path:
    with suppress(OSError, ValueError):
        return Path((directory / PATH_FILE).read_text().rstrip("\n"))
    return directory.absolute() / SOCKET_FILE


def _nobody(directory: Path) -> str:
    """Why nobody answered, as far as the lock's holder tells."""
    process = 0
    with suppress(OSError, ValueError):
        process = int((directory / "lock").read_bytes()[:20])
    # Only its existence is looked at: trying the lock could keep a node from starting at this very moment.
    if process > 0 and Path(f"/proc/{process}").exists():
        return f"no node answers in {directory} yet: process {process} may be starting there"
    return f"no node answers in {directory}: none is running there (start it with: p2pcoord node --data-dir {directory})"

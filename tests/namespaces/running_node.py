"""`p2pcoord node` as a process of its own, started and watched as a person would: by flags, status, events and signals.

Every process is ended by its own id. What it prints lies in files beside its directory, for when something failed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import trio

from node.reporting.events import read_events
from node.reporting.status_socket import ask_status
from p2pcoord.errors import LocalError, UserError

COMMAND: Final = (sys.executable, "-P", "-m", "node.cli")

START_S: Final = 60.0
"""Loading torch on a busy machine takes most of it."""

END_S: Final = 8.0
POLL_S: Final = 0.1

Document = dict[str, Any]


def environment() -> dict[str, str]:
    """One thread for each trainer: several share this machine's cores."""
    return os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}


class RunningNode:
    """One node. `prefix` runs it elsewhere (in a network namespace)."""

    def __init__(
        self, directory: Path, *flags: str, prefix: Sequence[str] = (), name: str | None = None
    ) -> None:
        self.name = name or directory.name
        self.directory = directory
        self.flags = flags
        self.prefix = tuple(prefix)
        self.process: subprocess.Popen[bytes] | None = None
        self._known: Document = {}

    # Its process

    def start(self, *flags: str) -> RunningNode:
        """Starts it; `flags` in place of those of the first start."""
        self.flags = flags or self.flags
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        command = [
            *self.prefix, *COMMAND, "node", "--data-dir", str(self.directory), "--name", self.name, *self.flags,
        ]  # fmt: skip
        with self._file("out").open("ab") as out, self._file("err").open("ab") as err:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environment(),
                start_new_session=True,
            )
        return self

    def _file(self, kind: str) -> Path:
        return self.directory.with_name(f"{self.directory.name}.{kind}")

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self, timeout_s: float) -> int:
        """Its exit code, once it has ended."""
        assert self.process is not None
        return self.process.wait(timeout_s)

    def end(self) -> None:
        """No process is left of it: it is asked to leave, and killed if it does not."""
        if not self.runs:
            return
        with suppress(ProcessLookupError):
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGTERM)
        try:
            self.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()  # type: ignore[union-attr]
            self.wait(END_S)

    def printed(self) -> str:
        """What it printed, standard output first."""
        return "".join(
            self._file(kind).read_text(errors="replace")
            for kind in ("out", "err")
            if self._file(kind).exists()
        )

    # What it says

    def status(self) -> Document | None:
        """None while it does not answer."""
        try:
            self._known = trio.run(ask_status, self.directory)
        except (UserError, LocalError):
            return None
        return self._known

    @property
    def peer_id(self) -> str:
        return str(self._known["peer_id"])

    def until(self, told: str, holds: Callable[[Document], object], timeout_s: float) -> Document:
        """Its status once `holds` is true of it. Raises AssertionError (`told`, and what it printed) after the time."""
        give_up = time.monotonic() + timeout_s
        document: Document | None = None
        while time.monotonic() < give_up:
            document = self.status()
            if document is not None and holds(document):
                return document
            assert self.runs, f"{self.name} ended while it was waited for: {told}\n{self.printed()[-4000:]}"
            time.sleep(POLL_S)
        raise AssertionError(
            f"{self.name}, after {timeout_s:g} s: not {told}; its status {document}\n{self.printed()[-4000:]}"
        )

    def events(self, *names: str) -> list[Document]:
        """Its events so far; of these names only, where some are given."""
        return [event for event in read_events(self.directory) if not names or event["event"] in names]

    def commits(self, since: float = 0.0) -> list[Document]:
        """The certified rounds that it has seen since (seconds of the Unix epoch)."""
        return [event for event in self.events("commit") if at(event) >= since]


def at(event: Document) -> float:
    """When it happened, in seconds of the Unix epoch."""
    return datetime.fromisoformat(str(event["time"])).timestamp()


def join_flags(document: Document) -> tuple[str, ...]:
    """--bootstrap and --secret as the status' join line has them."""
    words = str(document["join_line"]).split()
    return tuple(
        part for flag in ("--bootstrap", "--secret") for part in (flag, words[words.index(flag) + 1])
    )


@contextmanager
def running() -> Iterator[list[RunningNode]]:
    """A list to put nodes into: all have ended after this, whatever happened."""
    nodes: list[RunningNode] = []
    try:
        yield nodes
    finally:
        for node in nodes:
            if node.runs:
                with suppress(ProcessLookupError):
                    node.signal(signal.SIGCONT)
                    node.signal(signal.SIGTERM)
        for node in nodes:
            node.end()


def verified(directory: Path) -> tuple[int, str]:
    """`p2pcoord verify DIR`: exit code and what it said."""
    done = subprocess.run(
        [*COMMAND, "verify", str(directory)], capture_output=True, text=True, check=False, timeout=120
    )
    return done.returncode, done.stdout + done.stderr


def human_status(directory: Path) -> str:
    """`p2pcoord status` as a person sees it."""
    done = subprocess.run(
        [*COMMAND, "status", "--data-dir", str(directory)],
        capture_output=True, text=True, check=False, timeout=60, env=environment(),
    )  # fmt: skip
    return done.stdout + done.stderr

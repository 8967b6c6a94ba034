"""`p2pcoord cluster`: a network of real nodes on this machine, each with its own key, disk and port.

Every node is a process of its own, started as a person would start it: the first founds the run, and the line that it prints
(read from its status) brings the others to it. On directories that were used before they go on where they stopped.

    BASE/node1 ... nodeN   their directories            BASE/ports.json   their ports, the same at every start

The nodes belong to this command: it watches over their processes and ends them, by their own process ids and nothing else,
when it is told to stop: SIGTERM, and SIGKILL for what is left after KILL_AFTER_S. They run in sessions of their own, so a
terminal's Ctrl-C reaches them once, from here. A node that dies does not end the others: that they go on is the point.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Final

import msgspec
import trio
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from node.reporting.event_words import commit_line, in_words, number, printable, short_name
from node.reporting.events import parse_line
from node.reporting.status_socket import ask_status
from node.reporting.status_view import is_over
from node.storage.export import MODEL_FILE
from p2pcoord.errors import LocalError, UserError

MAX_NODES: Final = 64
"""Processes with a trainer each: 300 MB a node. Larger networks are simulated."""

KILL_AFTER_S: Final = 5.0
"""A node says goodbye within 5 s of SIGTERM; what is still there then does not listen."""

FOUND_TIMEOUT_S: Final = 120.0
"""Until the first node can be joined: loading torch and the data on a cold disk takes most of it."""

LAST_WORDS_S: Final = 0.5
"""After a process has ended: for what it printed last to be read."""

ASK_INTERVAL_S: Final = 0.5

MAX_KEPT_LINES: Final = 200
"""Of each node's output, for when it fails."""

MAX_TOLD_LINES: Final = 25
MAX_LINE_BYTES: Final = 64 << 10
STORY_LINES: Final = 8
"""Newest rounds below the live table."""

PORTS_FILE: Final = "ports.json"


class ClusterOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`shared` are flags of `p2pcoord node` for every node, `founding` those for the one that founds the run."""

    nodes: int
    base: Path
    shared: tuple[str, ...] = ()
    founding: tuple[str, ...] = ()
    bootstrap: tuple[str, ...] = ()
    """With it nobody founds: all nodes join the run that is there."""
    secret: str | None = None
    name: str = "node"


class Node:
    """One process, and what it said last."""

    def __init__(self, name: str, directory: Path, port: int) -> None:
        self.name = name
        self.directory = directory
        self.port = port
        self.process: trio.Process | None = None
        self.output: deque[str] = deque(maxlen=MAX_KEPT_LINES)
        self.status: dict[str, Any] = {}

    @property
    def exit_code(self) -> int | None:
        """None before it was started and while it runs; negative for the signal that killed it."""
        return self.process.returncode if self.process is not None else None

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.returncode is None


async def run_cluster(
    options: ClusterOptions,
    *,
    tell: Callable[[str], object],
    console: Console,
    command: Sequence[str] = (sys.executable, "-P", "-m", "node.cli", "node"),
) -> int:
    """Runs the nodes until all have ended. 0 when every one of them ended by itself and well, else 1.

    On a terminal `console` shows them live, else a line for each round is told. Raises UserError when the network cannot be
    started. `command` starts a node, without its flags.
    """
    if not 1 <= options.nodes <= MAX_NODES:
        raise UserError(f"--nodes: 1 to {MAX_NODES}, not {options.nodes}", exit_code=2)
    return await _Cluster(options, tell, console, command).run()


class _Cluster:
    def __init__(
        self, options: ClusterOptions, tell: Callable[[str], object], console: Console, command: Sequence[str]
    ) -> None:
        self.options = options
        self.tell = tell
        self.console = console
        self.command = command
        self.live: Live | None = None
        self.stopping = False
        self.founder: Node | None = None
        """The first node until it can be joined: its failure is this command's, and told once."""
        self.told_version = 0
        self.story: deque[str] = deque(maxlen=STORY_LINES)
        ports = _ports(options.base, options.nodes)
        self.nodes = [
            Node(f"{options.name}{at}", options.base / f"node{at}", port)
            for at, port in enumerate(ports, start=1)
        ]

    async def run(self) -> int:
        try:
            with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._watch_signals, signals, nursery)
                    nursery.start_soon(self._watch)
                    with self._screen():
                        async with trio.open_nursery() as processes:
                            await self._start(processes)
                    nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await self._end()
        return self._result()

    def _screen(self) -> Any:
        if not self.console.is_terminal:
            return nullcontext()
        self.live = Live(self.view(), console=self.console, auto_refresh=False)
        return self.live

    # Processes

    async def _start(self, nursery: trio.Nursery) -> None:
        options, first = self.options, self.nodes[0]
        if options.bootstrap:
            joining = _flags("--bootstrap", options.bootstrap)
            joining += ("--secret", options.secret) if options.secret else ()
            rest = self.nodes
        else:
            self.founder = first
            secret = ("--secret", options.secret) if options.secret else ()
            await self._spawn(nursery, first, (*options.founding, *secret))
            document = await self._joinable(first)
            self.founder = None
            if document is None:
                return
            if is_over(document):
                self.tell(
                    f"the run in {options.base} is over. For a new one use another --data-dir, or remove {options.base}"
                )
                await self._end()
                return
            joining = _join_flags(document["join_line"])
            rest = self.nodes[1:]
        for node in rest:
            if not self.stopping:
                await self._spawn(nursery, node, joining)

    async def _spawn(self, nursery: trio.Nursery, node: Node, flags: Sequence[str]) -> None:
        node.process = await trio.lowlevel.open_process(
            [
                *self.command,
                "--data-dir", str(node.directory),
                "--listen", f"/ip4/127.0.0.1/tcp/{node.port}",
                "--name", node.name,
                *self.options.shared,
                *flags,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=_environment(len(self.nodes)),
        )  # fmt: skip
        nursery.start_soon(self._follow, node, node.process)

    async def _follow(self, node: Node, process: trio.Process) -> None:
        """Until the process has ended, and all that it printed was read."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read, node, process)
            code = await process.wait()
            nursery.cancel_scope.deadline = (
                trio.current_time() + LAST_WORDS_S
            )  # a process of its own may hold the pipe
        if code and not self.stopping and node is not self.founder:
            self.tell(f"{node.name} ended with exit code {code}; it said:\n{_said(node)}")

    async def _joinable(self, node: Node) -> dict[str, Any] | None:
        """The first node's status, once it has a run that others can join; None when the cluster is told to stop."""
        with trio.move_on_after(FOUND_TIMEOUT_S):
            while node.runs and not self.stopping:
                with suppress(UserError, LocalError):
                    document = await ask_status(node.directory)
                    if document.get("join_line"):
                        node.status = document
                        return document
                await trio.sleep(0.1)
        if self.stopping:
            return None
        if node.runs:
            raise UserError(f"{node.name} has no run after {FOUND_TIMEOUT_S:.0f} s; it said:\n{_said(node)}")
        await trio.sleep(LAST_WORDS_S)
        raise UserError(
            _bare(_said(node)) or f"{node.name} ended with exit code {node.exit_code}",
            exit_code=2 if node.exit_code == 2 else 1,
        )

    async def _read(self, node: Node, process: trio.Process) -> None:
        """All that the node prints: the newest lines are kept, and its rounds are part of the story."""
        assert process.stdout is not None
        rest = b""
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for block in process.stdout:
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:
                    self._heard(node, line)
                rest = rest[-MAX_LINE_BYTES:]
        if rest:
            self._heard(node, rest)

    def _heard(self, node: Node, line: bytes) -> None:
        event = parse_line(line)
        if event is None:
            node.output.append(printable(line.decode(errors="replace")))
            return
        node.output += self._in_words(event)
        version = event.get("version")
        if event["event"] == "commit" and isinstance(version, int) and version > self.told_version:
            self.told_version = version
            told = printable(commit_line(event, self._name_of))
            self.story.append(told)
            if self.live is None:
                self.tell(told)

    async def _end(self) -> None:
        """No process of ours survives this command."""
        left = [
            node.process
            for node in self.nodes
            if node.process is not None and node.process.returncode is None
        ]
        for process in left:
            process.terminate()
        with trio.move_on_after(KILL_AFTER_S):
            for process in left:
                await process.wait()
        for process in left:
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def _watch_signals(self, signals: Any, nursery: trio.Nursery) -> None:
        """The first signal asks the nodes to leave, the second kills them."""
        async for _ in signals:
            if self.stopping:
                for node in self.nodes:
                    if node.process is not None and node.process.returncode is None:
                        node.process.kill()
                continue
            self.stopping = True
            self.tell("ending all nodes")
            nursery.start_soon(self._end)

    # What people see

    async def _watch(self) -> None:
        while True:
            for node in self.nodes:
                if node.runs:
                    with suppress(UserError, LocalError):
                        node.status = await ask_status(node.directory)
            if self.live is not None:
                self.live.update(self.view(), refresh=True)
            await trio.sleep(ASK_INTERVAL_S)

    def view(self) -> RenderableType:
        """The live table, and the newest rounds below it."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in ("node", "role", "version", "round", "quorum", "loss", "process"):
            table.add_column(heading, no_wrap=True)
        for node in self.nodes:
            table.add_row(*(Text(printable(cell)) for cell in _cells(node)), style="" if node.runs else "dim")
        return Group(table, *(Text(line, style="dim") for line in self.story))

    def _name_of(self, peer: str) -> str:
        return next(
            (node.name for node in self.nodes if node.status.get("peer_id") == peer), short_name(peer)
        )

    def _in_words(self, event: dict[str, Any]) -> list[str]:
        """As the node itself would show it on a terminal."""
        words = in_words(event["event"], event, self._name_of)
        if words is not None:
            return [words]
        # A warning, what the workload printed, or a library's: a traceback has many lines.
        lines = str(event.get("text") or "").splitlines() or [""]
        return [printable(f"{event['event']}: {line}".rstrip(": ")) for line in lines]

    def _result(self) -> int:
        """Says what came of it; the exit code."""
        newest = max(self.nodes, key=lambda node: node.status.get("version", -1))
        metrics = newest.status.get("metrics") or {}
        if metrics:
            measures = "".join(
                f"  {name} {number(value)}" for name, value in sorted((metrics.get("measures") or {}).items())
            )
            told = f"version {newest.status['version']}  loss {number(metrics.get('loss'))}{measures}"
            self.tell(f"{len(self.nodes)} nodes: {told}")
        model = newest.directory / MODEL_FILE
        if model.is_file():
            untrained = newest.status.get("version") == 0
            self.tell(f"the model lies in {model}" + ", untrained: it is version 0" * untrained)
        failed = [node.name for node in self.nodes if node.process is not None and node.exit_code != 0]
        if failed and not self.stopping:
            self.tell(f"did not end well: {', '.join(failed)}")
        return 1 if failed or self.stopping else 0


def _cells(node: Node) -> tuple[str, ...]:
    status = node.status
    quorum, current, metrics = (status.get(name) or {} for name in ("quorum", "round", "metrics"))
    process = (
        "starts" if node.process is None else "runs" if node.runs else "done" if not node.exit_code
        else f"exit code {node.exit_code}"
    )  # fmt: skip
    if not status:
        return node.name, "-", "-", "-", "-", "-", process
    phase = "over" if is_over(status) else f"{current.get('number')} {current.get('phase')}"
    halves = (half for half in (quorum, quorum.get("outgoing")) if half)
    held = "+".join(f"{half.get('reachable')}/{half.get('voters')}" for half in halves)
    held += "" if quorum.get("held") or is_over(status) else " waiting"
    return (
        node.name, str(status.get("role")), str(status.get("version")), phase, held, number(metrics.get("loss")), process
    )  # fmt: skip


def _said(node: Node) -> str:
    return "\n".join(list(node.output)[-MAX_TOLD_LINES:])


def _bare(said: str) -> str:
    """What a node said, for our own "error: " before it."""
    _, found, error = said.rpartition("error: ")
    return error if found else said


def _flags(flag: str, values: Sequence[str]) -> tuple[str, ...]:
    return tuple(part for value in values for part in (flag, value))


def _join_flags(line: str) -> tuple[str, ...]:
    """--bootstrap and --secret of a join line; a --workload in it has no path, and all nodes here have their own."""
    words = line.split()
    chosen = (flag for flag in ("--bootstrap", "--secret") if flag in words[:-1])
    return tuple(part for flag in chosen for part in (flag, words[words.index(flag) + 1]))


def _environment(nodes: int) -> dict[str, str]:
    """With several nodes on one machine, torch's threads only fight each other: one each, unless the user says otherwise."""
    path = os.pathsep.join(
        filter(None, (str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH")))
    )
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if nodes > 1 else {}
    return {**threads, **os.environ, "PYTHONPATH": path}


def _ports(base: Path, count: int) -> list[int]:
    """Free ports, the same ones as last time: nodes remember each other's addresses."""
    try:
        base.mkdir(parents=True, exist_ok=True)
        known: list[int] = []
        with suppress(FileNotFoundError, msgspec.DecodeError):
            known = msgspec.json.decode((base / PORTS_FILE).read_bytes(), type=list[int])
        if len(known) < count:
            known += _free_ports(count - len(known))
            (base / PORTS_FILE).write_bytes(msgspec.json.encode(known))
    except OSError as error:
        raise UserError(f"cannot use {base} for the nodes' directories: {error.strerror or error}") from error
    return known[:count]


def _free_ports(count: int) -> list[int]:
    """All are held until all are known, so that none comes twice."""
    held = [socket.socket() for _ in range(count)]
    try:
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in held]
    finally:
        for one in held:
            one.close()

"""A network of real nodes on 127.0.0.1 for tests and benchmarks: processes started by the CLI, and killed by their own pid.

    with Network(directory, run_file(parameters=2_500_000)) as network:
        network.found(4)                            # node1 founds, the others join with the line that it prints
        network.wait_version(3)
        killed = network.nodes[2].kill()
        network.next_commit(killed)
        network.check()                             # what every test demands of every run

What the nodes do is seen through what a user has: the status socket, events.jsonl, the log and the model file. Nothing waits
without a limit; a wait that ends in vain fails with the last lines of every node. The workload is `workloads/census.py`
unless another is named: with it the model itself tells who is in it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import trio
from safetensors import safe_open

from node.cluster import _free_ports
from node.reporting.events import CURRENT, parse_line, read_events
from node.reporting.status_socket import ask_status
from node.storage.store import Store
from p2pcoord.consensus.record import Record, Round
from p2pcoord.consensus.voter import Appended, Certified, Truncated
from p2pcoord.errors import LocalError, UserError
from p2pcoord.frames import PeerFrame
from p2pcoord.rounds.frames import Slot
from p2pcoord.wire import decode

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
WORKLOADS = HERE / "workloads"

CENSUS = f"{WORKLOADS / 'census.py'}:Census"

LARGE = 2_500_000
"""Parameters of the census for updates of 10 MB."""

# Loading torch in several processes at once, on two busy cores.
START_S = 120.0

# How often conditions are looked at. Figures are taken from the events' own times, which are exact to a millisecond.
POLL_S = 0.02

# Nodes of one network.
MAX_INDEX = 64

# The last lines of a node that a failed wait shows.
TOLD_LINES = 12

COMMAND = (sys.executable, "-P", "-m", "node.cli", "node")

Event = dict[str, Any]


def run_file(
    *,
    parameters: int = 1000,
    pause_s: float = 0.0,
    members: int = 1,
    rotation_rounds: int = 0,
    committee_size: int = 5,
    fan_out: int = 4,
) -> str:
    """A run of the census that goes on until it is ended. `members`: the first round waits for so many."""
    return f"""
[workload]
parameters = {parameters}
pause_s = {pause_s}
[strategy]
local_steps = 1
aggregation_rounds = 1000000
[aggregation]
weighted = false
fan_out = {fan_out}
[optimization]
learning_rate = 1.0
momentum = 0.0
nesterov = false
[data]
mode = "own"
[participation]
minimum_members = {members}
[coordination]
rotation_rounds = {rotation_rounds}
committee_size = {committee_size}
"""


def at(event: Event) -> float:
    """When an event was written: seconds since the epoch, as time.time() gives them."""
    return datetime.fromisoformat(event["time"]).timestamp()


class Node:
    """One node's directory and port, and its process if it runs."""

    def __init__(self, index: int, directory: Path, port: int) -> None:
        self.index = index
        self.name = name = f"node{index}"
        self.directory = directory
        self.port = port
        self.process: subprocess.Popen[bytes] | None = None
        self.peer_id = ""
        self.output = directory.parent / f"{name}.out"
        self.started: list[float] = []
        self._events: list[Event] = []
        self._read = (0, 0)  # inode and offset of events.jsonl

    def start(
        self,
        *flags: str,
        workload: str,
        environment: Mapping[str, str] | None = None,
        command: Sequence[str] = COMMAND,
    ) -> None:
        assert not self.runs, f"{self.name} runs already"
        self.started.append(time.time())
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [
                    *command,
                    "--data-dir", str(self.directory),
                    "--listen", f"/ip4/127.0.0.1/tcp/{self.port}",
                    "--name", self.name,
                    "--device", "cpu",
                    "--workload", workload,
                    *(("--set", f"index={self.index}") if workload == CENSUS else ()),
                    *flags,
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=ROOT,
                start_new_session=True,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "MKL_NUM_THREADS": "1",
                    "PYTHONPATH": str(ROOT),
                    **(environment or {}),
                },
            )  # fmt: skip

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def status(self) -> dict[str, Any] | None:
        """What the node tells of itself; None while it does not answer."""
        if not self.runs:
            return None
        with suppress(UserError, LocalError):
            return trio.run(ask_status, self.directory)
        return None

    def events(self, name: str | None = None) -> list[Event]:
        """All events of this directory, of all its lives. Reads only what is new since the last call."""
        try:
            with (self.directory / CURRENT).open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if self._read[0] != inode and self._read[0]:
                    self._events = list(read_events(self.directory))
                    self._read = (inode, file.seek(0, os.SEEK_END))
                else:
                    file.seek(self._read[1])
                    whole = file.read()
                    whole = whole[: whole.rfind(b"\n") + 1]
                    self._events += [e for e in map(parse_line, whole.splitlines()) if e is not None]
                    self._read = (inode, self._read[1] + len(whole))
        except FileNotFoundError:
            pass
        return [event for event in self._events if name is None or event["event"] == name]

    # Ends

    def kill(self) -> float:
        """SIGKILL for the node process alone; returns when. Its trainer notices that by itself."""
        assert self.process is not None
        when = time.time()
        self.process.kill()
        self.process.wait(10)
        return when

    def signal(self, number: int) -> float:
        assert self.process is not None
        when = time.time()
        self.process.send_signal(number)
        return when

    def terminate(self, timeout_s: float = 10.0) -> int:
        """SIGTERM, and the exit code; fails when the node has not ended in time."""
        self.signal(signal.SIGTERM)
        assert self.process is not None
        return self.process.wait(timeout_s)

    def trainers(self) -> list[psutil.Process]:
        if self.runs:
            with suppress(psutil.NoSuchProcess):
                return list(psutil.Process(self.pid).children(recursive=True))
        return []

    def end(self) -> None:
        """No process of this node is left."""
        trainers = self.trainers()
        if self.runs:
            self.kill()
        for trainer in trainers:
            with suppress(psutil.NoSuchProcess):
                trainer.kill()

    # The log

    def frames(self) -> list[PeerFrame]:
        """What the log says, read beside whoever writes it."""
        with Store.open(self.directory, read_only=True) as store:
            return [decode(frame, PeerFrame) for frame in store.recovered().payloads]  # type: ignore[arg-type]

    def slots(self) -> Counter[tuple[int, int]]:
        """How often the log says of each (origin round, assignment) that this member's training was finished."""
        return Counter(frame.header.slot for frame in self.frames() if isinstance(frame, Slot))

    def rounds(self) -> list[Round]:
        """The certified rounds in this log, in order."""
        records: dict[int, Record] = {}
        certified = 0
        for frame in self.frames():
            if isinstance(frame, Appended):
                records[frame.record.header.height] = frame.record
            elif isinstance(frame, Truncated):
                records = {height: record for height, record in records.items() if height <= frame.height}
            elif isinstance(frame, Certified):
                certified = max(certified, frame.certificate.height)
        bodies = [records[height].body for height in sorted(records) if height <= certified]
        return [body for body in bodies if isinstance(body, Round)]

    def model(self) -> tuple[int, np.ndarray]:
        """Version and first parameters of the model file, as anybody may load it."""
        with safe_open(self.directory / "model/latest.safetensors", framework="numpy") as file:
            return int(file.metadata()["p2pcoord_version"]), file.get_tensor("values")[:MAX_INDEX]

    def said(self) -> str:
        try:
            lines = self.output.read_text(errors="replace").splitlines()
        except OSError:
            lines = []
        return f"--- {self.name} ({'runs' if self.runs else 'ended'})\n" + "\n".join(lines[-TOLD_LINES:])


class Network:
    """Some nodes of one run. As a context manager it ends all its processes."""

    def __init__(self, base: Path, run_file: str, workload: str = CENSUS) -> None:
        self.base = base
        self.workload = workload
        self.nodes: list[Node] = []
        self.join_flags: tuple[str, ...] = ()
        base.mkdir(parents=True, exist_ok=True)
        self._run_file = base / "run.toml"
        self._run_file.write_text(run_file)

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            node.end()

    def add(self, count: int = 1) -> list[Node]:
        """New nodes, not started."""
        first = len(self.nodes) + 1
        made = [
            Node(first + offset, self.base / f"node{first + offset}", port)
            for offset, port in enumerate(_free_ports(count))
        ]
        self.nodes += made
        return made

    def found(
        self,
        count: int,
        environments: Mapping[int, Mapping[str, str]] | None = None,
        commands: Mapping[int, Sequence[str]] | None = None,
    ) -> None:
        """Starts `count` nodes. `environments` and `commands` are for the nodes of these numbers (from 1)."""
        environments, commands = environments or {}, commands or {}
        nodes = self.add(count)
        first = nodes[0]
        first.start(
            "--config", str(self._run_file),
            workload=self.workload, environment=environments.get(1), command=commands.get(1, COMMAND),
        )  # fmt: skip
        line = self.wait(
            lambda: (first.status() or {}).get("join_line"), "the founder can be joined", START_S
        )
        words = line.split()
        self.join_flags = tuple(
            part for flag in ("--bootstrap", "--secret") for part in (flag, words[words.index(flag) + 1])
        )
        for number, node in enumerate(nodes[1:], start=2):
            self.join(node, environment=environments.get(number), command=commands.get(number, COMMAND))
        self.wait(lambda: all(node.status() for node in nodes), "all nodes answer", START_S)
        for node in nodes:
            self.learn_id(node)

    def join(self, node: Node, **options: Any) -> None:
        node.start(*self.join_flags, workload=self.workload, **options)

    def restart(self, node: Node, **options: Any) -> None:
        """Starts a node on the directory that it had; it goes on with its run."""
        node.start(workload=self.workload, **options)

    def learn_id(self, node: Node) -> None:
        status = node.status()
        assert status is not None
        node.peer_id = status["peer_id"]

    # Waiting

    def wait(
        self, condition: Callable[[], Any], what: str, timeout_s: float = 60.0, poll_s: float = POLL_S
    ) -> Any:
        """The first true value of `condition`; fails when there is none in time."""
        until = time.monotonic() + timeout_s
        while not (value := condition()):
            if time.monotonic() > until:
                raise AssertionError(f"not in {timeout_s:.0f} s: {what}\n" + self.said())
            time.sleep(poll_s)
        return value

    def said(self) -> str:
        return "\n".join(node.said() for node in self.nodes)

    def version(self, node: Node) -> int:
        return int((node.status() or {}).get("version", -1))

    def wait_version(
        self, version: int, nodes: Sequence[Node] | None = None, timeout_s: float = 60.0
    ) -> None:
        """Until each of these nodes (all that run) has at least this version certified."""
        chosen = [node for node in nodes or self.nodes if node.runs]
        self.wait(
            lambda: all(self.version(node) >= version for node in chosen),
            f"version {version} on {', '.join(node.name for node in chosen)}",
            timeout_s,
        )

    def coordinator(self, timeout_s: float = 30.0) -> Node:
        """The node that says it coordinates."""

        def found() -> Node | None:
            for node in self.nodes:
                if node.runs and (node.status() or {}).get("role") == "coordinator":
                    return node
            return None

        node: Node = self.wait(found, "somebody coordinates", timeout_s)
        return node

    def node_of(self, peer_id: str) -> Node:
        return next(node for node in self.nodes if node.peer_id == peer_id)

    # What was certified

    def commits(self) -> dict[int, Event]:
        """The certified versions as the nodes tell them: of each version the first that was told. Fails when two nodes were
        told different things, or when versions went back on a node. (One that was killed before a certificate was on its disk
        is told of it again in its next life.)"""
        found: dict[int, Event] = {}
        for node in self.nodes:
            newest, life = 0, 0
            for event in node.events("commit"):
                before = life
                life = sum(started <= at(event) for started in node.started)
                if life == before:
                    assert event["version"] > newest, (
                        f"{node.name} was told {event['version']} after {newest}"
                    )
                newest = event["version"]
                told = found.setdefault(newest, event)
                same = ("term", "coordinator", "loss", "contributors")
                assert all(told[name] == event[name] for name in same), (told, event)
                if at(event) < at(told):
                    found[newest] = event
        return found

    def next_commit(self, after: float, timeout_s: float = 60.0, version: int = 0) -> Event:
        """The first certificate of a version that no node had at this moment (and of at least `version`)."""

        def found() -> Event | None:
            commits = self.commits()
            had = max((number for number, event in commits.items() if at(event) <= after), default=0)
            later = [event for number, event in commits.items() if number > max(had, version - 1)]
            return min(later, key=at, default=None)

        event: Event = self.wait(
            found, f"another certificate than {max(self.commits(), default=0)}", timeout_s
        )
        return event

    def commit_at(self, version: int) -> float:
        """When the first node learned of this version's certificate."""
        return at(self.commits()[version])

    def wait_contribution(self, node: Node, after: float, timeout_s: float = 60.0) -> Event:
        """Until a version certified after this moment has a contribution of this node."""

        def found() -> Event | None:
            for event in self.commits().values():
                if at(event) > after and node.peer_id in event["contributors"]:
                    return event
            return None

        event: Event = self.wait(found, f"{node.name} contributes", timeout_s)
        return event

    def check(self) -> None:
        """What is demanded of every run: nodes agree, nothing goes back, nothing is trained or counted twice, and the model
        holds exactly what its records say."""
        commits = self.commits()
        counted: dict[tuple[int, int], tuple[int, str]] = {}
        states: dict[int, bytes] = {}
        rounds: dict[int, Round] = {}
        models = self.models()  # before the logs, which go on and are never behind
        for node in self.nodes:
            if not (node.directory / "log").exists():
                continue
            twice = {slot: times for slot, times in node.slots().items() if times > 1}
            assert not twice, f"{node.name} trained {twice} more than once"
            trained = Counter((event["version"], event["assignment"]) for event in node.events("trained"))
            # Who was killed before its slot was written may have to do it again, once in each life.
            assert max(trained.values(), default=0) <= len(node.started), (
                f"{node.name} trained twice: {trained}"
            )
            bodies = node.rounds()
            # A log that was compacted holds the bodies of the last rounds only.
            before = bodies[0].version - 1 if bodies and node.events("compacted") else 0
            for body in bodies:
                assert body.version == before + 1, f"{node.name} has version {body.version} after {before}"
                before = body.version
                assert states.setdefault(body.version, body.state) == body.state, body.version
                for one in body.contributors:
                    slot = one.origin_round, one.assignment
                    claim = body.version, one.contributor
                    assert counted.setdefault(slot, claim) == claim, f"{slot} counts in two versions"
                if body.version in commits:
                    told = commits[body.version]["contributors"]
                    assert set(told) == {one.contributor for one in body.contributors}, body.version
            rounds |= {body.version: body for body in bodies}
        for node, (version, values) in models.items():
            self.check_model(node, version, values, rounds)

    def models(self) -> dict[Node, tuple[int, np.ndarray]]:
        """The version and the parameters of each node's census, where it has come so far."""
        found = {}
        for node in self.nodes if self.workload == CENSUS else ():
            with suppress(FileNotFoundError):
                found[node] = node.model()
        return found

    def check_model(self, node: Node, version: int, values: np.ndarray, rounds: Mapping[int, Round]) -> None:
        """The model of the census has in each member's parameter the sum of its weights in all `rounds`, and nothing else."""
        indices = {other.peer_id: other.index for other in self.nodes}
        gone = [number for number in range(1, version + 1) if number not in rounds]
        assert not gone, f"to check version {version} of {node.name}, no log holds what went into {gone}"
        expected = np.zeros_like(values)
        for number in range(1, version + 1):
            for one in rounds[number].contributors:
                expected[indices[one.contributor]] += np.float32(one.weight)
        assert np.allclose(values, expected, atol=1e-4 * max(version, 1)), (
            f"version {version} of {node.name} holds {values[: len(self.nodes) + 1]}, "
            f"its records say {expected[: len(self.nodes) + 1]}"
        )

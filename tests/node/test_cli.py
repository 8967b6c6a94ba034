"""The command line: quick to answer, every mistake one message with its exit code, and no traceback of ours."""

from __future__ import annotations

import fcntl
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
import trio
from click.testing import CliRunner, Result

from node import cli as cli_module
from node.cli import cli
from node.flags import FoundersFlags
from node.network.hello import SECRET_BYTES, JoinToken
from node.reporting.events import EventLog
from node.reporting.status_socket import serve_status
from node.start import NodeOptions
from node.storage.store import StorageError, Store
from p2pcoord.errors import UserError
from simulations import sweep
from simulations.report import Report
from tests.node.storage.model_files import write_model
from tests.node.storage.signed_run import SignedRun

ROOT = Path(__file__).parents[2]
TOKEN = JoinToken(bytes(SECRET_BYTES), bytes(32), 3, bytes(32)).text()
COMMANDS = sorted(cli.commands)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def command(*arguments: object, limit_s: float = 60) -> subprocess.CompletedProcess[str]:
    """The real thing, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "node.cli", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return SignedRun().complete().write(tmp_path / "data", states=(0, 1))


@contextmanager
def serving(directory: Path, document: dict[str, Any]) -> Iterator[None]:
    """A node's local socket, in a thread."""
    scopes: list[tuple[trio.lowlevel.TrioToken, trio.CancelScope]] = []
    ready = threading.Event()

    async def serve() -> None:
        with trio.CancelScope() as scope:
            scopes.append((trio.lowlevel.current_trio_token(), scope))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve_status, directory, lambda: document)
                while not (directory / "status.sock").exists():  # noqa: ASYNC110
                    await trio.sleep(0.005)
                ready.set()

    thread = threading.Thread(target=trio.run, args=(serve,))
    thread.start()
    assert ready.wait(10)
    try:
        yield
    finally:
        token, scope = scopes[0]
        token.run_sync_soon(scope.cancel)
        thread.join()


# Help ----------------------------------------------------------------------------------------------------------------


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from node.cli import cli\n"
        "try: cli(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    told = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    loaded = set(re.findall(r"'([^']+)'", told.splitlines()[-1]))
    heavy = {
        "trio",
        "rich",
        "cbor2",
        "msgspec",
        "structlog",
        "numpy",
        "torch",
        "libp2p",
        "nacl",
        "asyncio",
        "simulations",
    }
    assert not loaded & heavy


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_its_flags_are_documented(name: str) -> None:
    assert run(name, "--help").exit_code == 0
    page = (ROOT / "docs/commands.md").read_text()
    assert f"## p2pcoord {name}" in page
    section = page.partition(f"## p2pcoord {name}")[2].partition("\n## ")[0]
    flags = [
        flag
        for option in cli.commands[name].params
        if isinstance(option, click.Option)
        for flag in option.opts
    ]
    assert [flag for flag in flags if flag not in section] == []
    assert set(re.findall(r"\| `(--[a-z-]+)", section)) <= set(flags)


def test_the_commands_are_those_promised() -> None:
    assert COMMANDS == ["cluster", "events", "export", "node", "simulate", "status", "verify"]


# Usage ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nonsense"], "No such command"),
        (["node", "--set", "a"], "'a' is not KEY=VALUE"),
        (["node", "--set", "a=1", "--set", "a=2"], "a is set twice"),
        (["node", "--device", "tpu"], "'tpu' is none of auto, cpu, cuda, cuda:N, mps"),
        (["node", "--device", "cpu:1"], "is none of"),
        (["node", "--rounds", "0"], "Invalid value for '--rounds'"),
        (["status", "--peer", "a:1", "--data-dir", "x"], "give one of them"),
        (["status", "--secret", "s"], "--secret is for --peer"),
        (["simulate", "--seed", "1", "--seeds", "1..2"], "give one of them"),
        (["simulate", "--faults", "rain"], "Invalid value for '--faults'"),
        (["cluster", "--bootstrap", "a:1", "--rounds", "3"], "--rounds is the founder's"),
        (["verify"], "Missing argument 'DIR'"),
        (
            ["status", "--peer", "nonsense"],
            "--peer nonsense: 'nonsense' is neither host:port nor a multiaddr",
        ),
        (["--nonsense"], "No such option"),
        (["simulate", "--faults", "some"], "'some' is not one of"),
    ],
)
def test_a_command_line_that_cannot_be_meant_is_usage(arguments: list[str], told: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert told in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("text", ["x", "5..1", "1..y"])
def test_seeds_that_are_none_are_usage(text: str) -> None:
    result = run("simulate", "--seeds", text)
    assert (result.exit_code, result.stderr) == (2, f"error: seeds are a number or A..B, not {text!r}\n")


# Mistakes and bugs ---------------------------------------------------------------------------------------------------


def node_that_raises(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> Result:
    import node.process

    async def run_node(*_: object, **__: object) -> None:
        await trio.lowlevel.checkpoint()
        raise error

    monkeypatch.setattr(node.process, "run_node", run_node)
    return run("node")


@pytest.mark.parametrize("code", [1, 2])
def test_a_users_mistake_is_one_message_with_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    mistake = UserError("--workload x: no such file", exit_code=code)
    for error in (
        mistake,
        ExceptionGroup("tasks", [ExceptionGroup("inner", [mistake]), RuntimeError("ended by it")]),
    ):
        result = node_that_raises(monkeypatch, error)
        assert result.exit_code == code
        assert result.stderr == "error: --workload x: no such file\n"


def test_a_disk_that_refuses_is_told_without_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    result = node_that_raises(monkeypatch, StorageError("writing the log failed: No space left on device"))
    assert (result.exit_code, result.stderr) == (
        1,
        "error: writing the log failed: No space left on device\n",
    )


def test_a_bug_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    result = node_that_raises(monkeypatch, RuntimeError("impossible"))
    assert isinstance(result.exception, RuntimeError)


def test_the_nodes_flags_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    import node.process

    seen: list[Any] = []

    async def run_node(options: Any, *, tell: Any) -> None:
        await trio.lowlevel.checkpoint()
        seen.append(options)
        tell("peer 12D3")

    monkeypatch.setattr(node.process, "run_node", run_node)
    result = run(
        "node", "--bootstrap", "a:1", "--bootstrap", "b:2", "--secret", "s", "--workload", "f.py:X", "--config", "run.toml",
        "--set", "path=/a=b", "--listen", "/ip4/0.0.0.0/tcp/1", "--announce", "c:3", "--data-dir", "d", "--name", "n",
        "--device", "cuda:1", "--rounds", "7", "--init", "i.safetensors", "--open",
    )  # fmt: skip
    assert result.exit_code == 0
    assert result.stdout == "peer 12D3\n"
    (options,) = seen
    assert options == NodeOptions(
        data_dir=Path("d"), bootstrap=("a:1", "b:2"), secret="s", workload="f.py:X",
        local={"path": "/a=b"}, listen=("/ip4/0.0.0.0/tcp/1",), announce=("c:3",), name="n", device="cuda:1",
        founders=FoundersFlags(config=Path("run.toml"), rounds=7, init=Path("i.safetensors"), open=True),
    )  # fmt: skip
    run("node")
    assert seen[1] == NodeOptions(data_dir=Path("./p2pcoord-data"))


def test_a_cluster_hands_the_founders_flags_to_the_node_that_founds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import node.cluster

    seen: list[tuple[str, ...]] = []

    async def run_cluster(options: Any, **_: Any) -> int:
        await trio.lowlevel.checkpoint()
        seen.append(options.founding)
        return 0

    monkeypatch.setattr(node.cluster, "run_cluster", run_cluster)
    run("cluster", "--data-dir", tmp_path, "--config", "True", "--open", "--minimum-members", "3")
    run("cluster", "--data-dir", tmp_path, "--nodes", "2")
    (tmp_path / "node1").mkdir()
    (tmp_path / "node1" / "log").touch()
    run("cluster", "--data-dir", tmp_path, "--nodes", "2")
    assert seen == [
        ("--config", "True", "--minimum-members", "3", "--open"),
        ("--minimum-members", "2"),
        (),  # a run that is there has its own
    ]


def test_a_screen_that_is_gone_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(line: str) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(click, "echo", broken)
    cli_module._tell("round 1")


# verify, events, export, status --------------------------------------------------------------------------------------


def test_verify_tells_what_it_checked_and_exits_0(directory: Path) -> None:
    result = run("verify", directory)
    assert result.exit_code == 0, result.output
    assert "certified up to height 5 by 5 certificates" in result.stdout
    assert result.stdout.endswith("all is well\n")
    report = json.loads(run("verify", directory, "--json").stdout)
    assert (report["ok"], report["version"], report["problems"]) == (True, 1, [])


def test_verify_exits_1_and_names_the_fault(directory: Path) -> None:
    log = directory / "log"
    data = bytearray(log.read_bytes())
    data[70] ^= 1
    log.write_bytes(data)
    result = run("verify", directory)
    assert result.exit_code == 1
    assert "WRONG       byte 0 of the log: one of a frame's two copies is damaged" in result.stdout
    report = json.loads(run("verify", directory, "--json").stdout)
    assert report["ok"] is False
    assert len(report["problems"]) == 1


def test_events_are_printed_as_lines_of_json(directory: Path) -> None:
    log = EventLog(directory)
    for n in range(3):
        log.write("phase", {"n": n, "root": b"\x01"})
    result = run("events", "--data-dir", directory)
    assert result.exit_code == 0
    assert [json.loads(line)["n"] for line in result.stdout.splitlines()] == [0, 1, 2]


def test_following_events_ends_well_with_ctrl_c(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    EventLog(directory).write("phase", {"n": 1})

    def interrupt() -> None:
        raise KeyboardInterrupt

    import node.reporting.events

    monkeypatch.setattr(node.reporting.events.follow_events, "__kwdefaults__", {"wait": interrupt})
    result = run("events", "--data-dir", directory, "--follow")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["n"] == 1


def test_export_copies_the_newest_model_and_says_its_version(directory: Path, tmp_path: Path) -> None:
    target = tmp_path / "model.safetensors"
    signed = SignedRun()
    result = run("export", signed.write(tmp_path / "young"), target)
    assert result.exit_code == 1
    assert "has no certified model yet" in result.stderr
    result = run("export", directory, target)
    assert result.exit_code == 1
    assert "latest.safetensors is missing, of version 1. Start the node" in result.stderr
    assert not target.exists()
    latest = write_model(directory, 7, "ab")
    model = latest.read_bytes()
    target.write_bytes(b"older")
    result = run("export", directory, target)
    assert (result.exit_code, result.stdout) == (0, f"{target}: version 7\n")
    assert target.read_bytes() == model
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert run("export", directory, tmp_path / "model.bin").exit_code == 2
    gone = run("export", directory, tmp_path / "nowhere" / "m.safetensors")
    assert gone.exit_code == 1
    assert "cannot write" in gone.stderr
    latest.write_bytes(model + b"x")
    damaged = run("export", directory, target)
    assert damaged.exit_code == 1
    assert f"error: {latest} is damaged" in damaged.stderr
    assert target.read_bytes() == model


def test_status_is_shown_and_given_as_json(directory: Path) -> None:
    document = {
        "schema": 1,
        "name": "lab1",
        "version": 4,
        "rounds": 9,
        "role": "voter",
        "term": 2,
        "quorum": {"held": True},
    }
    EventLog(directory).write("failed", {"peer": "12D3KooWxyz"})
    with serving(directory, document):
        shown = run("status", "--data-dir", directory)
        assert shown.exit_code == 0, shown.output
        assert "version 4 of 9" in shown.stdout
        assert "12D3KooWxyz is gone" in shown.stdout
        assert json.loads(run("status", "--data-dir", directory, "--json").stdout) == document


def test_status_says_plainly_that_nobody_answers(directory: Path, tmp_path: Path) -> None:
    (directory / "lock").write_text("")
    for flags in ([], ["--json"], ["--watch"]):
        result = run("status", "--data-dir", directory, *flags)
        assert result.exit_code == 1
        assert result.stderr.startswith(f"error: no node answers in {directory}: none is running there")
    for name in ("status", "events"):
        assert "no node has run there" in run(name, "--data-dir", tmp_path / "nowhere").stderr


def test_status_of_a_peer_is_asked_over_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import node.reporting.remote_status

    async def ask(address: str, secret: str | None) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        return {"schema": 1, "name": f"{address} {secret}"}

    monkeypatch.setattr(node.reporting.remote_status, "ask", ask)
    result = run("status", "--peer", "lab1:4001", "--secret", "s", "--json")
    assert json.loads(result.stdout)["name"] == "lab1:4001 s"


# simulate ------------------------------------------------------------------------------------------------------------


def test_simulate_ends_with_its_figures_in_json() -> None:
    result = run("simulate", "--peers", 3, "--seed", 5, "--faults", "none", "--rounds", 2, "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout.splitlines()[-1])
    assert summary["violations"] == 0
    assert summary["committed_version"] >= 2
    assert set(summary) >= {
        "trace_sha256",
        "events",
        "violations",
        "committed_version",
        "virtual_s",
        "wall_s",
    }
    again = run("simulate", "--peers", 3, "--seeds", "5..5", "--faults", "none", "--rounds", 2, "--json")
    assert json.loads(again.stdout.splitlines()[-1])["trace_sha256"] == summary["trace_sha256"]


def test_simulate_shows_tables_only_when_asked_to() -> None:
    flags = ("--peers", 1, "--seed", 5, "--faults", "none", "--rounds", 1)
    plain = run("simulate", *flags).stdout.splitlines()
    assert plain[0].startswith("1 seed, ")
    assert len(plain) == 2
    assert "message lost" in run("simulate", *flags, "--coverage").stdout


@pytest.mark.parametrize("terminal", [False, True])
def test_simulate_counts_seeds_on_a_terminal_and_tells_how_to_run_a_violation_again(
    monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    real = sweep.run_seed
    monkeypatch.setattr(cli_module, "_on_terminal", lambda: terminal)
    monkeypatch.setattr(sweep.os, "cpu_count", lambda: 1)

    def bad_second(seed: int, **settings: Any) -> Report:
        report = real(seed, **settings)
        return msgspec.structs.replace(report, violations=("liveness at 1.000 s: none",) if seed == 2 else ())

    monkeypatch.setattr(sweep, "run_seed", bad_second)
    flags = ("--peers", "1..2", "--seeds", "1..3", "--faults", "none", "--rounds", 1)
    result = run("simulate", *flags)
    assert result.exit_code == 1
    assert result.stdout.startswith(
        "seed 2: liveness at 1.000 s: none\n"
        "again: p2pcoord simulate --peers 1..2 --faults none --rounds 1 --seed 2\n"
    )
    assert ("2 of 3 seeds, 1 violation" in result.stderr) == terminal
    assert run("simulate", *flags, "--json").stderr == ""


def test_simulate_shows_what_the_seeds_hit_and_missed() -> None:
    result = run("simulate", "--peers", 3, "--seed", 5, "--rounds", 2, "--coverage")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("1 seed, ")
    assert any(line.split()[0:1] == ["local_training"] for line in lines)
    assert any(line.split()[0:1] == ["offer"] for line in lines)
    assert lines[-1].startswith("empty cells: ")


def test_simulate_plays_a_scenario_file_and_no_other_figures(tmp_path: Path) -> None:
    from simulations import scenarios

    file = Path(scenarios.__path__[0], "calm.toml")
    result = run("simulate", "--scenario", file, "--json")
    assert json.loads(result.stdout.splitlines()[-1])["violations"] == 0
    refused = run("simulate", "--scenario", file, "--rounds", 3)
    assert refused.exit_code == 2
    assert "--rounds is the scenario's" in refused.output


def test_a_violation_is_printed_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from simulations import sweep
    from simulations.report import Coverage, Report, summary_of

    def simulate(*, progress: Any, seeds: range, **_: object) -> Any:
        report = Report(seeds[0], "ab", 10, ("one vote a term at 1.000 s: m1",), 3, 2, 1.0, 0.1, Coverage())
        progress(report)
        return summary_of([report], 0.1)

    monkeypatch.setattr(sweep, "simulate", simulate)
    result = run("simulate", "--seed", 7)
    assert result.exit_code == 1
    assert result.stdout.startswith("seed 7: one vote a term at 1.000 s: m1\n")


# Real processes ------------------------------------------------------------------------------------------------------


def test_real_commands_fail_in_words(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with Store.open(tmp_path / "used"):
        pass
    lock = (tmp_path / "used" / "lock").open("r+")
    fcntl.flock(lock, fcntl.LOCK_EX)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        local = ("--listen", "/ip4/127.0.0.1/tcp/0")
        cases: list[tuple[list[object], int, str]] = [
            (["status", "--data-dir", tmp_path / "none"], 1, "no node has run there"),
            (["verify", tmp_path / "other"], 1, "is not a p2pcoord data directory"),
            (["node", "--data-dir", tmp_path / "other"], 1, "is not a p2pcoord data directory"),
            (["node", "--data-dir", tmp_path / "used"], 1, "is in use by process"),
            (
                ["node", "--data-dir", tmp_path / "a", "--secret", "x", "--bootstrap", "a:1"],
                2,
                "copy the whole line again",
            ),
            (
                ["node", "--data-dir", tmp_path / "c", *local, "--secret", TOKEN],
                2,
                "--secret goes with --bootstrap",
            ),
            # what a start that failed has left behind is no run
            (
                ["node", "--data-dir", tmp_path / "c", *local, "--secret", TOKEN],
                2,
                "--secret goes with --bootstrap",
            ),
            (["node", "--data-dir", tmp_path / "b", "--listen", f"/ip4/127.0.0.1/tcp/{port}"], 1, str(port)),
        ]
        for arguments, code, told in cases:
            done = command(*arguments)
            assert done.returncode == code, (arguments, done.stdout, done.stderr)
            assert told in done.stderr
            assert done.stderr.startswith("error: ")
            assert "Traceback" not in done.stderr
    lock.close()


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        (["--bootstrap", "127.0.0.1:1"], 1, "no node answers at 127.0.0.1:1"),
        (["--bootstrap", "not an address"], 2, "--bootstrap not an address"),
        (["--workload", "missing.py:Name"], 2, "there is no file missing.py"),
    ],
)
def test_a_real_node_that_cannot_begin_says_why(
    tmp_path: Path, flags: list[str], code: int, told: str
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = command("node", "--data-dir", tmp_path / "a", "--listen", f"/ip4/127.0.0.1/tcp/{port}", *flags)
    assert done.returncode == code, done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_node_that_is_told_to_stop_before_it_has_begun_ends_well(number: signal.Signals) -> None:
    script = (
        "import os, sys, time\n"
        "from node import cli\n"
        f"cli.cli = lambda **_: (os.kill(os.getpid(), {int(number)}), time.sleep(30))\n"
        "sys.argv = ['p2pcoord', 'node']\n"
        "cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "leaving\n", "")

"""The cluster: starts nodes as people do, watches over its own processes, and leaves none behind.

A node here is a small script that takes the flags of `p2pcoord node`, answers for its status and tells rounds, so that a test
takes a second and not a minute.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
from rich.console import Console

from node import cluster
from node.cluster import ClusterOptions, run_cluster
from p2pcoord.errors import UserError

SCRIPT = """
import json, os, signal, sys, time
import trio
from pathlib import Path
from node.storage.directory import FORMAT
from node.reporting.status_socket import serve_status

flags = sys.argv[1:]
at = lambda flag: flags[flags.index(flag) + 1] if flag in flags else None
directory, name = Path(at("--data-dir")), at("--name")
directory.mkdir(parents=True, exist_ok=True)
(directory / "format").write_bytes(FORMAT)
(directory / "flags.json").write_text(json.dumps({"flags": flags, "pid": os.getpid(), "omp": os.environ.get("OMP_NUM_THREADS"),
                                                   "session": os.getsid(0)}))
mode = at("--workload") or ""
port = (at("--listen") or "").rpartition("/")[2]
if mode == "bad":
    print("error: --workload bad: no such thing", flush=True)
    sys.exit(2)
version = 0
def document():
    return {"schema": 1, "peer_id": "12D3KooW" + name * 9, "version": version, "rounds": 3, "role": "voter",
            "join_line": f"p2pcoord node --bootstrap 127.0.0.1:{port} --secret S --workload other.py:X",
            "metrics": {"loss": 3 - version, "measures": {"accuracy": 0.5}}, "quorum": {"held": True}}
async def main():
    global version
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_status, directory, document)
        if mode == "stubborn":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if mode in ("stubborn", "endless"):
            await trio.sleep_forever()
        if mode == "dies" and name.endswith("2"):
            for event in ({"event": "following", "coordinator": "12D3Koo" + "x" * 45, "term": 4},
                          {"event": "training-failed", "reason": "no\\nmemory"},
                          {"event": "trainer", "text": "batch 7\\n  batch 8"}):
                print(json.dumps(event), flush=True)
            print("out of memory", flush=True)
            os._exit(3)
        while not all((directory.parent / ("node%d" % n) / "flags.json").exists() for n in (1, 2)):
            await trio.sleep(0.01)
        for version in (1, 2, 3):
            print(json.dumps({"event": "commit", "version": version, "loss": 3 - version, "measures": {"accuracy": 0.5},
                              "contributors": ["12D3KooW" + "x" * 40], "seconds": 0.1, "coordinator": "c"}), flush=True)
            await trio.sleep(0.25)
        await trio.sleep(0.3)
        model = directory / "model"
        model.mkdir(exist_ok=True)
        (model / "latest.safetensors").touch()
        nursery.cancel_scope.cancel()
trio.run(main)
"""


@pytest.fixture
def command(tmp_path: Path) -> tuple[str, ...]:
    script = tmp_path / "node_script.py"
    script.write_text(SCRIPT)
    return (sys.executable, str(script))


class Ran:
    def __init__(self) -> None:
        self.told: list[str] = []
        self.code = -1

    async def cluster(
        self, command: tuple[str, ...], base: Path, *, terminal: bool = False, **fields: Any
    ) -> None:
        self.console = Console(file=io.StringIO(), force_terminal=terminal, width=140)
        options = ClusterOptions(**{"nodes": 2, "base": base} | fields)
        self.code = await run_cluster(options, tell=self.told.append, console=self.console, command=command)


def started(base: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(base.glob("node*/flags.json"))]


def is_gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.trio
async def test_the_first_founds_its_line_starts_the_others_and_all_end_by_themselves(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    ran = Ran()
    with trio.fail_after(30):
        await ran.cluster(command, tmp_path / "base", shared=("--device", "cpu"), founding=("--rounds", "3"))
    assert ran.code == 0, ran.told
    first, second = started(tmp_path / "base")
    assert first["flags"][-4:] == ["--device", "cpu", "--rounds", "3"]
    port = first["flags"][first["flags"].index("--listen") + 1].rpartition("/")[2]
    assert second["flags"][-4:] == ["--bootstrap", f"127.0.0.1:{port}", "--secret", "S"]
    assert first["omp"] == second["omp"] == "1"
    assert [line for line in ran.told if line.startswith("round")] == [
        f"round {v}  loss {3 - v}  accuracy 0.5  contributors xxxxxxxx  0.1 s  coordinator c"
        for v in (1, 2, 3)
    ]
    assert ran.told[-2:] == [
        "2 nodes: version 3  loss 0  accuracy 0.5",
        f"the model lies in {tmp_path / 'base' / 'node1' / 'model' / 'latest.safetensors'}",
    ]
    assert all(is_gone(node["pid"]) for node in (first, second))
    assert first["session"] != os.getsid(0)  # a terminal's Ctrl-C reaches the nodes once, through us


@pytest.mark.trio
async def test_ports_stay_the_same_at_the_next_start_and_a_finished_run_ends_at_once(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with trio.fail_after(30):
        await Ran().cluster(command, tmp_path / "base")
    before = [node["flags"][:4] for node in started(tmp_path / "base")]
    monkeypatch.setattr(cluster, "is_over", lambda document: True)
    ran = Ran()
    with trio.fail_after(30):
        await ran.cluster(command, tmp_path / "base")
    assert [node["flags"][:4] for node in started(tmp_path / "base")] == before
    assert any("is over. For a new one use another --data-dir" in line for line in ran.told)


@pytest.mark.trio
async def test_a_node_that_dies_is_told_with_its_last_words_and_the_others_go_on(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    ran = Ran()
    with trio.fail_after(30):
        await ran.cluster(command, tmp_path / "base", shared=("--workload", "dies"))
    assert ran.code == 1
    (died,) = [line for line in ran.told if line.startswith("node2 ended")]
    assert died.splitlines() == [
        "node2 ended with exit code 3; it said:",
        "xxxxxxxx coordinates term 4",
        "training failed here: no?memory",
        "trainer: batch 7",
        "trainer:   batch 8",
        "out of memory",
    ]
    assert "did not end well: node2" in ran.told
    assert any(line.startswith("round 3") for line in ran.told)


@pytest.mark.trio
async def test_a_founder_that_cannot_begin_fails_the_cluster_with_its_own_error(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    ran = Ran()
    with trio.fail_after(30), pytest.raises(ExceptionGroup) as caught:
        await ran.cluster(command, tmp_path / "base", shared=("--workload", "bad"))
    error: BaseException = caught.value
    while isinstance(error, BaseExceptionGroup):
        (error,) = error.exceptions
    assert isinstance(error, UserError)
    assert str(error) == "--workload bad: no such thing"
    assert error.exit_code == 2
    assert ran.told == []
    assert len(started(tmp_path / "base")) == 1


@pytest.mark.trio
@pytest.mark.parametrize(("mode", "signals"), [("endless", 1), ("stubborn", 1), ("stubborn", 2)])
async def test_ctrl_c_ends_all_nodes_also_those_that_do_not_listen(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, signals: int
) -> None:
    monkeypatch.setattr(cluster, "KILL_AFTER_S", 1.0 if signals == 1 else 60.0)
    ran = Ran()
    base = tmp_path / "base"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: ran.cluster(command, base, nodes=3, shared=("--workload", mode)))
        with trio.fail_after(30):
            while len(started(base)) < 3:  # noqa: ASYNC110
                await trio.sleep(0.05)
            await trio.sleep(0.5)
            for _ in range(signals):
                signal.raise_signal(signal.SIGINT)
                await trio.sleep(0.3)
    assert ran.code == 1
    assert "ending all nodes" in ran.told
    assert all(is_gone(node["pid"]) for node in started(base))


@pytest.mark.trio
async def test_cancelling_leaves_no_process_behind(command: tuple[str, ...], tmp_path: Path) -> None:
    base = tmp_path / "base"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: Ran().cluster(command, base, shared=("--workload", "endless")))
        with trio.fail_after(30):
            while len(started(base)) < 2:  # noqa: ASYNC110
                await trio.sleep(0.05)
        await trio.sleep(0.3)
        nursery.cancel_scope.cancel()
    assert all(is_gone(node["pid"]) for node in started(base))


@pytest.mark.trio
async def test_a_terminal_shows_a_live_table(command: tuple[str, ...], tmp_path: Path) -> None:
    ran = Ran()
    with trio.fail_after(30):
        await ran.cluster(command, tmp_path / "base", terminal=True)
    assert isinstance(ran.console.file, io.StringIO)
    shown = ran.console.file.getvalue()
    assert all(word in shown for word in ("node1", "node2", "voter", "quorum", "round 3"))
    assert not any(line.startswith("round") for line in ran.told)


@pytest.mark.trio
async def test_with_bootstrap_nobody_founds(command: tuple[str, ...], tmp_path: Path) -> None:
    ran = Ran()
    with trio.fail_after(30):
        await ran.cluster(command, tmp_path / "base", bootstrap=("lab1:4001",), secret="S")
    assert ran.code == 0
    for node in started(tmp_path / "base"):
        assert node["flags"][-4:] == ["--bootstrap", "lab1:4001", "--secret", "S"]


@pytest.mark.trio
async def test_without_bootstrap_the_secret_is_the_first_nodes_to_judge(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    """It goes on with the run in its directory, or refuses to found one."""
    ran = Ran()
    with trio.fail_after(30):
        await ran.cluster(command, tmp_path / "base", secret="S")
    first, *_ = started(tmp_path / "base")
    assert first["flags"][-2:] == ["--secret", "S"]


@pytest.mark.trio
async def test_what_cannot_be_a_cluster_is_refused(tmp_path: Path) -> None:
    for nodes in (0, 65):
        with pytest.raises(UserError, match="--nodes: 1 to 64"):
            await Ran().cluster(("true",), tmp_path / "base", nodes=nodes)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot use"):
        await Ran().cluster(("true",), tmp_path / "file")


@pytest.mark.parametrize(("version", "told"), [(0, ", untrained: it is version 0"), (2, "")])
def test_a_model_that_nobody_trained_is_called_so(tmp_path: Path, version: int, told: str) -> None:
    lines: list[str] = []
    ended = cluster._Cluster(ClusterOptions(nodes=1, base=tmp_path), lines.append, Console(), ())
    ended.nodes[0].status = {"version": version}
    model = ended.nodes[0].directory / cluster.MODEL_FILE
    model.parent.mkdir(parents=True)
    model.touch()
    ended._result()
    assert lines == [f"the model lies in {model}{told}"]


def test_a_users_own_thread_count_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert cluster._environment(4)["OMP_NUM_THREADS"] == "7"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert cluster._environment(4)["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in cluster._environment(1)

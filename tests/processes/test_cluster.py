"""`p2pcoord cluster` with real nodes: one is killed, the others go on."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.processes.network import CENSUS, run_file

ROUNDS_S = 60.0


def version(directory: Path) -> int:
    """The newest version that a node has told, 0 when none."""
    events = directory / "events.jsonl"
    lines = events.read_text().splitlines() if events.exists() else []
    told = [json.loads(line) for line in lines if '"commit"' in line]
    return max((int(event["version"]) for event in told), default=0)


def until_version(directory: Path, wanted: int) -> None:
    give_up = time.monotonic() + ROUNDS_S
    while version(directory) < wanted:
        assert time.monotonic() < give_up, (
            f"{directory.name} is at version {version(directory)}, not {wanted}"
        )
        time.sleep(0.1)


@pytest.mark.slow
def test_a_cluster_goes_on_when_one_of_its_nodes_is_killed(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(run_file(pause_s=0.1).replace("minimum_members = 1", ""))
    base = tmp_path / "base"
    command = [sys.executable, "-P", "-m", "node.cli", "cluster", "--nodes", "3", "--data-dir", str(base)]
    command += ["--workload", CENSUS, "--config", str(config), "--minimum-members", "3", "--set", "index=0"]
    with (tmp_path / "out").open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out) as cluster:
        try:
            until_version(base / "node1", 3)
            nodes = [
                child
                for child in psutil.Process(cluster.pid).children()
                if str(base / "node3") in child.cmdline()
            ]
            assert len(nodes) == 1
            nodes[0].kill()
            killed_at = version(base / "node1")
            until_version(base / "node1", killed_at + 5)
        finally:
            cluster.send_signal(signal.SIGINT)
            try:
                cluster.wait(20.0)
            except subprocess.TimeoutExpired:
                cluster.kill()
    assert "node3 ended" in (tmp_path / "out").read_text()


@pytest.mark.slow
def test_a_cluster_on_the_directories_of_a_finished_run_says_so_and_ends_well(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "node.cli", "cluster", "--nodes", "2", "--workload", CENSUS]
    command += ["--set", "index=0", "--data-dir", str(tmp_path / "base")]
    told = []
    for flags in (["--rounds", "3"], []):
        done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        told.append(done.stdout.splitlines())
    first, again = told
    assert again[0].startswith(f"the run in {tmp_path / 'base'} is over.")
    assert first[-2].startswith("2 nodes: version 3  loss ")
    assert again[-2] == first[-2]
    assert again[-1].startswith("the model lies in ")

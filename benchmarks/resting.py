"""What a node costs that has nothing to do: python -m benchmarks.resting [--nodes 5] [--seconds 20]

The nodes run one each in a network namespace (root and iproute2 are needed), so that what they send is counted where it
leaves them, with all headers. Two ways of resting are measured:

    over       the run is over, and its nodes were started again to serve the result
    waiting    more members are needed than there are

Printed for each: CPU of the node process and of its trainer in percent of a core, their resident memory, bytes a second that
a node sends, and the same for each of its peers. The load of the machine stands beside it: other work makes a node's CPU
time no longer but less even.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psutil

from tests.namespaces.hosts import Host, missing, network
from tests.namespaces.running_node import RunningNode, running
from tests.namespaces.runs import found_and_join, run_file, until_all

SETTLE_S = 5.0
START_S = 120.0


class Cost(msgspec.Struct, frozen=True):
    """Of one node, over the time that was measured."""

    node_cpu_percent: float
    trainer_cpu_percent: float
    node_rss_mib: float
    trainer_rss_mib: float
    sent_bytes_s: float


class _Before(msgspec.Struct):
    node: psutil.Process
    trainers: list[psutil.Process]
    cpu_s: tuple[float, float]
    sent: int


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def measure(nodes: list[RunningNode], hosts: list[Host], seconds: float) -> list[Cost]:
    """What each of the nodes costs from now on, over so many seconds."""
    before = []
    for node, host in zip(nodes, hosts, strict=True):
        process = psutil.Process(node.pid)
        trainers = process.children(recursive=True)
        cpu = (_cpu_s(process), sum(map(_cpu_s, trainers)))
        before.append(_Before(process, trainers, cpu, host.traffic()[1]))
    began = time.monotonic()
    time.sleep(seconds)
    spent = time.monotonic() - began
    return [
        Cost(
            100 * (_cpu_s(was.node) - was.cpu_s[0]) / spent,
            100 * (sum(map(_cpu_s, was.trainers)) - was.cpu_s[1]) / spent,
            was.node.memory_info().rss / 2**20,
            sum(trainer.memory_info().rss for trainer in was.trainers) / 2**20,
            (host.traffic()[1] - was.sent) / spent,
        )
        for was, host in zip(before, hosts, strict=True)
    ]


@contextmanager
def waiting(count: int, folder: Path) -> Iterator[tuple[list[RunningNode], list[Host]]]:
    """All are members, and one more is needed before a round begins."""
    with network(count) as net, running() as nodes:
        config = run_file(folder / "run.toml", members=count + 1, committee=5, pause_s=0.0)
        found_and_join(nodes, net.hosts, folder, "Small", config)
        until_all(nodes, "all members", lambda d: len(d["members"]) == count, START_S)
        yield nodes, net.hosts


@contextmanager
def over(count: int, folder: Path) -> Iterator[tuple[list[RunningNode], list[Host]]]:
    """The run is over; started again, its nodes serve the result for a minute."""
    with network(count) as net, running() as nodes:
        config = run_file(folder / "run.toml", members=count, committee=5, pause_s=0.0)
        config.write_text(config.read_text().replace("aggregation_rounds = 100000", "aggregation_rounds = 3"))
        found_and_join(nodes, net.hosts, folder, "Small", config)
        for node in nodes:
            node.wait(START_S)
        for node in nodes:
            node.start("--device", "cpu")
        until_all(nodes, "over", lambda d: d["version"] == d["rounds"] and d["quorum"]["held"], START_S)
        yield nodes, net.hosts


def show(name: str, costs: list[Cost], seconds: float) -> None:
    peers = len(costs) - 1

    def column(of: Callable[[Cost], float]) -> str:
        values = [of(cost) for cost in costs]
        return f"{statistics.median(values):8.1f}  {min(values):8.1f}  {max(values):8.1f}"

    load = os.getloadavg()[0]
    print(f"\n{name}: {len(costs)} nodes, {seconds:g} s, load {load:.1f} on {os.cpu_count()} cores")
    print(f"{'':34}{'median':>8}  {'least':>8}  {'most':>8}")
    print(f"{'CPU of the node, % of a core':34}{column(lambda c: c.node_cpu_percent)}")
    print(f"{'CPU of its trainer, % of a core':34}{column(lambda c: c.trainer_cpu_percent)}")
    print(f"{'resident memory of the node, MiB':34}{column(lambda c: c.node_rss_mib)}")
    print(f"{'resident memory of its trainer, MiB':34}{column(lambda c: c.trainer_rss_mib)}")
    print(f"{'sent, bytes/s':34}{column(lambda c: c.sent_bytes_s)}")
    print(f"{'sent, bytes/s to each peer':34}{column(lambda c: c.sent_bytes_s / peers)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nodes", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--only", choices=("over", "waiting"))
    arguments = parser.parse_args()
    if reason := missing():
        sys.exit(reason)
    for name, rest in (("waiting", waiting), ("over", over)):
        if arguments.only in (None, name):
            with (
                tempfile.TemporaryDirectory(prefix="p2pcoord-resting-") as folder,
                rest(arguments.nodes, Path(folder)) as (nodes, hosts),
            ):
                time.sleep(SETTLE_S)
                show(name, measure(nodes, hosts, arguments.seconds), arguments.seconds)


if __name__ == "__main__":
    main()

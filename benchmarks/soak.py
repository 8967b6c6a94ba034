"""Four real nodes and no fault at all: every round has all contributors, nobody is elected, memory and descriptors stay flat.

    python -m benchmarks.soak --minutes 15

Prints a line a minute, then what was found; exit code 1 when something was not as it should be. Memory (resident) and
descriptors of the node processes and their trainers are compared between the first and the last quarter of the time.
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import psutil

from tests.processes.network import Network, at

NODES = 4
SAMPLE_S = 2.0

# Python's allocator and torch's caches breathe; what grows by more than this in a few minutes does not stop.
GROWTH = 1.10
GROWTH_DESCRIPTORS = 2

RUN = """
[strategy]
local_steps = 5
aggregation_rounds = 1000000
[participation]
minimum_members = 4
"""

Sample = tuple[float, float, int]
"""Resident memory of a node process and of its trainer (MiB), open descriptors of the node."""


def sample(network: Network) -> list[Sample]:
    taken = []
    for node in network.nodes:
        process = psutil.Process(node.pid)
        trainers = sum(one.memory_info().rss for one in node.trainers())
        taken.append((process.memory_info().rss / 2**20, trainers / 2**20, process.num_fds()))
    return taken


@contextmanager
def ending_when_told() -> Iterator[None]:
    """SIGINT (also where whoever started this ignores it), SIGTERM and SIGHUP end the block; what cleans up behind it is not
    interrupted any more."""
    others = (signal.SIGTERM, signal.SIGHUP)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which trio knows
    for other in others:
        signal.signal(other, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        for each in (signal.SIGINT, *others):
            signal.signal(each, signal.SIG_IGN)


@click.command()
@click.option("--minutes", default=15.0, help="How long.")
@click.option("--directory", type=click.Path(path_type=Path), help="Keep the nodes' directories here.")
def main(minutes: float, directory: Path | None) -> None:
    wrong: list[str] = []
    with (
        tempfile.TemporaryDirectory() as temporary,
        Network(directory or Path(temporary), RUN, workload="text") as network,
        ending_when_told(),
    ):
        network.found(NODES)
        network.wait_version(5, timeout_s=120.0)
        began, told = time.time(), 0
        terms = network.commits()[max(network.commits())]["term"]
        samples: list[list[Sample]] = []
        while time.time() < began + 60 * minutes:
            time.sleep(SAMPLE_S)
            samples.append(sample(network))
            if (time.time() - began) // 60 > told:
                told += 1
                memory = " ".join(f"{node:.0f}+{trainer:.0f}" for node, trainer, _ in samples[-1])
                descriptors = " ".join(str(count) for *_, count in samples[-1])
                print(
                    f"{told:3} min  version {max(network.commits()):5}  MiB {memory}  descriptors {descriptors}  "
                    f"load {os.getloadavg()[0]:.1f}",
                    flush=True,
                )
        commits = {v: e for v, e in network.commits().items() if at(e) > began}
        network.check()
        missing = {v: len(e["contributors"]) for v, e in commits.items() if len(e["contributors"]) != NODES}
        if missing:
            wrong.append(f"rounds without all contributors: {missing}")
        unexpected = [
            (node.name, event["event"], event["time"])
            for node in network.nodes
            for event in node.events()
            if at(event) > began and event["event"] in ("transfer-failed", "failed")
        ]
        transfers = sum(1 for node in network.nodes for event in node.events("transfer") if at(event) > began)
        newest = commits[max(commits)]["term"]
        if unexpected:
            wrong.append(f"unexpected: {unexpected}")
        if newest - terms > transfers:
            wrong.append(f"{newest - terms} terms for {transfers} planned transfers of the duty")
    quarter = max(len(samples) // 4, 1)
    for at_node in range(NODES):
        for what, field, limit in (
            ("node memory", 0, GROWTH),
            ("trainer memory", 1, GROWTH),
        ):
            first = statistics.median(taken[at_node][field] for taken in samples[:quarter])
            last = statistics.median(taken[at_node][field] for taken in samples[-quarter:])
            print(f"node{at_node + 1} {what}: {first:.1f} MiB in the first quarter, {last:.1f} in the last")
            if last > first * limit:
                wrong.append(f"node{at_node + 1}: {what} grew from {first:.1f} to {last:.1f} MiB")
        first = statistics.median(taken[at_node][2] for taken in samples[:quarter])
        last = statistics.median(taken[at_node][2] for taken in samples[-quarter:])
        print(f"node{at_node + 1} descriptors: {first:.0f} in the first quarter, {last:.0f} in the last")
        if last > first + GROWTH_DESCRIPTORS:
            wrong.append(f"node{at_node + 1}: descriptors grew from {first:.0f} to {last:.0f}")
    print(
        f"{len(commits)} rounds in {minutes:g} min, {newest - terms} changes of term, {transfers} planned transfers"
    )
    for line in wrong:
        print(f"wrong: {line}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()

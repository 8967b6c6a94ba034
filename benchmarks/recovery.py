"""How long a network of four real nodes takes to go on after a death: seconds from the blow to the next certificate.

    python -m benchmarks.recovery coordinator    20 coordinators killed at random moments, all times at their defaults, `text` in
                                                 rounds of 5 local steps
    python -m benchmarks.recovery transfer       10 members killed while updates of 10 MB move
    python -m benchmarks.recovery frozen         10 members frozen for 20 s (SIGSTOP), with updates of 10 MB

Who was killed is started again and contributes before the next one is. Nodes are processes on 127.0.0.1, each with a trainer
of its own; the figures are from their event files. Every run ends with the checks of tests/processes/network.py: nothing is
trained or counted twice, versions never go back, and the model holds exactly what its records say.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import click

from tests.processes.deaths import come_back, freeze, kill_in_transfer, other_than
from tests.processes.network import LARGE, Network, at, run_file

NODES = 4
FREEZE_S = 20.0

# Rounds of about a second, so that a random moment falls into any of a round's phases.
TEXT_RUN = """
[strategy]
local_steps = 5
aggregation_rounds = 1000000
"""


def load() -> str:
    return "load " + " ".join(f"{value:.1f}" for value in os.getloadavg())


def start(network: Network) -> None:
    network.found(NODES)
    network.wait(
        lambda: any(len(event["contributors"]) == NODES for event in network.commits().values()),
        f"all {NODES} contribute",
        120.0,
    )
    newest = network.commits()[max(network.commits())]
    print(f"{NODES} nodes, rounds of {newest['seconds']:.2f} s, {load()}")


def kill_coordinators(base: Path, times: int, random: Random) -> list[float]:
    seconds = []
    with Network(base, TEXT_RUN, workload="text") as network:
        start(network)
        for number in range(1, times + 1):
            time.sleep(random.uniform(0.0, 3.0))
            victim = network.coordinator()
            events = victim.events("phase")
            killed = victim.kill()
            commit = network.next_commit(killed)
            seconds.append(at(commit) - killed)
            phase = events[-1]["phase"] if events else "-"
            print(
                f"{number:3}  {seconds[-1]:6.2f} s  in {phase:20} version {commit['version']:4} term {commit['term']}  {load()}"
            )
            come_back(network, victim)
        network.check()
    return seconds


def kill_members(base: Path, times: int, random: Random) -> list[float]:
    seconds = []
    with Network(base, run_file(parameters=LARGE, members=3)) as network:
        start(network)
        for number in range(1, times + 1):
            victim = random.choice([node for node in network.nodes if node is not network.coordinator()])
            taken, commit = kill_in_transfer(network, victim, random)
            seconds.append(taken)
            told = f"{len(commit['contributors'])} contributors"
            print(
                f"{number:3}  {taken:6.2f} s  {victim.name}  version {commit['version']:4}  {told}  {load()}"
            )
            come_back(network, victim)
        network.check()
    return seconds


def freeze_members(base: Path, times: int, random: Random) -> list[float]:
    seconds = []
    with Network(base, run_file(parameters=LARGE, members=3)) as network:
        start(network)
        for number in range(1, times + 1):
            time.sleep(random.uniform(0.0, 1.0))
            victim = other_than(network, network.coordinator())
            taken, commit = freeze(network, victim, FREEZE_S)
            seconds.append(taken)
            told = f"{len(commit['contributors'])} contributors"
            print(
                f"{number:3}  {taken:6.2f} s  {victim.name}  version {commit['version']:4}  {told}  {load()}"
            )
        network.check()
    return seconds


SCENARIOS: dict[str, tuple[int, Callable[[Path, int, Random], list[float]]]] = {
    "coordinator": (20, kill_coordinators),
    "transfer": (10, kill_members),
    "frozen": (10, freeze_members),
}


@click.command()
@click.argument("scenario", type=click.Choice(list(SCENARIOS)))
@click.option("--times", type=int, help="Blows; by default as many as stand above.")
@click.option("--seed", default=1, help="Of the moments and the victims.")
@click.option("--directory", type=click.Path(path_type=Path), help="Keep the nodes' directories here.")
def main(scenario: str, times: int | None, seed: int, directory: Path | None) -> None:
    usual, run = SCENARIOS[scenario]
    with tempfile.TemporaryDirectory() as temporary:
        seconds = run(directory or Path(temporary), times or usual, Random(seed))
    print(
        f"{scenario}: {len(seconds)} times, median {statistics.median(seconds):.2f} s, worst {max(seconds):.2f} s"
    )


if __name__ == "__main__":
    main()

"""Running seeds: one after the other, or over the machine's cores."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import msgspec

from p2pcoord.errors import UserError
from simulations import quadratic
from simulations.faults import FAMILIES
from simulations.mutants import MUTANTS
from simulations.randomness import stream
from simulations.report import Report, Summary, report_of, summary_of
from simulations.scenario import WEATHERS, Director, Scenario, WorkName, draw_scenario, load_scenario
from simulations.steady_work import SteadyWork
from simulations.training import Training
from simulations.world import WorkFactory, World, WorldSettings

MAX_PEERS = 1_000

ENDLESS = 1_000_000
"""Rounds of a run that the scenario ends."""


def run_scenario(
    seed: int, scenario: Scenario, *, mutant: str = "", work: WorkFactory = SteadyWork, real: bool = False
) -> Report:
    """One run. What a peer raises is a violation ("raised"), as a peer must never do that. `mutant` switches a bug on."""
    began = time.perf_counter()
    settings = WorldSettings(
        weather=WEATHERS[scenario.weather],
        real_signatures=real,
        overtake=scenario.overtake,
        writes_at_once=scenario.writes_at_once,
        gossip=scenario.work == "training",
        rules=quadratic.rules(rounds=ENDLESS) if scenario.work == "training" else None,
    )
    world = World(seed, settings, work)
    if scenario.work == "training":
        Training(world)
    director = Director(world, scenario)
    with MUTANTS[mutant]() if mutant else nullcontext():
        try:
            director.play()
        except Exception:  # whatever it is, it is a finding of this seed
            world.invariants.violated("raised", traceback.format_exc(limit=-4))
    return report_of(world, director, time.perf_counter() - began)


def run_seed(
    seed: int,
    *,
    peers: int | range,
    faults: str,
    rounds: int,
    work: WorkName = "training",
    mutant: str = "",
) -> Report:
    """The scenario that this seed draws; of several numbers of peers it draws one."""
    count = peers if isinstance(peers, int) else stream(seed, "peers").choice(peers)
    return run_scenario(seed, draw_scenario(seed, count, faults, rounds, work), mutant=mutant)


def run_file(seed: int, path: str) -> Report:
    return run_scenario(seed, load_scenario(Path(path)))


def simulate(
    *,
    peers: int | range = 5,
    seeds: Sequence[int] = (1,),
    faults: str = "all",
    rounds: int = 10,
    work: WorkName = "training",
    scenario: str = "",
    processes: int | None = None,
    progress: Callable[[Report], None] = lambda report: None,
) -> Summary:
    """Runs all seeds and sums them up. `scenario` is the path of a file that takes the place of `peers`, `faults`, `rounds`.

    `processes`: how many at a time, by default one a core. `progress` is told each report as it comes, in no order. Raises
    UserError for what cannot be simulated.
    """
    if faults not in FAMILIES:
        raise UserError(f"faults are one of {', '.join(FAMILIES)}, not {faults!r}", exit_code=2)
    counts = range(peers, peers + 1) if isinstance(peers, int) else peers
    if not (counts and 1 <= counts[0] <= counts[-1] <= MAX_PEERS):
        told = peers if isinstance(peers, int) else f"{peers.start}..{peers.stop - 1}"
        raise UserError(f"a simulation has 1 to {MAX_PEERS} peers, not {told}", exit_code=2)
    if scenario:
        load_scenario(Path(scenario))
        run: Callable[[int], Report] = partial(run_file, path=scenario)
    else:
        run = partial(run_seed, peers=peers, faults=faults, rounds=rounds, work=work)
    began = time.perf_counter()
    reports = []
    for report in _over(run, seeds, processes or os.cpu_count() or 1):
        reports.append(report)
        progress(report)
    reports.sort(key=lambda report: report.seed)
    return summary_of(reports, time.perf_counter() - began)


def _over(run: Callable[[int], Report], seeds: Sequence[int], processes: int) -> Iterable[Report]:
    if processes == 1 or len(seeds) == 1:
        yield from map(run, seeds)
        return
    # Spawned: a fork of a process with threads (the command line's, a test's) may deadlock.
    with multiprocessing.get_context("spawn").Pool(min(processes, len(seeds))) as pool:
        yield from pool.imap_unordered(run, seeds)


def parse_range(what: str, text: str) -> range:
    """ "7" or "1..250" (both included). Raises UserError that names `what`."""
    first, dots, last = text.partition("..")
    try:
        numbers = range(int(first), int(last if dots else first) + 1)
    except ValueError:
        numbers = range(0)
    if not numbers:
        raise UserError(f"{what} are a number or A..B, not {text!r}", exit_code=2)
    return numbers


def as_json(summary: Summary) -> str:
    return msgspec.json.encode(summary).decode()

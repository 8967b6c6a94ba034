"""How fast rules combine, beside ByzFL and beside memory, in one run.

    python -m benchmarks.aggregation [--updates 16] [--millions 10] [--f 3] [--repeats 3] [--threads 1] [--cpu]
                                    [--rules median krum]

ByzFL is compared with where it is installed (pip install --no-deps byzfl==0.0.11, with scipy beside it); without it the last
columns stay empty. It is given the same float32 array, and runs once, after a smaller run that loads what it needs.

    s            the best of the repeats
    of memory    how near to the bound: the time in which this machine reads every update once and writes the result, at the
                 speed at which it copies memory, over the time taken. 1.0 is as fast as memory allows
    memory       the most that was allocated at any moment, the result included, as a share of the inputs
    x            ByzFL's time over ours

With --cpu, times are those of the processor, all threads together: what is left to compare on a machine that is busy with
other work, though caches and memory that others use still slow it down. With --threads 2 or more, pieces of columns go to a
pool of threads, as a node's workers do; ByzFL uses what it uses.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import time
import tracemalloc
import types
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from p2pcoord.aggregation import aggregate
from p2pcoord.errors import UserError

MIXING_BYTES = 200_000_000
"""Above, ByzFL's mixing is not asked for: it copies each vector's n - f neighbours, all at once."""


def byzfl() -> dict[str, Any] | None:
    """ByzFL's aggregators by our names, without its package's imports of torchvision and matplotlib; None if not there."""
    spec = importlib.util.find_spec("byzfl")
    if spec is None or spec.submodule_search_locations is None:
        return None
    package = types.ModuleType("byzfl")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["byzfl"] = package
    rules = importlib.import_module("byzfl.aggregators.aggregators")
    before = importlib.import_module("byzfl.aggregators.preaggregators")
    return {
        "federated_average": lambda f: rules.Average(),
        "median": lambda f: rules.Median(),
        "trimmed_mean": rules.TrMean,
        "krum": rules.Krum,
        "multi_krum": rules.MultiKrum,
        "geometric_median": lambda f: rules.GeometricMedian(),
        "centered_clipping": lambda f: rules.CenteredClipping(),
        "mixing": before.NNM,
    }


CLOCK = {False: time.perf_counter, True: time.process_time}
"""By --cpu."""


def seconds(repeats: int, work: Callable[[], object], *, cpu: bool = False) -> float:
    """The shortest of some runs: what the code takes when nothing else runs."""
    times, clock = [], CLOCK[cpu]
    for _ in range(repeats):
        begin = clock()
        work()
        times.append(clock() - begin)
    return min(times)


def copy_seconds(updates: np.ndarray, *, cpu: bool) -> float:
    """What a byte takes that is read or written, when memory is copied."""
    copied = np.empty_like(updates)
    return seconds(4, lambda: np.copyto(copied, updates), cpu=cpu) / (2 * updates.nbytes)


def allocated(work: Callable[[], object]) -> int:
    """The most bytes that were allocated at once, numpy's arrays included."""
    tracemalloc.start()
    work()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--updates", type=int, default=16)
    arguments.add_argument("--millions", type=float, default=10, help="columns, in millions")
    arguments.add_argument("--f", type=int, default=3)
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--cpu", action="store_true", help="the processor's time instead of the clock's")
    arguments.add_argument("--rules", nargs="*", default=None, help="only those that begin with one of these")
    given = arguments.parse_args()
    warnings.simplefilter("ignore")

    columns = int(given.millions * 1e6)
    updates = np.random.default_rng(0).standard_normal((given.updates, columns), np.float32)
    f = given.f
    calls: dict[str, tuple[str, dict[str, Any]]] = {
        "federated_average": ("federated_average", {}),
        "federated_average, clipped": ("federated_average", {"clip_norm": 1.0}),
        "median": ("median", {}),
        f"trimmed_mean, f = {f}": ("trimmed_mean", {"f": f}),
        f"krum, f = {f}": ("krum", {"f": f}),
        f"multi_krum, f = {f}": ("multi_krum", {"f": f}),
        "geometric_median": ("geometric_median", {}),
        "centered_clipping": ("centered_clipping", {"radius": 100.0}),
        f"bulyan, f = {f}": ("bulyan", {"f": f}),
        f"median after mixing, f = {f}": ("median", {"pre": [("nearest_neighbour_mixing", {"f": f})]}),
    }
    other = byzfl()
    if other is not None:
        for make in other.values():
            make(f)(updates[:, :1000].copy())
    moved = copy_seconds(updates, cpu=given.cpu)
    bound = moved * (updates.nbytes + 4 * columns)
    print(
        f"{given.updates} updates of {columns:,} float32, {given.threads} thread(s), best of {given.repeats}"
    )
    print(
        f"memory is copied at {1 / moved / 1e9:.1f} GB/s, read and written together; the bound is {bound:.3f} s"
    )
    print(f"{'rule':<32}{'s':>8}{'of memory':>11}{'memory':>9}{'ByzFL s':>10}{'x':>8}")
    with ThreadPoolExecutor(given.threads) as pool:
        run = map if given.threads == 1 else pool.map
        for name, (kind, options) in calls.items():
            if given.rules is not None and not name.startswith(tuple(given.rules)):
                continue
            try:
                work = partial(aggregate, kind, updates, run=run, **options)
                taken = seconds(given.repeats, work, cpu=given.cpu)
            except UserError as error:
                print(f"{name:<32}{error}")
                continue
            peak = allocated(work)
            line = f"{name:<32}{taken:>8.3f}{bound / taken:>11.2f}{peak / updates.nbytes:>9.1%}"
            if other is not None and kind in other and "pre" not in options and "clip_norm" not in options:
                theirs = seconds(1, lambda: other[kind](f)(updates), cpu=given.cpu)  # noqa: B023
                line += f"{theirs:>10.2f}{theirs / taken:>8.1f}"
            elif other is not None and "pre" in options and updates.nbytes < MIXING_BYTES:
                theirs = seconds(1, lambda: other["median"](f)(other["mixing"](f)(updates)), cpu=given.cpu)
                line += f"{theirs:>10.2f}{theirs / taken:>8.1f}"
            print(line, flush=True)


if __name__ == "__main__":
    main()

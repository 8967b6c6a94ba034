"""How fast sums and outer steps are, as a share of copying memory on the same machine in the same run.

    python -m benchmarks.combine [--megabytes 256] [--inputs 5] [--repeats 5] [--directory DIR]

MB/s counts the bytes of all vectors that an operation has to read and write once: a sum of n vectors n + 1, a copy two, a
step with Nesterov momentum five (parameters, gradient, slot; parameters, slot), with Adam seven. So a ratio of 1.0 is as
fast as memory allows. The best of the repeats is printed. Files lie in DIR (default: the system's temporary directory)
and are in the page cache; nothing is synced.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from node.training.workers import CombineInput, combine, step
from p2pcoord.aggregation import summation
from p2pcoord.aggregation.mean import Factors
from p2pcoord.layout import Layout, TensorSpec
from p2pcoord.optimization import step as step_module
from p2pcoord.optimization.optimizer import SGD, Adam

NESTEROV = SGD(momentum=0.9, nesterov=True, weight_decay=0.0).parameters(1, 0.7)
ADAM = Adam(beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.0).parameters(1, 0.1)


def best_seconds(repeats: int, work: Callable[[], object]) -> float:
    """The shortest of some runs: what the code takes when nothing else runs."""
    times = []
    for _ in range(repeats + 1):  # the first also touches pages
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--megabytes", type=int, default=256, help="size of one vector")
    arguments.add_argument("--inputs", type=int, default=5, help="vectors in a sum: own and fan-out 4")
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--directory", type=Path, default=None, help="where files are written")
    given = arguments.parse_args()

    count = given.megabytes * 250_000
    random = np.random.default_rng(0)
    vectors = [random.standard_normal(count, np.float32) for _ in range(given.inputs)]
    out, slots, new_slots = (
        np.empty_like(vectors[0]),
        vectors[1:3],
        [np.empty_like(vectors[0]) for _ in range(2)],
    )
    slots[1] = np.abs(slots[1])
    factor = float(np.float32(1 / given.inputs))

    copied = 2 * given.megabytes / best_seconds(given.repeats, lambda: np.copyto(out, vectors[0]))
    print(f"{given.megabytes} MB a vector, best of {given.repeats}")
    print(f"{'operation':<42}{'MB/s':>8}{'of memcpy':>11}")
    print(f"{'memcpy':<42}{copied:>8.0f}{1:>11.2f}")

    def show(name: str, moved: int, work: Callable[[], object]) -> None:
        speed = moved * given.megabytes / best_seconds(given.repeats, work)
        print(f"{name:<42}{speed:>8.0f}{speed / copied:>11.2f}", flush=True)

    block = summation.BLOCK
    terms = [(vector, factor) for vector in vectors]
    for shift in range(12, 19):
        summation.BLOCK = 1 << shift  # type: ignore[misc]  # what is measured
        show(
            f"weighted_sum of {given.inputs}, blocks of 2**{shift}",
            given.inputs + 1,
            lambda: summation.weighted_sum(terms, out),
        )
    summation.BLOCK = block  # type: ignore[misc]
    show("weighted_sum of 2", 3, lambda: summation.weighted_sum(terms[:2], out))
    partials = [(vector, 1.0) for vector in vectors]
    show(
        f"weighted_sum of {given.inputs} partial sums",
        given.inputs + 1,
        lambda: summation.weighted_sum(partials, out),
    )
    show("norm", 1, lambda: summation.norm(vectors[0]))
    for name, scalars, moved in (("sgd with nesterov", NESTEROV, 5), ("adam", ADAM, 7)):
        for shift in (14, 15, 16, 17):
            step_module.BLOCK = 1 << shift  # type: ignore[attr-defined]
            old, new = slots[: scalars.slots], new_slots[: scalars.slots]
            work = partial(step_module.step, vectors[0], vectors[-1], old, scalars, out, new)
            show(f"step, {name}, blocks of 2**{shift}", moved, work)
    step_module.BLOCK = block  # type: ignore[attr-defined]

    layout = Layout((TensorSpec("weight", (count,), "float32", "parameter"),))
    with tempfile.TemporaryDirectory(dir=given.directory) as name:
        directory = Path(name)
        inputs = []
        for at, vector in enumerate(vectors):
            vector.tofile(directory / f"in{at}")
            inputs.append(CombineInput(directory / f"in{at}", Factors(factor, factor)))
        with open(directory / "state", "wb") as state:
            for vector in (vectors[0], slots[0]):
                vector.tofile(state)
        show(
            f"combine {given.inputs} files, norm included",
            given.inputs + 1,
            lambda: combine(layout, inputs, directory / "out"),
        )
        show(
            "step of files, sgd with nesterov",
            5,
            lambda: step(layout, directory / "state", directory / "in1", NESTEROV, directory / "new"),
        )


if __name__ == "__main__":
    main()

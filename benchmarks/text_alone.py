"""What the built-in workload `text` can reach, without any network: four replicas, each alone on its share, and a trigram table.

    python -m benchmarks.text_alone [--controls] [--rounds N] [--replicas N] [--local-steps N] [--learning-rate X]

All three are measured on the same validation text. The replicas run one after the other in this process, with the trainer's
own training, the layout's files and the run's outer step, so this is what a run without faults computes. The control is as
many replicas that keep their shares and never average, for the same local steps each; they have nothing to do with each other,
so they run on all cores. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

import msgspec
import numpy as np
import torch

from node.training.local_training import LocalTraining
from node.training.text_workload import VALIDATION_SHARE, Text
from node.training.trainer_protocol import Configure, Initialize, Train, Validate
from p2pcoord.layout import Layout
from p2pcoord.optimization.optimizer import configured
from p2pcoord.optimization.step import step
from p2pcoord.run_config import RunSettings, derive_seed
from p2pcoord.run_file import parse_run_file
from p2pcoord.workload import Workload

SMOOTHING = 0.01  # added to every count; of 1, 0.1, 0.01 and 0.001 the best on this text
RUN = bytes(32)


def trigram_bits(text: bytes) -> float:
    """Bits per byte of the validation text by counts of three bytes in the training text."""
    border = int(len(text) * (1 - VALIDATION_SHARE))
    train, validation = text[:border], text[border:]
    threes = Counter(zip(train, train[1:], train[2:], strict=False))
    twos = Counter(pairwise(train))
    bits = [
        math.log2((twos[a, b] + 256 * SMOOTHING) / (threes[a, b, c] + SMOOTHING))
        for a, b, c in zip(validation, validation[1:], validation[2:], strict=False)
    ]
    return sum(bits) / len(bits)


class Replica:
    """One member's trainer, and the share of the data that it is dealt in every round."""

    def __init__(
        self, folder: Path, settings: RunSettings, share: int, shares: int, workload: Workload
    ) -> None:
        folder.mkdir()
        self.folder = folder
        self._settings = settings
        self._share = share
        self._shares = shares
        local = settings.local
        slots = configured(settings.optimization).slots
        configuration = Configure(
            {}, "dealt", local.batch_size, local.optimizer, derive_seed(RUN, "model"), slots
        )
        self.training = LocalTraining(workload, bytes(32), torch.device("cpu"), folder, configuration)

    def train(self, base: Path, version: int) -> Path:
        """A contribution from this base."""
        length = self.training.describe().train_samples
        begin, end = (length * index // self._shares for index in (self._share, self._share + 1))
        strategy, output = self._settings.strategy, self.folder / "contribution"
        seed = derive_seed(RUN, "train", version, self._share)
        request = Train(
            str(base),
            version,
            str(version),
            ((begin, end),),
            strategy.local_epochs,
            strategy.local_steps,
            None,
            seed,
            str(output),
        )
        trained = self.training.train(request, lambda progress: None, lambda: False)
        if not trained.finite:
            raise SystemExit(f"replica {self._share} diverged in version {version}")
        return output

    def measure(self, state: Path, metric: str) -> float:
        """A metric's mean over all validation data."""
        samples = self.training.describe().validation_samples
        validated = self.training.validate(Validate(str(state), ((0, samples),)), lambda: False)
        return validated.metric_sums[metric] / validated.samples


def averaged(
    layout: Layout, settings: RunSettings, state: Path, contributions: list[Path], version: int
) -> Path:
    """The next version: the outer step by the contributions' mean."""
    outer = configured(settings.optimization)
    old = np.fromfile(state, np.uint8)
    new = old.copy()
    share = np.float32(1 / len(contributions))
    mean = np.zeros(layout.parameter_count, np.float32)
    for contribution in contributions:
        mean += share * layout.parameters(np.fromfile(contribution, np.uint8))
    scalars = outer.parameters(version + 1, settings.optimization.learning_rate)
    finite = step(
        layout.parameters(old), mean, layout.slots(old), scalars, layout.parameters(new), layout.slots(new)
    )
    if not finite:
        raise SystemExit(f"version {version + 1} is not finite")
    path = state.with_name(f"state{version + 1}")
    new.tofile(path)
    state.unlink()
    return path


def alone(settings: RunSettings) -> RunSettings:
    """The same local work, after which the local model is the next base: an outer step of exactly minus the update."""
    outer = msgspec.structs.replace(
        settings.optimization, kind="sgd", learning_rate=1.0, momentum=0.0, nesterov=False
    )
    return msgspec.structs.replace(settings, optimization=outer)


def reach(
    workload: type[Workload], metric: str, settings: RunSettings, dealt: range, shares: int, folder: Path
) -> Iterator[float]:
    """The metric after each round of one replica for each share in `dealt`, of `shares` shares."""
    folder.mkdir()
    members = [Replica(folder / f"replica{share}", settings, share, shares, workload()) for share in dealt]
    state = folder / "state0"
    request = Initialize(None, str(state), str(folder / "dataset"), str(folder / "frozen"))
    layout = members[0].training.initialize(request).described.pins.layout
    for version in range(settings.strategy.aggregation_rounds):
        contributions = [member.train(state, version) for member in members]
        state = averaged(layout, settings, state, contributions, version)
        yield members[0].measure(state, metric)


def reached_alone(settings: RunSettings, share: int, shares: int, folder: Path) -> list[float]:
    """Bits per byte after each round of a replica that has only this share; in a process of its own."""
    torch.set_num_threads(1)
    dealt = range(share, share + 1)
    return list(reach(Text, "bits_per_byte", alone(settings), dealt, shares, folder / f"alone{share}"))


def each_alone(settings: RunSettings, shares: int, folder: Path) -> list[list[float]]:
    """Print what each share alone comes to, as soon as it is known, and return it round by round."""
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as processes:
        controls = [
            processes.submit(reached_alone, settings, share, shares, folder) for share in range(shares)
        ]
        for share, control in enumerate(controls, start=1):
            bits = control.result()
            steps = len(bits) * (settings.strategy.local_steps or 0)
            print(
                f"alone on share {share} of {shares}: {steps} local steps, {bits[-1]:.3f} bits per byte "
                f"(best {min(bits):.3f})",
                flush=True,
            )
    return [control.result() for control in controls]


def told(name: str, settings: RunSettings, figures: Iterator[float]) -> list[float]:
    """Print bits per byte after each round, and return them."""
    reached, began = [], time.perf_counter()
    for bits in figures:
        reached.append(bits)
        steps = len(reached) * (settings.strategy.local_steps or 0)
        print(
            f"{name}: round {len(reached)}, {steps} local steps each, {bits:.3f} bits per byte, "
            f"{time.perf_counter() - began:.0f} s",
            flush=True,
        )
    return reached


def main() -> None:
    """Print the three figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    recommended = parse_run_file("", workload_defaults=Text.run_defaults())
    parser.add_argument("--rounds", type=int, default=recommended.strategy.aggregation_rounds)
    parser.add_argument("--local-steps", type=int, default=recommended.strategy.local_steps)
    parser.add_argument("--learning-rate", type=float, default=recommended.local.optimizer.learning_rate)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument(
        "--controls", action="store_true", help="only the trigram table and those that train alone"
    )
    said = parser.parse_args()
    torch.set_num_threads(1)
    settings = parse_run_file(
        f"[strategy]\nlocal_steps = {said.local_steps}\naggregation_rounds = {said.rounds}\n"
        f"[local.optimizer]\nlearning_rate = {said.learning_rate}\n",
        workload_defaults=Text.run_defaults(),
    )
    trigram = trigram_bits(Text().dataset_bytes())
    print(f"trigram table: {trigram:.3f} bits per byte", flush=True)
    with TemporaryDirectory() as folder:
        singles = each_alone(settings, said.replicas, Path(folder))
        last = mean(bits[-1] for bits in singles)
        print(f"each alone on its share, mean of {said.replicas}: {last:.3f} bits per byte", flush=True)
        if said.controls:
            return
        shares = range(said.replicas)
        figures_of = reach(Text, "bits_per_byte", settings, shares, said.replicas, Path(folder, "together"))
        together = told(f"{said.replicas} replicas", settings, figures_of)
    below = next((index + 1 for index, bits in enumerate(together) if bits < 2.4), None)
    figures = {
        "trigram_bits_per_byte": round(trigram, 3),
        "alone_bits_per_byte": [round(bits[-1], 3) for bits in singles],
        "alone_best_bits_per_byte": [round(min(bits), 3) for bits in singles],
        "alone_mean_bits_per_byte": round(last, 3),
        "together_bits_per_byte": round(together[-1], 3),
        "rounds_to_below_2.4": below,
        "rounds": said.rounds,
        "local_steps": said.local_steps,
        "replicas": said.replicas,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

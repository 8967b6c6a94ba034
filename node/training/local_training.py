"""The model and the data inside the trainer process: trains from a state, validates one, tells what the workload amounts to.

Theory of operation
    Training is a function of base, assignment, seed and the inner optimizer's state: all random generators are seeded before it,
    and the order of samples is drawn from the seed alone. On the CPU the same request gives the same bytes.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn
from torch.utils.data import default_collate

from node.storage.whole_file import whole_file
from node.training.inner_state import InnerState
from node.training.model_file import export_model, load_model, write_tensors
from node.training.model_state import ModelState, hash_value
from node.training.trainer_protocol import (
    Configure,
    Described,
    Export,
    Exported,
    Initialize,
    Initialized,
    Progress,
    Train,
    Trained,
    Validate,
    Validated,
)
from node.training.workload_loading import user_code
from p2pcoord.errors import LocalError, UserError
from p2pcoord.workload import (
    SAMPLE_HASH_BYTES,
    SPLITS,
    DataPins,
    Dataset,
    Split,
    Workload,
    WorkloadPins,
    sampled_indices,
)

DEFAULT_BATCH_SIZE: Final = 32
"""Where neither run file nor workload says: small enough for noise that generalises (Masters, Luschi 2018: 2 to 32)."""

PROGRESS_INTERVAL_S: Final = 0.25
"""A person sees four numbers a second as alive; a fast model makes thousands of steps in that time."""

Report = Callable[[Progress], None]
Cancelled = Callable[[], bool]


class TrainingStopped(Exception):  # no error: somebody asked for it
    """The request was cancelled between two batches."""


class LocalTraining:
    """One workload on one device. Model and data are made when they are first needed, and kept."""

    def __init__(
        self, workload: Workload, source: bytes, device: torch.device, directory: Path, settings: Configure
    ) -> None:
        self._workload = workload
        self._source = source
        self._device = device
        self._settings = settings
        self._inner = InnerState(directory / "inner")
        self._files: ModelState | None = None
        self._data: dict[Split, Dataset] = {}
        if settings.dataset is not None:
            workload.dataset = Path(settings.dataset).read_bytes()

    # Requests

    def initialize(self, request: Initialize) -> Initialized:
        """Make version 0 (see trainer_protocol.Initialize). Raises UserError, OSError."""
        if self._workload.dataset is None:
            with user_code("dataset_bytes()"):
                dataset = self._workload.dataset_bytes()
            if dataset is not None:
                with whole_file(Path(request.dataset), durable=False) as temporary:
                    temporary.write_bytes(dataset)
                self._workload.dataset = dataset
        files = self._model()
        if request.init is not None:
            load_model(files.model, Path(request.init))
        described = self.describe()
        if frozen := files.frozen:
            write_tensors(Path(request.frozen), frozen, {})
        files.write_state(Path(request.state))
        return Initialized(described, self._workload.dataset is not None, bool(frozen))

    def describe(self) -> Described:
        """The pins of model and data. Raises UserError."""
        files = self._model()
        dealt = self._settings.data_mode == "dealt"
        pins = {split: self._pins(split) if dealt else None for split in SPLITS}
        return Described(
            WorkloadPins(files.layout, files.frozen_hash(), self._source, pins["train"], pins["validation"]),
            len(self._split("train")),
            len(self._split("validation")),
        )

    def train(self, request: Train, report: Report, cancelled: Cancelled) -> Trained:
        """Train and write a contribution (see trainer_protocol.Train).

        Raises TrainingStopped when `cancelled()` says so between two batches, UserError, OSError.
        """
        began = time.monotonic()
        files = self._model()
        indices = self._indices("train", request.ranges)
        files.load_state(Path(request.base))
        _seed_everything(request.seed)
        names, parameters = list(files.parameters), list(files.parameters.values())
        optimizer, own = self._optimizer(parameters)
        steps_before = self._inner.load(optimizer, request.base_version, names)
        schedule = None if own else _WarmUp(optimizer, self._settings.optimizer.warmup_steps, steps_before)
        clip = None if own else self._settings.optimizer.clip_norm

        files.model.train()
        losses, steps = _Losses(report), 0
        ends = math.inf if request.sync_interval_s is None else began + request.sync_interval_s
        for batch, size in self._batches("train", self._order(indices, request)):
            if cancelled():
                raise TrainingStopped
            if schedule is not None:
                schedule.before_step(steps)
            with user_code("training"):
                optimizer.zero_grad(set_to_none=True)
                loss = self._loss(files.model, batch)
                if not loss.requires_grad:
                    raise UserError(
                        "loss() of the workload returned a tensor without gradient: was it detached?"
                    )
                loss.backward()  # type: ignore[no-untyped-call]  # torch's own gap
                if clip is not None:
                    torch.nn.utils.clip_grad_norm_(parameters, clip)
                optimizer.step()
            steps += 1
            losses.add(loss.detach(), size, steps)
            if time.monotonic() >= ends:
                break
        losses.told(steps)
        norm, finite = files.write_contribution(Path(request.base), Path(request.output))
        self._inner.save(optimizer, request.base_version, names, request.slot, steps_before + steps)
        finite = finite and math.isfinite(losses.mean)
        return Trained(steps, losses.samples, losses.mean, norm, finite, time.monotonic() - began)

    def validate(self, request: Validate, cancelled: Cancelled) -> Validated:
        """Sums of loss and metrics over a share of the validation data. Raises TrainingStopped, UserError, OSError."""
        began = time.monotonic()
        files = self._model()
        indices = self._indices("validation", request.ranges)
        files.load_state(Path(request.state))
        files.model.eval()
        samples, loss_sum, sums = 0, 0.0, dict[str, float]()
        with torch.no_grad():
            for batch, size in self._batches("validation", _in_batches(indices, self._batch_size)):
                if cancelled():
                    raise TrainingStopped
                with user_code("validation"):
                    loss_sum += float(self._loss(files.model, batch)) * size
                with user_code("metrics()"):
                    metrics = self._workload.metrics(files.model, batch)
                    measured = {str(name): _number(name, value) for name, value in metrics.items()}
                if samples and measured.keys() != sums.keys():
                    raise UserError(
                        f"metrics() of the workload names {sorted(measured)} for one batch and {sorted(sums)} for another"
                    )
                for name, value in measured.items():
                    sums[name] = sums.get(name, 0.0) + value * size
                samples += size
        finite = math.isfinite(loss_sum) and all(map(math.isfinite, sums.values()))
        return Validated(samples, loss_sum, sums, finite, time.monotonic() - began)

    def export(self, request: Export) -> Exported:
        """Write a model file. Raises OSError."""
        files = self._model()
        files.load_state(Path(request.state))
        export_model(files.model, Path(request.path), request.metadata)
        return Exported()

    # Model and data

    def _model(self) -> ModelState:
        if self._files is None:
            _seed_everything(self._settings.seed)
            with user_code("model()"):
                model = self._workload.model()
            if not isinstance(model, nn.Module):
                raise UserError(
                    f"model() of the workload returned a {type(model).__name__}, not a torch.nn.Module"
                )
            with user_code("model()"):
                model = model.to(self._device)
            files = ModelState(model, self._settings.slots)
            if self._settings.frozen is not None:
                self._load_frozen(files, Path(self._settings.frozen))
            self._files = files
        return self._files

    def _load_frozen(self, files: ModelState, path: Path) -> None:
        """The founder's frozen parameters over ours; a name that does not fit is left to the comparison of pins."""
        import safetensors.torch

        given = safetensors.torch.load_file(path)
        with torch.no_grad():
            for name, tensor in files.frozen.items():
                if name in given and given[name].shape == tensor.shape and given[name].dtype == tensor.dtype:
                    tensor.copy_(given[name])

    def _split(self, split: Split) -> Dataset:
        if split not in self._data:
            _seed_everything(self._settings.seed)
            with user_code(f"data({split!r})"):
                data = self._workload.data(split)
                length = len(data) if hasattr(data, "__getitem__") and hasattr(data, "__len__") else None
            if length is None:
                raise UserError(
                    f"data({split!r}) of the workload returned a {type(data).__name__}: it needs __len__ and __getitem__, "
                    "as torch's map-style Dataset has"
                )
            own_validation = split == "validation" and self._settings.data_mode == "own"
            if length == 0 and not own_validation:  # others may have data to validate on
                raise UserError(f"data({split!r}) of the workload is empty: is the path to the data right?")
            self._data[split] = data
        return self._data[split]

    def _pins(self, split: Split) -> DataPins:
        data = self._split(split)
        hashes = []
        for index in sampled_indices(len(data)):
            _seed_everything(self._settings.seed)  # random augmentation, the same everywhere
            with user_code(f"data({split!r})[{index}]"):
                sample = data[index]
            digest = sha256()
            hash_value(sample, digest.update)
            hashes.append(digest.digest()[:SAMPLE_HASH_BYTES])
        return DataPins(len(data), tuple(hashes))

    def _indices(
        self, split: Split, ranges: Sequence[tuple[int, int]] | None
    ) -> np.ndarray[Any, np.dtype[np.int64]]:
        length = len(self._split(split))
        for begin, end in ranges or ():
            if not 0 <= begin <= end <= length:
                raise LocalError(f"range {begin}..{end} of {length} {split} samples")
        parts = [np.arange(begin, end) for begin, end in (((0, length),) if ranges is None else ranges)]
        indices = np.concatenate([np.arange(0), *parts])
        if split == "train" and not len(indices):
            raise LocalError("an assignment without samples")
        return indices

    def _order(self, indices: np.ndarray[Any, np.dtype[np.int64]], request: Train) -> Iterator[Sequence[int]]:
        """Batches of indices, shuffled anew in every epoch, as many as the request says."""
        epoch, batches = 0, 0
        while request.local_steps is not None or epoch < request.local_epochs:
            shuffled = np.random.default_rng((request.seed, epoch)).permutation(indices)
            for batch in _in_batches(shuffled, self._batch_size):
                if len(batch) == 1 and len(indices) > 1 and self._batch_size > 1:
                    continue  # the epoch's rest of one sample: batch normalisation cannot train on it
                yield batch
                batches += 1
                if batches == request.local_steps:
                    return
            epoch += 1

    @property
    def _batch_size(self) -> int:
        return self._settings.batch_size or self._workload.batch_size or DEFAULT_BATCH_SIZE

    def _batches(self, split: Split, order: Iterator[Sequence[int]]) -> Iterator[tuple[Any, int]]:
        data, collate = self._split(split), self._workload.collate or default_collate
        for indices in order:
            with user_code(f"data({split!r})"):
                batch = _moved(collate([data[int(index)] for index in indices]), self._device)
            yield batch, len(indices)

    def _loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        loss = self._workload.loss(model, batch)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            got = (
                f"shape {list(loss.shape)}" if isinstance(loss, torch.Tensor) else f"a {type(loss).__name__}"
            )
            raise UserError(
                f"loss() of the workload returned {got}: it returns the batch's mean loss, a scalar tensor"
            )
        return loss.reshape(())

    def _optimizer(self, parameters: list[torch.Tensor]) -> tuple[torch.optim.Optimizer, bool]:
        """A fresh inner optimizer, and whether it is the workload's own."""
        with user_code("optimizer()"):
            own = self._workload.optimizer(parameters)  # type: ignore[arg-type]  # they are Parameters
        if own is not None:
            if not isinstance(own, torch.optim.Optimizer):
                raise UserError(
                    f"optimizer() of the workload returned a {type(own).__name__}, no torch.optim.Optimizer"
                )
            return own, True
        said = self._settings.optimizer
        if said.kind == "sgd":
            sgd = torch.optim.SGD(
                parameters,
                said.learning_rate,
                said.momentum,
                weight_decay=said.weight_decay,
                nesterov=said.nesterov,
            )
            return sgd, False
        adam = torch.optim.AdamW if said.kind == "adamw" else torch.optim.Adam
        betas = (said.beta1, said.beta2)
        return adam(parameters, said.learning_rate, betas, said.epsilon, said.weight_decay), False


class _WarmUp:
    """Raises the learning rate linearly over a member's first steps in the run."""

    def __init__(self, optimizer: torch.optim.Optimizer, warmup_steps: int, steps_before: int) -> None:
        self._groups = [(group, group["lr"]) for group in optimizer.param_groups]
        self._warmup_steps = warmup_steps
        self._steps_before = steps_before

    def before_step(self, steps: int) -> None:
        if self._warmup_steps:
            share = min(1.0, (self._steps_before + steps + 1) / self._warmup_steps)
            for group, full in self._groups:
                group["lr"] = full * share


class _Losses:
    """Adds up losses and reports them now and then. They are read from the device only then: reading makes it wait."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._unread: list[tuple[torch.Tensor, int]] = []
        self._last_told = -math.inf
        self._sum = 0.0
        self.samples = 0

    def add(self, loss: torch.Tensor, size: int, step: int) -> None:
        self._unread.append((loss, size))
        if time.monotonic() - self._last_told >= PROGRESS_INTERVAL_S:
            self.told(step)

    def told(self, step: int) -> None:
        if self._unread:
            sizes = sum(size for _, size in self._unread)
            added = sum(float(loss) * size for loss, size in self._unread)
            self._unread.clear()
            self._sum += added
            self.samples += sizes
            self._report(Progress(step, added / sizes))
            self._last_told = time.monotonic()

    @property
    def mean(self) -> float:
        return self._sum / self.samples if self.samples else 0.0


def _in_batches(indices: np.ndarray[Any, np.dtype[np.int64]], size: int) -> Iterator[Sequence[int]]:
    for begin in range(0, len(indices), size):
        yield indices[begin : begin + size].tolist()


def _number(name: str, measured: Any) -> float:
    try:
        return float(measured)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"metrics() of the workload: {name!r} is no number: {error}") from None


def _moved(value: Any, device: torch.device) -> Any:
    """A batch on the device: tensors inside tuples, lists and dicts, and whatever has `to` itself."""
    if isinstance(value, torch.Tensor) or hasattr(value, "to"):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(inner, device) for key, inner in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_moved(inner, device) for inner in value))
    if isinstance(value, list | tuple):
        return type(value)(_moved(inner, device) for inner in value)
    return value


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.manual_seed(seed)

"""What a user implements to train a model, and what a run pins of it so that all members train the same thing.

Theory of operation
    A `Workload` says what the model, the data and the loss are; p2pcoord says when to train and on what. Its code is never
    taken from the network: every member brings its own copy, and runs it in a process of its own (the trainer).

    So a run must find out whether two copies agree. **Pins** are what the founder's copy amounts to:

        layout      every tensor's name, shape, dtype and role, in the model's order       differs: refused
        frozen      the hash of all tensors that never travel (requires_grad=False)        differs: refused
        data        dealt data: each split's length, and the hashes of a few samples       differs: refused
        source      the hash of the file that the class was read from                      differs: a warning

    Source may differ in a comment or a path, so it only warns; a model or data that differ would spoil the average without a
    sign of it, so they are refused, naming the difference. Own data (each machine's) is pinned by nothing.

torch is named here for the type checker only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal, Protocol

import msgspec

from p2pcoord.content import Hash
from p2pcoord.layout import Layout, difference

if TYPE_CHECKING:
    import torch

Split = Literal["train", "validation"]
SPLITS: Final[tuple[Split, ...]] = ("train", "validation")

SAMPLED: Final = 16
"""Samples hashed in each split. They are spread evenly, first and last included: enough to see another order, another
scaling or another file; loading them takes milliseconds where a whole data set takes hours."""

SAMPLE_HASH_BYTES: Final = 8
"""Enough to tell samples apart by accident; nobody is attacked by training on data of his own."""


class Dataset(Protocol):
    """Map-style data: `torch.utils.data.Dataset` with a length, a list, or anything alike."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Workload:
    """A model, its data and its loss. Subclass it; `model`, `data` and `loss` are required.

    It is created without arguments, after `options`, `local` and `dataset` were set, so `__init__` may use them. All methods
    run in the trainer process. Before `model()` the random number generators of torch, Python and numpy are seeded with the
    run's seed, before training with the assignment's.
    """

    options: Mapping[str, Any] = {}
    """The run file's [workload] table: agreed, the same on all machines."""

    local: Mapping[str, str] = {}
    """This machine's `--set KEY=VALUE`, for example a path to the data."""

    dataset: bytes | None = None
    """The founder's `dataset_bytes()`, on every machine; set before `data()` is called, None if there are none."""

    batch_size: ClassVar[int | None] = None
    """Samples in a batch, if the run file does not say ([local] batch_size). None: 32."""

    def model(self) -> torch.nn.Module:
        """The model, on the CPU. The founder's weights become version 0 of the run; the others' are overwritten."""
        raise NotImplementedError

    def data(self, split: Split) -> Dataset:
        """Map-style data for "train" or "validation". With dealt data every machine returns the same and trains on the
        indices that it is dealt; with own data ([data] mode = "own") it returns this machine's."""
        raise NotImplementedError

    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """The mean loss over the batch: a scalar that can be differentiated. The batch is on the model's device."""
        raise NotImplementedError

    def metrics(self, model: torch.nn.Module, batch: Any) -> Mapping[str, float | torch.Tensor]:
        """Other numbers of a validation batch, each a mean over the batch, for example {"accuracy": 0.9}. Optional."""
        return {}

    def optimizer(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer | None:
        """The inner optimizer, fresh. Optional; None means the one of the run file ([local] optimizer). Its state stays on
        this machine, goes on from round to round and survives a restart."""
        return None

    collate: ClassVar[Callable[..., Any] | None] = None
    """Optional: a method `collate(self, samples)` that makes a batch of a list of samples. None: torch's default."""

    def dataset_bytes(self) -> bytes | None:
        """Optional, asked on the founder only: data that must be the same everywhere and is not part of any installation.
        The run pins it by its hash, joiners fetch it like the model, and everybody finds it in `self.dataset`."""
        return None

    @classmethod
    def run_defaults(cls) -> Mapping[str, Mapping[str, Any]]:
        """Optional, asked on the founder only: sections of the run file that suit this workload, for example
        {"strategy": {"local_steps": 100}}. The user's run file overrides them key by key."""
        return {}


# Pins ----------------------------------------------------------------------------------------------------------------


class DataPins(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One split of dealt data: its length, and the hashes of the samples at `sampled_indices(length)`."""

    length: Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
    samples: Annotated[
        tuple[
            Annotated[bytes, msgspec.Meta(min_length=SAMPLE_HASH_BYTES, max_length=SAMPLE_HASH_BYTES)], ...
        ],
        msgspec.Meta(max_length=SAMPLED),
    ]


class WorkloadPins(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a workload amounts to (see the module's theory).

    `source`: SHA-256 of the source file with Unix line ends. `frozen`: SHA-256 over the frozen tensors' bytes in the model's
    order. `train` and `validation` are None for own data.
    """

    layout: Layout
    frozen: Hash
    source: Hash
    train: DataPins | None
    validation: DataPins | None


class PinsDifference(msgspec.Struct, frozen=True):
    """How one machine's workload differs from the run's, in words: what refuses it, and what only warns."""

    refused: tuple[str, ...]
    warned: tuple[str, ...]


def sampled_indices(length: int) -> tuple[int, ...]:
    """Which samples of a split of this length are hashed: up to SAMPLED, evenly spread, first and last included."""
    if length <= SAMPLED:
        return tuple(range(length))
    return tuple(step * (length - 1) // (SAMPLED - 1) for step in range(SAMPLED))


def compare_pins(here: WorkloadPins, agreed: WorkloadPins) -> PinsDifference:
    """How this machine's pins differ from the run's."""
    refused = []
    if layouts := difference(here.layout, agreed.layout):
        refused.append(f"the model differs: {layouts}")
    elif here.frozen != agreed.frozen:
        names = ", ".join(repr(spec.name) for spec in here.layout.specs if spec.role == "frozen")
        refused.append(
            f"the frozen parameters have other values here than in the run ({names or 'the run has some, here are none'}): "
            "load them from the file that the founder loaded"
        )
    for split, ours, theirs in (
        ("train", here.train, agreed.train),
        ("validation", here.validation, agreed.validation),
    ):
        if told := _data_difference(split, ours, theirs):
            refused.append(told)
    warned = []
    if here.source != agreed.source:
        warned.append(
            f"the workload's source differs from the founder's (SHA-256 {here.source.hex()[:12]} here, "
            f"{agreed.source.hex()[:12]} there): make sure that both mean the same"
        )
    return PinsDifference(tuple(refused), tuple(warned))


def _data_difference(split: str, here: DataPins | None, agreed: DataPins | None) -> str:
    if here == agreed:
        return ""
    if here is None or agreed is None:
        return f"{split} data is {'own' if here is None else 'dealt'} here and {'own' if agreed is None else 'dealt'} in the run"
    if here.length != agreed.length:
        return f"{split} data has {here.length} samples here and {agreed.length} in the run"
    differing = [
        index
        for index, ours, theirs in zip(
            sampled_indices(here.length), here.samples, agreed.samples, strict=False
        )
        if ours != theirs
    ]
    if not differing:
        return (
            f"{split} data has {len(here.samples)} hashed samples here and {len(agreed.samples)} in the run"
        )
    listed = ", ".join(map(str, differing))
    return f"{split} data differs: of {len(here.samples)} samples compared, those at {listed} are others here than in the run"

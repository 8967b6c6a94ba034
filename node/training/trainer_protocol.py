"""What the node and its trainer process say to each other: frames over two pipes, tensors only by path.

Theory of operation
    The node starts the trainer with two pipes of their own, so nothing that a workload prints can be taken for an answer. A frame
    is a length (4 bytes, big-endian) and canonical CBOR. Each request has an id, and gets any number of `Progress` and then
    exactly one answer with that id; requests run one after the other, in order. `Cancel` names a request and has no answer of
    its own: the cancelled one answers `Stopped` at the next batch, or as if nothing had been said when it was done already.

        node                                    trainer
        Start (once, first)                     Loaded
        Configure (again after a restart)       Configured
        Initialize (founder)                    Initialized
        Describe (joiner, resuming node)        Described
        Train                                   Progress ..., Trained
        Validate, Export                        Validated, Exported

    Paths are absolute. A file named as an output appears under its name only when it is complete.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

from node.training.workload_loading import WorkloadSpec
from p2pcoord.content import Hash
from p2pcoord.run_config import LocalOptimizer
from p2pcoord.wire import decode, encode
from p2pcoord.workload import WorkloadPins

LENGTH_BYTES: Final = 4

MAX_FRAME_BYTES: Final = 16 << 20
"""The largest is a layout of 32,768 tensors with names of 256 characters: 10 MiB."""


class Body(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of all requests and answers."""


# Requests


class Start(Body, frozen=True, tag="start"):
    """This machine's part: whose code, on what.

    `local` is --set KEY=VALUE; `device` "auto", "cpu", "cuda", "cuda:N" or "mps"; `threads` of torch on the CPU, None for as
    many as there are cores; `directory` keeps what stays on this machine (the inner optimizer's state).
    """

    workload: WorkloadSpec
    local: dict[str, str]
    device: str
    threads: int | None
    directory: str


class Configure(Body, frozen=True, tag="configure"):
    """What the run says; before any request but this one.

    `options` is [workload]; `seed` the run's for the model's first values; `slots` how many optimizer slots a state has;
    `dataset` and `frozen` are files with the founder's data set and frozen parameters (safetensors), None where there are none
    or they are not known yet.
    """

    options: dict[str, Any]
    data_mode: Literal["dealt", "own"]
    batch_size: int | None
    optimizer: LocalOptimizer
    seed: int
    slots: int
    dataset: str | None = None
    frozen: str | None = None


class Initialize(Body, frozen=True, tag="initialize"):
    """Make version 0: the workload's own model, or the one in `init` (safetensors).

    Writes the state, with optimizer slots of zeros, to `state`; the workload's data set, if it has one, to `dataset`; the
    frozen parameters, if it has any, to `frozen`.
    """

    init: str | None
    state: str
    dataset: str
    frozen: str


class Describe(Body, frozen=True, tag="describe"):
    """What does this machine's workload amount to?"""


class Train(Body, frozen=True, tag="train"):
    """Train from the state in `base`, version `base_version`, and write the contribution to `output`.

    `ranges` are half-open ranges of train indices; None means this machine's own data, all of it. Local work ends after
    `local_steps` batches (if not None, else after `local_epochs` passes), and after `sync_interval_s` at the latest. `slot`
    names the contribution. `seed` decides shuffling and every random draw: the same request gives the same bytes on the
    same machine's CPU.
    """

    base: str
    base_version: int
    slot: str
    ranges: tuple[tuple[int, int], ...] | None
    local_epochs: int
    local_steps: int | None
    sync_interval_s: float | None
    seed: int
    output: str


class Validate(Body, frozen=True, tag="validate"):
    """Loss and metrics of the state over these ranges of validation indices; None means this machine's own data."""

    state: str
    ranges: tuple[tuple[int, int], ...] | None


class Export(Body, frozen=True, tag="export"):
    """Write the state as a model file (safetensors) that `load_state_dict` takes. `metadata` goes into its header."""

    state: str
    path: str
    metadata: dict[str, str]


class Cancel(Body, frozen=True, tag="cancel"):
    """The answer to the frame's id is no longer wanted."""


# Answers


class Loaded(Body, frozen=True, tag="loaded"):
    """The workload's class was read, nothing of it called but `run_defaults`.

    `source` is SHA-256 of its file. `device` is what "auto" came to, `device_name` its name for people, `memory_bytes` the memory
    that training can use there: an accelerator's own, else the machine's.
    """

    source: Hash
    run_defaults: dict[str, Any]
    device: str
    device_name: str
    memory_bytes: int
    torch_version: str


class Configured(Body, frozen=True, tag="configured"):
    pass


class Described(Body, frozen=True, tag="described"):
    """`train_samples` and `validation_samples` count this machine's data, dealt or own."""

    pins: WorkloadPins
    train_samples: int
    validation_samples: int


class Initialized(Body, frozen=True, tag="initialized"):
    """The state was written; and the data set, the frozen parameters, if there are any."""

    described: Described
    has_dataset: bool
    has_frozen: bool


class Progress(Body, frozen=True, tag="progress"):
    """`loss` is the mean of the batches since the last progress."""

    local_step: int
    loss: float


class Trained(Body, frozen=True, tag="trained"):
    """The contribution was written.

    `loss` is the mean training loss over `samples` (counted with repetition), `norm` the L2 norm of the pseudo-gradient.
    `finite` is False when a value of the contribution or the loss is infinite or no number: then nobody should use it.
    """

    steps: int
    samples: int
    loss: float
    norm: float
    finite: bool
    wall_s: float


class Validated(Body, frozen=True, tag="validated"):
    """Sums over samples, so that shares add up: divide by `samples` for means. `finite` speaks of all of them."""

    samples: int
    loss_sum: float
    metric_sums: dict[str, float]
    finite: bool
    wall_s: float


class Exported(Body, frozen=True, tag="exported"):
    pass


class Stopped(Body, frozen=True, tag="stopped"):
    """The request was cancelled and left nothing behind."""


class Failed(Body, frozen=True, tag="failed"):
    """`user`: the message is for the person at the keyboard and `exit_code` theirs. Else a bug or a disk, with traceback."""

    user: bool
    message: str
    exit_code: int = 1


Request = Start | Configure | Initialize | Describe | Train | Validate | Export | Cancel
Answer = (
    Loaded
    | Configured
    | Described
    | Initialized
    | Progress
    | Trained
    | Validated
    | Exported
    | Stopped
    | Failed
)


class RequestFrame(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A request and the id that its answer will have."""

    id: int
    body: Request


class AnswerFrame(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """An answer to the request with this id."""

    id: int
    body: Answer


def encode_frame(frame: RequestFrame | AnswerFrame) -> bytes:
    """Length and CBOR."""
    data = encode(frame)
    return len(data).to_bytes(LENGTH_BYTES, "big") + data


def decode_request(data: bytes) -> RequestFrame:
    """Raises RemoteError: then node and trainer are not of one installation."""
    return decode(data, RequestFrame, limit=MAX_FRAME_BYTES)


def decode_answer(data: bytes) -> AnswerFrame:
    """Raises RemoteError: then node and trainer are not of one installation."""
    return decode(data, AnswerFrame, limit=MAX_FRAME_BYTES)

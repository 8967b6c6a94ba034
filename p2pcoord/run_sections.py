"""The sections of a run, as the run file names them: every field's range, unit, default and reason.

Theory of operation
    Each section is a frozen struct, each field an annotated type: range, meaning, unit, and why its default is what it is. That
    annotation is the only statement of a field. The run file's reader (`p2pcoord.run_file`) checks values by it, a peer's
    bytes are checked by it (`p2pcoord.run_config.decode`), and docs/run-file.md is checked against it. What a single field
    cannot say (two fields that contradict each other) is said once, by `contradictions`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Final, Literal

import msgspec

from p2pcoord.wire import encode as encode_value

MAX_CONFIG_BYTES: Final = 32 << 10
"""The config travels inside the first record, whose body has at most 64 KiB."""

MAX_WORKLOAD_NESTING: Final = 12
"""Tables in tables in [workload]; the wire takes 24 levels in all."""


def _says(meaning: str, why: str, unit: str = "") -> msgspec.Meta:
    return msgspec.Meta(description=meaning, extra={"why": why, "unit": unit})


_Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400 * 30)]
_Rate = Annotated[float, msgspec.Meta(gt=0, le=1_000)]
_Fraction = Annotated[float, msgspec.Meta(ge=0, lt=1)]
_Decay = Annotated[float, msgspec.Meta(ge=0, le=10)]
_Epsilon = Annotated[float, msgspec.Meta(gt=0, le=1)]
_Norm = Annotated[float, msgspec.Meta(gt=0, le=1e12)]
_Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000_000)]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all sections."""


class Strategy(Section, frozen=True):
    """[strategy]: what a member does in a round."""

    kind: Annotated[
        Literal["hybrid_federated"],
        _says(
            "members train locally, then their updates are averaged",
            "the one that works over home and campus links: bytes per round do not grow with local work",
        ),
    ] = "hybrid_federated"
    local_epochs: Annotated[
        _Count,
        _says(
            "passes over a member's share in a round",
            "the smallest of FedAvg's settings (McMahan et al. 2017 try 1, 5 and 20): the least drift between members",
            "epochs",
        ),
    ] = 1
    local_steps: Annotated[
        _Count | None,
        _says(
            "optimizer steps in a round, in place of local_epochs",
            "unset: epochs suit small data sets, steps large ones (DiLoCo takes 500)",
            "steps",
        ),
    ] = None
    sync_interval_s: Annotated[
        _Seconds | None,
        _says(
            "a member stops after this time, whatever it has done by then",
            "unset: without it a round's work does not depend on the machine; set it where machines differ in speed",
            "s",
        ),
    ] = None
    aggregation_rounds: Annotated[
        _Count,
        _says(
            "rounds until the run is over",
            "enough for four machines to bring the README's example above 90% accuracy; every real run sets it",
            "rounds",
        ),
    ] = 50


class Synchronization(Section, frozen=True):
    """[synchronization]: when a round closes."""

    kind: Annotated[
        Literal["bsp"],
        _says(
            "bulk synchronous parallel: a round closes when all have arrived, or the barrier timed out",
            "no update is ever stale, which is what FedAvg and DiLoCo assume",
        ),
    ] = "bsp"
    barrier_timeout_s: Annotated[
        _Seconds,
        _says(
            "how long the round waits for its members, from the plan on",
            "a minute of local work is where averaging costs a small part of a round on a 100 Mbit/s link; the dead are noticed "
            "by the failure detector long before",
            "s",
        ),
    ] = 60.0
    straggler_policy: Annotated[
        Literal["leave_out", "extend", "reassign"],
        _says(
            "what happens to a member that is late: leave_out closes without it, extend waits once more as long, reassign gives "
            "its assignment to others (so do all three while less than `minimum_share` has arrived)",
            "one slow machine must not hold the others; what it computed is not needed for the next round",
        ),
    ] = "leave_out"


class Aggregation(Section, frozen=True):
    """[aggregation]: how updates become one."""

    kind: Annotated[
        Literal["federated_average"],
        _says(
            "the mean of the members' updates", "FedAvg (McMahan et al. 2017), what the field compares with"
        ),
    ] = "federated_average"
    weighted: Annotated[
        bool,
        _says(
            "weigh each update by its samples",
            "FedAvg's own weights: the mean over samples, not over machines",
        ),
    ] = True
    clip_norm: Annotated[
        _Norm | None,
        _says(
            "an update with a larger L2 norm is scaled down to it",
            "unset: a right bound depends on model and local work; set it to bound what one bad member can do",
            "L2 norm of the pseudo-gradient",
        ),
    ] = None
    fan_out: Annotated[
        Annotated[int, msgspec.Meta(ge=2, le=64)],
        _says(
            "children of a member in the aggregation tree; nobody receives more than fan_out + 1 vectors",
            "a home link receives 4 vectors as fast as a tree of 2 passes them over twice the levels; 1,000 members are 5 levels",
            "members",
        ),
    ] = 4


class Optimization(Section, frozen=True):
    """[optimization]: the outer optimizer, which steps the model by the averaged update."""

    kind: Annotated[
        Literal["sgd", "adam"],
        _says(
            "outer optimizer",
            "DiLoCo (Douillard et al. 2023) compares SGD, momentum, Nesterov and Adam: Nesterov is best",
        ),
    ] = "sgd"
    learning_rate: Annotated[
        _Rate,
        _says("outer learning rate", 'DiLoCo\'s 0.7; kind = "adam" needs its own (FedAdam: 0.001 to 0.1)'),
    ] = 0.7
    momentum: Annotated[_Fraction, _says("SGD's momentum", "DiLoCo's 0.9")] = 0.9
    nesterov: Annotated[bool, _says("Nesterov's form of momentum", "DiLoCo: better than plain momentum")] = (
        True
    )
    weight_decay: Annotated[
        _Decay, _says("pulls parameters to zero in each outer step", "the inner optimizer already decays")
    ] = 0.0
    beta1: Annotated[_Fraction, _says("Adam's decay of the mean", "FedAdam (Reddi et al. 2021): 0.9")] = 0.9
    beta2: Annotated[
        _Fraction, _says("Adam's decay of the second moment", "FedAdam: 0.99, as outer steps are few")
    ] = 0.99
    epsilon: Annotated[
        _Epsilon,
        _says(
            "Adam's degree of adaptivity",
            "FedAdam (Reddi et al. 2021): 0.001 works on nearly all its tasks",
        ),
    ] = 1e-3


class LocalOptimizer(Section, frozen=True):
    """[local.optimizer]: the inner optimizer, unless the workload brings its own."""

    kind: Annotated[
        Literal["adamw", "adam", "sgd"],
        _says("torch.optim's class", "DiLoCo's inner optimizer, and the field's default"),
    ] = "adamw"
    learning_rate: Annotated[
        _Rate, _says("inner learning rate", "torch's default for Adam, right for small models")
    ] = 1e-3
    warmup_steps: Annotated[
        Annotated[int, msgspec.Meta(ge=0, le=1_000_000_000)],
        _says(
            "the learning rate rises linearly over a member's first steps in the run",
            "0: small models need none; DiLoCo takes 1,000",
            "steps",
        ),
    ] = 0
    momentum: Annotated[_Fraction, _says("SGD's momentum", "torch's default: what plain SGD means")] = 0.0
    nesterov: Annotated[bool, _says("Nesterov's form of momentum", "torch's default")] = False
    weight_decay: Annotated[
        _Decay,
        _says(
            "decoupled for adamw, L2 for the others", "torch's default for AdamW (Loshchilov, Hutter 2019)"
        ),
    ] = 0.01
    beta1: Annotated[_Fraction, _says("Adam's decay of the mean", "Kingma, Ba 2015")] = 0.9
    beta2: Annotated[_Fraction, _says("Adam's decay of the second moment", "Kingma, Ba 2015")] = 0.999
    epsilon: Annotated[_Epsilon, _says("Adam's divisor is never below it", "Kingma, Ba 2015")] = 1e-8
    clip_norm: Annotated[
        _Norm | None,
        _says(
            "a gradient with a larger L2 norm is scaled down to it",
            "1, as DiLoCo and nearly all language models: one odd batch moves a member no further than others",
            "L2 norm",
        ),
    ] = 1.0


class Local(Section, frozen=True):
    """[local]: how a member trains between two averages."""

    batch_size: Annotated[
        Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] | None,
        _says("samples in a batch", "unset: the workload's `batch_size`, else 32", "samples"),
    ] = None
    optimizer: Annotated[
        LocalOptimizer, _says("the inner optimizer, a table", "its state stays on the machine, as in DiLoCo")
    ] = LocalOptimizer()


class Data(Section, frozen=True):
    """[data]: whose data."""

    mode: Annotated[
        Literal["dealt", "own"],
        _says(
            "dealt: all members load the same and train on the indices that they are dealt; own: each on its machine's",
            "needs nothing from anybody but the same code, and a failed member's share can go to others",
        ),
    ] = "dealt"


class Participation(Section, frozen=True):
    """[participation]: how many must take part."""

    minimum_share: Annotated[
        Annotated[float, msgspec.Meta(gt=0, le=1)],
        _says(
            "a round that timed out closes only with this share of its members",
            "half: below it an average says more about who was slow than about the data",
            "of the planned members",
        ),
    ] = 0.5
    minimum_members: Annotated[
        Annotated[int, msgspec.Meta(ge=1, le=10_000)],
        _says(
            "the first round begins when so many members live; later ones go on with whoever is left",
            "1: a run begins with its founder; set it when machines start one after the other",
            "members",
        ),
    ] = 1
    minimum_memory_mb: Annotated[
        Annotated[int, msgspec.Meta(ge=0, le=1 << 30)],
        _says(
            "a machine whose device has less memory is not admitted",
            "0: whoever can load the workload may join; set it so that small machines are told before they run out",
            "MiB",
        ),
    ] = 0


class Coordination(Section, frozen=True):
    """[coordination]: who decides."""

    committee_size: Annotated[
        Literal[1, 3, 5, 7],
        _says(
            "voters, once as many members are fit to vote",
            "5 survives any two deaths; etcd advises it, and 7 costs more than it saves",
            "voters",
        ),
    ] = 5
    rotation_rounds: Annotated[
        Annotated[int, msgspec.Meta(ge=0, le=1_000_000)],
        _says(
            "rounds after which the coordinator hands its duty on; 0: never",
            "often enough that no machine carries the duty for long, rare enough that the hand-over's round trips vanish",
            "rounds",
        ),
    ] = 10


class RunSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The run file's sections. `workload` is free: strings, numbers, booleans, lists and tables for `Workload.options`."""

    strategy: Strategy = Strategy()
    synchronization: Synchronization = Synchronization()
    aggregation: Aggregation = Aggregation()
    optimization: Optimization = Optimization()
    local: Local = Local()
    data: Data = Data()
    participation: Participation = Participation()
    coordination: Coordination = Coordination()
    workload: dict[str, Any] = {}


# Rules between fields -----------------------------------------------------------------------------------------------

Key = tuple[str, ...]
"""A key's path in the run file: ("local", "optimizer", "kind")."""


def contradictions(settings: RunSettings) -> Iterator[tuple[Key, str]]:
    """What no single field's range can say: each key, and what is wrong with it."""
    for key, value in _floats(msgspec.to_builtins(settings), ()):
        if not math.isfinite(value):
            yield key, f"a finite number, not {value}"
    optimizers: tuple[tuple[Key, Optimization | LocalOptimizer], ...] = (
        (("optimization",), settings.optimization),
        (("local", "optimizer"), settings.local.optimizer),
    )
    for table, optimizer in optimizers:
        if optimizer.kind == "sgd" and optimizer.nesterov and optimizer.momentum == 0:
            yield (
                (*table, "nesterov"),
                "needs a momentum above 0; set nesterov = false for SGD without momentum",
            )
    for key, told in _workload_problems(settings.workload, ("workload",)):
        yield key, told
        return
    if len(encode_value(settings.workload)) > MAX_CONFIG_BYTES // 2:
        yield (
            ("workload",),
            f"at most {MAX_CONFIG_BYTES // 2} bytes, as it travels inside the run's first record",
        )


def _workload_problems(value: Any, at: Key) -> Iterator[tuple[Key, str]]:
    if len(at) > MAX_WORKLOAD_NESTING:
        yield at, f"nested deeper than {MAX_WORKLOAD_NESTING} levels"
    elif isinstance(value, dict):
        for name, inner in value.items():
            if not isinstance(name, str):
                yield at, f"keys are strings, not {typed(name)}"
            else:
                yield from _workload_problems(inner, (*at, name))
    elif isinstance(value, list):
        for inner in value:
            for _, told in _workload_problems(inner, (*at, "")):
                yield at, told
    elif isinstance(value, int) and abs(value) >= 1 << 63:
        yield at, "a whole number of at most 64 bits"
    elif not isinstance(value, str | int | float | bool):
        yield at, f"a string, number, boolean, list or table, not {typed(value)}"


def _floats(value: Any, at: Key) -> Iterator[tuple[Key, float]]:
    if isinstance(value, float):
        yield at, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _floats(inner, (*at, str(name)))
    elif isinstance(value, list):
        for inner in value:
            yield from _floats(inner, at)


def typed(value: Any) -> str:
    words = {
        dict: "a table",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return words.get(type(value), f"a {type(value).__name__}")


def spoken(key: Key) -> str:
    """("local", "optimizer", "kind") as people write it: [local.optimizer] kind."""
    *table, name = [part for part in key if part]
    return f"[{'.'.join(table)}] {name}" if table else f"[{name}]"

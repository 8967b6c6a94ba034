"""What a run is: its sections as the run file names them, their ranges and defaults, and the hash that names the run.

Theory of operation
    Each section is a frozen struct, each field an annotated type: range, meaning, unit, and why its default is what it is. That
    annotation is the only statement of a field. The run file's reader checks values by it and names key and line, a
    peer's bytes are checked by it (`decode`), and docs/run-file.md is checked against it (`reference`). What a single field
    cannot say (two fields that contradict each other) is said once, by `contradictions`.

    `RunSettings` is what the founder chooses; `RunConfig` adds who founded the run, a nonce and the workload. The run id is the
    hash of the config's canonical CBOR, so a run cannot change what it is; whoever knows the id can check the config.

    A run file is TOML. Python's parser keeps no positions, so only when something is wrong the line is found by parsing the file's
    beginnings: the first one that has the key ends with the statement that set it.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Iterator, Mapping
from hashlib import sha256
from typing import Annotated, Any, Final, Literal, get_type_hints

import msgspec

from p2pcoord.errors import LocalError, RemoteError, UserError
from p2pcoord.identity import DOMAIN, PROTOCOL_VERSION
from p2pcoord.wire import decode as decode_bytes
from p2pcoord.wire import encode as encode_value

MAX_RUN_FILE_BYTES: Final = 64 << 10
"""A run file that sets every field has some 2 KiB; the rest is [workload]'s."""

MAX_CONFIG_BYTES: Final = 32 << 10
"""The config travels inside the first record, whose body has at most 64 KiB."""

MAX_WORKLOAD_NESTING: Final = 12
"""Tables in tables in [workload]; the wire takes 24 levels in all."""

NONCE_BYTES: Final = 16
"""Two runs of one founder never share an id by accident."""


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
            "its assignment to others",
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
            "no round begins with fewer living members",
            "1: a run begins with its founder; set it when machines start one after the other",
            "members",
        ),
    ] = 1


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


class RunConfig(RunSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that all members of a run agree on from its first moment. `run_id` names it.

    `workload_spec` is the founder's --workload as its peers may use it too: "text", "module:Name" or "FILE.py:Name" (the file's
    name without its folder). `open`: whoever knows the run may join, without the secret.
    """

    founder: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    nonce: Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
    workload_spec: Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
    protocol: Annotated[int, msgspec.Meta(ge=1, le=1 << 31)] = PROTOCOL_VERSION
    open: bool = False


def found_run(
    settings: RunSettings, *, founder: str, nonce: bytes, workload_spec: str, open: bool = False
) -> RunConfig:
    """The config of a new run. Raises LocalError when it would not pass `decode`."""
    sections = {name: getattr(settings, name) for name in RunSettings.__struct_fields__}
    config = RunConfig(**sections, founder=founder, nonce=nonce, workload_spec=workload_spec, open=open)
    try:
        decode(encode(config))
    except RemoteError as error:
        raise LocalError(f"this is no run config: {error}") from None
    return config


def encode(config: RunConfig) -> bytes:
    """Canonical CBOR."""
    return encode_value(config)


def decode(data: bytes) -> RunConfig:
    """A config that a peer sent. Raises RemoteError as `wire.decode` does, and "out_of_range" for contradictions."""
    config = decode_bytes(data, RunConfig, limit=MAX_CONFIG_BYTES)
    for key, told in contradictions(config):
        raise RemoteError("out_of_range", f"{_spoken(key)}: {told}")
    return config


def run_id(config: RunConfig) -> bytes:
    """Names the run: 32 bytes, SHA-256 over domain and canonical CBOR."""
    return sha256(DOMAIN + b"run\x00" + encode(config)).digest()


def derive_seed(run: bytes, *purpose: str | int | bytes) -> int:
    """A seed below 2**63 for one purpose, such as derive_seed(run, "shuffle", round, assignment). Streams are independent: one
    more draw in one moves nothing in another."""
    return (
        int.from_bytes(sha256(DOMAIN + b"seed\x00" + encode_value([run, *purpose])).digest()[:8], "big") >> 1
    )


# Reading -------------------------------------------------------------------------------------------------------------

Key = tuple[str, ...]
"""A key's path in the run file: ("local", "optimizer", "kind")."""

_UNUSED_BY_KIND: Final = {
    "sgd": ("beta1", "beta2", "epsilon"),
    "adam": ("momentum", "nesterov"),
    "adamw": ("momentum", "nesterov"),
}


def parse_run_file(
    text: str, path: str = "run.toml", workload_defaults: Mapping[str, Mapping[str, Any]] | None = None
) -> RunSettings:
    """The settings in a run file (empty: all defaults). `path` is for messages only.

    `workload_defaults` (Workload.run_defaults) are overridden key by key; a table in which the file names another `kind` drops
    them, and so do local_epochs and local_steps each other's. Raises UserError (exit code 2) that names file, line and key.
    """
    if len(text.encode()) > MAX_RUN_FILE_BYTES:
        raise UserError(f"{path}: a run file has at most {MAX_RUN_FILE_BYTES} bytes", exit_code=2)
    try:
        given = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        told = str(error).replace("(at end of document)", f"(in the statement of line {_broken_line(text)})")
        raise UserError(f"{path}: {told}", exit_code=2) from None

    def refuse(key: Key, told: str) -> UserError:
        line = line_of(text, key)
        return UserError(f"{path}{f' line {line}' if line else ''}: {_spoken(key)}: {told}", exit_code=2)

    for key, told in _given_problems(given):
        raise refuse(key, told)
    base = {name: dict(table) for name, table in (workload_defaults or {}).items()}
    try:
        defaults = _section(RunSettings, base, ())
    except _Wrong as wrong:
        raise UserError(f"run_defaults() of the workload: {_spoken(wrong.key)}: {wrong.told}") from None
    try:
        settings: RunSettings = _section(
            RunSettings, _overlay(msgspec.to_builtins(defaults), base, given), ()
        )
    except _Wrong as wrong:
        raise refuse(wrong.key, wrong.told) from None
    for key, told in contradictions(settings):
        raise refuse(key, told)
    return settings


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


def _given_problems(given: Mapping[str, Any]) -> Iterator[tuple[Key, str]]:
    """Keys that are right by themselves, but that someone who wrote them means otherwise."""
    strategy, outer = given.get("strategy"), given.get("optimization")
    if isinstance(strategy, dict) and "local_epochs" in strategy and "local_steps" in strategy:
        yield (
            ("strategy", "local_steps"),
            "a round's local work is given by local_epochs or by local_steps, not by both",
        )
    if isinstance(outer, dict) and outer.get("kind") == "adam" and "learning_rate" not in outer:
        yield (
            ("optimization", "kind"),
            "adam needs a learning_rate of its own (0.001 to 0.1); the default is for sgd",
        )
    local = given.get("local")
    inner = local.get("optimizer") if isinstance(local, dict) else None
    tables: tuple[tuple[Key, Any, str], ...] = (
        (("optimization",), outer, Optimization().kind),
        (("local", "optimizer"), inner, LocalOptimizer().kind),
    )
    for table, values, default in tables:
        if isinstance(values, dict):
            kind = values.get("kind", default)
            unused = _UNUSED_BY_KIND.get(kind, ()) if isinstance(kind, str) else ()
            for name in unused:
                if name in values:
                    yield (*table, name), f"means nothing with kind = {kind!r}"


def _overlay(defaults: dict[str, Any], base: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The file's values over the workload's; `base` holds only what the workload said itself."""
    result = dict(base)
    for name, value in given.items():
        under = base.get(name)
        if (
            not isinstance(value, dict)
            or not isinstance(under, dict)
            or not isinstance(defaults.get(name), dict)
        ) or ("kind" in value and value["kind"] != defaults[name].get("kind")):
            result[name] = value
        else:
            if value.keys() & {"local_epochs", "local_steps"}:
                under = {k: v for k, v in under.items() if k not in ("local_epochs", "local_steps")}
            result[name] = _overlay(defaults[name], under, value)
    return result


class _Wrong(Exception):  # never leaves this module
    def __init__(self, key: Key, told: str) -> None:
        super().__init__(told)
        self.key = key
        self.told = told


def _section(kind: type[Any], table: Any, at: Key) -> Any:
    """A struct from a table, field by field, so that what is wrong has a name. Raises _Wrong."""
    if not isinstance(table, dict):
        raise _Wrong(at, f"a table, not {_typed(table)}")
    hints = get_type_hints(kind, include_extras=True)
    for name in table:
        if name not in hints:
            close = difflib.get_close_matches(name, hints, n=1)
            known = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(hints)}"
            raise _Wrong((*at, name), f"unknown {'key' if at else 'section'}; {known}")
    return kind(**{name: _value(hints[name], table[name], (*at, name)) for name in table})


def _value(hint: Any, value: Any, at: Key) -> Any:
    plain = hint.__origin__ if hasattr(hint, "__metadata__") else hint
    if isinstance(plain, type) and issubclass(plain, Section):
        return _section(plain, value, at)
    try:
        return msgspec.convert(value, hint)
    except msgspec.ValidationError as error:
        raise _Wrong(at, _worded(str(error), plain, value)) from None


def _worded(error: str, plain: Any, value: Any) -> str:
    if choices := getattr(plain, "__args__", ()) if getattr(plain, "__origin__", None) is Literal else ():
        close = difflib.get_close_matches(value, choices, n=1) if isinstance(value, str) else []
        told = f"one of {', '.join(map(repr, choices))}, not {value!r}"
        return f"{told}; did you mean {close[0]!r}?" if close else told
    told = error.replace(" | null", "").replace("`", "").removeprefix("Expected ")
    return told if ", got " in told else f"{told}, not {value!r}"


def _workload_problems(value: Any, at: Key) -> Iterator[tuple[Key, str]]:
    if len(at) > MAX_WORKLOAD_NESTING:
        yield at, f"nested deeper than {MAX_WORKLOAD_NESTING} levels"
    elif isinstance(value, dict):
        for name, inner in value.items():
            if not isinstance(name, str):
                yield at, f"keys are strings, not {_typed(name)}"
            else:
                yield from _workload_problems(inner, (*at, name))
    elif isinstance(value, list):
        for inner in value:
            for _, told in _workload_problems(inner, (*at, "")):
                yield at, told
    elif isinstance(value, int) and abs(value) >= 1 << 63:
        yield at, "a whole number of at most 64 bits"
    elif not isinstance(value, str | int | float | bool):
        yield at, f"a string, number, boolean, list or table, not {_typed(value)}"


def _floats(value: Any, at: Key) -> Iterator[tuple[Key, float]]:
    if isinstance(value, float):
        yield at, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _floats(inner, (*at, str(name)))
    elif isinstance(value, list):
        for inner in value:
            yield from _floats(inner, at)


def _typed(value: Any) -> str:
    words = {
        dict: "a table",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return words.get(type(value), f"a {type(value).__name__}")


def _spoken(key: Key) -> str:
    """("local", "optimizer", "kind") as people write it: [local.optimizer] kind."""
    *table, name = [part for part in key if part]
    return f"[{'.'.join(table)}] {name}" if table else f"[{name}]"


def line_of(text: str, key: Key) -> int | None:
    """The line (from 1) on which the statement begins that sets `key`, or its nearest table that the file has. None when the
    file has no part of it."""
    found, depth = None, 0
    for begin, table in _beginnings(text):
        reached = _depth(table, key) if table is not None else 0
        if reached > depth:
            found, depth = begin, reached
    return found


def _broken_line(text: str) -> int:
    """The line on which the statement begins that TOML's parser does not get to the end of."""
    return max((begin for begin, table in _beginnings(text) if table is None), default=1)


def _beginnings(text: str) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """For each line that ends a statement, the line on which that begins, and the file up to there. The rest that never
    becomes a statement comes last, with None."""
    lines = text.splitlines(keepends=True)
    begin = 0
    for end in range(1, len(lines) + 1):
        while begin < end - 1 and not lines[begin].split("#")[0].strip():
            begin += 1  # blank lines and comments belong to nothing
        try:
            table = tomllib.loads("".join(lines[:end]))
        except tomllib.TOMLDecodeError:
            continue  # in the middle of a statement that spans lines
        yield begin + 1, table
        begin = end
    if begin < len(lines):
        yield begin + 1, None


def _depth(table: Any, key: Key) -> int:
    for depth, part in enumerate(key):
        if not isinstance(table, dict) or part not in table:
            return depth
        table = table[part]
    return len(key)


# Documentation -------------------------------------------------------------------------------------------------------


class Documented(msgspec.Struct, frozen=True):
    """One field as docs/run-file.md lists it."""

    section: str
    name: str
    type: str
    unit: str
    default: str
    meaning: str
    why: str


def reference() -> Iterator[Documented]:
    """Every field of the run file in order, as it is declared."""
    yield from _documented(RunSettings, ())


def _documented(kind: type[Any], at: Key) -> Iterator[Documented]:
    hints = get_type_hints(kind, include_extras=True)
    defaults = dict(zip(kind.__struct_fields__, kind.__struct_defaults__, strict=True))
    for name in kind.__struct_fields__:
        hint, default = hints[name], defaults[name]
        plain = hint.__origin__ if hasattr(hint, "__metadata__") else hint
        if isinstance(plain, type) and issubclass(plain, Section):
            yield from _documented(plain, (*at, name))
        elif at:
            meta = next(m for m in hint.__metadata__ if m.extra)
            yield Documented(
                section=".".join(at),
                name=name,
                type=_type_words(hint, plain),
                unit=meta.extra["unit"],
                default="unset" if default is None else msgspec.json.encode(default).decode(),
                meaning=meta.description,
                why=meta.extra["why"],
            )


def _type_words(hint: Any, plain: Any) -> str:
    """A type and its range, for people: "int >= 1, <= 64"."""
    if getattr(plain, "__origin__", None) is Literal:
        return " or ".join(msgspec.json.encode(choice).decode() for choice in plain.__args__)
    schema = msgspec.json.schema(hint)
    [part] = [option for option in schema.get("anyOf", [schema]) if option.get("type") != "null"]
    word = {"integer": "int", "number": "float", "boolean": "bool"}[part["type"]]
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = ", ".join(f"{sign} {part[key]:,}" for key, sign in signs.items() if key in part)
    return f"{word} {bounds}".strip()

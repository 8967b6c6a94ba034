"""Reads a run file, and says what one may say.

Theory of operation
    A run file is TOML with the sections of `p2pcoord.run_sections`. Each value is checked alone by its field's annotation, so
    that what is wrong has a name; then the whole by `contradictions`, as a peer's config is.

    Python's parser keeps no positions, so only when something is wrong the line is found by parsing the file's beginnings: the
    first one that has the key ends with the statement that set it.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal, get_type_hints

import msgspec

from p2pcoord.errors import UserError
from p2pcoord.run_sections import (
    Key,
    LocalOptimizer,
    Optimization,
    RunSettings,
    Section,
    contradictions,
    spoken,
    typed,
)

MAX_RUN_FILE_BYTES: Final = 64 << 10
"""A run file that sets every field has some 2 KiB; the rest is [workload]'s."""

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
        return UserError(f"{path}{f' line {line}' if line else ''}: {spoken(key)}: {told}", exit_code=2)

    for key, told in _given_problems(given):
        raise refuse(key, told)
    base = {name: dict(table) for name, table in (workload_defaults or {}).items()}
    try:
        defaults = _section(RunSettings, base, ())
    except _Wrong as wrong:
        raise UserError(f"run_defaults() of the workload: {spoken(wrong.key)}: {wrong.told}") from None
    try:
        settings: RunSettings = _section(
            RunSettings, _overlay(msgspec.to_builtins(defaults), base, given), ()
        )
    except _Wrong as wrong:
        raise refuse(wrong.key, wrong.told) from None
    for key, told in contradictions(settings):
        raise refuse(key, told)
    return settings


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
        raise _Wrong(at, f"a table, not {typed(table)}")
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

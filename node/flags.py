"""Flags that several commands have, and what makes their values ones that can be meant: those of a node, and its directory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import click

DEFAULT_DIRECTORY = "./p2pcoord-data"

F = TypeVar("F", bound=Callable[..., Any])


def _settings(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    """--set K=V, each key once."""
    settings: dict[str, str] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"{text!r} is not KEY=VALUE")
        if key in settings:
            raise click.BadParameter(f"{key} is set twice")
        settings[key] = value
    return settings


def _device(_: click.Context, __: click.Parameter, given: str | None) -> str | None:
    if given is None:
        return None
    kind, colon, index = given.partition(":")
    if kind not in ("auto", "cpu", "cuda", "mps") or (colon and (kind != "cuda" or not index.isdecimal())):
        raise click.BadParameter(f"{given!r} is none of auto, cpu, cuda, cuda:N, mps")
    return given


def _flags(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


directory_flag = click.option(
    "--data-dir",
    "data_dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=DEFAULT_DIRECTORY,
    show_default=True,
    help="Where the node keeps its key, log and model.",
)


class FoundersFlags(NamedTuple):
    """What only the founder of a run may say, one field a flag of that name; a default means that it was not given.

    Whoever joins is refused each of them, and whoever resumes is refused what the run was not founded with (`run.contradicted`).
    """

    config: Path | None = None
    rounds: int | None = None
    minimum_members: int | None = None
    init: Path | None = None
    open: bool = False

    def given(self) -> dict[str, Any]:
        """The flags that were given, as they are written, and their values."""
        return {
            f"--{name.replace('_', '-')}": value
            for name, value in self._asdict().items()
            if value is not None and value is not False
        }

    def arguments(self) -> tuple[str, ...]:
        """As a command line has them."""
        return tuple(
            part
            for flag, value in self.given().items()
            for part in ((flag,) if value is True else (flag, str(value)))
        )


def _gathered(function: F) -> F:
    """The founder's flags reach the command as one argument, `founders`."""

    @functools.wraps(function)
    def command(**flags: Any) -> Any:
        founders = FoundersFlags(**{name: flags.pop(name) for name in FoundersFlags._fields})
        return function(founders=founders, **flags)

    return cast(F, command)


_founders_flags = _flags(
    click.option(
        "--config",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help="The run file (TOML) of a new run.",
    ),
    click.option(
        "--rounds", type=click.IntRange(min=1), metavar="N", help="Rounds of a new run (aggregation_rounds)."
    ),
    click.option(
        "--minimum-members",
        type=click.IntRange(min=1),
        metavar="N",
        help="The first round of a new run waits for so many members.",
    ),
    click.option(
        "--init",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help="First parameters of a new run (safetensors).",
    ),
    click.option("--open", is_flag=True, help="Found a run that anyone may join, without a secret."),
)

node_flags = _flags(
    click.option(
        "--bootstrap",
        multiple=True,
        metavar="ADDR",
        help="A node of the run to join: HOST:PORT or a multiaddr.",
    ),
    click.option(
        "--secret", metavar="S", help="The run's secret, from the line that a node of the run printed."
    ),
    click.option("--workload", metavar="SPEC", help="What to train: FILE.py:Name, module:Name or text."),
    click.option(
        "--set",
        "local",
        multiple=True,
        metavar="K=V",
        callback=_settings,
        help="A setting of this machine's workload.",
    ),
    click.option(
        "--device",
        callback=_device,
        metavar="DEVICE",
        help="auto, cpu, cuda[:N] or mps.  [default: auto]",
    ),
    _founders_flags,
    _gathered,
)

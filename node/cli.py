"""The command line. It understands flags, calls the part that does the work, and turns what went wrong into a message.

    exit code   0 done      1 failed      2 usage: the command line cannot be meant

Nothing heavy is imported before a command needs it, so `p2pcoord --help` answers at once. A user's mistake (`UserError`) is
one message on standard error, without a traceback of ours; any other exception is our bug and shows where it happened.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from node.flags import FoundersFlags, directory_flag, node_flags

if TYPE_CHECKING:
    from simulations.report import Report

CLUSTER_DIRECTORY = "./p2pcoord-cluster"

FAULTS = ("none", "crashes", "loss", "partitions", "all")


class _Commands(click.Group):
    """A group whose commands' mistakes become messages."""

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        try:
            return super().make_context(*args, **extra)
        except click.ClickException as error:
            raise _told(error) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.ClickException as error:
            raise _told(error) from None
        except (click.Abort, click.exceptions.Exit):
            raise
        except KeyboardInterrupt:
            raise click.exceptions.Exit(130) from None
        except Exception as error:
            told = _mistake(error)
            if told is None:
                raise
            message, exit_code = told
            click.echo(f"error: {message}", err=True)
            raise click.exceptions.Exit(exit_code) from None


def _told(error: click.ClickException) -> Exception:
    """click's own message on one line, as ours are; its help for a command line that says nothing stays."""
    if type(error).__name__ == "NoArgsIsHelpError":  # by name: older versions of click have none
        return error
    click.echo(f"error: {' '.join(error.format_message().split())}", err=True)
    return click.exceptions.Exit(error.exit_code)


def _mistake(error: BaseException) -> tuple[str, int] | None:
    """Message and exit code of what is the user's mistake or the disk's; None for what is ours.

    trio hands out what several tasks raised as a group. A mistake in it ended the others, so it is the one to tell.
    """
    from p2pcoord.errors import UserError

    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, map(_mistake, error.exceptions)), None)
    if isinstance(error, UserError):
        return str(error), error.exit_code
    if type(error).__name__ in ("StorageError", "CorruptLog"):  # by name: their modules need not be loaded
        return str(error), 1
    return None


def _show_version(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if not asked or ctx.resilient_parsing:
        return
    from importlib import metadata

    try:
        click.echo(f"p2pcoord {metadata.version('p2pcoord')}")
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        click.echo("p2pcoord, not installed")
    ctx.exit()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_show_version,
    help="Show it and exit.",
)
def cli() -> None:
    """Trains one PyTorch model on many machines that nobody needs to keep alive."""


def main() -> None:
    """The console script."""
    if sys.argv[1:2] == ["node"]:
        # A node takes signals itself while it lives. This is for those that come just before and just after: there is nobody
        # to tell, and an exception at whatever line Python is at would look like a bug.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _leave_at_once)
    cli(prog_name="p2pcoord")


def _leave_at_once(*_: object) -> None:
    with suppress(OSError):
        os.write(1, b"leaving\n")  # not by way of sys.stdout, which may be in the midst of a line
    os._exit(0)


def _tell(line: str) -> None:
    """Prints a line. A screen that is gone (a closed pipe) stops nobody."""
    with suppress(OSError):
        click.echo(line)


# Commands ------------------------------------------------------------------------------------------------------------


@cli.command()
@node_flags
@click.option(
    "--listen",
    multiple=True,
    metavar="ADDR",
    help="Where to accept connections.  [default: /ip4/0.0.0.0/tcp/4001]",
)
@click.option(
    "--announce", multiple=True, metavar="ADDR", help="An address at which others reach this machine."
)
@click.option("--name", metavar="NAME", help="This machine's name for people.  [default: its host name]")
@directory_flag
def node(data_dir: Path, **flags: Any) -> None:
    """Take part in a run: found one, join one (--bootstrap), or go on with the one in the directory."""
    from functools import partial

    import trio

    from node.process import run_node
    from node.start import NodeOptions

    options = NodeOptions(data_dir=data_dir, **flags)
    trio.run(partial(run_node, options, tell=_tell))


@cli.command()
@directory_flag
@click.option("--peer", metavar="ADDR", help="Ask this node over the network instead.")
@click.option("--secret", metavar="S", help="With --peer: the run's secret.")
@click.option("--watch", is_flag=True, help="Keep showing it, until Ctrl-C.")
@click.option(
    "--json", "as_json", is_flag=True, help="As one line of JSON; with --watch one line each second."
)
@click.pass_context
def status(
    ctx: click.Context, data_dir: Path, peer: str | None, secret: str | None, watch: bool, as_json: bool
) -> None:
    """Show what a node knows of itself and of the run."""
    given = ctx.get_parameter_source("data_dir") is click.core.ParameterSource.COMMANDLINE
    if peer is not None and given:
        raise click.UsageError(
            "--data-dir asks the node on this machine, --peer another one: give one of them"
        )
    if secret is not None and peer is None:
        raise click.UsageError("--secret is for --peer: the node on this machine asks for none")
    import trio

    from node.reporting.events import newest_events

    async def ask() -> dict[str, Any]:
        if peer is not None:
            from node.reporting.remote_status import ask as ask_peer

            document: dict[str, Any] = await ask_peer(peer, secret)
            return document
        from node.reporting.status_socket import ask_status

        return await ask_status(data_dir)

    def events() -> list[dict[str, Any]]:
        return [] if peer is not None else newest_events(data_dir)

    if as_json:
        trio.run(_print_json, ask, watch)
        return
    from rich.console import Console

    from node.reporting import status_view

    # Not a terminal: wide enough that nothing is folded, for grep and the like.
    console = Console() if sys.stdout.isatty() else Console(width=200, color_system=None)
    if not watch:
        status_view.show(trio.run(ask), events(), console)
        return
    _until_interrupted(lambda: trio.run(status_view.watch, ask, events, console))


async def _print_json(ask: Callable[[], Any], again: bool) -> None:
    import msgspec
    import trio

    while True:
        click.echo(msgspec.json.encode(await ask()).decode())
        if not again:
            return
        await trio.sleep(1)


@cli.command()
@directory_flag
@click.option("--follow", is_flag=True, help="Go on with new events as they come, until Ctrl-C.")
def events(data_dir: Path, follow: bool) -> None:
    """Print the node's events, one line of JSON each."""
    import msgspec

    from node.reporting.events import follow_events, read_events
    from node.storage.directory import check_format

    check_format(data_dir)

    def print_all(found: Iterator[Mapping[str, Any]]) -> None:
        for event in found:
            click.echo(msgspec.json.encode(event).decode())

    if follow:
        _until_interrupted(lambda: print_all(follow_events(data_dir)))
    else:
        print_all(read_events(data_dir))


def _until_interrupted(call: Callable[[], object]) -> None:
    """Ctrl-C is how these end: well."""
    try:
        call()
    except KeyboardInterrupt:
        click.echo(err=True)


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False), metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="As one line of JSON.")
def verify(directory: Path, as_json: bool) -> None:
    """Check everything in a node's directory: frames, hashes, signatures, certificates, the state.

    A node may run in it meanwhile. Exit code 1 when something is wrong; the first fault of the log is told with its frame.
    """
    from node.storage.verify import verify as verify_directory

    report = verify_directory(directory)
    if as_json:
        import msgspec

        click.echo(msgspec.json.encode(report.as_dict()).decode())
    else:
        for line in report.lines():
            click.echo(line)
    sys.exit(0 if report.ok else 1)


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False), metavar="DIR")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.safetensors")
def export(directory: Path, file: Path) -> None:
    """Copy the newest certified model out of a node's directory; it loads with load_state_dict."""
    from node.storage.export import export_latest

    version = export_latest(directory, file)
    click.echo(f"{file}: version {version}")


@cli.command()
@click.option(
    "--nodes", type=click.IntRange(min=1), default=4, show_default=True, metavar="N", help="How many."
)
@node_flags
@click.option(
    "--name",
    default="node",
    show_default=True,
    metavar="NAME",
    help="Names of the nodes, before their number.",
)
@click.option(
    "--data-dir",
    "base",
    type=click.Path(path_type=Path, file_okay=False),
    default=CLUSTER_DIRECTORY,
    show_default=True,
    help="Holds a directory for each node.",
)
def cluster(
    nodes: int,
    base: Path,
    bootstrap: tuple[str, ...],
    secret: str | None,
    workload: str | None,
    local: dict[str, str],
    device: str | None,
    founders: FoundersFlags,
    name: str,
) -> None:
    """Run a network of nodes on this machine, with the flags of `node`; Ctrl-C ends all of them."""
    from functools import partial

    import trio
    from rich.console import Console

    from node.cluster import ClusterOptions, run_cluster

    if bootstrap and founders.given():
        raise click.UsageError(
            f"{next(iter(founders.given()))} is the founder's: with --bootstrap all nodes join"
        )
    founds = not bootstrap and not (base / "node1" / "log").exists()
    if founds and founders.minimum_members is None and founders.config is None:
        # They start one after the other, and are meant to train together.
        founders = founders._replace(minimum_members=nodes)
    shared = [*(("--workload", workload) if workload else ()), *(("--device", device) if device else ())]
    for key, value in local.items():
        shared += ["--set", f"{key}={value}"]
    console = Console()

    def tell(line: str) -> None:
        """Above the live table where there is one."""
        if console.is_terminal:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            _tell(line)

    options = ClusterOptions(
        nodes=nodes,
        base=base,
        shared=tuple(shared),
        founding=founders.arguments(),
        bootstrap=bootstrap,
        secret=secret,
        name=name,
    )
    sys.exit(trio.run(partial(run_cluster, options, tell=tell, console=console)))


def _on_terminal() -> bool:
    return sys.stderr.isatty()


@cli.command()
@click.option(
    "--peers", default="5", show_default=True, metavar="N", help="How many; of A..B each seed draws a number."
)
@click.option("--seed", type=int, metavar="S", help="One seed.  [default: 1]")
@click.option("--seeds", metavar="A..B", help="All seeds from A to B.")
@click.option(
    "--faults", type=click.Choice(FAULTS), default="all", show_default=True, help="What goes wrong."
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    metavar="R",
    help="Certified versions.",
)
@click.option(
    "--scenario",
    type=click.Path(exists=True, path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Peers, faults and rounds as this file says.",
)
@click.option("--coverage", is_flag=True, help="Show what the seeds hit and what they missed.")
@click.option("--json", "as_json", is_flag=True, help="The summary as one line of JSON, the last one.")
@click.pass_context
def simulate(
    ctx: click.Context,
    peers: str,
    seed: int | None,
    seeds: str | None,
    faults: str,
    rounds: int,
    scenario: Path | None,
    coverage: bool,
    as_json: bool,
) -> None:
    """Run networks that are made up, in virtual time, with faults. Exit code 1 when an invariant was violated."""
    if seed is not None and seeds is not None:
        raise click.UsageError("--seed is one seed, --seeds a range: give one of them")
    if scenario is not None:
        for name in ("peers", "faults", "rounds"):
            if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
                raise click.UsageError(f"--{name} is the scenario's: with --scenario leave it out")
    from simulations import sweep
    from simulations.coverage import tables
    from simulations.report import counted, headline

    chosen = sweep.parse_range("seeds", seeds if seeds is not None else str(1 if seed is None else seed))
    counts = sweep.parse_range("peers", peers)
    again = f"--scenario {shlex.quote(str(scenario))}" if scenario is not None else (
        f"--peers {peers} --faults {faults} --rounds {rounds}"
    )  # fmt: skip
    live = _on_terminal() and not as_json
    done = wrong = 0

    def show_progress() -> None:
        if live:
            told = (
                f"{done} of {counted(len(chosen), 'seed')}, {counted(wrong, 'violation')}"
                if done < len(chosen)
                else ""
            )
            click.echo(f"\r\x1b[K{told}", err=True, nl=False)

    def progress(report: Report) -> None:
        nonlocal done, wrong
        done, wrong = done + 1, wrong + len(report.violations)
        if live and report.violations:
            click.echo("\r\x1b[K", err=True, nl=False)
        for text in report.violations:
            click.echo(f"seed {report.seed}: {text}")
        if report.violations:
            click.echo(f"again: p2pcoord simulate {again} --seed {report.seed}")
        show_progress()

    show_progress()
    summary = sweep.simulate(
        peers=counts,
        seeds=chosen,
        faults=faults,
        rounds=rounds,
        scenario=str(scenario or ""),
        progress=progress,
    )
    if as_json:
        click.echo(sweep.as_json(summary))
    else:
        click.echo(headline(summary))
        if coverage:
            click.echo(f"\n{tables(summary.coverage)}", nl=False)
    sys.exit(1 if summary.violations else 0)


if __name__ == "__main__":
    main()

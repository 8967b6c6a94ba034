"""The status document as a person reads it: who is there, where the round stands, what came of the last one.

Rendered with rich from plain values, so a document from another machine (`status --peer`) looks the same. Everything in it
that other machines chose (names, reasons) is text, never markup, and cannot steer the terminal.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final, Literal

import trio
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from node.reporting.event_words import (
    NameOf,
    enough_reached,
    in_words,
    naming,
    number,
    printable,
    short_name,
    voters_reached,
    with_departed,
)
from p2pcoord.errors import UserError

LAST_EVENTS: Final = 6
"""Events shown below the status: what a person who just looked up has missed."""

MAX_MEMBERS: Final = 30
"""Members shown; beyond, a screen shows nothing any more, and --json has all."""

MAX_REJECTED: Final = 5

REFRESH_S: Final = 0.5

NOTE_LINES: Final = 2
"""Kept free below what is watched: for the word that nobody answers any more."""

COLUMNS: Final[Mapping[str, Literal["left", "right"]]] = {
    "member": "left",
    "role": "left",
    "state": "left",
    "version": "right",
    "behind": "right",
    "phi": "right",
    "local step": "right",
    "local loss": "right",
    "device": "left",
    "peer": "left",
}

LEFT_OUT_FIRST: Final = ("phi", "device", "local step", "peer", "local loss", "behind")
"""On a narrow screen; what is left says who is there and how far."""

_BARS: Final = "▁▂▃▄▅▆▇█"
_BAR_COUNT: Final = 48

Document = Mapping[str, Any]


def name_in(document: Document) -> NameOf:
    """Names of peers as this document knows them; the end of its id for any other."""
    names = {member.get("peer_id"): member.get("name") for member in document.get("members") or ()}
    names[document.get("peer_id")] = document.get("name")
    here = ((peer, name) for peer, name in names.items() if peer and name)
    return naming(with_departed(here, (document.get("departed") or {}).items()))


def lines(document: Document, now: datetime) -> list[str]:
    """What is not a table, one line each, in the order in which it is shown. `now` is local time."""
    told = [_who(document), _progress(document)]
    told += [] if is_over(document) else [quorum_line(document, now)]
    told += filter(None, (_metrics(document), _losses(document), _last_commit(document), _rejected(document)))
    if document.get("failpoint"):
        told.append(f"held by a failpoint: {document['failpoint']}")
    return [printable(line) for line in told]


def _who(document: Document) -> str:
    role, term = document.get("role"), document.get("term")
    name_of = name_in(document)
    coordinator = document.get("coordinator")
    duty = (
        f"coordinator of term {term}"
        if role == "coordinator"
        else f"{role}, term {term}, {f'coordinator {name_of(coordinator)}' if coordinator else 'no coordinator'}"
    )
    run = str(document.get("run_id", ""))[:16]
    return f"{document.get('name')}  {duty}  run {run}  peer {document.get('peer_id')}"


def _progress(document: Document) -> str:
    version, rounds = document.get("version", 0), document.get("rounds")
    told = f"version {version}" + (f" of {rounds}" if rounds else "")
    if is_over(document):
        return f"{told}: the run is over"
    current = document.get("round") or {}
    told += f"  round {current.get('number')}: {current.get('phase')}"
    if current.get("attempt"):
        told += f", attempt {current['attempt']}"
    if current.get("deadline_s") is not None:
        told += f", closes within {current['deadline_s']:.0f} s"
    if document.get("state_held") is False:
        told += "  (this machine is fetching the state)"
    return told


def is_over(document: Document) -> bool:
    """Whether all rounds of the run are certified."""
    rounds = document.get("rounds")
    return bool(rounds) and document.get("version", 0) >= rounds


def quorum_line(document: Document, now: datetime) -> str:
    """Whether the run can go on, and who is missing if not."""
    quorum = document.get("quorum") or {}
    missing = [_missing(document, peer, now) for peer in quorum.get("missing") or ()]
    absent = f"; missing {', '.join(missing)}" if missing else ""
    if not quorum.get("held") and not enough_reached(quorum):
        return f"waiting for quorum: {voters_reached(quorum)}{absent}"
    told = _reachable(quorum, "voters")
    if quorum.get("outgoing"):
        told += f", and {_reachable(quorum['outgoing'], 'outgoing voters')}"
    # Without a coordinator: an election, or a cut that nobody has noticed yet.
    return f"{'quorum' if quorum.get('held') else 'waiting for a coordinator'}: {told}{absent}"


def _reachable(half: Mapping[str, Any], who: str) -> str:
    voters, reachable, needed = (half.get(name, 0) for name in ("voters", "reachable", "needed"))
    return f"{reachable} of {voters} {who} reachable, {needed} needed"


def _missing(document: Document, peer: str, now: datetime) -> str:
    member: Mapping[str, Any] = next(
        (m for m in document.get("members") or () if m.get("peer_id") == peer), {}
    )
    seen = member.get("last_seen_s")
    when = "never seen" if seen is None else f"last seen {now - timedelta(seconds=seen):%H:%M}"
    return f"{name_in(document)(peer)} ({when})"


def _metrics(document: Document) -> str:
    metrics = document.get("metrics") or {}
    if not metrics:
        return ""
    shown = {"loss": metrics.get("loss")} | dict(sorted((metrics.get("measures") or {}).items()))
    shown |= {name: metrics.get(name) for name in ("gradient_norm", "learning_rate", "node_participation")}
    return "  ".join(f"{name} {number(value)}" for name, value in shown.items() if value is not None)


def _losses(document: Document) -> str:
    """The losses of the last versions as bars, newest at the right."""
    history = [
        (version, loss) for version, loss in document.get("history") or () if isinstance(loss, int | float)
    ][-_BAR_COUNT:]
    if len(history) < 2:
        return ""
    values = [loss for _, loss in history]
    low, span = min(values), max(values) - min(values)
    bars = "".join(_BARS[int((loss - low) / span * (len(_BARS) - 1)) if span else 0] for loss in values)
    return f"loss {bars}  {number(values[0])} at version {history[0][0]}, {number(values[-1])} at {history[-1][0]}"


def _last_commit(document: Document) -> str:
    commit = document.get("last_commit")
    if not commit:
        return ""
    name_of = name_in(document)
    weights: dict[str, float] = {}
    for part in commit.get("contributors") or ():  # one that did another's work besides is there twice
        peer = part.get("peer_id", "")
        weights[peer] = weights.get(peer, 0.0) + (part.get("weight") or 0)
    contributors = ", ".join(f"{name_of(peer)} {100 * weight:.0f}%" for peer, weight in weights.items())
    return (
        f"last commit: version {commit.get('version')} by {name_of(commit.get('coordinator') or '-')} in term "
        f"{commit.get('term')}, from {contributors}; computation {commit.get('computation_s') or 0:.1f} s, "
        f"communication {commit.get('communication_s') or 0:.1f} s"
    )


def _rejected(document: Document) -> str:
    rejected = document.get("rejected") or {}
    if not rejected.get("total"):
        return ""
    name_of = name_in(document)
    kinds = _largest(rejected.get("by_kind") or {}, str)
    peers = _largest(rejected.get("by_peer") or {}, name_of)
    return f"rejected: {rejected['total']} messages ({kinds}) from {peers}"


def _largest(counts: Mapping[str, int], name_of: Callable[[str], str]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    told = [f"{name_of(name)} {count}" for name, count in ordered[:MAX_REJECTED]]
    return ", ".join(told + [f"{len(ordered) - MAX_REJECTED} more"] * (len(ordered) > MAX_REJECTED))


# On the screen -------------------------------------------------------------------------------------------------------


def render(
    document: Document,
    events: Iterable[Mapping[str, Any]] = (),
    now: datetime | None = None,
    *,
    width: int | None = None,
    members: int = MAX_MEMBERS,
    last_events: int = LAST_EVENTS,
) -> Group:
    """All of the status but the line to join with, which a screen would cut off.

    `events` are the newest of the events file, oldest first. `width` in columns, `members` and `last_events` shown at most.
    """
    moment = now or datetime.now()
    parts: list[RenderableType] = [
        Text(line, style="bold yellow" if line.startswith("waiting for ") else "")
        for line in lines(document, moment)
    ]
    parts.append(members_table(document, width, members))
    name_of = name_in(document)
    parts += [Text(line, style="dim") for line in worded(events, name_of, last_events)]
    return Group(*parts)


def fitted(
    document: Document,
    events: Sequence[Mapping[str, Any]],
    console: Console,
    now: datetime | None = None,
) -> Group:
    """`render` for a screen that shows no more than its height: members are left out first, then all but the last event."""
    members, last_events = min(MAX_MEMBERS, len(document.get("members") or ())), LAST_EVENTS
    while True:
        shown = render(document, events, now, width=console.width, members=members, last_events=last_events)
        over = len(console.render_lines(shown)) - (console.height - NOTE_LINES)
        if over <= 0 or (members <= 1 and last_events == 1):
            return shown
        if members > 1:
            members = max(members - over, 1)
        else:
            last_events = max(last_events - over, 1)


def members_table(document: Document, width: int | None = None, most: int = MAX_MEMBERS) -> Table:
    """One row for each member, this machine first. What does not fit into `width` is left out, the least telling column first."""
    me = document.get("peer_id")
    members = sorted(document.get("members") or (), key=lambda member: member.get("peer_id") != me)
    rows: list[tuple[dict[str, str], bool]] = []
    for member in members[:most]:
        alive = bool(member.get("alive"))
        state = f"excluded: {member['excluded']}" if member.get("excluded") else member.get("state") or "-"
        if is_over(document) and not alive:
            state, alive = "ended", True  # as all do
        cells = {
            "member": member.get("name") or "-",
            "role": member.get("role") or "-",
            "state": state,
            "version": str(member.get("version", "-")),
            "behind": str(member.get("staleness", "-")),
            "phi": number(member.get("phi")),
            "local step": str(member.get("local_step", "-")),
            "local loss": number(member.get("local_loss")),
            "device": member.get("device") or "-",
            "peer": short_name(member.get("peer_id") or "-"),
        }
        rows.append(({heading: printable(cell) for heading, cell in cells.items()}, alive))
    widths = {
        heading: max([cell_len(heading), *(cell_len(cells[heading]) for cells, _ in rows)])
        for heading in COLUMNS
    }
    more = f"and {len(members) - most} more" if len(members) > most else ""
    widths["member"] = max(widths["member"], len(more))
    for heading in LEFT_OUT_FIRST:
        if width is not None and sum(widths.values()) + 2 * (len(widths) - 1) > width:
            del widths[heading]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in widths:
        table.add_column(heading, justify=COLUMNS[heading], no_wrap=True)
    for cells, alive in rows:
        table.add_row(*(Text(cells[heading]) for heading in widths), style="" if alive else "red")
    if more:
        table.add_row(Text(more, style="dim"))
    return table


def worded(
    events: Iterable[Mapping[str, Any]], name_of: Callable[[str], str], most: int = LAST_EVENTS
) -> list[str]:
    """The newest events that have words, oldest first."""
    told = ((event, in_words(event["event"], event, name_of)) for event in events)
    return [f"{_clock(event)} {words}" for event, words in told if words is not None][-most:]


def _clock(event: Mapping[str, Any]) -> str:
    try:
        return f"{datetime.fromisoformat(str(event['time'])).astimezone():%H:%M:%S}"
    except (KeyError, ValueError):
        return "--:--:--"


def show(document: Document, events: Iterable[Mapping[str, Any]], console: Console) -> None:
    """Prints the status once, and below it the line that brings another machine to the run, whole: it is there to be copied."""
    console.print(render(document, events, width=console.width))
    if document.get("join_line"):
        line = Text("join with  " + printable(document["join_line"]), no_wrap=True, overflow="ignore")
        console.print(line, crop=False, soft_wrap=True)


async def watch(
    ask: Callable[[], Awaitable[Document]],
    events: Callable[[], Sequence[Mapping[str, Any]]],
    console: Console,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Shows the status until the caller cancels. Raises UserError when nobody answers at first; later that is shown, and
    asked on."""
    shown: RenderableType = fitted(await ask(), events(), console)
    answered_at = clock()
    with Live(shown, console=console, auto_refresh=False) as live:
        while True:
            try:
                shown = fitted(await ask(), events(), console)
                answered_at = clock()
                live.update(shown, refresh=True)
            except UserError as error:
                waited = clock() - answered_at
                note = Text(f"{printable(str(error))} (the above is {waited:.0f} s old)", style="bold red")
                live.update(Group(shown, note), refresh=True)
            await trio.sleep(REFRESH_S)

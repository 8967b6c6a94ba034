"""Events in words: what happened, as a line for people. The console and `p2pcoord status` tell the same story.

An event that nobody watches for (a phase, a fetch, a single record) has no words: it is in the events file, and only there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

NameOf = Callable[[str], str]
"""A peer id as people know it: its name, or the end of its id (`naming`)."""

Words = Callable[[Mapping[str, Any], NameOf], str | None]

COLUMN: Final = "  "
PEER_ID_START: Final = "12D3Koo"
_PEER_ID: Final = re.compile(rf"\b{PEER_ID_START}[1-9A-HJ-NP-Za-km-z]{{45}}\b")

SOLE_VOTER: Final = "voters     1 of 1: this machine must stay until status shows 3 voters"
"""Of a run whose only voter is this machine: without it the run stands still."""


def short_name(peer_id: str) -> str:
    """The end of a peer id, whose beginning is the same for all Ed25519 keys; an address as it is."""
    return peer_id[-8:] if peer_id.startswith(PEER_ID_START) and len(peer_id) > 40 else peer_id


def naming(names: Iterable[tuple[str, str]]) -> NameOf:
    """How to call peers of these (id, name): by name; who shares it gets the end of the id besides, as does who has none."""
    known = {peer: name for peer, name in names if name}
    shared = Counter(known.values())

    def name_of(peer: str) -> str:
        name = known.get(peer)
        if name is None:
            return printable(short_name(peer))
        return printable(f"{name}({short_name(peer)})" if shared[name] > 1 else name)

    return name_of


def with_departed(here: Iterable[tuple[str, str]], gone: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """(id, name) of members and of those who have left. A machine that came back with a new key has its name for itself: the
    one that it was gets the end of its id besides."""
    told = list(here)
    taken = {name for _, name in told}
    told += [(peer, f"{name}({short_name(peer)})" if name in taken else name) for peer, name in gone if name]
    return told


def printable(text: str) -> str:
    """`text` on one line, without characters that would steer a terminal: names and reasons come from other machines."""
    return "".join(letter if letter.isprintable() else "?" for letter in text.replace("\t", " "))


def commit_line(fields: Mapping[str, Any], name_of: NameOf) -> str:
    """One certified round: round, loss, what the workload measures, contributors, seconds, coordinator."""
    measures = fields.get("measures") or {}
    contributors = " ".join(name_of(peer) for peer in fields.get("contributors") or ())
    parts = [
        f"round {fields.get('version', '?')}",
        f"loss {number(fields.get('loss'))}",
        *(f"{name} {number(value)}" for name, value in sorted(measures.items())),
        f"contributors {contributors or '-'}",
        f"{fields.get('seconds') or 0.0:.1f} s",
        f"coordinator {name_of(str(fields.get('coordinator') or '-'))}",
    ]
    return COLUMN.join(parts)


def number(value: Any) -> str:
    """Four significant digits (never -0); a dash for what is none."""
    return f"{value + 0:.4g}" if isinstance(value, int | float) else "-"


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def enough_reached(quorum: Mapping[str, Any]) -> bool:
    """Whether as many voters can be reached as a quorum needs: of both committees while one takes over from the other."""
    halves = (quorum, quorum.get("outgoing") or quorum)
    return all(half.get("reachable", 0) >= half.get("needed", 0) > 0 for half in halves)


def voters_reached(quorum: Mapping[str, Any]) -> str:
    """How many voters can be reached of those needed."""

    def told(half: Mapping[str, Any]) -> str:
        return f"{half.get('reachable', '?')} of {half.get('needed', '?')} needed"

    outgoing = quorum.get("outgoing")
    if not outgoing:
        return told(quorum)
    return f"{told(quorum)}, and {told(outgoing)} of the outgoing voters"


def in_words(event: str, fields: Mapping[str, Any], name_of: NameOf) -> str | None:
    """The event as a sentence on one line; None for events that are for the file only."""
    words = WORDS.get(event)
    told = None if words is None else words(fields, name_of)
    if told is None:
        return None
    return printable(_PEER_ID.sub(lambda found: name_of(found[0]), told))  # reasons come with ids


def _who(fields: Mapping[str, Any], name_of: NameOf, key: str = "peer") -> str:
    value = fields.get(key)
    return name_of(value) if isinstance(value, str) and value else "somebody"


def _fetched(fields: Mapping[str, Any], name_of: NameOf) -> str | None:
    """Where a state or the founder's content came from; the fetches of every round have no words."""
    founders = {"dataset": "the run's data set", "frozen": "the run's frozen parameters"}
    what = founders.get(fields.get("purpose", ""), f"the state of version {fields.get('version')}")
    if fields.get("purpose") not in ("state", *founders):
        return None
    sources = fields.get("sources") or {}
    told = ", ".join(f"{size(count)} from {name_of(peer)}" for peer, count in sources.items())
    refused = fields.get("refused") or {}
    bad = "".join(f"; {name_of(peer)} was dropped ({reason})" for peer, reason in refused.items())
    return f"fetched {what}: {told or 'it was here'}{bad}"


def _fetch_failed(fields: Mapping[str, Any], name_of: NameOf) -> str | None:
    if fields.get("superseded"):
        return None  # of no use to anybody any more
    what, version = fields.get("purpose"), fields.get("version")
    told = what if version is None else f"the {what} of version {version}"
    source = f" from {_who(fields, name_of, 'source')}" if fields.get("source") else ""
    return f"{told} could not be fetched{source}: {fields.get('reason')}"


def _excluded(fields: Mapping[str, Any], name_of: NameOf) -> str | None:
    if fields.get("late"):
        return None
    until = fields.get("until")
    wait = f"until version {until}" if until else "for good"
    return f"{_who(fields, name_of)} is excluded {wait}: {fields.get('reason')}"


def _names(value: Any, name_of: NameOf) -> str:
    return ", ".join(name_of(peer) for peer in value or ()) or "nobody"


WORDS: Final[dict[str, Words]] = {
    # The run
    "commit": lambda f, n: None if f.get("late") else commit_line(f, n),
    "caught-up": lambda f, n: f"caught up to version {f.get('version')}, loss {number(f.get('loss'))}",
    "joined": lambda f, n: "this machine is a member of the run",
    "admitted": lambda f, n: None if f.get("late") else f"{f.get('name') or _who(f, n)} joined the run",
    "left": lambda f, n: None if f.get("late") else f"{_who(f, n)} left the run",
    "excluded": _excluded,
    "fetched": _fetched,
    "join-refused": lambda f, n: (
        f"{_who(f, n, 'by')} does not let this machine in: {f.get('reason')}"
        if f.get("by")
        else f"{_who(f, n)} may not join: {f.get('reason')}"
    ),
    # Who is there
    "failed": lambda f, n: f"{_who(f, n)} is gone",
    "alive": lambda f, n: f"{_who(f, n)} is {'back' if f.get('was') == 'dead' else 'there'}",
    "unreachable": lambda f, n: f"{_who(f, n, 'by')} cannot connect to this machine",
    "reachable": lambda f, n: f"{_who(f, n, 'by')} can connect to this machine",
    "equivocation": lambda f, n: f"{_who(f, n)} signed two contradicting records of itself",
    "evidence": lambda f, n: f"{_who(f, n)} contradicted itself: {f.get('reason')}",
    "versions-differ": lambda f, n: f"{_who(f, n)} has {f.get('theirs')}; this machine {f.get('ours')}",
    # The duty
    "coordinator": lambda f, n: f"this machine coordinates term {f.get('term')}",
    "following": lambda f, n: f"{_who(f, n, 'coordinator')} coordinates term {f.get('term')}",
    "coordinator-silent": lambda f, n: f"{_who(f, n, 'coordinator')} coordinates no more: it is silent",
    "candidate": lambda f, n: f"this machine stands for election in term {f.get('term')}",
    "stepped-down": lambda f, n: f"this machine coordinates no more: {f.get('reason')}",
    "transfer": lambda f, n: f"the duty goes to {_who(f, n, 'target')}",
    "transfer-failed": lambda f, n: f"{_who(f, n, 'target')} did not take the duty over",
    "sole-voter": lambda f, n: SOLE_VOTER,
    "committee": lambda f, n: f"the voters shall be {_names(f.get('voters'), n)}",
    "quorum-lost": lambda f, n: (
        f"waiting for quorum: {voters_reached(f)}; missing {_names(f.get('missing'), n)}"
    ),
    "quorum-regained": lambda f, n: "there is a quorum again",
    # The round
    "reassigned": lambda f, n: f"{_who(f, n, 'now')} takes over what {_who(f, n, 'was')} was given",
    "waiting-for-members": lambda f, n: (
        f"waiting for members: {f.get('living')} of {f.get('needed')} are here"
    ),
    "left-out": lambda f, n: f"{_who(f, n)} is late: the round goes on without it",
    "barrier": lambda f, n: f"the round waits for {_names(f.get('missing'), n)}: {f.get('decision')}",
    "lost": lambda f, n: f"{_who(f, n)} cannot be had for attempt {f.get('attempt')}: {f.get('reason')}",
    "obstacle": lambda f, n: (
        f"{_who(f, n, 'by')} cannot have the bytes of {_who(f, n)} in attempt {f.get('attempt')}: {f.get('reason')}"
    ),
    "unplaced": lambda f, n: f"{_who(f, n)} has no neighbour in the tree: the attempt goes on without it",
    "assignment-failed": lambda f, n: f"{_who(f, n)} could not train: {f.get('reason')}",
    "training-failed": lambda f, n: f"training failed here: {f.get('reason')}",
    "trainer-died": lambda f, n: f"the trainer is started again: {f.get('reason')}",
    "validation-failed": lambda f, n: f"validation failed at {_who(f, n)}: {f.get('reason')}",
    "attempt-refused": lambda f, n: f"attempt {f.get('attempt')} was refused: {f.get('reason')}",
    "export-failed": lambda f, n: f"the model file could not be written: {f.get('reason')}",
    "held": lambda f, n: f"this process is held at the failpoint {f.get('failpoint')}",
    "step-failed": lambda f, n: f"version {f.get('version')} could not be computed here: {f.get('reason')}",
    "state-differs": lambda f, n: f"another state of version {f.get('version')} was computed here",
    "fetch-failed": _fetch_failed,
    # What was refused
    "rejected": lambda f, n: (
        f"refused what {_who(f, n)} sent: {f.get('kind')} {f.get('detail') or ''}".rstrip()
    ),
    "late-tick": lambda f, n: f"this machine slept for {(f.get('late_ns') or 0) / 1e9:.1f} s",
}

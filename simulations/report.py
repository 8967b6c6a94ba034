"""What a run, and a sweep over seeds, came to."""

from __future__ import annotations

from collections import Counter
from hashlib import sha256

import msgspec

from simulations.network import SECOND
from simulations.scenario import Director
from simulations.world import World


class Coverage(msgspec.Struct):
    """What was hit how often: cells of two tables, each "row / column"."""

    crashes: Counter[str] = msgspec.field(default_factory=Counter)
    """Role / what it was at, for every machine that crashed."""
    losses: Counter[str] = msgspec.field(default_factory=Counter)
    """Message kind / how it was lost."""
    faults: Counter[str] = msgspec.field(default_factory=Counter)
    told: Counter[str] = msgspec.field(default_factory=Counter)
    """Events that peers emitted."""

    def add(self, other: Coverage) -> None:
        for name in self.__struct_fields__:
            getattr(self, name).update(getattr(other, name))


class Report(msgspec.Struct):
    """One run."""

    seed: int
    trace_sha256: str
    events: int
    violations: tuple[str, ...]
    committed_version: int
    terms: int
    virtual_s: float
    wall_s: float
    coverage: Coverage


class Summary(msgspec.Struct):
    """A sweep: sums, the lowest version, and the hash over all traces in order of seed."""

    trace_sha256: str
    events: int
    violations: int
    committed_version: int
    virtual_s: float
    wall_s: float
    seeds: int
    violated: tuple[tuple[int, str], ...]
    """(seed, what), of at most MAX_SHOWN seeds."""
    coverage: Coverage
    fault_kinds: int
    """Kinds of faults that came about in the seed with the fewest."""


MAX_SHOWN = 100


def report_of(world: World, director: Director, wall_s: float) -> Report:
    coverage = Coverage()
    coverage.crashes.update({f"{role} / {at}": count for (role, at), count in world.crashed.items()})
    coverage.losses.update({f"{kind} / {how}": count for (kind, how), count in world.lost.items()})
    coverage.faults.update(director.done)
    coverage.told.update(world.told)
    accounts = world.invariants
    return Report(
        world.seed,
        world.trace,
        world.events,
        tuple(f"{v.invariant} at {v.at_ns / SECOND:.3f} s: {v.detail}" for v in accounts.violations),
        accounts.version,
        max((m.peer.agreement.voter.term for m in world.machines.values() if m.peer), default=0),
        world.now / SECOND,
        wall_s,
        coverage,
    )


def summary_of(reports: list[Report], wall_s: float) -> Summary:
    """Of reports in order of seed."""
    coverage = Coverage()
    for report in reports:
        coverage.add(report.coverage)
    violated = [(report.seed, text) for report in reports for text in report.violations]
    return Summary(
        sha256("".join(report.trace_sha256 for report in reports).encode()).hexdigest()
        if len(reports) != 1
        else reports[0].trace_sha256,
        sum(report.events for report in reports),
        len(violated),
        min((report.committed_version for report in reports), default=0),
        round(sum(report.virtual_s for report in reports), 3),
        round(wall_s, 3),
        len(reports),
        tuple(violated[:MAX_SHOWN]),
        coverage,
        min((len(report.coverage.faults) for report in reports), default=0),
    )


def counted(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


def headline(summary: Summary) -> str:
    """For people."""
    return (
        f"{counted(summary.seeds, 'seed')}, {summary.events} events, "
        f"{summary.virtual_s:.0f} virtual seconds in {summary.wall_s:.1f} s\n"
        f"{counted(summary.violations, 'violation')}; at least version {summary.committed_version}"
        f" and {counted(summary.fault_kinds, 'kind')} of faults in every seed"
    )

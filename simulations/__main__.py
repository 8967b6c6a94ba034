"""python -m simulations --peers N|A..B --seeds A..B --faults none|crashes|loss|partitions|all --rounds R [--work training|steady]
[--coverage] [--json]"""

from __future__ import annotations

import argparse
import sys

from p2pcoord.errors import UserError
from simulations.coverage import tables
from simulations.faults import FAMILIES
from simulations.report import Report, Summary
from simulations.sweep import as_json, parse_range, simulate


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m simulations", description="Runs a network that is made up."
    )
    parser.add_argument("--peers", default="5", help="a number, or A..B of which each seed draws one")
    parser.add_argument("--seeds", default="1", help="a seed, or A..B")
    parser.add_argument("--faults", choices=list(FAMILIES), default="all")
    parser.add_argument("--rounds", type=int, default=10, help="certified versions at least")
    parser.add_argument("--work", choices=["training", "steady"], default="training", help="what rounds do")
    parser.add_argument("--scenario", default="", help="a scenario file instead of the three above")
    parser.add_argument("--processes", type=int, default=None)
    parser.add_argument("--json", action="store_true", help="the summary as one line of JSON")
    parser.add_argument("--coverage", action="store_true", help="two tables: what the seeds hit and missed")
    given = parser.parse_args()
    out = sys.stdout.write

    def progress(report: Report) -> None:
        for text in report.violations:
            out(f"seed {report.seed}: {text}\n")

    try:
        summary = simulate(
            peers=parse_range("peers", given.peers),
            seeds=parse_range("seeds", given.seeds),
            faults=given.faults,
            rounds=given.rounds,
            work=given.work,
            scenario=given.scenario,
            processes=given.processes,
            progress=progress,
        )
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    if given.json:
        out(as_json(summary) + "\n")
    elif given.coverage:
        out(headline(summary) + "\n\n" + tables(summary.coverage))
    else:
        out(told(summary))
    return 1 if summary.violations else 0


def headline(summary: Summary) -> str:
    return (
        f"{summary.seeds} seeds, {summary.events} events, {summary.virtual_s:.0f} virtual seconds in {summary.wall_s:.1f} s\n"
        f"{summary.violations} violations; at least version {summary.committed_version}"
    )


def told(summary: Summary) -> str:
    """For people: the figures, and the tables of what was hit."""
    lines = [headline(summary)]
    for title, table in (
        ("faults", summary.coverage.faults),
        ("crashes: role / at", summary.coverage.crashes),
        ("losses: message / how", summary.coverage.losses),
    ):
        lines.append(f"\n{title}")
        lines += [f"  {count:8} {cell}" for cell, count in sorted(table.items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())

"""What a sweep hit and what it missed: two tables, each cell a count.

    a coordinator's crash    in each of the eight phases of a round
    a message's loss         of each kind that peers send, by how it was lost: alone, or with its link

A cell that is empty says that the schedules never went there, so nothing is known about it.
"""

from __future__ import annotations

from p2pcoord.rounds.phases import Phase
from simulations.report import Coverage
from simulations.world import MESSAGE_KINDS

LOSSES = {"dropped": ("dropped",), "link lost": ("reset", "cut")}
"""Column -> the ways that it counts: a message alone, or all that was under way on a link."""

OTHERS = frozenset({"genesis?", "genesis", "status?", "status", "evidence"})
"""What programs ask a node for before they are peers of its run; and what a peer sends about one that contradicts itself,
which not even the liar of the virtual world does (tests/simulations/test_invariants.py and the scripts do it by hand)."""

SENT = tuple(sorted(MESSAGE_KINDS - OTHERS))


def phases(coverage: Coverage) -> dict[str, int]:
    """Phase -> how often a coordinator crashed in it."""
    return {str(phase): coverage.crashes[f"coordinator / {phase}"] for phase in Phase}


def messages(coverage: Coverage) -> dict[str, dict[str, int]]:
    """Kind of message -> how lost -> how often."""
    return {
        kind: {
            column: sum(coverage.losses[f"{kind} / {how}"] for how in ways) for column, ways in LOSSES.items()
        }
        for kind in SENT
    }


def empty_cells(coverage: Coverage) -> list[str]:
    """The cells of both tables that nothing hit."""
    missed = [f"coordinator crash / {phase}" for phase, count in phases(coverage).items() if not count]
    for kind, by_loss in messages(coverage).items():
        missed += [f"{kind} / {how}" for how, count in by_loss.items() if not count]
    return missed


def tables(coverage: Coverage) -> str:
    """Both tables for people."""
    lines = ["round phase           coordinator crashes"]
    lines += [f"{phase:20} {count:>20}" for phase, count in phases(coverage).items()]
    lines += ["", f"{'message lost':20}" + "".join(f"{column:>10}" for column in LOSSES)]
    for kind, by_loss in messages(coverage).items():
        lines.append(f"{kind:20}" + "".join(f"{by_loss[column]:>10}" for column in LOSSES))
    missed = empty_cells(coverage)
    lines += ["", f"empty cells: {', '.join(missed) or 'none'}"]
    return "\n".join(lines) + "\n"

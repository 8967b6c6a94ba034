"""Switched-on bugs: each is seen by an invariant at a known seed, and the same seed is clean without it."""

import pytest

from simulations.mutants import MUTANTS
from simulations.scenario import WorkName
from simulations.sweep import run_seed

CAUGHT = {
    "speak-before-persist": ("durable", (2, 3)),
    "old-term-by-counting": ("acknowledged", (1, 2, 3)),
    "quorum-from-gossip": ("certificate", (1, 2)),
    "vote-forgotten": ("vote", (25, 58, 9, 21)),
    "unsigned-proof": ("term", (1, 2)),
    "mixed-attempts": ("sum", (1, 4, 11, 14)),
}
"""Bug -> the invariant that sees it, and seeds (five peers, all faults) that show it: any of them, as every change of the
program's timing moves what a seed hits."""

WORK: dict[str, WorkName] = dict.fromkeys(MUTANTS, "steady") | {"mixed-attempts": "training"}
"""What breaks the agreement shows best in a world of the agreement alone, where commits are many."""


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_switched_on_bug_is_caught_at_its_seeds(mutant: str) -> None:
    invariant, seeds = CAUGHT[mutant]
    reports = (
        run_seed(seed, peers=5, faults="all", rounds=10, work=WORK[mutant], mutant=mutant) for seed in seeds
    )
    assert any(text.startswith(f"{invariant} at ") for report in reports for text in report.violations)


CLEAN = sorted({(WORK[mutant], seed) for mutant, (_, seeds) in CAUGHT.items() for seed in seeds})


@pytest.mark.parametrize(("work", "seed"), CLEAN)
def test_the_same_seeds_are_clean_without_the_bug(work: WorkName, seed: int) -> None:
    assert run_seed(seed, peers=5, faults="all", rounds=10, work=work).violations == ()


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_switched_on_bug_is_caught_within_two_hundred_seeds(mutant: str) -> None:
    """Whatever the schedules of the day: the known seeds may move when they change, this may not."""
    invariant, _ = CAUGHT[mutant]
    reports = (
        run_seed(seed, peers=5, faults="all", rounds=10, work=WORK[mutant], mutant=mutant)
        for seed in range(1, 201)
    )
    assert any(text.startswith(f"{invariant} at ") for report in reports for text in report.violations)

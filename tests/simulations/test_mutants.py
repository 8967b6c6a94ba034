"""Switched-on bugs: each is seen by an invariant at a known seed, and the same seed is clean without it."""

import pytest

from simulations.mutants import MUTANTS
from simulations.sweep import run_seed

CAUGHT = {
    "speak-before-persist": (2, "durable"),
    "old-term-by-counting": (1, "acknowledged"),
    "quorum-from-gossip": (1, "certificate"),
    "vote-forgotten": (9, "vote"),
    "unsigned-proof": (1, "term"),
}
"""Bug -> the seed (five peers, all faults) that catches it, and the invariant."""


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_switched_on_bug_is_caught_at_its_seed(mutant: str) -> None:
    seed, invariant = CAUGHT[mutant]
    report = run_seed(seed, peers=5, faults="all", rounds=10, mutant=mutant)
    assert report.violations
    assert report.violations[0].startswith(f"{invariant} at ")


@pytest.mark.parametrize("seed", sorted({seed for seed, _ in CAUGHT.values()}))
def test_the_same_seed_is_clean_without_the_bug(seed: int) -> None:
    assert run_seed(seed, peers=5, faults="all", rounds=10).violations == ()


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_switched_on_bug_is_caught_within_two_hundred_seeds(mutant: str) -> None:
    """Whatever the schedules of the day: the known seeds may move when they change, this may not."""
    assert any(
        run_seed(seed, peers=5, faults="all", rounds=10, mutant=mutant).violations for seed in range(1, 201)
    )

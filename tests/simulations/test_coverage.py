"""What a sweep hits: no cell of the tables stays empty."""

import pytest

from simulations.coverage import LOSSES, SENT, empty_cells, tables
from simulations.report import Coverage
from simulations.sweep import simulate


def test_an_empty_sweep_has_only_empty_cells_and_says_so() -> None:
    missed = empty_cells(Coverage())
    assert len(missed) == 8 + len(SENT) * len(LOSSES)
    assert "coordinator crash / model_update" in missed
    assert "partial / dropped" in missed


def test_what_was_hit_is_counted_in_its_cell() -> None:
    coverage = Coverage()
    coverage.crashes["coordinator / validation"] = 3
    coverage.losses["offer / cut"] = 4
    missed = empty_cells(coverage)
    assert "coordinator crash / validation" not in missed
    assert "offer / link lost" not in missed
    assert "offer / dropped" in missed
    assert "validation                              3" in tables(coverage)


@pytest.mark.slow
def test_a_sweep_crashes_coordinators_in_every_phase_and_loses_every_kind_of_message() -> None:
    covered = Coverage()
    for first in (1, 121, 241):  # the rarest kinds are lost once in a hundred seeds or so
        summary = simulate(peers=7, seeds=range(first, first + 120))
        covered.add(summary.coverage)
        if not empty_cells(covered):
            break
    assert empty_cells(covered) == []

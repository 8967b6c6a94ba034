"""Networks sort, programs compute the lanes that are asked for, and nothing but them."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcoord.aggregation.sorting_network import comparators, program, run


def executed(inputs, needed):
    chosen = program(len(inputs), frozenset(needed))
    buffers = [np.empty(inputs[0].size, np.float32) for _ in range(chosen.buffers)]
    return run(chosen, inputs, buffers)


@pytest.mark.parametrize("n", range(1, 11))
def test_a_network_that_sorts_all_zeros_and_ones_sorts_everything(n):
    # Knuth, theorem 5.3.4Z.
    lanes = np.array(list(product((0, 1), repeat=n)), np.int8).T.copy()
    expected = np.sort(lanes, axis=0)
    for i, j in comparators(n):
        assert i < j
        lanes[i], lanes[j] = np.minimum(lanes[i], lanes[j]), np.maximum(lanes[i], lanes[j])
    assert (lanes == expected).all()


@given(st.integers(1, 70), st.data())
def test_a_program_brings_any_lanes_about_and_only_reads_its_inputs(n, data):
    seed = data.draw(st.integers(0, 2**32 - 1))
    needed = data.draw(st.sets(st.integers(0, n - 1), min_size=1))
    inputs = np.random.default_rng(seed).integers(0, 9, (n, 20)).astype(np.float32)
    inputs.flags.writeable = False
    lanes = executed(list(inputs), needed)
    assert (np.array(lanes) == np.sort(inputs, axis=0)[sorted(needed)]).all()


def test_what_nobody_needs_is_not_computed():
    assert len(comparators(16)) == 63
    counts = {
        name: len(program(16, frozenset(needed)).operations)
        for name, needed in {
            "all": range(16),
            "median": (7, 8),
            "median and ends": (0, 7, 8, 15),
            "smallest": (0,),
        }.items()
    }
    assert counts == {"all": 126, "median": 92, "median and ends": 94, "smallest": 15}


@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_what_is_not_finite_shows_in_the_first_or_the_last_lane(n):
    for at in range(n):
        for value in (np.nan, np.inf, -np.inf):
            inputs = np.arange(n, dtype=np.float32)[:, None] * np.ones(3, np.float32)
            inputs[at, 1] = value
            ends = executed(list(inputs), {0, n // 2, n - 1})
            finite = np.isfinite(ends[0]) & np.isfinite(ends[-1])
            assert finite.tolist() == [True, False, True]

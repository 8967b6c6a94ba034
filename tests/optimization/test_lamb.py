"""LAMB: what its formula promises, for every tensor by itself."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pcoord.optimization import lamb as lamb_module
from p2pcoord.optimization import optimizer

SHAPES = [(30, 7), (11,), (3, 5, 4)]
SIZES = [210, 11, 60]
ENDS = [210, 221]


def draw(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def stepped(shapes, parameters, gradients, learning_rate=0.01, **options):
    chosen = optimizer("lamb", shapes, learning_rate=learning_rate, **options)
    states = [chosen.initial(parameters)]
    for gradient in gradients:
        states.append(chosen.step(states[-1], gradient))
    return states


@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3), st.sampled_from([0.0, 0.01, 1.0]))
@settings(max_examples=30)
def test_each_tensor_moves_by_the_learning_rate_times_its_own_norm(seed, scale, decay):
    states = stepped(SHAPES, draw(seed, 281, scale=scale), draw(seed + 1, 3, 281), weight_decay=decay)
    for old, new in itertools.pairwise(states):
        for before, after in zip(np.split(old.parameters, ENDS), np.split(new.parameters, ENDS), strict=True):
            moved = np.linalg.norm(after.astype(np.float64) - before)
            assert moved == pytest.approx(0.01 * np.linalg.norm(before), rel=1e-4)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_a_tensors_step_does_not_depend_on_the_others(seed):
    parameters, gradients = draw(seed, 281), draw(seed + 1, 3, 281)
    together = stepped(SHAPES, parameters, gradients)[-1].parameters
    alone = [
        stepped([shape], part.copy(), [np.split(gradient, ENDS)[at].copy() for gradient in gradients])[-1]
        for at, (shape, part) in enumerate(zip(SHAPES, np.split(parameters, ENDS), strict=True))
    ]
    assert together.tobytes() == b"".join(state.parameters.tobytes() for state in alone)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_the_scale_of_the_gradient_does_not_matter(seed):
    parameters, gradients = draw(seed, 281), draw(seed + 1, 3, 281)
    plain = stepped(SHAPES, parameters, gradients, epsilon=1e-30)[-1].parameters
    scaled = stepped(SHAPES, parameters, gradients * np.float32(1024), epsilon=1e-30)[-1].parameters
    assert plain.tobytes() == scaled.tobytes(), "a power of two scales without rounding"


def test_zeros_move_as_under_adam():
    gradients = draw(1, 4, 281)
    zeros = np.zeros(281, np.float32)
    first = stepped(SHAPES, zeros, gradients[:1], learning_rate=0.01, weight_decay=0.0)[-1]
    adam = optimizer("adam", SHAPES, learning_rate=0.01, epsilon=1e-6)
    expected = adam.step(adam.initial(zeros), gradients[0])
    np.testing.assert_allclose(first.parameters, expected.parameters, rtol=1e-6)
    assert [slot.tobytes() for slot in first.slots] == [slot.tobytes() for slot in expected.slots]


def test_under_apex_without_decay_it_is_adam():
    parameters, gradients = draw(2, 281), draw(3, 5, 281)
    found = stepped(SHAPES, parameters, gradients, weight_decay=0.0, convention="apex")[-1]
    adam = optimizer("adam", SHAPES, learning_rate=0.01, epsilon=1e-6)
    state = adam.initial(parameters)
    for gradient in gradients:
        state = adam.step(state, gradient)
    np.testing.assert_allclose(found.parameters, state.parameters, rtol=1e-5, atol=1e-6)


def test_clamped_a_tensor_moves_by_ten_at_most():
    parameters = draw(4, 281, scale=100.0)
    old, new = stepped(SHAPES, parameters, draw(5, 1, 281), convention="clamped")
    for before, after in zip(np.split(old.parameters, ENDS), np.split(new.parameters, ENDS), strict=True):
        assert np.linalg.norm(after.astype(np.float64) - before) == pytest.approx(0.01 * 10, rel=1e-3)


def test_long_tensors_are_worked_on_in_blocks_without_changing_a_bit():
    parameters, gradients = draw(6, 40_000), draw(7, 2, 40_000)
    whole = stepped([(200, 200)], parameters, gradients)[-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lamb_module, "BLOCK", 1 << 13)
        blocked = stepped([(200, 200)], parameters, gradients)[-1]
    assert whole.parameters.tobytes() == blocked.parameters.tobytes()
    assert [slot.tobytes() for slot in whole.slots] == [slot.tobytes() for slot in blocked.slots]

"""Distributed Shampoo: laws of the method, and its work done by several."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pcoord.errors import LocalError
from p2pcoord.optimization import optimizer
from p2pcoord.optimization import shampoo as shampoo_module
from p2pcoord.optimization.blocks import blocks, preconditioner_work

SHAPES = [(7, 5), (4,), (), (3, 2, 4), (1, 6)]
COUNT = 35 + 4 + 1 + 24 + 6


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def shampoo(shapes=SHAPES, **options):
    return optimizer("distributed_shampoo", shapes, learning_rate=0.1, **options)


def stepped(chosen, parameters, gradients):
    states = [chosen.initial(parameters)]
    for gradient in gradients:
        states.append(chosen.step(states[-1], gradient))
    return states


def bits(state) -> list[bytes]:
    return [state.parameters.tobytes(), *(slot.tobytes() for slot in state.slots)]


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("grafting", ["adagrad", "none"])
def test_roots_that_members_compute_give_the_bits_that_one_computes_alone(interval, grafting):
    chosen = shampoo(block_size=3, preconditioning_interval=interval, grafting=grafting)
    work = preconditioner_work(SHAPES, ["a", "b", "c"], block_size=3)
    alone = together = chosen.initial(draw(1, COUNT))
    for gradient in draw(2, 4, COUNT):
        computed = {}
        for numbers in work.values():
            computed |= chosen.preconditioners(together, gradient, numbers)
        due = chosen.chosen.recomputes(together.steps + 1)
        assert set(computed) == (set(range(len(blocks(SHAPES, 3)))) if due else set())
        together = chosen.step(together, gradient, preconditioners=computed)
        alone = chosen.step(alone, gradient)
        assert bits(together) == bits(alone)


def test_roots_that_are_given_are_used_and_the_others_computed():
    chosen = shampoo([(4, 4), (4, 4)], grafting="none", beta1=0.0)
    state = chosen.initial(draw(3, 32))
    gradient = draw(4, 32)
    roots = chosen.preconditioners(state, gradient, [0])
    doubled = chosen.step(state, gradient, preconditioners={0: roots[0] * np.float32(2)})
    plain = chosen.step(state, gradient)
    moved = (doubled.parameters - state.parameters) / (plain.parameters - state.parameters)
    np.testing.assert_allclose(moved[:16], 4, rtol=1e-3)  # both sides of the block are doubled
    assert doubled.parameters[16:].tobytes() == plain.parameters[16:].tobytes()


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_turning_the_gradient_of_a_matrix_turns_its_step(seed):
    """Shampoo knows no axes: with G for every gradient turned into Q G R, the update U becomes Q U R."""
    random = np.random.default_rng(seed)
    left, right = (np.linalg.qr(random.standard_normal((side, side)))[0] for side in (5, 4))
    gradients = random.standard_normal((3, 5, 4))
    chosen = shampoo([(5, 4)], grafting="none", epsilon=1e-2)
    zeros = np.zeros(20, np.float32)
    plain, turned = (
        stepped(chosen, zeros, [gradient.astype(np.float32).reshape(-1) for gradient in given_])[
            -1
        ].parameters.reshape(5, 4)
        for given_ in (gradients, left @ gradients @ right)
    )
    np.testing.assert_allclose(turned, left @ plain @ right, atol=1e-4)


@given(st.integers(0, 2**32 - 1), st.integers(1, 8))
@settings(max_examples=20)
def test_a_block_steps_as_it_would_alone(seed, size):
    parameters, gradients = draw(seed, 7, 5), draw(seed + 1, 3, 7, 5)
    together = stepped(shampoo([(7, 5)], block_size=size), parameters.reshape(-1), gradients.reshape(3, -1))[
        -1
    ].parameters.reshape(7, 5)
    for block in blocks([(7, 5)], size):
        shape = parameters[block.parts].shape
        alone = stepped(
            shampoo([shape], block_size=size),
            parameters[block.parts].reshape(-1),
            [gradient[block.parts].reshape(-1) for gradient in gradients],
        )[-1].parameters.reshape(shape)
        if (
            1 not in shape or size == 1
        ):  # a side of length 1 is a preconditioner inside a matrix, and none alone
            np.testing.assert_allclose(together[block.parts], alone, atol=1e-5)


@pytest.mark.parametrize("grafting", ["adagrad", "adam", "sgd"])
def test_grafting_lends_the_length_of_the_other_methods_step(grafting):
    options = {"beta2": 0.9, "beta1": 0.5, "grafting": grafting}
    gradients = draw(5, 3, 12)
    roots, none_yet = (
        stepped(
            shampoo([(4, 3)], preconditioning_interval=interval, **options),
            np.zeros(12, np.float32),
            gradients,
        )
        for interval in (1, 99)
    )
    directions = []
    for states in (roots, none_yet):
        moves = [new.parameters - old.parameters for old, new in itertools.pairwise(states)]
        directions.append([move.astype(np.float64) for move in moves])
    for ours, theirs in zip(*directions, strict=True):
        assert np.linalg.norm(ours) == pytest.approx(np.linalg.norm(theirs), rel=1e-4)
        assert not np.allclose(ours, theirs, rtol=1e-2)


def test_a_matrix_with_one_gradient_moves_along_its_polar_factor():
    """(G G^T)^(-1/4) G (G^T G)^(-1/4) is U V^T (Gupta et al. 2018): all singular values become one."""
    gradient = draw(6, 5, 5)
    chosen = shampoo([(5, 5)], beta1=0.0, grafting="none")
    moved = -chosen.step(chosen.initial(np.zeros(25, np.float32)), gradient.reshape(-1)).parameters / 0.1
    left, _, right = np.linalg.svd(gradient.astype(np.float64))
    np.testing.assert_allclose(moved.reshape(5, 5), left @ right, atol=2e-3)


def test_old_roots_are_kept_until_the_next_are_due():
    chosen = shampoo(preconditioning_interval=3)
    states = stepped(chosen, draw(7, COUNT), draw(8, 7, COUNT))
    at = chosen.chosen.slot_names.index("roots")
    roots = [state.slots[at].tobytes() for state in states]
    assert not any(np.frombuffer(root, np.float32).any() for root in roots[:3])
    assert roots[3] == roots[4] == roots[5]
    assert len({roots[2], roots[3], roots[6]}) == 3


def test_noise_that_old_roots_never_saw_is_not_enlarged():
    """Of a wide matrix one gradient tells little: what is orthogonal to it must not be a thousand times too long."""
    first, later = draw(9, 2, 40), draw(10, 2, 40)
    exact = {}
    for floor in (shampoo_module.NOISE, 0.0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shampoo_module, "NOISE", floor)
            chosen = shampoo([(2, 40)], beta1=0.0, grafting="none", preconditioning_interval=2, block_size=40)
            half = np.zeros_like(first)
            states = stepped(
                chosen, np.zeros(80, np.float32), [half.reshape(-1), first.reshape(-1), later.reshape(-1)]
            )
            exact[floor] = np.linalg.norm(states[-1].parameters - states[-2].parameters)
    assert exact[shampoo_module.NOISE] < exact[0.0] / 5


def test_shampoo_goes_down_a_badly_scaled_quadratic_faster_than_sgd_and_adagrad():
    """min |A (X - X*) B|^2 / 2 with condition 1e4 on both sides, the best of some learning rates each."""
    random = np.random.default_rng(11)
    left, right = (
        np.linalg.qr(random.standard_normal((8, 8)))[0] * np.geomspace(1, 1e-2, 8) for _ in range(2)
    )
    target = random.standard_normal((8, 8))

    def loss_and_gradient(parameters):
        rest = left.T @ (parameters.reshape(8, 8) - target) @ right
        return (rest**2).sum() / 2, (left @ rest @ right.T).reshape(-1).astype(np.float32)

    def reached(kind, **options):
        found = []
        for rate in (0.01, 0.03, 0.1, 0.3, 1.0):
            chosen = optimizer(kind, [(8, 8)], learning_rate=rate, **options)
            state = chosen.initial(np.zeros(64, np.float32))
            for _ in range(100):
                state = chosen.step(state, loss_and_gradient(state.parameters.astype(np.float64))[1])
            found.append(loss_and_gradient(state.parameters.astype(np.float64))[0])
        return min(found)

    ours = reached("distributed_shampoo", beta1=0.0)
    adagrad = reached("distributed_shampoo", beta1=0.0, preconditioning_interval=10_000)
    assert ours < adagrad
    assert ours < reached("sgd")


def test_statistics_beyond_float32_have_no_roots_and_make_no_step():
    chosen = shampoo([(4, 3)])
    state, gradient = chosen.initial(draw(1, 12)), np.full(12, 1e30, np.float32)
    roots = chosen.preconditioners(state, gradient, [0])
    assert np.isnan(roots[0]).all()
    for given_ in (None, roots):
        with pytest.raises(LocalError, match="step 1 is not finite"):
            chosen.step(state, gradient, preconditioners=given_)
    with pytest.raises(LocalError, match="step 1 is not finite"):
        chosen.step(state, draw(2, 12), preconditioners=roots)


def test_what_is_no_block_and_no_root_is_misuse():
    chosen = shampoo()
    state, gradient = chosen.initial(draw(1, COUNT)), draw(2, COUNT)
    count = len(blocks(SHAPES, 1024))
    for number in (-1, count):
        with pytest.raises(LocalError, match=f"there is no block {number} of {count}"):
            chosen.preconditioners(state, gradient, [number])
    with pytest.raises(LocalError, match="block 0 has 43 float32 roots, not float32"):
        chosen.step(state, gradient, preconditioners={0: np.zeros(42, np.float32)})
    with pytest.raises(LocalError, match=f"there is no block {count} of {count}"):
        chosen.step(state, gradient, preconditioners={count: np.zeros(42, np.float32)})
    with pytest.raises(LocalError, match="the gradient is not finite"):
        chosen.preconditioners(state, np.full(COUNT, np.nan, np.float32), [0])
    adam = optimizer("adam", SHAPES, learning_rate=0.1)
    with pytest.raises(LocalError, match="adam has no preconditioners"):
        adam.preconditioners(adam.initial(draw(1, COUNT)), gradient, [0])
    with pytest.raises(LocalError, match="adam has no preconditioners"):
        adam.step(adam.initial(draw(1, COUNT)), gradient, preconditioners={0: np.zeros(1, np.float32)})

"""The outer optimizer as anybody calls it: the same bits as a run's step, published values, and what is refused."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pcoord.errors import LocalError, UserError
from p2pcoord.optimization import optimizer
from p2pcoord.optimization.optimizer import OPTIMIZERS
from p2pcoord.optimization.step import step

SHAPES = [(5, 3), (4,), (), (2, 3, 2)]
COUNT = 15 + 4 + 1 + 12
PUBLISHED = json.loads(Path(__file__).with_name("published_vectors.json").read_text())

# Units in the last place of the largest element of a tensor, over 20 steps, against float64. Roots of statistics that have
# not the full rank lose digits: DASH's case has blocks of 3 x 1.
LAMB_ULP = 8
SHAMPOO_ULP = 512


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def taken(kind: str, gradients, shapes=SHAPES, parameters=None, **options):
    """All states from the first on."""
    chosen = optimizer(kind, shapes, learning_rate=0.1, **options)
    states = [chosen.initial(draw(1, COUNT) if parameters is None else parameters)]
    for gradient in gradients:
        states.append(chosen.step(states[-1], gradient))
    return states


def bits(state) -> list[bytes]:
    return [state.parameters.tobytes(), *(slot.tobytes() for slot in state.slots)]


@pytest.mark.parametrize(
    "case",
    PUBLISHED["cases"],
    ids=lambda case: f"{case['library']}-{case['kind']}-{'-'.join(map(str, case['options'].values()))}",
)
def test_twenty_steps_are_those_of_a_public_implementation(case):
    given_ = PUBLISHED["inputs"][case["shapes"]]
    chosen = optimizer(case["kind"], given_["shapes"], learning_rate=case["learning_rate"], **case["options"])
    state = chosen.initial(np.array(given_["parameters"], np.float32))
    tolerance = LAMB_ULP if case["kind"] == "lamb" else SHAMPOO_ULP
    for number, gradient in enumerate(given_["gradients"], start=1):
        state = chosen.step(state, np.array(gradient, np.float32))
        if str(number) not in case["states"]:
            continue
        expected = np.array(case["states"][str(number)])
        ends = np.cumsum([math.prod(shape) for shape in given_["shapes"]])[:-1]
        for ours, theirs in zip(np.split(state.parameters, ends), np.split(expected, ends), strict=True):
            unit = np.spacing(np.float32(np.abs(theirs).max()))
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * float(unit))
    assert number == 20


def test_every_kind_that_torch_has_not_was_compared_in_all_its_forms():
    kinds = [case["kind"] for case in PUBLISHED["cases"]]
    assert set(kinds) == {"lamb", "distributed_shampoo"}
    conventions = {case["options"].get("convention") for case in PUBLISHED["cases"]} - {None}
    assert conventions == {"paper", "uncorrected", "clamped", "apex"}
    grafted = {case["options"].get("grafting") for case in PUBLISHED["cases"]} - {None}
    assert grafted == {"adagrad", "adam", "sgd", "none"}


@pytest.mark.parametrize(
    ("kind", "options", "torchs"),
    [
        ("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}, torch.optim.SGD),
        ("adam", {"weight_decay": 0.01}, torch.optim.Adam),
        ("adamw", {"weight_decay": 0.1}, torch.optim.AdamW),
        # Before the first roots there is the grafted method.
        (
            "distributed_shampoo",
            {"beta1": 0.0, "preconditioning_interval": 50, "grafting_epsilon": 1e-10},
            torch.optim.Adagrad,
        ),
    ],
)
def test_twenty_steps_are_torchs_within_8_units_in_the_last_place(kind, options, torchs):
    parameters, gradients = draw(2, COUNT), draw(3, 20, COUNT)
    theirs = torch.nn.Parameter(torch.from_numpy(parameters.copy()))
    shared = {name: value for name, value in options.items() if kind != "distributed_shampoo"}
    holder = torchs([theirs], lr=0.1, **shared)
    for gradient in gradients:
        theirs.grad = torch.from_numpy(gradient)
        holder.step()
    ours = taken(kind, gradients, parameters=parameters, **options)[-1].parameters
    expected = theirs.detach().numpy()
    unit = np.spacing(np.maximum(np.abs(expected), np.float32(1)))
    assert (np.abs(ours - expected) / unit).max() <= 8


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
@given(st.integers(0, 2**32 - 1), st.integers(1, COUNT))
@settings(max_examples=20)
def test_a_step_has_the_bits_of_a_runs_step_in_pieces(kind, seed, cut):
    options = {"weight_decay": 0.01, **({"momentum": 0.9, "nesterov": True} if kind == "sgd" else {})}
    gradients = draw(seed, 3, COUNT)
    states = taken(kind, gradients, **options)
    chosen = OPTIMIZERS[kind](**options)
    for number, (old, new) in enumerate(itertools.pairwise(states), start=1):
        scalars = chosen.parameters(number, 0.1)
        for part in (slice(0, cut), slice(cut, COUNT)):
            out = np.empty_like(old.parameters[part])
            slots = [np.empty_like(out) for _ in old.slots]
            step(
                old.parameters[part],
                gradients[number - 1][part],
                [slot[part] for slot in old.slots],
                scalars,
                out,
                slots,
            )
            assert out.tobytes() == new.parameters[part].tobytes()
            assert [slot.tobytes() for slot in slots] == [slot[part].tobytes() for slot in new.slots]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_state_and_a_gradient_are_left_as_they_were(kind):
    gradients = draw(4, 3, COUNT)
    kept = gradients.copy()
    first, *_ = states = taken(kind, gradients)
    again = taken(kind, gradients)
    assert [bits(state) for state in states] == [bits(state) for state in again]
    assert (gradients == kept).all()
    assert first.steps == 0
    assert states[-1].steps == 3
    assert (first.parameters == draw(1, COUNT)).all()
    assert all((slot == 0).all() for slot in first.slots)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_descent_direction_is_minus_the_gradient(kind):
    gradient = draw(5, COUNT)
    first, second = taken(kind, [gradient], weight_decay=0.0)
    assert float((second.parameters - first.parameters) @ gradient) < 0


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_steps_own_learning_rate_goes_before_the_optimizers(kind):
    gradient = draw(6, COUNT)
    by_default = optimizer(kind, SHAPES, learning_rate=0.25)
    other = optimizer(kind, SHAPES, learning_rate=10.0)
    without = optimizer(kind, SHAPES)
    state = by_default.initial(draw(1, COUNT))
    expected = bits(by_default.step(state, gradient))
    assert bits(other.step(state, gradient, 0.25)) == expected
    assert bits(without.step(state, gradient, 0.25)) == expected
    assert bits(other.step(state, gradient, 0.0)) != expected
    with pytest.raises(LocalError, match="a step needs a learning rate"):
        without.step(state, gradient)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_learning_rate_of_zero_moves_nothing(kind):
    chosen = optimizer(kind, SHAPES, learning_rate=0.0)
    state = chosen.initial(draw(1, COUNT))
    assert (chosen.step(state, draw(6, COUNT)).parameters == state.parameters).all()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_model_of_nothing_and_empty_tensors_are_stepped(kind):
    for shapes in ([], [(0, 3)], [(0,), (2, 0)]):
        chosen = optimizer(kind, shapes, learning_rate=0.1)
        empty = np.empty(0, np.float32)
        assert chosen.step(chosen.initial(empty), empty).parameters.size == 0


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_refused(kind, poison):
    chosen = optimizer(kind, SHAPES, learning_rate=0.1)
    state = chosen.initial(draw(1, COUNT))
    gradient = draw(6, COUNT)
    gradient[7] = poison
    with pytest.raises(LocalError, match="step 1 is not finite: the gradient is not"):
        chosen.step(state, gradient)
    new = state.parameters.copy(), [slot.copy() for slot in state.slots]
    scalars = chosen.chosen.parameters(1, 0.1)
    assert not chosen.advance(1, scalars, state.parameters, gradient, state.slots, *new)


@pytest.mark.parametrize("kind", ["adam", "adamw", "lamb", "distributed_shampoo"])
def test_a_gradient_whose_square_is_beyond_float32_is_refused(kind):
    chosen = optimizer(kind, SHAPES, learning_rate=0.1)
    with pytest.raises(LocalError, match="float32 ends before it"):
        chosen.step(chosen.initial(draw(1, COUNT)), np.full(COUNT, 1e30, np.float32))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_arrays_of_another_form_are_misuse(kind):
    chosen = optimizer(kind, SHAPES, learning_rate=0.1)
    good = draw(1, COUNT)
    state = chosen.initial(good)
    for bad in (good[:-1], good.astype(np.float64), good.reshape(4, -1), np.zeros(COUNT, np.int32)):
        with pytest.raises(LocalError, match="needs flat float32 vectors"):
            chosen.initial(bad)
        with pytest.raises(LocalError, match="needs flat float32 vectors"):
            chosen.step(state, bad)
    with pytest.raises(LocalError, match="the parameters are not finite"):
        chosen.initial(np.full(COUNT, math.nan, np.float32))
    with pytest.raises(LocalError, match="needs flat float32 vectors"):
        optimizer(kind, [(COUNT - 1,)], learning_rate=0.1).step(state, good)


def test_what_cannot_be_is_refused_when_the_optimizer_is_made():
    with pytest.raises(UserError, match="there is no outer optimizer 'rmsprop'"):
        optimizer("rmsprop", SHAPES, learning_rate=0.1)
    with pytest.raises(
        UserError, match="has no 'momentum': it has weight_decay, beta1, beta2, epsilon, convention"
    ):
        optimizer("lamb", SHAPES, learning_rate=0.1, momentum=0.9)
    with pytest.raises(LocalError, match="a tensor's sides are at least 0"):
        optimizer("sgd", [(2, -1)], learning_rate=0.1)
    for rate in (-0.1, math.nan):
        with pytest.raises(LocalError, match="a learning rate is a number of at least 0"):
            optimizer("sgd", SHAPES, learning_rate=rate)
    with pytest.raises(LocalError, match="has no finite float32"):
        optimizer("sgd", SHAPES, learning_rate=math.inf)

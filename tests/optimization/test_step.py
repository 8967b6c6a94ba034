"""The outer step: torch's formulas, the written order, the same bits for every block size."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2pcoord.errors import LocalError
from p2pcoord.optimization import step as step_module
from p2pcoord.optimization.optimizer import SGD, Adam, AdamW, DistributedShampoo, Lamb, Optimizer
from p2pcoord.optimization.step import step

PLAIN = SGD(momentum=0.0, nesterov=False, weight_decay=0.0)
ALL = [
    PLAIN,
    SGD(momentum=0.0, nesterov=False, weight_decay=0.01),
    SGD(momentum=0.9, nesterov=False, weight_decay=0.01),
    SGD(momentum=0.9, nesterov=True, weight_decay=0.0),
    SGD(momentum=0.9, nesterov=True, weight_decay=0.01),
    Adam(beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.0),
    Adam(beta1=0.9, beta2=0.99, epsilon=1e-3, weight_decay=0.01),
    Adam(beta1=0.0, beta2=0.0, epsilon=1e-8, weight_decay=0.0),
    AdamW(beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.1),
    AdamW(beta1=0.8, beta2=0.9, epsilon=1e-3, weight_decay=0.0),
]


def taken(chosen: Optimizer, parameters, gradients, rate=0.7):
    """Parameters and slots after a step with each gradient, and whether all were finite."""
    slots = [np.zeros_like(parameters) for _ in range(chosen.slots)]
    finite = True
    for number, gradient in enumerate(gradients, start=1):
        new, new_slots = np.empty_like(parameters), [np.empty_like(slot) for slot in slots]
        finite &= step(parameters, gradient, slots, chosen.parameters(number, rate), new, new_slots)
        parameters, slots = new, new_slots
    return parameters, slots, finite


def draw(seed: int, size: int, steps: int):
    random = np.random.default_rng(seed)
    return random.standard_normal(size).astype(np.float32), random.standard_normal((steps, size)).astype(
        np.float32
    )


def torch_optimizer(chosen: Optimizer, parameter: torch.Tensor, rate: float) -> torch.optim.Optimizer:
    if isinstance(chosen, SGD):
        return torch.optim.SGD(
            [parameter],
            lr=rate,
            momentum=chosen.momentum,
            nesterov=chosen.nesterov,
            weight_decay=chosen.weight_decay,
        )
    assert isinstance(chosen, Adam)
    kind = torch.optim.AdamW if isinstance(chosen, AdamW) else torch.optim.Adam
    return kind(
        [parameter],
        lr=rate,
        betas=(chosen.beta1, chosen.beta2),
        eps=chosen.epsilon,
        weight_decay=chosen.weight_decay,
    )


@pytest.mark.parametrize("chosen", ALL, ids=str)
def test_twenty_steps_are_torchs_within_units_in_the_last_place(chosen):
    parameters, gradients = draw(3, 5000, 20)
    parameter = torch.nn.Parameter(torch.from_numpy(parameters.copy()))
    theirs = torch_optimizer(chosen, parameter, rate=0.1)
    for gradient in gradients:
        parameter.grad = torch.from_numpy(gradient)
        theirs.step()
    ours, slots, finite = taken(chosen, parameters, gradients, rate=0.1)
    assert finite
    # Parameters, steps and moments are of size 1: twenty steps of a few roundings each, 2**-24 a rounding.
    np.testing.assert_allclose(ours, parameter.detach().numpy(), rtol=0, atol=40 * 2.0**-24)
    if chosen.slots == 1:
        found = [theirs.state[parameter]["momentum_buffer"]]
    elif chosen.slots == 2:
        found = [theirs.state[parameter]["exp_avg"], theirs.state[parameter]["exp_avg_sq"]]
    else:
        found = []
    for slot, other in zip(slots, found, strict=True):
        np.testing.assert_allclose(slot, other.numpy(), rtol=0, atol=100 * 2.0**-24)


@pytest.mark.parametrize("chosen", ALL, ids=str)
def test_block_size_changes_no_bit(chosen):
    parameters, gradients = draw(4, 1000, 3)
    whole = taken(chosen, parameters, gradients)
    for block in (1, 7, 64, 999):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(step_module, "BLOCK", block)
            blocked = taken(chosen, parameters, gradients)
        assert whole[0].tobytes() == blocked[0].tobytes()
        assert [slot.tobytes() for slot in whole[1]] == [slot.tobytes() for slot in blocked[1]]


def rounded(value: Fraction) -> Fraction:
    """The float32 nearest to an exact number (normal, positive or negative), ties to even."""
    if value == 0:
        return value
    exponent = math.floor(math.log2(abs(value)))
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (exponent - 23)
    return round(value / unit) * unit


def exact(value: float) -> Fraction:
    return Fraction(float(value))


@given(st.integers(0, 2**32 - 1))
def test_a_nesterov_step_is_rounded_operation_by_operation_as_written(seed):
    chosen = SGD(momentum=0.9, nesterov=True, weight_decay=0.01)
    scalars = chosen.parameters(1, 0.7)
    random = np.random.default_rng(seed)
    p, g, m = (random.uniform(0.5, 2, 1).astype(np.float32) for _ in range(3))
    new, new_slot = np.empty(1, np.float32), np.empty(1, np.float32)
    step(p, g, [m], scalars, new, [new_slot])
    mu = exact(scalars.momentum)
    decayed = rounded(exact(g[0]) + rounded(exact(scalars.weight_decay) * exact(p[0])))
    buffer = rounded(rounded(mu * exact(m[0])) + decayed)
    direction = rounded(decayed + rounded(mu * buffer))
    expected = rounded(exact(p[0]) - rounded(exact(scalars.learning_rate) * direction))
    assert exact(new_slot[0]) == buffer
    assert exact(new[0]) == expected


@given(st.integers(0, 2**32 - 1))
def test_an_adam_step_is_rounded_operation_by_operation_as_written(seed):
    scalars = Adam(beta1=0.9, beta2=0.99, epsilon=1e-3, weight_decay=0.0).parameters(3, 0.1)
    random = np.random.default_rng(seed)
    p, g, m, v = (random.uniform(0.5, 2, 1).astype(np.float32) for _ in range(4))
    new, first, second = (np.empty(1, np.float32) for _ in range(3))
    step(p, g, [m, v], scalars, new, [first, second])

    def root(value: Fraction) -> Fraction:
        # A float64 root of a float32 rounds on to the float32 root (Figueroa 1995).
        return rounded(Fraction(math.sqrt(value)))

    gradient = exact(g[0])
    mean = rounded(
        rounded(exact(scalars.beta1) * exact(m[0])) + rounded(exact(scalars.one_minus_beta1) * gradient)
    )
    square = rounded(
        rounded(exact(scalars.beta2) * exact(v[0]))
        + rounded(exact(scalars.one_minus_beta2) * rounded(gradient * gradient))
    )
    divisor = rounded(rounded(root(square) / root(exact(scalars.bias_correction2))) + exact(scalars.epsilon))
    rate = rounded(exact(scalars.learning_rate) / exact(scalars.bias_correction1))
    assert exact(first[0]) == mean
    assert exact(second[0]) == square
    assert exact(new[0]) == rounded(exact(p[0]) - rounded(rate * rounded(mean / divisor)))


@given(st.integers(0, 2**32 - 1))
def test_an_adamw_step_is_adams_from_parameters_that_decayed_first(seed):
    decaying = AdamW(beta1=0.9, beta2=0.99, epsilon=1e-3, weight_decay=0.1).parameters(3, 0.1)
    plain = Adam(beta1=0.9, beta2=0.99, epsilon=1e-3, weight_decay=0.0).parameters(3, 0.1)
    random = np.random.default_rng(seed)
    p, g, m, v = (random.uniform(0.5, 2, 1).astype(np.float32) for _ in range(4))
    kept = rounded(1 - rounded(exact(decaying.learning_rate) * exact(decaying.weight_decay)))
    decayed = np.array([float(rounded(exact(p[0]) * kept))], np.float32)
    results = []
    for parameters, scalars in ((p, decaying), (decayed, plain)):
        new = [np.empty(1, np.float32) for _ in range(3)]
        step(parameters, g, [m, v], scalars, new[0], new[1:])
        results.append([vector.tobytes() for vector in new])
    assert results[0] == results[1]


def test_plain_sgd_with_rate_one_is_federated_averaging():
    base, local = draw(5, 100, 1)[0], draw(6, 100, 1)[0]
    gradient = base - local
    new, _, _ = taken(PLAIN, base, [gradient], rate=1.0)
    np.testing.assert_allclose(new, local, atol=1e-6)


def test_the_old_state_and_the_gradient_are_left_as_they_were():
    for chosen in ALL:
        parameters, gradients = draw(7, 100, 1)
        slots = [np.full(100, 0.5, np.float32) for _ in range(chosen.slots)]
        before = [vector.copy() for vector in (parameters, gradients[0], *slots)]
        new, new_slots = np.empty_like(parameters), [np.empty_like(slot) for slot in slots]
        step(parameters, gradients[0], slots, chosen.parameters(1, 0.7), new, new_slots)
        assert all(
            (old == kept).all() for old, kept in zip((parameters, gradients[0], *slots), before, strict=True)
        )


@pytest.mark.parametrize("chosen", ALL, ids=str)
@pytest.mark.parametrize("poison", [math.nan, math.inf, 3e38])
def test_a_step_says_when_anything_it_wrote_is_not_finite(chosen, poison):
    parameters, gradients = draw(8, 100, 1)
    assert taken(chosen, parameters, gradients)[2]
    gradients[0, 57] = poison
    new, slots, finite = taken(chosen, parameters, gradients)
    assert finite == all(np.isfinite(vector).all() for vector in (new, *slots))
    if poison != 3e38:
        assert not finite


def test_a_parameter_without_gradient_stays_under_adam():
    chosen = Adam(beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.0)
    new, _, finite = taken(chosen, np.ones(3, np.float32), [np.zeros(3, np.float32)] * 5)
    assert finite
    assert (new == 1).all()


def test_misuse_of_a_step_is_refused():
    vector, out = np.ones(3, np.float32), np.empty(3, np.float32)
    scalars = SGD(momentum=0.9, nesterov=True, weight_decay=0.0).parameters(1, 0.7)
    wrong = [
        (vector, vector, [], out, []),
        (vector, vector, [vector], out, []),
        (vector, vector[:2], [vector], out, [out]),
        (vector, vector.astype(np.float64), [vector], out, [out]),
        (vector, vector, [vector], np.empty((3, 1), np.float32), [out]),
    ]
    for parameters, gradient, slots, new, new_slots in wrong:
        with pytest.raises(LocalError):
            step(parameters, gradient, slots, scalars, new, new_slots)


@pytest.mark.parametrize("chosen", [Lamb(), DistributedShampoo()], ids=str)
def test_what_needs_whole_tensors_is_not_stepped_piece_by_piece(chosen):
    vector = np.ones(3, np.float32)
    with pytest.raises(LocalError, match=f"{chosen.kind} is not element-wise"):
        step(vector, vector, [vector] * 2, chosen.parameters(1, 0.7), vector.copy(), [vector.copy()] * 2)


def test_nothing_to_step_is_a_step():
    empty = np.empty(0, np.float32)
    assert step(empty, empty, [empty], ALL[3].parameters(1, 0.7), empty.copy(), [empty.copy()])

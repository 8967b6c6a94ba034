"""Outer optimizers: options, the signed scalars, and what is refused."""

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcoord.errors import LocalError, RemoteError, UserError
from p2pcoord.float32 import is_float32
from p2pcoord.optimization.optimizer import (
    OPTIMIZERS,
    SGD,
    Adam,
    StepParameters,
    agrees,
    configured,
    optimizer,
)
from p2pcoord.optimization.step import KERNELS
from p2pcoord.run_config import Optimization
from p2pcoord.wire import decode, encode

NESTEROV = SGD(momentum=0.9, nesterov=True, weight_decay=0.0)
ADAM = Adam(beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.01)

fractions = st.floats(0, 0.9999)
optimizers = st.one_of(
    st.builds(SGD, momentum=st.floats(1e-6, 0.9999), nesterov=st.booleans(), weight_decay=fractions),
    st.builds(SGD, momentum=st.just(0.0), nesterov=st.just(False), weight_decay=fractions),
    st.builds(Adam, beta1=fractions, beta2=fractions, epsilon=st.floats(1e-12, 1.0), weight_decay=fractions),
)


@given(optimizers, st.integers(1, 10**6), st.floats(0, 10))
def test_scalars_are_float32_numbers_that_pass_the_wire(chosen, step, rate):
    scalars = chosen.parameters(step, rate)
    numbers = [value for value in msgspec.structs.astuple(scalars) if isinstance(value, float)]
    assert all(is_float32(number) for number in numbers)
    assert decode(encode(scalars), StepParameters) == scalars
    assert agrees(scalars, scalars)
    assert scalars.slots == chosen.slots


def test_slots_are_momentum_or_two_moments_or_none():
    assert NESTEROV.slots == 1
    assert optimizer("sgd", momentum=0.0, nesterov=False, weight_decay=0.0).slots == 0
    assert ADAM.slots == 2


def test_bias_corrections_follow_the_step():
    first, tenth = ADAM.parameters(1, 0.1), ADAM.parameters(10, 0.1)
    assert first.bias_correction1 == pytest.approx(0.1)
    assert first.bias_correction1 == first.one_minus_beta1
    assert tenth.bias_correction1 == pytest.approx(1 - 0.9**10)
    assert tenth.bias_correction2 == pytest.approx(1 - 0.999**10)
    assert ADAM.parameters(10**6, 0.1).bias_correction2 == 1.0


def test_every_exact_kind_has_a_kernel_and_a_place_in_the_run_file():
    assert {kind for kind, chosen in OPTIMIZERS.items() if chosen.exact} == set(KERNELS)
    assert configured(Optimization()) == optimizer("sgd", momentum=0.9, nesterov=True, weight_decay=0.0)
    adam = configured(Optimization(kind="adam", beta2=0.9))
    assert adam == optimizer("adam", beta1=0.9, beta2=0.9, epsilon=1e-3, weight_decay=0.0)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("lamb", {}, "there is no outer optimizer 'lamb': use adam or sgd"),
        ("sgd", {"beta1": 0.9}, "has no 'beta1': it has weight_decay, momentum, nesterov"),
        ("sgd", {"momentum": 0.9, "nesterov": True}, "missing required field `weight_decay`"),
        ("sgd", {"momentum": 1.0, "nesterov": True, "weight_decay": 0.0}, "momentum must be"),
        ("sgd", {"momentum": 0.0, "nesterov": True, "weight_decay": 0.0}, "nesterov needs a momentum"),
        ("sgd", {"momentum": 1e-60, "nesterov": True, "weight_decay": 0.0}, "nesterov needs a momentum"),
        ("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": -1.0}, "weight_decay must be"),
        ("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": math.inf}, "weight_decay must be"),
        ("adam", {"beta1": math.nan, "beta2": 0.9, "epsilon": 1e-8, "weight_decay": 0.0}, "beta1 must be"),
        ("adam", {"beta1": 0.9, "beta2": 1.0, "epsilon": 1e-8, "weight_decay": 0.0}, "beta2 must be"),
        ("adam", {"beta1": 0.9, "beta2": 0.9, "epsilon": 0.0, "weight_decay": 0.0}, "epsilon must be"),
        ("adam", {"beta1": 0.9, "beta2": 0.9, "epsilon": 1e-60, "weight_decay": 0.0}, "epsilon must be"),
        ("adam", {"beta1": 0.9, "beta2": 0.9, "epsilon": math.inf, "weight_decay": 0.0}, "epsilon must be"),
    ],
)
def test_what_cannot_work_is_refused_in_words(kind, options, message):
    with pytest.raises(UserError, match=message):
        optimizer(kind, **options)


def test_a_step_that_cannot_be_is_misuse():
    for chosen in (NESTEROV, ADAM):
        for step, rate in ((0, 0.1), (-1, 0.1), (1, math.nan), (1, 1e39)):
            with pytest.raises(LocalError):
                chosen.parameters(step, rate)


def test_scalars_that_differ_as_c_libraries_do_agree_and_others_do_not():
    ours = ADAM.parameters(7, 0.1)
    near = msgspec.structs.replace(ours, bias_correction2=ours.bias_correction2 * (1 + 2**-22))
    far = msgspec.structs.replace(ours, bias_correction2=ours.bias_correction2 * (1 + 2**-18))
    assert agrees(ours, near)
    assert agrees(near, ours)
    assert not agrees(ours, far)
    assert not agrees(ours, ADAM.parameters(8, 0.1))
    assert not agrees(ours, msgspec.structs.replace(ours, learning_rate=0.0))
    for name in ("learning_rate", "bias_correction1", "bias_correction2", "epsilon"):
        for wrong in (math.inf, -math.inf, math.nan):
            assert not agrees(ours, msgspec.structs.replace(ours, **{name: wrong}))
    assert not agrees(
        NESTEROV.parameters(1, 0.1), SGD(momentum=0.9, nesterov=False, weight_decay=0.0).parameters(1, 0.1)
    )


def test_an_unknown_kind_cannot_be_decoded():
    encoded = encode(["shampoo", *msgspec.structs.astuple(ADAM.parameters(1, 0.5))[1:]])
    with pytest.raises(RemoteError) as error:
        decode(encoded, StepParameters)
    assert error.value.kind == "bad_type"

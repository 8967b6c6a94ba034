"""Outer optimizers: options, the signed scalars, and what is refused."""

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcoord.errors import LocalError, RemoteError, UserError
from p2pcoord.float32 import is_float32
from p2pcoord.optimization.optimizer import (
    LAMB_CONVENTIONS,
    OPTIMIZERS,
    SGD,
    Adam,
    AdamW,
    DistributedShampoo,
    Lamb,
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
    *(
        st.builds(
            kind, beta1=fractions, beta2=fractions, epsilon=st.floats(1e-12, 1.0), weight_decay=fractions
        )
        for kind in (Adam, AdamW)
    ),
    st.builds(
        Lamb,
        beta1=fractions,
        beta2=fractions,
        epsilon=st.floats(1e-12, 1.0),
        weight_decay=fractions,
        convention=st.sampled_from(sorted(LAMB_CONVENTIONS)),
    ),
    st.builds(
        DistributedShampoo,
        beta1=fractions,
        beta2=st.floats(0.01, 1.0),
        momentum=st.floats(1e-6, 0.9999),
        nesterov=st.booleans(),
        weight_decay=fractions,
        preconditioning_interval=st.integers(1, 5),
        grafting=st.sampled_from(["adagrad", "sgd", "none"]),
    ),
)


@given(optimizers, st.integers(1, 10**6), st.floats(0, 10))
def test_scalars_are_float32_numbers_that_pass_the_wire(chosen, step, rate):
    scalars = chosen.parameters(step, rate)
    numbers = [value for value in msgspec.structs.astuple(scalars) if isinstance(value, float)]
    assert all(is_float32(number) for number in numbers)
    assert decode(encode(scalars), StepParameters) == scalars
    assert agrees(scalars, scalars)
    if not isinstance(chosen, DistributedShampoo):
        assert scalars.slots == chosen.slots
        assert chosen.slot_sizes([(3, 4), ()]) == (13,) * chosen.slots


def test_slots_are_momentum_or_two_moments_or_none():
    assert NESTEROV.slots == 1
    assert optimizer("sgd").slots == 0
    assert [optimizer(kind).slots for kind in ("adam", "adamw", "lamb")] == [2, 2, 2]


def test_shampoos_slots_depend_on_the_shapes_and_on_what_it_keeps():
    shapes, count, packed = [(5, 3), (4,), ()], 20, 15 + 6 + 10 + 1

    def sizes(**options):
        chosen = optimizer("distributed_shampoo", **options)
        return dict(zip(chosen.slot_names, chosen.slot_sizes(shapes), strict=True))

    assert sizes() == {"gradient_mean": count, "squares": count, "statistics": packed}
    assert sizes(beta1=0.0, grafting="sgd") == {"statistics": packed}
    assert sizes(momentum=0.5, grafting="none", preconditioning_interval=2) == {
        "gradient_mean": count,
        "momentum": count,
        "statistics": packed,
        "roots": packed,
    }
    # Blocks of 2: rows 2, 2, 1 with columns 2, 1; twice 2; 1.
    in_twos = 2 * (3 + 3) + 2 * (3 + 1) + (1 + 3) + (1 + 1) + 2 * 3 + 1
    assert optimizer("distributed_shampoo", block_size=2).slot_sizes(shapes)[-1] == in_twos
    with pytest.raises(LocalError, match="not as large as the parameters"):
        _ = optimizer("distributed_shampoo").slots


def test_defaults_are_torchs_where_torch_has_the_kind():
    assert optimizer("sgd") == SGD(momentum=0.0, nesterov=False, weight_decay=0.0)
    assert optimizer("adam") == Adam(beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.0)
    assert optimizer("adamw") == AdamW(beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.01)
    assert optimizer("lamb").convention == "paper"


def test_kinds_that_are_not_element_wise_say_so():
    assert {kind for kind, chosen in OPTIMIZERS.items() if not chosen.exact} == {
        "lamb",
        "distributed_shampoo",
    }


def test_a_lamb_without_bias_correction_divides_by_one():
    for convention, differs in LAMB_CONVENTIONS.items():
        scalars = Lamb(convention=convention).parameters(3, 0.1)
        assert (scalars.bias_correction1 < 1) == (scalars.bias_correction2 < 1) == differs.bias_correction


def test_shampoos_statistics_are_sums_or_corrected_means():
    sums = DistributedShampoo(beta2=1.0).parameters(3, 0.1)
    assert (sums.beta2, sums.one_minus_beta2, sums.bias_correction2) == (1, 1, 1)
    means = DistributedShampoo(beta2=0.5).parameters(3, 0.1)
    assert (means.beta2, means.one_minus_beta2, means.bias_correction2) == (0.5, 0.5, 0.875)


def test_roots_are_computed_at_every_interval():
    every_third = DistributedShampoo(preconditioning_interval=3)
    assert [step for step in range(1, 10) if every_third.recomputes(step)] == [3, 6, 9]


def test_bias_corrections_follow_the_step():
    first, tenth = ADAM.parameters(1, 0.1), ADAM.parameters(10, 0.1)
    assert first.bias_correction1 == pytest.approx(0.1)
    assert first.bias_correction1 == first.one_minus_beta1
    assert tenth.bias_correction1 == pytest.approx(1 - 0.9**10)
    assert tenth.bias_correction2 == pytest.approx(1 - 0.999**10)
    assert ADAM.parameters(10**6, 0.1).bias_correction2 == 1.0


def test_every_exact_kind_has_a_kernel():
    assert {kind for kind, chosen in OPTIMIZERS.items() if chosen.exact} == set(KERNELS)
    assert all(chosen.kind == kind for kind, chosen in OPTIMIZERS.items())


def test_a_run_file_names_the_kind_and_what_it_needs():
    assert configured(Optimization()) == optimizer("sgd", momentum=0.9, nesterov=True, weight_decay=0.0)
    adam = configured(Optimization(kind="adam", beta2=0.9))
    assert adam == optimizer("adam", beta1=0.9, beta2=0.9, epsilon=1e-3, weight_decay=0.0)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "lambda",
            {},
            "there is no outer optimizer 'lambda': use one of sgd, adam, adamw, lamb, distributed_shampoo",
        ),
        ("sgd", {"beta1": 0.9}, "has no 'beta1': it has weight_decay, momentum, nesterov"),
        (
            "sgd",
            {"momentum": "much"},
            r"the outer optimizer 'sgd': Expected `float`, got `str` - at `\$.momentum`",
        ),
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
        ("adamw", {"beta1": -0.1}, "beta1 must be at least 0 and below 1, it is -0.1"),
        (
            "adamw",
            {"weight_decay": math.nan},
            "weight_decay must be a finite number of at least 0, it is nan",
        ),
        ("lamb", {"epsilon": 0.0}, "epsilon must be a positive float32 number, it is 0.0"),
        ("lamb", {"convention": "mine"}, "the outer optimizer 'lamb': Invalid enum value 'mine'"),
        ("distributed_shampoo", {"beta1": 1.0}, "beta1 must be at least 0 and below 1, it is 1.0"),
        ("distributed_shampoo", {"beta2": 0.0}, "beta2 must be above 0 and at most 1, it is 0.0"),
        ("distributed_shampoo", {"beta2": 1.1}, "beta2 must be above 0 and at most 1, it is 1.1"),
        ("distributed_shampoo", {"nesterov": True}, "nesterov needs a momentum above 0"),
        ("distributed_shampoo", {"epsilon": -1.0}, "epsilon must be a positive float32 number, it is -1.0"),
        (
            "distributed_shampoo",
            {"grafting_epsilon": 0.0},
            "grafting_epsilon must be a positive float32 number",
        ),
        ("distributed_shampoo", {"block_size": 0}, "block_size must be at least 1, it is 0"),
        (
            "distributed_shampoo",
            {"preconditioning_interval": 0},
            "preconditioning_interval must be at least 1",
        ),
        ("distributed_shampoo", {"grafting": "adam"}, 'grafting = "adam" needs a beta2 below 1'),
        ("distributed_shampoo", {"grafting": "lars"}, "Invalid enum value 'lars'"),
        ("distributed_shampoo", {"block_size": 1.5}, "Expected `int`, got `float`"),
    ],
)
def test_what_cannot_work_is_refused_in_words(kind, options, message):
    with pytest.raises(UserError, match=message):
        optimizer(kind, **options)


def test_a_step_that_cannot_be_is_misuse():
    for chosen in (NESTEROV, ADAM, AdamW(), Lamb(), DistributedShampoo()):
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

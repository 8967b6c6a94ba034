"""Schedules: torch's values from a pure function of the step."""

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2pcoord.errors import LocalError, UserError
from p2pcoord.float32 import float32, is_float32
from p2pcoord.optimization.learning_rate import SCHEDULES, learning_rate, schedule

CASES = [
    ("constant", {}),
    ("ConstantLR", {}),
    ("ConstantLR", {"factor": 0.5, "total_iters": 7}),
    ("LinearLR", {}),
    ("LinearLR", {"start_factor": 1.0, "end_factor": 0.0, "total_iters": 12}),
    ("CosineAnnealingLR", {"T_max": 10}),
    ("CosineAnnealingLR", {"T_max": 7, "eta_min": 0.01}),
    ("StepLR", {"step_size": 4}),
    ("StepLR", {"step_size": 3, "gamma": 0.5}),
]


def torch_rates(kind, options, base: float, steps: int, warmup: int) -> list[float]:
    holder = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=base)
    if kind == "constant":
        scheduler = torch.optim.lr_scheduler.LambdaLR(holder, lambda _: 1.0)
    else:
        scheduler = getattr(torch.optim.lr_scheduler, kind)(holder, **options)
    if warmup:
        rising = torch.optim.lr_scheduler.LinearLR(holder, 1 / warmup, 1.0, max(1, warmup - 1))
        scheduler = torch.optim.lr_scheduler.SequentialLR(holder, [rising, scheduler], milestones=[warmup])
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR calls step with the argument that it warns of
        for _ in range(steps):
            rates.append(holder.param_groups[0]["lr"])
            holder.step()
            scheduler.step()
    return rates


@pytest.mark.parametrize(("kind", "options"), CASES)
@pytest.mark.parametrize("warmup", [0, 2, 5])
def test_rates_are_torchs_step_by_step(kind, options, warmup):
    chosen = schedule(kind, **options)
    ours = [learning_rate(chosen, 0.7, step, warmup_steps=warmup) for step in range(25)]
    assert ours == pytest.approx(torch_rates(kind, options, 0.7, 25, warmup), rel=1e-6, abs=1e-9)


@given(st.sampled_from(CASES), st.floats(0, 10), st.integers(0, 10**9), st.integers(0, 1000))
def test_a_rate_is_a_float32_number_of_at_least_zero_and_depends_on_the_step_alone(case, base, step, warmup):
    chosen = schedule(case[0], **case[1])
    rate = learning_rate(chosen, base, step, warmup_steps=warmup)
    assert is_float32(rate)
    assert 0 <= rate <= max(float32(base), case[1].get("eta_min", 0.0))
    assert rate == learning_rate(schedule(case[0], **case[1]), base, step, warmup_steps=warmup)


def test_a_warm_up_rises_in_equal_steps_to_the_base_rate():
    rates = [learning_rate(schedule(), 1.0, step, warmup_steps=4) for step in range(6)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_names_are_torchs():
    assert all(hasattr(torch.optim.lr_scheduler, kind) for kind in SCHEDULES if kind != "constant")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "OneCycleLR",
            {},
            "there is no learning-rate schedule 'OneCycleLR': use one of constant, ConstantLR",
        ),
        ("constant", {"factor": 1.0}, "has no 'factor': it has no options"),
        ("StepLR", {}, "missing required field `step_size`"),
        ("StepLR", {"step_size": 0}, "step_size of the learning-rate schedule must be at least 1, it is 0"),
        ("StepLR", {"step_size": 1, "gamma": 1.5}, "gamma"),
        ("LinearLR", {"start_factor": 0.0}, "start_factor"),
        ("LinearLR", {"end_factor": math.nan}, "end_factor"),
        ("LinearLR", {"total_iters": 0}, "total_iters"),
        ("ConstantLR", {"factor": 2.0}, "factor"),
        ("CosineAnnealingLR", {"T_max": 1.5}, "T_max"),
        ("CosineAnnealingLR", {"T_max": 5, "eta_min": -1.0}, "eta_min"),
    ],
)
def test_what_cannot_work_is_refused_in_words(kind, options, message):
    with pytest.raises(UserError, match=message):
        schedule(kind, **options)


@pytest.mark.parametrize(
    ("base", "step", "warmup"), [(0.1, -1, 0), (0.1, 0, -1), (-0.1, 0, 0), (math.nan, 0, 0), (math.inf, 0, 0)]
)
def test_a_rate_that_cannot_be_is_misuse(base, step, warmup):
    with pytest.raises(LocalError):
        learning_rate(schedule(), base, step, warmup_steps=warmup)

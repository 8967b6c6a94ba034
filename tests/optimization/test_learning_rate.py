"""Schedules: torch's values from a pure function of the step."""

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2pcoord.errors import LocalError, UserError
from p2pcoord.float32 import float32, is_float32
from p2pcoord.optimization.learning_rate import (
    SCHEDULES,
    SHORT_NAMES,
    ReduceLROnPlateau,
    learning_rate,
    schedule,
)

STEPS = 120

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
    ("MultiStepLR", {"milestones": [3, 30, 30, 10]}),
    ("MultiStepLR", {"milestones": [], "gamma": 0.5}),
    ("ExponentialLR", {"gamma": 0.9}),
    ("PolynomialLR", {}),
    ("PolynomialLR", {"total_iters": 40, "power": 2.0}),
    ("OneCycleLR", {"total_steps": STEPS}),
    ("OneCycleLR", {"total_steps": STEPS, "pct_start": 0.5, "anneal_strategy": "linear"}),
    ("OneCycleLR", {"total_steps": STEPS, "three_phase": True, "div_factor": 10.0, "final_div_factor": 2.0}),
    ("OneCycleLR", {"total_steps": STEPS, "pct_start": 0.0}),
    ("OneCycleLR", {"total_steps": STEPS, "pct_start": 0.95}),
]


def torch_rates(kind, options, base: float, steps: int, warmup: int) -> list[float]:
    holder = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=base)
    if kind == "constant":
        scheduler = torch.optim.lr_scheduler.LambdaLR(holder, lambda _: 1.0)
    elif kind == "OneCycleLR":
        # torch's takes the place of the base rate, so it cannot follow another: what it gives is shifted instead.
        rising = [base * (step + 1) / warmup for step in range(warmup)]
        one = torch.optim.lr_scheduler.OneCycleLR(holder, base, cycle_momentum=False, **options)
        return rising + [_rate_then_step(holder, one) for _ in range(steps - warmup)]
    else:
        scheduler = getattr(torch.optim.lr_scheduler, kind)(holder, **options)
    if warmup:
        rising = torch.optim.lr_scheduler.LinearLR(holder, 1 / warmup, 1.0, max(1, warmup - 1))
        scheduler = torch.optim.lr_scheduler.SequentialLR(holder, [rising, scheduler], milestones=[warmup])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR calls step with the argument that it warns of
        return [_rate_then_step(holder, scheduler) for _ in range(steps)]


def _rate_then_step(holder, scheduler) -> float:
    rate = holder.param_groups[0]["lr"]
    holder.step()
    scheduler.step()
    return rate


@pytest.mark.parametrize(("kind", "options"), CASES)
@pytest.mark.parametrize("warmup", [0, 2, 5])
def test_rates_of_a_whole_run_are_torchs_step_by_step(kind, options, warmup):
    chosen = schedule(kind, **options)
    ours = [learning_rate(chosen, 0.7, step, warmup_steps=warmup) for step in range(STEPS)]
    # float32 of 0.7 or less; torch's products of many factors end at 1e-17 where the closed form is 0.
    assert ours == pytest.approx(torch_rates(kind, options, 0.7, STEPS, warmup), rel=1e-6, abs=1e-9)


def test_every_schedule_of_ours_was_compared():
    assert {kind for kind, _ in CASES} | {"ReduceLROnPlateau"} == set(SCHEDULES)


plateaus = st.fixed_dictionaries(
    {},
    optional={
        "mode": st.sampled_from(["min", "max"]),
        "factor": st.floats(0.1, 0.9),
        "patience": st.integers(0, 4),
        "threshold": st.sampled_from([0.0, 1e-4, 0.3]),
        "threshold_mode": st.sampled_from(["rel", "abs"]),
        "cooldown": st.integers(0, 4),
        "min_lr": st.sampled_from([0.0, 0.01, 1.0]),
        "eps": st.sampled_from([1e-8, 0.05]),
    },
)
some_losses = st.lists(st.floats(-2, 2) | st.just(math.nan) | st.just(math.inf), max_size=80)


@given(plateaus, some_losses, st.integers(0, 3))
def test_rates_on_a_plateau_are_torchs_whatever_the_losses(options, losses, warmup):
    holder = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.7)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(holder, **options)
    chosen = schedule("plateau", **options)
    history = [5.0] * warmup + losses
    for step in range(warmup, len(history) + 1):
        ours = learning_rate(chosen, 0.7, step, warmup_steps=warmup, losses=history)
        assert ours == float32(holder.param_groups[0]["lr"])
        if step < len(history):
            theirs.step(history[step])


@given(plateaus, some_losses)
def test_a_plateau_that_is_carried_along_is_the_one_of_the_history(options, losses):
    chosen = ReduceLROnPlateau(**options)
    plateau = chosen.begin(0.7)
    for step, loss in enumerate(losses):
        assert plateau.rate == chosen.rate(0.7, step, losses)
        plateau = chosen.after(plateau, loss)


@given(plateaus, some_losses, st.data())
def test_states_that_were_not_validated_count_neither_way(options, losses, data):
    chosen = schedule("plateau", **options)
    at = data.draw(st.integers(0, len(losses)))
    with_gap = [*losses[:at], None, *losses[at:]]
    assert learning_rate(chosen, 0.7, len(with_gap), losses=with_gap) == learning_rate(
        chosen, 0.7, len(losses), losses=losses
    )


def test_a_plateau_needs_the_losses_of_all_steps_before():
    with pytest.raises(LocalError, match="the rate of step 3 needs the losses of all steps before, not 2"):
        learning_rate(schedule("plateau"), 0.7, 5, warmup_steps=2, losses=[1.0] * 4)
    assert learning_rate(schedule("plateau"), 0.5, 1, warmup_steps=2) == 0.5


def test_after_its_cycle_one_cycle_stays_at_its_last_rate():
    chosen = schedule("one_cycle", total_steps=10)
    last = learning_rate(chosen, 1.0, 9)
    assert last == pytest.approx(1 / 25 / 1e4)
    assert learning_rate(chosen, 1.0, 10) == learning_rate(chosen, 1.0, 10**6) == last


@pytest.mark.parametrize("three_phase", [False, True])
def test_a_phase_without_length_is_over_at_once(three_phase):
    # torch divides by zero here.
    rates = [
        learning_rate(
            schedule("one_cycle", total_steps=4, pct_start=0.25, three_phase=three_phase), 1.0, step
        )
        for step in range(4)
    ]
    assert max(rates) <= 1
    assert rates[-1] == pytest.approx(1 / 25 / 1e4)


def test_short_names_are_torchs_schedules_and_constant_is_none():
    assert {
        name: type(schedule(name, **options)).__name__
        for name, options in (
            ("linear", {}),
            ("cosine", {"T_max": 3}),
            ("step", {"step_size": 3}),
            ("one_cycle", {"total_steps": 3}),
            ("plateau", {}),
        )
    } == SHORT_NAMES
    assert learning_rate(schedule("constant"), 0.5, 0) == 0.5


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
            "CyclicLR",
            {},
            "there is no learning-rate schedule 'CyclicLR': use one of constant, ConstantLR, .*ReduceLROnPlateau, linear",
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
        ("cosine", {}, "the learning-rate schedule 'cosine': Object missing required field `T_max`"),
        ("MultiStepLR", {}, "missing required field `milestones`"),
        ("MultiStepLR", {"milestones": [3, -1]}, "each of the milestones .* must be at least 0, it is -1"),
        (
            "MultiStepLR",
            {"milestones": [3], "gamma": 0.0},
            "gamma .* must be above 0 and at most 1, it is 0.0",
        ),
        ("ExponentialLR", {"gamma": math.nan}, "gamma .* must be above 0 and at most 1, it is nan"),
        ("PolynomialLR", {"total_iters": 0}, "total_iters .* must be at least 1, it is 0"),
        ("PolynomialLR", {"power": 0.0}, "power .* must be a finite number above 0, it is 0.0"),
        ("OneCycleLR", {"total_steps": 0}, "total_steps .* must be at least 1, it is 0"),
        (
            "OneCycleLR",
            {"total_steps": 9, "pct_start": 1.5},
            "pct_start .* must be between 0 and 1, it is 1.5",
        ),
        (
            "OneCycleLR",
            {"total_steps": 9, "pct_start": 0.6, "three_phase": True},
            "pct_start .* must be between 0 and 0.5, it is 0.6",
        ),
        (
            "OneCycleLR",
            {"total_steps": 9, "div_factor": 0.5},
            "div_factor .* must be a finite number of at least 1",
        ),
        (
            "OneCycleLR",
            {"total_steps": 9, "final_div_factor": math.inf},
            "final_div_factor .* must be a finite",
        ),
        ("OneCycleLR", {"total_steps": 9, "anneal_strategy": "sin"}, "Invalid enum value 'sin'"),
        ("plateau", {"factor": 1.0}, "factor .* must be above 0 and below 1, it is 1.0"),
        ("plateau", {"patience": -1}, "patience .* must be a finite number of at least 0, it is -1"),
        ("plateau", {"threshold": math.inf}, "threshold .* must be a finite number of at least 0, it is inf"),
        ("plateau", {"mode": "best"}, "Invalid enum value 'best'"),
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

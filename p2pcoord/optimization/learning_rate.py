"""Learning-rate schedules: the rate of each outer step as a pure function of the step and of the losses before it.

Theory of operation
    A schedule is named as torch.optim.lr_scheduler names it, with torch's parameters and defaults, plus "constant" for no
    schedule at all. torch's classes count calls and multiply the last rate; here the closed form is evaluated at `step`
    (0 for the first outer step, torch's last_epoch), so that any coordinator, and any voter, gets the rate from the
    ledger alone. The rate is a float32 number: whoever coordinates rounds it and signs it, since cosines differ in the
    last bit between C libraries.

    Only ReduceLROnPlateau looks at losses: those of the states that the steps made, by number of the step. It is a fold, and
    may as well be carried along (`begin`, `after`).

    A warm-up of w steps multiplies by 1/w, 2/w, ... 1 (Goyal et al. 2017, section 2.2), and the schedule begins after it:
    torch's SequentialLR of LinearLR and the schedule. Losses of the warm-up do not count.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Final, Literal, TypeAlias

import msgspec

from p2pcoord.errors import LocalError, UserError
from p2pcoord.float32 import float32
from p2pcoord.kinds import made

Losses: TypeAlias = Sequence[float | None]
"""By number of the step; None where a state was not validated."""


class Schedule(msgspec.Struct, frozen=True, kw_only=True):
    """Base of the schedules; made by `schedule`. Parameters are checked when it is made (UserError)."""

    @abstractmethod
    def rate(self, base: float, step: int, losses: Losses) -> float:
        """The rate at `step`, counted from 0 after the warm-up, for the base rate: float64, not rounded yet."""


class Constant(Schedule, frozen=True, kw_only=True):
    """The base rate at every step."""

    def rate(self, base: float, step: int, losses: Losses) -> float:
        return base


class ConstantLR(Schedule, frozen=True, kw_only=True):
    """`factor` times the base rate for `total_iters` steps, then the base rate."""

    factor: float = 1 / 3
    total_iters: int = 5

    def __post_init__(self) -> None:
        _require(0 <= self.factor <= 1, "factor", "between 0 and 1", self.factor)
        _require(self.total_iters >= 0, "total_iters", "at least 0", self.total_iters)

    def rate(self, base: float, step: int, losses: Losses) -> float:
        return base * self.factor if step < self.total_iters else base


class LinearLR(Schedule, frozen=True, kw_only=True):
    """From `start_factor` to `end_factor` times the base rate in `total_iters` steps of equal size, then constant."""

    start_factor: float = 1 / 3
    end_factor: float = 1.0
    total_iters: int = 5

    def __post_init__(self) -> None:
        _require(0 < self.start_factor <= 1, "start_factor", "above 0 and at most 1", self.start_factor)
        _require(0 <= self.end_factor <= 1, "end_factor", "between 0 and 1", self.end_factor)
        _require(self.total_iters >= 1, "total_iters", "at least 1", self.total_iters)

    def rate(self, base: float, step: int, losses: Losses) -> float:
        way = min(step, self.total_iters) / self.total_iters
        return base * (self.start_factor + (self.end_factor - self.start_factor) * way)


class CosineAnnealingLR(Schedule, frozen=True, kw_only=True):
    """From the base rate to `eta_min` in `T_max` steps along half a cosine, and up again (Loshchilov and Hutter 2017)."""

    T_max: int
    eta_min: float = 0.0

    def __post_init__(self) -> None:
        _require(self.T_max >= 1, "T_max", "at least 1", self.T_max)
        _require(self.eta_min >= 0, "eta_min", "at least 0", self.eta_min)

    def rate(self, base: float, step: int, losses: Losses) -> float:
        return self.eta_min + (base - self.eta_min) * (1 + math.cos(math.pi * step / self.T_max)) / 2


class StepLR(Schedule, frozen=True, kw_only=True):
    """The base rate times `gamma` for each `step_size` steps that have passed."""

    step_size: int
    gamma: float = 0.1

    def __post_init__(self) -> None:
        _require(self.step_size >= 1, "step_size", "at least 1", self.step_size)
        _require(0 < self.gamma <= 1, "gamma", "above 0 and at most 1", self.gamma)

    def rate(self, base: float, step: int, losses: Losses) -> float:
        return float(base * self.gamma ** (step // self.step_size))


class MultiStepLR(Schedule, frozen=True, kw_only=True):
    """The base rate times `gamma` for each of the milestones that was reached."""

    milestones: tuple[int, ...]
    gamma: float = 0.1

    def __post_init__(self) -> None:
        for milestone in self.milestones:
            _require(milestone >= 0, "each of the milestones", "at least 0", milestone)
        _require(0 < self.gamma <= 1, "gamma", "above 0 and at most 1", self.gamma)

    def rate(self, base: float, step: int, losses: Losses) -> float:
        return float(base * self.gamma ** bisect_right(sorted(self.milestones), step))


class ExponentialLR(Schedule, frozen=True, kw_only=True):
    """The base rate times `gamma` for each step that has passed."""

    gamma: float

    def __post_init__(self) -> None:
        _require(0 < self.gamma <= 1, "gamma", "above 0 and at most 1", self.gamma)

    def rate(self, base: float, step: int, losses: Losses) -> float:
        return float(base * self.gamma**step)


class PolynomialLR(Schedule, frozen=True, kw_only=True):
    """From the base rate to 0 in `total_iters` steps, as the `power` of what is left of them; then 0."""

    total_iters: int = 5
    power: float = 1.0

    def __post_init__(self) -> None:
        _require(self.total_iters >= 1, "total_iters", "at least 1", self.total_iters)
        _require(0 < self.power < math.inf, "power", "a finite number above 0", self.power)

    def rate(self, base: float, step: int, losses: Losses) -> float:
        return float(base * (1 - min(step, self.total_iters) / self.total_iters) ** self.power)


class OneCycleLR(Schedule, frozen=True, kw_only=True):
    """From a fraction of the base rate up to it and down to nearly nothing (Smith and Topin 2019), in `total_steps` steps.

    The base rate is torch's max_lr. Momentum is not cycled (torch's cycle_momentum=False), and where torch raises, after
    `total_steps`, the last rate stays.
    """

    total_steps: int
    pct_start: float = 0.3
    anneal_strategy: Literal["cos", "linear"] = "cos"
    div_factor: float = 25.0
    final_div_factor: float = 1e4
    three_phase: bool = False

    def __post_init__(self) -> None:
        _require(self.total_steps >= 1, "total_steps", "at least 1", self.total_steps)
        most = 0.5 if self.three_phase else 1
        _require(0 <= self.pct_start <= most, "pct_start", f"between 0 and {most}", self.pct_start)
        _require(
            1 <= self.div_factor < math.inf, "div_factor", "a finite number of at least 1", self.div_factor
        )
        _require(
            1 <= self.final_div_factor < math.inf,
            "final_div_factor",
            "a finite number of at least 1",
            self.final_div_factor,
        )

    def rate(self, base: float, step: int, losses: Losses) -> float:
        first = base / self.div_factor
        last = self.total_steps - 1
        rise = self.pct_start * self.total_steps
        turns = [(0.0, first), (rise - 1, base)]
        if self.three_phase:
            turns.append((2 * rise - 2, first))
        turns.append((float(last), first / self.final_div_factor))
        at = min(step, last)
        for (begin, high), (end, low) in pairwise(turns):
            if at <= end:
                # torch divides by zero in a phase without length.
                way = (at - begin) / (end - begin) if end != begin else 1.0
                if self.anneal_strategy == "linear":
                    return high + (low - high) * way
                return low + (high - low) / 2 * (1 + math.cos(math.pi * way))
        raise LocalError(f"step {step} is in no phase of {self}")


class Plateau(msgspec.Struct, frozen=True):
    """Where ReduceLROnPlateau stands: the rate of the next step, the best loss, steps without a better one, and steps for
    which none are counted."""

    rate: float
    best: float
    bad: int = 0
    cooldown: int = 0


class ReduceLROnPlateau(Schedule, frozen=True, kw_only=True):
    """The rate times `factor` whenever more than `patience` states in a row were not better than the best before.

    A state that was not validated counts neither way; a loss that is NaN is not better.
    """

    mode: Literal["min", "max"] = "min"
    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    threshold_mode: Literal["rel", "abs"] = "rel"
    cooldown: int = 0
    min_lr: float = 0.0
    eps: float = 1e-8

    def __post_init__(self) -> None:
        _require(0 < self.factor < 1, "factor", "above 0 and below 1", self.factor)
        for name in ("patience", "threshold", "cooldown", "min_lr", "eps"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, name, "a finite number of at least 0", value)

    def begin(self, base: float) -> Plateau:
        """Where it stands at the first step."""
        return Plateau(base, math.inf if self.mode == "min" else -math.inf)

    def after(self, plateau: Plateau, loss: float | None) -> Plateau:
        """Where it stands after a step whose state has this loss."""
        if loss is None:
            return plateau
        better = self._better(loss, plateau.best)
        best = loss if better else plateau.best
        if plateau.cooldown:
            return Plateau(plateau.rate, best, 0, plateau.cooldown - 1)
        bad = 0 if better else plateau.bad + 1
        if bad <= self.patience:
            return Plateau(plateau.rate, best, bad)
        lower = max(plateau.rate * self.factor, self.min_lr)
        rate = lower if plateau.rate - lower > self.eps else plateau.rate
        return Plateau(rate, best, 0, self.cooldown)

    def rate(self, base: float, step: int, losses: Losses) -> float:
        if len(losses) < step:
            raise LocalError(
                f"the rate of step {step} needs the losses of all steps before, not {len(losses)}"
            )
        plateau = self.begin(base)
        for loss in losses[:step]:
            plateau = self.after(plateau, loss)
        return plateau.rate

    def _better(self, loss: float, best: float) -> bool:
        if self.threshold_mode == "rel":
            margin = 1 - self.threshold if self.mode == "min" else 1 + self.threshold
            return loss < best * margin if self.mode == "min" else loss > best * margin
        return loss < best - self.threshold if self.mode == "min" else loss > best + self.threshold


SCHEDULES: Final[dict[str, type[Schedule]]] = {
    "constant": Constant,
    "ConstantLR": ConstantLR,
    "LinearLR": LinearLR,
    "CosineAnnealingLR": CosineAnnealingLR,
    "StepLR": StepLR,
    "MultiStepLR": MultiStepLR,
    "ExponentialLR": ExponentialLR,
    "PolynomialLR": PolynomialLR,
    "OneCycleLR": OneCycleLR,
    "ReduceLROnPlateau": ReduceLROnPlateau,
}
"""By torch's class names; "constant" is no schedule at all."""

SHORT_NAMES: Final[dict[str, str]] = {
    "linear": "LinearLR",
    "cosine": "CosineAnnealingLR",
    "step": "StepLR",
    "one_cycle": "OneCycleLR",
    "plateau": "ReduceLROnPlateau",
}


def schedule(kind: str = "constant", **options: float | str | Sequence[int]) -> Schedule:
    """The schedule of this kind, by torch's name or the short one; options are the fields of its class.

    Raises UserError for an unknown kind, unknown or missing options and values out of range.
    """
    known = SCHEDULES | {short: SCHEDULES[name] for short, name in SHORT_NAMES.items()}
    return made("learning-rate schedule", known, kind, options, choices=f"one of {', '.join(known)}")


def learning_rate(
    chosen: Schedule, base: float, step: int, *, warmup_steps: int = 0, losses: Losses = ()
) -> float:
    """The learning rate of outer step `step`, counted from 0: a float32 number.

    `losses` are those of the states that the steps before made, from step 0 on; only ReduceLROnPlateau needs them. Raises
    LocalError when it has too few, for a negative step or warm-up, and for a base rate that is negative or has no float32.
    """
    if step < 0 or warmup_steps < 0 or not base >= 0:
        raise LocalError(
            f"no learning rate for step {step} after {warmup_steps} of warm-up at base rate {base}"
        )
    if step < warmup_steps:
        return float32(base * (step + 1) / warmup_steps)
    return float32(chosen.rate(base, step - warmup_steps, losses[warmup_steps:]))


def _require(condition: bool, name: str, wanted: str, value: float) -> None:
    if not condition:
        raise UserError(f"{name} of the learning-rate schedule must be {wanted}, it is {value}")

"""Learning-rate schedules: the rate of each outer step as a pure function of the step.

Theory of operation
    A schedule is named as torch.optim.lr_scheduler names it, with torch's parameters and defaults, plus "constant" for no
    schedule at all. torch's classes count calls and multiply the last rate; here the closed form is evaluated at `step`
    (0 for the first outer step, torch's last_epoch), so that any coordinator, and any voter, gets the rate from the
    ledger alone. The rate is a float32 number: whoever coordinates rounds it and signs it, since cosines differ in the
    last bit between C libraries.

    A warm-up of w steps multiplies by 1/w, 2/w, ... 1 (Goyal et al. 2017, section 2.2), and the schedule begins after it:
    torch's SequentialLR of LinearLR and the schedule.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Final

import msgspec

from p2pcoord.errors import LocalError, UserError
from p2pcoord.float32 import float32


class Schedule(msgspec.Struct, frozen=True, kw_only=True):
    """Base of the schedules; made by `schedule`. Parameters are checked when it is made (UserError)."""

    @abstractmethod
    def rate(self, base: float, step: int) -> float:
        """The rate at `step`, counted from 0 after the warm-up, for the base rate: float64, not rounded yet."""


class Constant(Schedule, frozen=True, kw_only=True):
    """The base rate at every step."""

    def rate(self, base: float, step: int) -> float:
        return base


class ConstantLR(Schedule, frozen=True, kw_only=True):
    """`factor` times the base rate for `total_iters` steps, then the base rate."""

    factor: float = 1 / 3
    total_iters: int = 5

    def __post_init__(self) -> None:
        _require(0 <= self.factor <= 1, "factor", "between 0 and 1", self.factor)
        _require(self.total_iters >= 0, "total_iters", "at least 0", self.total_iters)

    def rate(self, base: float, step: int) -> float:
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

    def rate(self, base: float, step: int) -> float:
        way = min(step, self.total_iters) / self.total_iters
        return base * (self.start_factor + (self.end_factor - self.start_factor) * way)


class CosineAnnealingLR(Schedule, frozen=True, kw_only=True):
    """From the base rate to `eta_min` in `T_max` steps along half a cosine, and up again (Loshchilov and Hutter 2017)."""

    T_max: int
    eta_min: float = 0.0

    def __post_init__(self) -> None:
        _require(self.T_max >= 1, "T_max", "at least 1", self.T_max)
        _require(self.eta_min >= 0, "eta_min", "at least 0", self.eta_min)

    def rate(self, base: float, step: int) -> float:
        return self.eta_min + (base - self.eta_min) * (1 + math.cos(math.pi * step / self.T_max)) / 2


class StepLR(Schedule, frozen=True, kw_only=True):
    """The base rate times `gamma` for each `step_size` steps that have passed."""

    step_size: int
    gamma: float = 0.1

    def __post_init__(self) -> None:
        _require(self.step_size >= 1, "step_size", "at least 1", self.step_size)
        _require(0 < self.gamma <= 1, "gamma", "above 0 and at most 1", self.gamma)

    def rate(self, base: float, step: int) -> float:
        return float(base * self.gamma ** (step // self.step_size))


SCHEDULES: Final[dict[str, type[Schedule]]] = {
    "constant": Constant,
    "ConstantLR": ConstantLR,
    "LinearLR": LinearLR,
    "CosineAnnealingLR": CosineAnnealingLR,
    "StepLR": StepLR,
}
"""By the name that the run file uses: torch's class names."""


def schedule(kind: str = "constant", **options: float) -> Schedule:
    """The schedule of this kind; options are the fields of its class.

    Raises UserError for an unknown kind, unknown or missing options and values out of range.
    """
    if kind not in SCHEDULES:
        raise UserError(f"there is no learning-rate schedule {kind!r}: use one of {', '.join(SCHEDULES)}")
    chosen = SCHEDULES[kind]
    unknown = sorted(options.keys() - set(chosen.__struct_fields__))
    if unknown:
        known = ", ".join(chosen.__struct_fields__) or "no options"
        raise UserError(f"the learning-rate schedule {kind!r} has no {unknown[0]!r}: it has {known}")
    try:
        return msgspec.convert(options, chosen)
    except msgspec.ValidationError as error:
        raise UserError(f"the learning-rate schedule {kind!r}: {error}") from None


def learning_rate(chosen: Schedule, base: float, step: int, *, warmup_steps: int = 0) -> float:
    """The learning rate of outer step `step`, counted from 0: a float32 number.

    Raises LocalError for a negative step or warm-up, and for a base rate that is negative or has no float32.
    """
    if step < 0 or warmup_steps < 0 or not base >= 0:
        raise LocalError(
            f"no learning rate for step {step} after {warmup_steps} of warm-up at base rate {base}"
        )
    if step < warmup_steps:
        return float32(base * (step + 1) / warmup_steps)
    return float32(chosen.rate(base, step - warmup_steps))


def _require(condition: bool, name: str, wanted: str, value: float) -> None:
    if not condition:
        raise UserError(f"{name} of the learning-rate schedule must be {wanted}, it is {value}")

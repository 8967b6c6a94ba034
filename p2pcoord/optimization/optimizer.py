"""Outer optimizers: what a run chooses, and the scalars of one step as a coordinator signs them.

Theory of operation
    The outer optimizer takes the mean pseudo-gradient (base minus local) for a gradient and makes the next state of the
    old one (FedOpt, Reddi et al. 2021; DiLoCo, Douillard et al. 2023). Everything in a step that is not element-wise is a
    scalar, and is computed once: `Optimizer.parameters(step, learning_rate)` gives `StepParameters`, float32 numbers that
    travel in the signed attempt, because powers differ in the last bit between C libraries. What is left for every member
    (optimization/step.py) is exactly rounded, so its state's hash is everybody's.

    A voter computes the scalars again and compares with `agrees`, which forgives what C libraries may differ in.

    Conventions are torch's (torch.optim.SGD, torch.optim.Adam; weight decay is added to the gradient). Slots begin as
    zeros: torch's SGD sets its momentum buffer to the first gradient, which zeros give as well.

    An optimizer that cannot be element-wise (LAMB's norms, Shampoo's roots) declares `exact = False`: one member steps it
    and the state itself is distributed.

This module knows no numpy.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Final, Literal

import msgspec

from p2pcoord.errors import LocalError, UserError
from p2pcoord.float32 import MAX_FLOAT32, float32

if TYPE_CHECKING:
    from p2pcoord.run_config import Optimization

Kind = Literal["sgd", "adam"]


class StepParameters(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The scalars of one outer step: float32 numbers, signed in the attempt. What a kind does not use is 0.

    `one_minus_beta1` and `bias_correction1` (1 - beta1 ** step) are rounded from float64, not computed from the rounded
    beta1: 1 - float32(0.999) is 0.005% away from 0.001.
    """

    kind: Kind
    learning_rate: float
    weight_decay: float = 0.0
    momentum: float = 0.0
    nesterov: bool = False
    beta1: float = 0.0
    beta2: float = 0.0
    one_minus_beta1: float = 0.0
    one_minus_beta2: float = 0.0
    bias_correction1: float = 0.0
    bias_correction2: float = 0.0
    epsilon: float = 0.0

    @property
    def slots(self) -> int:
        """Optimizer slots in the state, each as large as the parameters: momentum buffer; first and second moment."""
        if self.kind == "adam":
            return 2
        return 1 if self.momentum else 0


class Optimizer(msgspec.Struct, frozen=True, kw_only=True):
    """Base of the outer optimizers; made by `optimizer`. Instances are checked when they are made (UserError)."""

    kind: ClassVar[Kind]
    exact: ClassVar[bool] = True
    """Whether the step is element-wise, so that everybody steps for itself and the hash is certified."""

    weight_decay: float

    def __post_init__(self) -> None:
        _require(
            0 <= self.weight_decay <= MAX_FLOAT32,
            f"weight_decay must be a finite number of at least 0, it is {self.weight_decay}",
        )

    @abstractmethod
    def parameters(self, step: int, learning_rate: float) -> StepParameters:
        """The scalars of outer step `step`, counted from 1, at this learning rate.

        Raises LocalError for a step below 1 and for a learning rate that has no float32.
        """

    @property
    def slots(self) -> int:
        """Optimizer slots in a state of this run (Layout.state_bytes)."""
        return self.parameters(1, 0.0).slots


class SGD(Optimizer, frozen=True, kw_only=True):
    """torch.optim.SGD, dampening 0; with Nesterov momentum 0.9 and learning rate 0.7 it is DiLoCo's outer optimizer, with
    momentum 0 and learning rate 1 it is FedAvg."""

    kind: ClassVar[Kind] = "sgd"
    momentum: float
    nesterov: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(0 <= self.momentum < 1, f"momentum must be at least 0 and below 1, it is {self.momentum}")
        _require(
            float32(self.momentum) > 0 or not self.nesterov,
            "nesterov needs a momentum above 0: set one, or nesterov = false",
        )

    def parameters(self, step: int, learning_rate: float) -> StepParameters:
        _check_step(step)
        return StepParameters(
            kind=self.kind,
            learning_rate=float32(learning_rate),
            weight_decay=float32(self.weight_decay),
            momentum=float32(self.momentum),
            nesterov=self.nesterov,
        )


class Adam(Optimizer, frozen=True, kw_only=True):
    """torch.optim.Adam (Kingma and Ba 2015) without amsgrad."""

    kind: ClassVar[Kind] = "adam"
    beta1: float
    beta2: float
    epsilon: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(0 <= self.beta1 < 1, f"beta1 must be at least 0 and below 1, it is {self.beta1}")
        _require(0 <= self.beta2 < 1, f"beta2 must be at least 0 and below 1, it is {self.beta2}")
        _require(
            self.epsilon <= MAX_FLOAT32 and float32(self.epsilon) > 0,
            f"epsilon must be a positive float32 number, it is {self.epsilon}: without it a parameter that never had a "
            "gradient is divided 0 by 0",
        )

    def parameters(self, step: int, learning_rate: float) -> StepParameters:
        _check_step(step)
        return StepParameters(
            kind=self.kind,
            learning_rate=float32(learning_rate),
            weight_decay=float32(self.weight_decay),
            beta1=float32(self.beta1),
            beta2=float32(self.beta2),
            one_minus_beta1=float32(1 - self.beta1),
            one_minus_beta2=float32(1 - self.beta2),
            bias_correction1=float32(1 - self.beta1**step),
            bias_correction2=float32(1 - self.beta2**step),
            epsilon=float32(self.epsilon),
        )


OPTIMIZERS: Final[dict[str, type[Optimizer]]] = {"sgd": SGD, "adam": Adam}
"""By the name that the run file's `[optimization] kind` uses."""


def optimizer(kind: str, **options: float) -> Optimizer:
    """The outer optimizer of this kind; options are the fields of its class, all of them.

    Raises UserError for an unknown kind, options that are missing or that the kind does not have, and values out of range.
    """
    if kind not in OPTIMIZERS:
        raise UserError(f"there is no outer optimizer {kind!r}: use {' or '.join(sorted(OPTIMIZERS))}")
    chosen = OPTIMIZERS[kind]
    unknown = sorted(options.keys() - set(chosen.__struct_fields__))
    if unknown:
        known = ", ".join(chosen.__struct_fields__)
        raise UserError(f"the outer optimizer {kind!r} has no {unknown[0]!r}: it has {known}")
    try:
        return msgspec.convert(options, chosen)
    except msgspec.ValidationError as error:
        raise UserError(f"the outer optimizer {kind!r}: {error}") from None


def configured(optimization: Optimization) -> Optimizer:
    """The outer optimizer of a run, from its run file's [optimization]; what belongs to other kinds is left aside."""
    chosen = OPTIMIZERS[optimization.kind]
    return optimizer(
        optimization.kind, **{name: getattr(optimization, name) for name in chosen.__struct_fields__}
    )


AGREEMENT: Final = 2.0**-20
"""Relative difference between two machines' scalars that is nobody's fault: 8 units in the last place of float32. Powers
and cosines of C libraries differ in the last place of float64, and what is left after 1 - x grows by 1 / (1 - x)."""


def agrees(ours: StepParameters, theirs: StepParameters) -> bool:
    """Whether two machines computed the same scalars, as far as C libraries do. The signed ones are then used.

    Measured by ours, which are finite: an infinity would be near everything if it were its own measure, and a step divides by
    some of them.
    """
    return all(
        mine == other
        if not isinstance(mine, float) or not isinstance(other, float)
        else abs(mine - other) <= AGREEMENT * abs(mine)
        for mine, other in zip(msgspec.structs.astuple(ours), msgspec.structs.astuple(theirs), strict=True)
    )


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise UserError(otherwise)


def _check_step(step: int) -> None:
    if step < 1:
        raise LocalError(f"outer steps are counted from 1, not {step}")

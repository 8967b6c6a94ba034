"""Outer optimizers: what a run chooses, and the scalars of one step as a coordinator signs them.

Theory of operation
    The outer optimizer takes the mean pseudo-gradient (base minus local) for a gradient and makes the next state of the
    old one (FedOpt, Reddi et al. 2021; DiLoCo, Douillard et al. 2023). Everything in a step that is not element-wise is a
    scalar, and is computed once: `Optimizer.parameters(step, learning_rate)` gives `StepParameters`, float32 numbers that
    travel in the signed attempt, because powers differ in the last bit between C libraries. What is left for every member
    (optimization/step.py) is exactly rounded, so its state's hash is everybody's.

    A voter computes the scalars again and compares with `agrees`, which forgives what C libraries may differ in.

    Conventions and defaults are torch's where torch has the kind (torch.optim.SGD and Adam add weight decay to the
    gradient, AdamW decouples it). Slots begin as zeros: torch's SGD sets its momentum buffer to the first gradient, which
    zeros give as well. docs/optimization.md says when to pick which.

    An optimizer that is not element-wise (LAMB's norms, Shampoo's roots) declares `exact = False`: one member steps it and
    the state itself is distributed.

This module knows no numpy.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Final, Literal

import msgspec

from p2pcoord.errors import LocalError
from p2pcoord.float32 import MAX_FLOAT32, float32
from p2pcoord.kinds import made, require
from p2pcoord.optimization.blocks import blocks

if TYPE_CHECKING:
    from p2pcoord.optimization.blocks import Shapes
    from p2pcoord.run_config import Optimization

Kind = Literal["sgd", "adam", "adamw", "lamb", "distributed_shampoo"]


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
        """Optimizer slots in the state, each as large as the parameters: momentum buffer; first and second moment.

        Raises LocalError for Shampoo, whose slots depend on the shapes (`Optimizer.slot_sizes`).
        """
        if self.kind == "distributed_shampoo":
            raise LocalError("the slots of distributed_shampoo are not as large as the parameters")
        if self.kind == "sgd":
            return 1 if self.momentum else 0
        return 2


class Optimizer(msgspec.Struct, frozen=True, kw_only=True):
    """Base of the outer optimizers; made by `optimizer`. Instances are checked when they are made (UserError)."""

    kind: ClassVar[Kind]
    exact: ClassVar[bool] = True
    """Whether the step is element-wise, so that everybody steps for itself and the hash is certified."""

    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        require(
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

    def slot_sizes(self, shapes: Shapes) -> tuple[int, ...]:
        """Elements of each slot in a state whose parameters have these shapes."""
        return (sum(map(math.prod, shapes)),) * self.slots


class SGD(Optimizer, frozen=True, kw_only=True):
    """torch.optim.SGD, dampening 0; with Nesterov momentum 0.9 and learning rate 0.7 it is DiLoCo's outer optimizer, with
    momentum 0 and learning rate 1 it is FedAvg."""

    kind: ClassVar[Kind] = "sgd"
    momentum: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_momentum(self.momentum, self.nesterov)

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
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.beta1 < 1, f"beta1 must be at least 0 and below 1, it is {self.beta1}")
        require(0 <= self.beta2 < 1, f"beta2 must be at least 0 and below 1, it is {self.beta2}")
        _require_positive("epsilon", self.epsilon)

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


class AdamW(Adam, frozen=True, kw_only=True):
    """torch.optim.AdamW (Loshchilov and Hutter 2019): weight decay shrinks the parameters, times the learning rate, and does
    not enter the moments."""

    kind: ClassVar[Kind] = "adamw"
    weight_decay: float = 0.01


class Convention(msgspec.Struct, frozen=True):
    """What published LAMBs differ in."""

    bias_correction: bool = True
    largest_norm: float = math.inf
    """The paper's phi: the norm of the parameters counts at most this much in the trust ratio."""
    ratio_without_decay: bool = True
    """Whether the trust ratio is taken also where there is no weight decay."""


LAMB_CONVENTIONS: Final[dict[str, Convention]] = {
    "paper": Convention(),
    "uncorrected": Convention(bias_correction=False),
    "clamped": Convention(bias_correction=False, largest_norm=10.0),
    "apex": Convention(ratio_without_decay=False),
}
"""paper: algorithm 2 of You et al. 2020 with phi(z) = z, per tensor; optax does the same. uncorrected: their first versions,
and the code of ALBERT. clamped: cybertronai's pytorch-lamb and torch_optimizer. apex: NVIDIA's FusedLAMB and timm's Lamb."""


class Lamb(Adam, frozen=True, kw_only=True):
    """LAMB (You et al. 2020): Adam's direction and the decay, scaled per tensor to the norm of the tensor."""

    kind: ClassVar[Kind] = "lamb"
    exact: ClassVar[bool] = False
    weight_decay: float = 0.01
    epsilon: float = 1e-6
    convention: Literal["paper", "uncorrected", "clamped", "apex"] = "paper"

    def parameters(self, step: int, learning_rate: float) -> StepParameters:
        scalars = super().parameters(step, learning_rate)
        if LAMB_CONVENTIONS[self.convention].bias_correction:
            return scalars
        return msgspec.structs.replace(scalars, bias_correction1=1.0, bias_correction2=1.0)


class DistributedShampoo(Optimizer, frozen=True, kw_only=True):
    """Shampoo (Gupta et al. 2018) on blocks of each tensor (Anil et al. 2020), as Shi et al. 2023 write it down.

    beta2 = 1 sums the statistics, as Gupta et al. do; below 1 they are moving averages. Before step
    `preconditioning_interval` the step is the grafted method's. Defaults are those of Shi et al.'s code, but for grafting,
    which is Anil et al.'s.
    """

    kind: ClassVar[Kind] = "distributed_shampoo"
    exact: ClassVar[bool] = False
    beta1: float = 0.9
    beta2: float = 1.0
    momentum: float = 0.0
    nesterov: bool = False
    epsilon: float = 1e-12
    """Added to the eigenvalues of the statistics."""
    block_size: int = 1024
    """A block's longest side: recomputing costs its cube."""
    preconditioning_interval: int = 1
    """Steps between two computations of the inverse roots."""
    grafting: Literal["adagrad", "adam", "sgd", "none"] = "adagrad"
    """The method that lends its step length to each block."""
    grafting_epsilon: float = 1e-10

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_momentum(self.momentum, self.nesterov)
        require(0 <= self.beta1 < 1, f"beta1 must be at least 0 and below 1, it is {self.beta1}")
        require(0 < self.beta2 <= 1, f"beta2 must be above 0 and at most 1, it is {self.beta2}")
        require(
            self.beta2 < 1 or self.grafting != "adam",
            'grafting = "adam" needs a beta2 below 1: with sums it is "adagrad"',
        )
        _require_positive("epsilon", self.epsilon)
        _require_positive("grafting_epsilon", self.grafting_epsilon)
        for name in ("block_size", "preconditioning_interval"):
            value = getattr(self, name)
            require(value >= 1, f"{name} must be at least 1, it is {value}")

    def parameters(self, step: int, learning_rate: float) -> StepParameters:
        _check_step(step)
        sums = self.beta2 == 1
        return StepParameters(
            kind=self.kind,
            learning_rate=float32(learning_rate),
            weight_decay=float32(self.weight_decay),
            momentum=float32(self.momentum),
            nesterov=self.nesterov,
            beta1=float32(self.beta1),
            beta2=float32(self.beta2),
            one_minus_beta1=float32(1 - self.beta1),
            one_minus_beta2=1.0 if sums else float32(1 - self.beta2),
            bias_correction1=float32(1 - self.beta1**step),
            bias_correction2=1.0 if sums else float32(1 - self.beta2**step),
            epsilon=float32(self.epsilon),
        )

    def recomputes(self, step: int) -> bool:
        """Whether the inverse roots are computed at this step; there are none before the first that is."""
        return step % self.preconditioning_interval == 0

    @property
    def slot_names(self) -> tuple[str, ...]:
        """What each slot of a state holds. Inverse roots that are computed in every step are no state."""
        held = {
            "gradient_mean": self.beta1 > 0,
            "momentum": self.momentum > 0,
            "squares": self.grafting in ("adagrad", "adam"),
            "statistics": True,
            "roots": self.preconditioning_interval > 1,
        }
        return tuple(name for name, is_held in held.items() if is_held)

    def slot_sizes(self, shapes: Shapes) -> tuple[int, ...]:
        count = sum(map(math.prod, shapes))
        packed = sum(block.packed_count for block in blocks(shapes, self.block_size))
        return tuple(packed if name in ("statistics", "roots") else count for name in self.slot_names)


OPTIMIZERS: Final[dict[str, type[Optimizer]]] = {
    "sgd": SGD,
    "adam": Adam,
    "adamw": AdamW,
    "lamb": Lamb,
    "distributed_shampoo": DistributedShampoo,
}
"""By kind."""


def optimizer(kind: str, **options: float | str) -> Optimizer:
    """The outer optimizer of this kind; options are the fields of its class.

    Raises UserError for an unknown kind, options that the kind does not have, and values out of range.
    """
    choices = f"one of {', '.join(OPTIMIZERS)}"
    return made("outer optimizer", OPTIMIZERS, kind, options, choices=choices)


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


def _require_momentum(momentum: float, nesterov: bool) -> None:
    require(0 <= momentum < 1, f"momentum must be at least 0 and below 1, it is {momentum}")
    require(
        float32(momentum) > 0 or not nesterov,
        "nesterov needs a momentum above 0: set one, or nesterov = false",
    )


def _require_positive(name: str, value: float) -> None:
    require(
        value <= MAX_FLOAT32 and float32(value) > 0,
        f"{name} must be a positive float32 number, it is {value}: without it a parameter that never had a "
        "gradient is divided 0 by 0",
    )


def _check_step(step: int) -> None:
    if step < 1:
        raise LocalError(f"outer steps are counted from 1, not {step}")

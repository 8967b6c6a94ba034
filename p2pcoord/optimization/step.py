"""The outer step on flat float32 vectors: from the old state and the result, the new state, the same bits everywhere.

Theory of operation
    Only element-wise numpy operations that IEEE 754 rounds correctly (add, subtract, multiply, divide, square root), each
    stored before the next, all float32, scalars as `StepParameters` carries them. With g the mean pseudo-gradient, p the
    parameters, and a prime for the new value:

        all     g <- g + (weight_decay * p)                                       only if weight_decay is not 0; not adamw
        sgd     m' = (momentum * m) + g                                           only if momentum is not 0
                d  = g + (momentum * m') with nesterov;  m' without;  g without momentum
                p' = p - (learning_rate * d)
        adam    m' = (beta1 * m) + (one_minus_beta1 * g)
                v' = (beta2 * v) + (one_minus_beta2 * (g * g))
                d  = (sqrt(v') / sqrt(bias_correction2)) + epsilon
                p' = p - ((learning_rate / bias_correction1) * (m' / d))
        adamw   as adam, with p * (1 - (learning_rate * weight_decay)) for p      only if weight_decay is not 0

    torch's kernels compute the same formulas with fused and reassociated operations; they agree within some units in the
    last place, and their bits depend on the machine. That is why torch is not used here.

    The new state is written beside the old one: nothing that is certified is touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from p2pcoord.aggregation.summation import BLOCK
from p2pcoord.errors import LocalError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from p2pcoord.layout import Float32s
    from p2pcoord.optimization.optimizer import StepParameters


class Kernel(Protocol):
    """One kind's step on one block. `gradient` may be overwritten, so may `scratch`; all have the same shape (n,)."""

    def __call__(
        self,
        parameters: Float32s,
        gradient: Float32s,
        slots: Sequence[Float32s],
        scalars: StepParameters,
        out_parameters: Float32s,
        out_slots: Sequence[Float32s],
        scratch: Float32s,
    ) -> None: ...


def _sgd(
    parameters: Float32s,
    gradient: Float32s,
    slots: Sequence[Float32s],
    scalars: StepParameters,
    out_parameters: Float32s,
    out_slots: Sequence[Float32s],
    scratch: Float32s,
) -> None:
    direction = gradient
    if scalars.momentum:
        momentum = np.float32(scalars.momentum)
        (buffer,) = out_slots
        np.multiply(slots[0], momentum, out=buffer)
        np.add(buffer, gradient, out=buffer)
        if scalars.nesterov:
            np.multiply(buffer, momentum, out=scratch)
            np.add(gradient, scratch, out=gradient)
        else:
            direction = buffer
    np.multiply(direction, np.float32(scalars.learning_rate), out=scratch)
    np.subtract(parameters, scratch, out=out_parameters)


def adam_direction(
    gradient: Float32s,
    slots: Sequence[Float32s],
    scalars: StepParameters,
    out_slots: Sequence[Float32s],
    scratch: Float32s,
) -> None:
    """Adam's new moments into `out_slots`, and m' / d into `gradient`: without the first bias correction."""
    first, second = out_slots
    np.multiply(slots[0], np.float32(scalars.beta1), out=first)
    np.multiply(gradient, np.float32(scalars.one_minus_beta1), out=scratch)
    np.add(first, scratch, out=first)
    np.multiply(slots[1], np.float32(scalars.beta2), out=second)
    np.multiply(gradient, gradient, out=gradient)
    np.multiply(gradient, np.float32(scalars.one_minus_beta2), out=gradient)
    np.add(second, gradient, out=second)
    denominator = np.sqrt(second, out=scratch)
    np.divide(denominator, np.sqrt(np.float32(scalars.bias_correction2)), out=denominator)
    np.add(denominator, np.float32(scalars.epsilon), out=denominator)
    np.divide(first, denominator, out=gradient)


def _adam(
    parameters: Float32s,
    gradient: Float32s,
    slots: Sequence[Float32s],
    scalars: StepParameters,
    out_parameters: Float32s,
    out_slots: Sequence[Float32s],
    scratch: Float32s,
) -> None:
    adam_direction(gradient, slots, scalars, out_slots, scratch)
    np.multiply(
        gradient, np.float32(scalars.learning_rate) / np.float32(scalars.bias_correction1), out=gradient
    )
    np.subtract(parameters, gradient, out=out_parameters)


def kept(scalars: StepParameters) -> np.float32:
    """What decoupled weight decay leaves of a parameter."""
    return np.float32(1) - np.float32(scalars.learning_rate) * np.float32(scalars.weight_decay)


def _adamw(
    parameters: Float32s,
    gradient: Float32s,
    slots: Sequence[Float32s],
    scalars: StepParameters,
    out_parameters: Float32s,
    out_slots: Sequence[Float32s],
    scratch: Float32s,
) -> None:
    if scalars.weight_decay:
        parameters = np.multiply(parameters, kept(scalars), out=out_parameters)
    _adam(parameters, gradient, slots, scalars, out_parameters, out_slots, scratch)


KERNELS: Final[dict[str, Kernel]] = {"sgd": _sgd, "adam": _adam, "adamw": _adamw}
"""By StepParameters.kind: every kind whose optimizer is exact."""


def step(
    parameters: Float32s,
    gradient: Float32s,
    slots: Sequence[Float32s],
    scalars: StepParameters,
    out_parameters: Float32s,
    out_slots: Sequence[Float32s],
) -> bool:
    """One outer step; returns whether all that was written is finite.

    All vectors are float32 of shape (n,); `scalars.slots` slots; outputs overlap no input. Raises LocalError for others, and
    for a kind that is not element-wise (outer_optimizer.py).
    """
    if scalars.kind not in KERNELS:
        raise LocalError(f"{scalars.kind} is not element-wise: it needs all of a tensor at once")
    if len(slots) != scalars.slots or len(out_slots) != scalars.slots:
        raise LocalError(f"{scalars.kind} needs {scalars.slots} slots, not {len(slots)} and {len(out_slots)}")
    vectors = (parameters, gradient, *slots, out_parameters, *out_slots)
    if any(vector.dtype != np.float32 or vector.shape != (parameters.size,) for vector in vectors):
        raise LocalError("a step needs flat float32 vectors of one length")
    kernel = KERNELS[scalars.kind]
    block_size = min(BLOCK, parameters.size)
    gradient_block, scratch = np.empty(block_size, np.float32), np.empty(block_size, np.float32)
    finite_block = np.empty(block_size, np.bool_)
    finite = True
    with np.errstate(all="ignore"):
        for start in range(0, parameters.size, BLOCK):
            part = slice(start, min(start + BLOCK, parameters.size))
            n = part.stop - start
            old, g = parameters[part], gradient_block[:n]
            if scalars.weight_decay and scalars.kind != "adamw":
                np.multiply(old, np.float32(scalars.weight_decay), out=g)
                np.add(gradient[part], g, out=g)
            else:
                g[:] = gradient[part]
            out = out_parameters[part]
            new_slots = [slot[part] for slot in out_slots]
            kernel(old, g, [slot[part] for slot in slots], scalars, out, new_slots, scratch[:n])
            for written in (out, *new_slots):
                finite &= bool(np.isfinite(written, out=finite_block[:n]).all())
    return finite

"""LAMB's step (You et al. 2020, algorithm 2): Adam's direction with decay, scaled so that each tensor moves by its own norm.

Theory of operation
    m', v' and d as in step.py (adam); then, tensor by tensor:

        u  = ((m' / d) / bias_correction1) + (weight_decay * p)
        q  = min(|p|, largest_norm) / |u|          1 if either norm is 0, as in all public versions: else zeros never move
        p' = p - ((learning_rate * q) * u)

    What differs between published LAMBs is a `Convention`. Where torch has none, and the libraries that do follow one or
    the other (docs/optimization.md), this is ours.

    Norms are summed in the fixed order of aggregation/summation.py and the rest is element-wise, so bits are in fact the
    same on all machines. The kind is still declared not exact: a step needs all of a tensor twice, not piece by piece.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from p2pcoord.aggregation.summation import BLOCK, NormSum, all_finite
from p2pcoord.optimization.step import adam_direction

if TYPE_CHECKING:
    from collections.abc import Sequence

    from p2pcoord.layout import Float32s
    from p2pcoord.optimization.blocks import Shapes
    from p2pcoord.optimization.optimizer import Convention, StepParameters


def step_lamb(
    convention: Convention,
    shapes: Shapes,
    scalars: StepParameters,
    parameters: Float32s,
    gradient: Float32s,
    slots: Sequence[Float32s],
    out_parameters: Float32s,
    out_slots: Sequence[Float32s],
) -> bool:
    """One step; returns whether all that was written is finite. Vectors are flat, of the shapes' size; two slots."""
    begin = 0
    with np.errstate(all="ignore"):
        for shape in shapes:
            tensor = slice(begin, begin + math.prod(shape))
            begin = tensor.stop
            _step_tensor(
                convention,
                scalars,
                parameters[tensor],
                gradient[tensor],
                [slot[tensor] for slot in slots],
                out_parameters[tensor],
                [slot[tensor] for slot in out_slots],
            )
    return all(all_finite(vector) for vector in (out_parameters, *out_slots))


def _step_tensor(
    convention: Convention,
    scalars: StepParameters,
    parameters: Float32s,
    gradient: Float32s,
    slots: Sequence[Float32s],
    out_parameters: Float32s,
    out_slots: Sequence[Float32s],
) -> None:
    buffers = np.empty((2, min(BLOCK, parameters.size)), np.float32)
    parameter_norm, update_norm = NormSum(), NormSum()
    for start in range(0, parameters.size, BLOCK):
        part = slice(start, min(start + BLOCK, parameters.size))
        direction, scratch = buffers[:, : part.stop - start]
        direction[:] = gradient[part]
        adam_direction(
            direction, [slot[part] for slot in slots], scalars, [slot[part] for slot in out_slots], scratch
        )
        # The update waits where the new parameters will be.
        update = np.divide(direction, np.float32(scalars.bias_correction1), out=out_parameters[part])
        if scalars.weight_decay:
            np.multiply(parameters[part], np.float32(scalars.weight_decay), out=scratch)
            np.add(update, scratch, out=update)
        parameter_norm.add(parameters[part])
        update_norm.add(update)
    ratio = 1.0
    if scalars.weight_decay or convention.ratio_without_decay:
        ratio = _trust_ratio(min(parameter_norm.norm(), convention.largest_norm), update_norm.norm())
    size = np.float32(scalars.learning_rate) * np.float32(ratio)
    for start in range(0, parameters.size, BLOCK):
        update = out_parameters[start : start + BLOCK]
        np.multiply(update, size, out=update)
        np.subtract(parameters[start : start + BLOCK], update, out=update)


def _trust_ratio(parameter_norm: float, update_norm: float) -> float:
    return parameter_norm / update_norm if parameter_norm > 0 and update_norm > 0 else 1.0

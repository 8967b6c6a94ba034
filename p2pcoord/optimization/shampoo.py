"""Distributed Shampoo's step, block by block (Gupta et al. 2018; Anil et al. 2020; Shi et al. 2023, algorithm 2).

Theory of operation
    With G a block of the mean pseudo-gradient, k its number of sides, and for each side i the unfolding G_i (side i as
    rows):

        S_i' = (beta2 * S_i) + (w * G_i G_i^T)              w = 1 - beta2; beta2 = 1: sums, with w = 1
        R_i  = (S_i' / (1 - beta2^t) + epsilon I)^(-1/2k)   at every preconditioning_interval-th step
        M'   = (beta1 * M) + ((1 - beta1) * G),  D = M' / (1 - beta1^t)
        P    = D, multiplied along each side by its R_i
        U    = P * (|D grafted| / |P|)                      per block; D grafted itself before the first roots are there

    grafted is D / (sqrt(A) + grafting_epsilon), where A is the sum of squares (adagrad, as in Anil et al.) or their
    corrected moving average (adam); D itself for sgd. Then, tensor by tensor, torch's momentum and decoupled decay:

        B' = (momentum * B) + U;  U <- U + (momentum * B') with nesterov, B' without
        p' = (p * (1 - (learning_rate * weight_decay))) - (learning_rate * U)

    Statistics are float32, and know an eigenvalue to within some 2**-24 of the largest. What lies below NOISE times the
    largest is therefore raised to it: else a direction that old roots never saw, and a later gradient has, would be
    enlarged by epsilon^(-1/2k), a thousandfold. Anil et al. add 1e-6 of the largest for the same reason; a floor leaves
    what is known as it is.

    Products and eigenvectors differ in their last bits between machines, so one member steps, and the state is
    distributed. `preconditioners` lets others compute the roots of some blocks from the state and the gradient that they
    hold as well; blocks.py divides them.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from p2pcoord.aggregation.summation import all_finite
from p2pcoord.errors import LocalError
from p2pcoord.optimization.blocks import Block, blocks, squeezed
from p2pcoord.optimization.step import kept

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from p2pcoord.layout import Float32s
    from p2pcoord.optimization.blocks import Shapes
    from p2pcoord.optimization.optimizer import DistributedShampoo, StepParameters

    Tensor = np.ndarray[Any, np.dtype[np.float32]]
    """float32, of any shape."""

NOISE: Final = 2.0**-20
"""Of the largest eigenvalue; Anil et al.'s 1e-6 for float32."""


class _Blocks:
    """The blocks, and where each one's statistics lie in their slot."""

    def __init__(self, chosen: DistributedShampoo, shapes: Shapes) -> None:
        self.all = blocks(shapes, chosen.block_size)
        ends = list(accumulate(block.packed_count for block in self.all))
        self.packed = [
            slice(end - block.packed_count, end) for block, end in zip(self.all, ends, strict=True)
        ]
        self.of_tensor: list[list[int]] = [[] for _ in shapes]
        for number, block in enumerate(self.all):
            self.of_tensor[block.tensor].append(number)

    def block(self, number: int) -> Block:
        if not 0 <= number < len(self.all):
            raise LocalError(f"there is no block {number} of {len(self.all)}")
        return self.all[number]


def preconditioners(
    chosen: DistributedShampoo,
    shapes: Shapes,
    scalars: StepParameters,
    gradient: Float32s,
    slots: Sequence[Float32s],
    numbers: Iterable[int],
) -> dict[int, Float32s]:
    """The inverse roots of these blocks that the step from this state by this gradient uses: number of a block -> float32
    of shape (packed_count,), for `step_shampoo`.

    Gradient and slots are finite. Raises LocalError for a block that is not there.
    """
    cut = _Blocks(chosen, shapes)
    statistics = dict(zip(chosen.slot_names, slots, strict=True))["statistics"]
    begins = [0, *accumulate(map(math.prod, shapes))]
    found = {}
    with np.errstate(all="ignore"):
        for number in numbers:
            block = cut.block(number)
            shape = squeezed(shapes[block.tensor])
            begin = begins[block.tensor]
            part = gradient[begin : begin + math.prod(shape)].reshape(shape)[block.parts]
            new = np.empty(block.packed_count, np.float32)
            _add_statistics(part, statistics[cut.packed[number]], scalars, new)
            found[number] = _inverse_roots(block, new, scalars)
    return found


def step_shampoo(
    chosen: DistributedShampoo,
    shapes: Shapes,
    number: int,
    scalars: StepParameters,
    parameters: Float32s,
    gradient: Float32s,
    slots: Sequence[Float32s],
    out_parameters: Float32s,
    out_slots: Sequence[Float32s],
    given: Mapping[int, Float32s],
) -> bool:
    """Step `number`, counted from 1; returns whether all is finite: if not, what was written means nothing.

    Vectors are flat, slots of `chosen.slot_sizes(shapes)`. `given` are inverse roots by number of block; those that a step
    needs and that are not given are computed. Raises LocalError for roots of another size or of no block.
    """
    if not all(all_finite(vector) for vector in (parameters, gradient, *slots)):
        return False
    cut = _Blocks(chosen, shapes)
    for at, roots_given in given.items():
        count = cut.block(at).packed_count
        if roots_given.dtype != np.float32 or roots_given.shape != (count,):
            raise LocalError(
                f"block {at} has {count} float32 roots, not {roots_given.dtype} {roots_given.shape}"
            )
    old = dict(zip(chosen.slot_names, slots, strict=True))
    new = dict(zip(chosen.slot_names, out_slots, strict=True))
    begun, due = number >= chosen.preconditioning_interval, chosen.recomputes(number)
    begin = 0
    with np.errstate(all="ignore"):
        for tensor, shape in enumerate(shapes):
            part = slice(begin, begin + math.prod(shape))
            begin = part.stop
            sides = squeezed(shape)
            direction = _direction(gradient[part], part, scalars, old, new)
            update = _grafted(chosen, direction, gradient[part], part, scalars, old, new)
            shaped, raw = update.reshape(sides), direction.reshape(sides)
            for at in cut.of_tensor[tensor]:
                block, packed = cut.all[at], cut.packed[at]
                statistics = new["statistics"][packed]
                _add_statistics(
                    gradient[part].reshape(sides)[block.parts], old["statistics"][packed], scalars, statistics
                )
                roots = old["roots"][packed] if "roots" in old else None
                if due:
                    roots = given[at] if at in given else _inverse_roots(block, statistics, scalars)
                if "roots" in new and roots is not None:
                    new["roots"][packed] = roots
                if begun and roots is not None:
                    moved = _precondition(raw[block.parts], block, roots)
                    length = _norm(shaped[block.parts]) if chosen.grafting != "none" else None
                    shaped[block.parts] = moved if length is None else _of_length(moved, length)
            _apply(update, part, scalars, parameters, out_parameters, old, new)
    return all(all_finite(vector) for vector in (out_parameters, *out_slots))


def _direction(
    gradient: Float32s,
    part: slice,
    scalars: StepParameters,
    old: Mapping[str, Float32s],
    new: Mapping[str, Float32s],
) -> Float32s:
    """D of the theory."""
    if "gradient_mean" not in new:
        return gradient
    mean = new["gradient_mean"][part]
    np.multiply(old["gradient_mean"][part], np.float32(scalars.beta1), out=mean)
    np.add(mean, gradient * np.float32(scalars.one_minus_beta1), out=mean)
    return mean / np.float32(scalars.bias_correction1)


def _grafted(
    chosen: DistributedShampoo,
    direction: Float32s,
    gradient: Float32s,
    part: slice,
    scalars: StepParameters,
    old: Mapping[str, Float32s],
    new: Mapping[str, Float32s],
) -> Float32s:
    """The grafted method's direction, an array of its own."""
    if "squares" not in new:
        return direction.copy()
    squares = new["squares"][part]
    if chosen.grafting == "adagrad":
        np.add(old["squares"][part], gradient * gradient, out=squares)
        mean = squares
    else:
        np.multiply(old["squares"][part], np.float32(scalars.beta2), out=squares)
        np.add(squares, gradient * gradient * np.float32(scalars.one_minus_beta2), out=squares)
        mean = squares / np.float32(scalars.bias_correction2)
    divisor = np.sqrt(mean)
    np.add(divisor, np.float32(chosen.grafting_epsilon), out=divisor)
    return np.divide(direction, divisor, out=divisor)


def _add_statistics(block: Tensor, old: Float32s, scalars: StepParameters, out: Float32s) -> None:
    """S' of the theory, packed, for all sides of a block."""
    begin = 0
    for axis, side in enumerate(block.shape):
        unfolded = np.moveaxis(block, axis, 0).reshape(side, -1)
        packed = (unfolded @ unfolded.T)[_lower(side)]
        part = slice(begin, begin + packed.size)
        begin = part.stop
        np.multiply(old[part], np.float32(scalars.beta2), out=out[part])
        np.add(out[part], packed * np.float32(scalars.one_minus_beta2), out=out[part])


def _inverse_roots(block: Block, statistics: Float32s, scalars: StepParameters) -> Float32s:
    """R of the theory, packed, for all sides of a block; decomposed in float64. NaN for statistics that are not finite."""
    roots = np.full_like(statistics, math.nan)
    if not np.isfinite(statistics).all():
        return roots  # the decomposition would raise
    begin = 0
    for side in block.sides:
        part = slice(begin, begin + side * (side + 1) // 2)
        begin = part.stop
        values, vectors = np.linalg.eigh(
            _unpacked(statistics[part], side).astype(np.float64) / scalars.bias_correction2
        )
        floor = NOISE * max(float(values[-1]), 0.0)
        powers = (np.maximum(values, floor) + scalars.epsilon) ** (-1 / (2 * len(block.sides)))
        roots[part] = ((vectors * powers) @ vectors.T)[_lower(side)]
    return roots


def _precondition(direction: Tensor, block: Block, roots: Float32s) -> Tensor:
    """P of the theory."""
    begin = 0
    for axis, side in enumerate(block.sides):
        part = slice(begin, begin + side * (side + 1) // 2)
        begin = part.stop
        moved = np.tensordot(_unpacked(roots[part], side), direction, axes=(1, axis))
        direction = np.moveaxis(moved, 0, axis)
    return direction


def _of_length(vector: Tensor, length: float) -> NDArray[np.float64]:
    own = _norm(vector)
    return np.multiply(vector, length / own if own > 0 else 0.0, dtype=np.float64)


def _norm(vector: Tensor) -> float:
    return math.sqrt(float(np.square(vector, dtype=np.float64).sum()))


def _apply(
    update: Float32s,
    part: slice,
    scalars: StepParameters,
    parameters: Float32s,
    out_parameters: Float32s,
    old: Mapping[str, Float32s],
    new: Mapping[str, Float32s],
) -> None:
    """Momentum, decay and step of one tensor; `update` may be overwritten."""
    if "momentum" in new:
        momentum, buffer = np.float32(scalars.momentum), new["momentum"][part]
        np.multiply(old["momentum"][part], momentum, out=buffer)
        np.add(buffer, update, out=buffer)
        update = update + buffer * momentum if scalars.nesterov else buffer
    out = out_parameters[part]
    decayed = parameters[part]
    if scalars.weight_decay:
        decayed = np.multiply(decayed, kept(scalars), out=out)
    np.subtract(decayed, update * np.float32(scalars.learning_rate), out=out)


@lru_cache(maxsize=16)
def _lower(side: int) -> NDArray[np.bool_]:
    return np.tri(side, dtype=np.bool_)


def _unpacked(packed: Float32s, side: int) -> Tensor:
    matrix = np.empty((side, side), np.float32)
    matrix[_lower(side)] = packed
    matrix.T[_lower(side)] = packed
    return matrix

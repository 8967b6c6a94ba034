"""An outer optimizer over arrays: what anybody can call, and what a real run steps by.

Theory of operation
    optimizer.py decides the scalars of a step, step.py, lamb.py and shampoo.py do it; `OuterOptimizer` knows the shapes and
    puts the two together. `advance` is the step of a run: scalars as they were signed, old vectors in, new vectors written.
    `step` is the same for who has no run: it keeps parameters, slots and the count in a `State`, which is never changed.

    A kind that is exact may also be stepped piece by piece, by step.py alone: the same bits.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from p2pcoord.errors import LocalError
from p2pcoord.optimization.lamb import step_lamb
from p2pcoord.optimization.optimizer import LAMB_CONVENTIONS, DistributedShampoo, Lamb, Optimizer
from p2pcoord.optimization.shampoo import preconditioners, step_shampoo
from p2pcoord.optimization.step import step

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from p2pcoord.layout import Float32s
    from p2pcoord.optimization.optimizer import StepParameters


class State(msgspec.Struct, frozen=True, eq=False):
    """Parameters and optimizer slots, flat float32, after `steps` steps. The arrays are not written to."""

    parameters: Float32s
    slots: tuple[Float32s, ...]
    steps: int = 0


class OuterOptimizer:
    """The chosen optimizer for tensors of these shapes, which lie one after the other in flat vectors."""

    def __init__(
        self, chosen: Optimizer, shapes: Sequence[Sequence[int]], learning_rate: float | None = None
    ) -> None:
        self.chosen = chosen
        self.shapes = tuple(tuple(shape) for shape in shapes)
        if any(side < 0 for shape in self.shapes for side in shape):
            raise LocalError(f"a tensor's sides are at least 0, not {self.shapes}")
        if learning_rate is not None:
            self._scalars(1, learning_rate)
        self.learning_rate = learning_rate
        self._sizes = chosen.slot_sizes(self.shapes)
        self._count = sum(map(math.prod, self.shapes))

    def initial(self, parameters: Float32s) -> State:
        """The state before the first step: a copy of the parameters, slots of zeros.

        Raises LocalError for other than finite float32 of shape (n,).
        """
        self._check([parameters], [self._count])
        if not np.isfinite(parameters).all():
            raise LocalError("the parameters are not finite")
        return State(parameters.copy(), tuple(np.zeros(size, np.float32) for size in self._sizes))

    def step(
        self,
        state: State,
        gradient: Float32s,
        learning_rate: float | None = None,
        *,
        preconditioners: Mapping[int, Float32s] | None = None,
    ) -> State:
        """The state after a step against `gradient`, float32 of shape (n,), by the learning rate of this step or, without
        one, the optimizer's own. `preconditioners`: of Shampoo's blocks, where somebody computed them already.

        Raises LocalError for other shapes, a learning rate that is missing, negative or not finite, and when the gradient or
        what would come out is not finite.
        """
        rate = self.learning_rate if learning_rate is None else learning_rate
        if rate is None:
            raise LocalError("a step needs a learning rate: here, or when the optimizer is made")
        number = state.steps + 1
        new = State(
            np.empty_like(state.parameters), tuple(np.empty_like(slot) for slot in state.slots), number
        )
        finite = np.isfinite(gradient).all() and self.advance(
            number,
            self._scalars(number, rate),
            state.parameters,
            gradient,
            state.slots,
            new.parameters,
            new.slots,
            preconditioners or {},
        )
        if not finite:
            raise LocalError(f"step {number} is not finite: the gradient is not, or float32 ends before it")
        return new

    def advance(
        self,
        number: int,
        scalars: StepParameters,
        parameters: Float32s,
        gradient: Float32s,
        slots: Sequence[Float32s],
        out_parameters: Float32s,
        out_slots: Sequence[Float32s],
        preconditioners: Mapping[int, Float32s] | None = None,
    ) -> bool:
        """Step `number`, counted from 1, with these scalars; returns whether all that was written is finite.

        Outputs overlap no input. Raises LocalError for vectors of other shapes.
        """
        vectors = (parameters, gradient, out_parameters, *slots, *out_slots)
        self._check(vectors, (*[self._count] * 3, *self._sizes, *self._sizes))
        if preconditioners and not isinstance(self.chosen, DistributedShampoo):
            raise LocalError(f"{self.chosen.kind} has no preconditioners")
        match self.chosen:
            case Lamb():
                convention = LAMB_CONVENTIONS[self.chosen.convention]
                return step_lamb(
                    convention, self.shapes, scalars, parameters, gradient, slots, out_parameters, out_slots
                )
            case DistributedShampoo():
                return step_shampoo(
                    self.chosen,
                    self.shapes,
                    number,
                    scalars,
                    parameters,
                    gradient,
                    slots,
                    out_parameters,
                    out_slots,
                    preconditioners or {},
                )
        return step(parameters, gradient, slots, scalars, out_parameters, out_slots)

    def preconditioners(
        self, state: State, gradient: Float32s, numbers: Iterable[int]
    ) -> dict[int, Float32s]:
        """Inverse roots of some of Shampoo's blocks for the step from this state by this gradient: what one member of
        several computes (blocks.preconditioner_work). None are needed in a step that does not recompute them.

        Raises LocalError for another kind, other shapes, a gradient that is not finite, and blocks that are not there.
        """
        if not isinstance(self.chosen, DistributedShampoo):
            raise LocalError(f"{self.chosen.kind} has no preconditioners")
        self._check((gradient, *state.slots), (self._count, *self._sizes))
        if not np.isfinite(gradient).all():
            raise LocalError("the gradient is not finite")
        number = state.steps + 1
        if not self.chosen.recomputes(number):
            return {}
        scalars = self._scalars(number, 0.0)
        return preconditioners(self.chosen, self.shapes, scalars, gradient, state.slots, numbers)

    def _scalars(self, number: int, learning_rate: float) -> StepParameters:
        if not learning_rate >= 0:
            raise LocalError(f"a learning rate is a number of at least 0, not {learning_rate}")
        return self.chosen.parameters(number, learning_rate)

    def _check(self, vectors: Sequence[Float32s], sizes: Sequence[int]) -> None:
        found = [(vector.dtype, vector.shape) for vector in vectors]
        wanted = [(np.dtype(np.float32), (size,)) for size in sizes]
        if found != wanted:
            raise LocalError(
                f"{self.chosen.kind} over {self._count} parameters needs flat float32 vectors of sizes "
                f"{list(sizes)}, not {[f'{dtype} {shape}' for dtype, shape in found]}"
            )

"""The outer optimizer, and the learning rate of each step.

    from p2pcoord.optimization import optimizer
    o = optimizer("lamb", shapes, learning_rate=0.01, weight_decay=0.01)
    state = o.initial(parameters)
    state = o.step(state, gradient)

It is loaded when it is first called: kinds, scalars and schedules (optimizer.py, learning_rate.py) are decided about without
numpy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

# Imported before the function below takes the module's name in this package: the module is p2pcoord.optimization.optimizer
# in every import statement, the function is what `from p2pcoord.optimization import optimizer` gives.
from p2pcoord.optimization.optimizer import optimizer as _chosen

if TYPE_CHECKING:
    from collections.abc import Sequence

    from p2pcoord.optimization.outer_optimizer import OuterOptimizer

__all__ = ["optimizer"]


def optimizer(
    kind: str,
    shapes: Sequence[Sequence[int]],
    *,
    learning_rate: float | None = None,
    **options: float | str,
) -> OuterOptimizer:
    """The outer optimizer of this kind over tensors of these shapes, which lie one after the other in a flat float32 vector.

    Options are the fields of the kind's class in optimizer.py (docs/optimization.md). The learning rate is that of steps which
    are given none. Raises UserError for an unknown kind, unknown options and values out of range; LocalError for shapes and
    learning rates that cannot be.
    """
    from p2pcoord.optimization.outer_optimizer import OuterOptimizer

    return OuterOptimizer(_chosen(kind, **options), shapes, learning_rate)

"""How many updates become one: rules, and the tree on which they meet.

    from p2pcoord.aggregation import aggregate

`aggregate` (engine.py) is for anybody who holds vectors, without a node. It is loaded when it is first used: headers, trees
and factors (contribution.py, tree.py, mean.py) are decided about without numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from p2pcoord.aggregation.engine import Aggregate, NotFiniteError, aggregate, measure

__all__ = ["Aggregate", "NotFiniteError", "aggregate", "measure"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module("p2pcoord.aggregation.engine"), name)
    globals()[name] = value
    return value

"""Decentralised training coordination for PyTorch: what a user imports.

    import p2pcoord

    class Digits(p2pcoord.Workload): ...

Names are loaded when they are first used, so that `import p2pcoord` costs a millisecond and the command line answers at
once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from p2pcoord.run_config import RunConfig
    from p2pcoord.workload import Workload

__all__ = ["RunConfig", "Workload"]

_HOMES = {"RunConfig": "p2pcoord.run_config", "Workload": "p2pcoord.workload"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value

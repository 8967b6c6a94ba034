"""The inner optimizer's state on this machine's disk: kept from round to round, never sent, never pickled.

Theory of operation
    DIR/<version>.safetensors   the state after training from that version: tensors, and in the header a JSON tree of
                                everything else, with references to them

    Training from version v begins with the newest state below v. So a training that is done again after a crash begins where it
    began before, and gives the same bytes, whether or not the first one came to saving; a state from a round that this
    machine missed is merely older. Two files are kept: the one being built on, and the one just made.

    A file appears whole or not at all. One that does not fit the model or the optimizer any more, or is damaged, is set aside:
    moments are an aid to training, not a part of what was agreed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import safetensors
import torch

from node.training.model_file import write_tensors
from p2pcoord.errors import UserError

FORMAT: Final = 1
KEPT_FILES: Final = 2
_SUFFIX: Final = ".safetensors"
_HEADER: Final = "p2pcoord"


class InnerState:
    """The states in one directory, which is made when it is needed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def load(self, optimizer: torch.optim.Optimizer, version: int, names: Sequence[str]) -> int:
        """Set a fresh optimizer's state to the newest one below `version`; return the local steps in it (0: none fits).

        `names` are the parameters' names in the optimizer's order.
        """
        for saved in reversed(self._versions()):
            if saved >= version:
                continue
            path = self._path(saved)
            try:
                steps = _read(path, optimizer, names)
            except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
                path.rename(path.with_suffix(".damaged"))
                print(f"the inner optimizer's state {path} was set aside: {error}", flush=True)  # noqa: T201
                continue
            return steps
        return 0

    def save(
        self, optimizer: torch.optim.Optimizer, version: int, names: Sequence[str], slot: str, steps: int
    ) -> None:
        """Keep the state after training from `version`. Another assignment of the same round does not replace it.

        Raises UserError for an optimizer whose state is more than tensors, numbers and containers; OSError.
        """
        if version in self._versions() and _header(self._path(version)).get("slot", slot) != slot:
            return
        tensors: dict[str, torch.Tensor] = {}
        header = {
            "format": FORMAT,
            "optimizer": _kind(optimizer),
            "names": list(names),
            "slot": slot,
            "steps": steps,
            "state": _flatten(optimizer.state_dict()["state"], tensors, "state"),
        }
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_tensors(self._path(version), tensors, {_HEADER: json.dumps(header)})
        for old in self._versions()[:-KEPT_FILES]:
            self._path(old).unlink(missing_ok=True)

    def _versions(self) -> list[int]:
        if not self._directory.is_dir():
            return []
        return sorted(int(path.stem) for path in self._directory.glob(f"*{_SUFFIX}") if path.stem.isdecimal())

    def _path(self, version: int) -> Path:
        return self._directory / f"{version}{_SUFFIX}"


def _kind(optimizer: torch.optim.Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def _header(path: Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return dict(json.loads((file.metadata() or {})[_HEADER]))
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError):
        return {}


def _read(path: Path, optimizer: torch.optim.Optimizer, names: Sequence[str]) -> int:
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads((file.metadata() or {})[_HEADER])
        if header["format"] != FORMAT:
            raise ValueError(f"format {header['format']}, this program knows {FORMAT}")
        if header["optimizer"] != _kind(optimizer) or header["names"] != list(names):
            raise ValueError(f"it belongs to {header['optimizer']} over other parameters")
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dict
    fresh = optimizer.state_dict()
    # The groups are the fresh optimizer's: learning rates are the run's, only moments and counts are kept.
    optimizer.load_state_dict(
        {"state": _restore(header["state"], tensors), "param_groups": fresh["param_groups"]}
    )
    steps = header["steps"]
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(f"{steps!r} steps")
    return steps


def _flatten(value: Any, tensors: dict[str, torch.Tensor], at: str) -> Any:
    """JSON of a nested value; its tensors go into `tensors` under their place's name."""
    if isinstance(value, torch.Tensor):
        tensors[at] = value
        return {"tensor": at}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_flatten(inner, tensors, f"{at}.{index}") for index, inner in enumerate(value)]}
    if isinstance(value, dict) and all(isinstance(key, str | int) for key in value):
        return {"dict": [[key, _flatten(inner, tensors, f"{at}.{key}")] for key, inner in value.items()]}
    raise UserError(
        f"the optimizer's state holds a {type(value).__name__} ({at}), which cannot be kept across a restart: "
        "tensors, numbers, strings, lists and dicts can"
    )


def _restore(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    [(kind, value)] = tree.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "value":
        return value
    if kind == "dict":
        return {key: _restore(inner, tensors) for key, inner in value}
    restored = [_restore(inner, tensors) for inner in value]
    return restored if kind == "list" else tuple(restored)

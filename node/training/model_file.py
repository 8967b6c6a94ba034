"""Model files: safetensors with the names of `state_dict`, so that `load_state_dict` takes them as they are.

safetensors refuses tensors that share memory, and a file without a tied tensor's second name would not load strictly; so
every name gets a copy of its own. On reading a file that leaves tied names out (as `safetensors.torch.save_model` does) is as
good.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import safetensors
import safetensors.torch
import torch
from torch import nn

from node.storage.model_checksum import CHECKSUM, NO_CHECKSUM, seal
from node.storage.whole_file import whole_file
from p2pcoord.errors import UserError

MAX_NAMES_TOLD: Final = 5
"""Names that a message lists; more only hide that it is another model."""


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file that appears whole or not at all, durably. Raises OSError."""
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        with whole_file(path) as temporary:
            safetensors.torch.save_file(own, temporary, metadata=dict(metadata))
            if CHECKSUM in metadata:
                seal(temporary)
    except safetensors.SafetensorError as error:  # it reports a full disk by this
        raise OSError(f"{path}: {error}") from error


def export_model(model: nn.Module, path: Path, metadata: Mapping[str, str]) -> None:
    """Write the model's `state_dict` to a file that another program loads, with a checksum. Raises OSError."""
    write_tensors(path, model.state_dict(), {"format": "pt", CHECKSUM: NO_CHECKSUM, **metadata})


def load_model(model: nn.Module, path: Path) -> None:
    """Set all of the model's values from a file, in place. Raises UserError naming what does not fit."""
    try:
        given = safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file", exit_code=2) from None
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} is no safetensors file: {error}", exit_code=2) from None
    ours = model.state_dict(keep_vars=True)
    filled = {
        id(tensor) for name, tensor in ours.items() if name in given
    }  # a tied tensor needs one of its names
    told = [f"{name!r} is missing" for name, tensor in ours.items() if id(tensor) not in filled]
    told += [f"the model has no {name!r}" for name in given if name not in ours]
    told += [
        f"{name!r} has shape {list(tensor.shape)}, the model's has {list(ours[name].shape)}"
        for name, tensor in given.items()
        if name in ours and tensor.shape != ours[name].shape
    ]
    if told:
        more = f"; and {len(told) - MAX_NAMES_TOLD} more" if len(told) > MAX_NAMES_TOLD else ""
        raise UserError(
            f"{path} does not fit the workload's model: {'; '.join(told[:MAX_NAMES_TOLD])}{more}", exit_code=2
        )
    with torch.no_grad():
        for name, tensor in given.items():
            ours[name].copy_(tensor)

"""A model's values in the files of `p2pcoord.layout`: states in, contributions out.

Theory of operation
    A state's float32 masters are cast to the model's dtypes on the way in. A contribution is written as

        pseudo-gradient    the base as the model saw it (cast, then float32) minus the trained parameters, in float32
        float buffers      their values             integer buffers    their values, int64

    so a parameter that training did not move gives exactly 0, also where the model is bfloat16. The descent direction is minus
    the pseudo-gradient (DiLoCo, Douillard et al. 2023, algorithm 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import nn

from node.storage.whole_file import whole_file
from p2pcoord.errors import LocalError, UserError
from p2pcoord.layout import Layout, TensorSpec, buffer_spec, parameter_spec


class ModelState:
    """A model on its device, and where its tensors lie in states and contributions."""

    def __init__(self, model: nn.Module, slots: int) -> None:
        """`slots`: how many optimizer slots the run's states have. Raises UserError for a model that cannot be trained."""
        self.model = model
        self._slots = slots
        self.tensors: dict[str, torch.Tensor] = {}
        specs: list[TensorSpec] = []
        seen: set[int] = set()
        for name, tensor in model.state_dict(keep_vars=True).items():
            if not isinstance(tensor, torch.Tensor):
                raise UserError(
                    f"the model's state_dict() holds {name!r}, a {type(tensor).__name__}: only tensors can be kept equal "
                    "between machines"
                )
            if id(tensor) in seen:
                continue  # tied: one tensor under its first name
            seen.add(id(tensor))
            shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
            if isinstance(tensor, nn.Parameter):
                specs.append(parameter_spec(name, shape, dtype, trainable=tensor.requires_grad))
            else:
                specs.append(buffer_spec(name, shape, dtype))
            self.tensors[name] = tensor
        lost = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in seen]
        if lost:
            raise UserError(
                f"the model's parameter {lost[0]!r} is not in its state_dict(), so it could not be averaged"
            )
        try:
            self.layout = Layout(tuple(specs))
        except ValueError as error:
            raise UserError(f"the model cannot be trained: {error}") from None
        if self.layout.parameter_count == 0:
            raise UserError(
                "the model has no trainable parameter (requires_grad=True): there is nothing to train"
            )

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        """The trainable parameters by name, in the layout's order."""
        return {spec.name: self.tensors[spec.name] for spec in self._of("parameter")}

    @property
    def frozen(self) -> dict[str, torch.Tensor]:
        """The tensors that never travel, by name."""
        return {spec.name: self.tensors[spec.name] for spec in self._of("frozen")}

    def frozen_hash(self) -> bytes:
        """SHA-256 over the frozen tensors: names, types, shapes and bytes."""
        digest = sha256()
        for name, tensor in self.frozen.items():
            hash_value(tensor, digest.update)
            digest.update(name.encode())
        return digest.digest()

    def load_state(self, path: Path) -> None:
        """Fill the model from a state. Raises LocalError when it is none of this layout, OSError."""
        views = self.layout.tensor_views(self._map(path))
        with torch.no_grad():
            for name, view in views.items():
                self.tensors[name].copy_(torch.from_numpy(np.array(view)))

    def write_state(self, path: Path) -> None:
        """Write the model as version 0: its values, then optimizer slots of zeros. Raises OSError."""
        with whole_file(path, durable=False) as temporary, temporary.open("wb") as file:
            for spec in self._of("parameter"):
                file.write(_float32(self.tensors[spec.name]).tobytes())
            self._write_buffers(file)
            zeros = bytes(1 << 20)
            left = self.layout.state_bytes(self._slots) - self.layout.contribution_bytes
            while left:
                left -= file.write(zeros[:left])

    def write_contribution(self, base: Path, path: Path) -> tuple[float, bool]:
        """Write base minus model, and the buffers. Returns the pseudo-gradient's L2 norm and whether all is finite.

        Raises OSError, and leaves no file then.
        """
        bases = self.layout.tensor_views(self._map(base))
        square, finite = 0.0, True
        with whole_file(path, durable=False) as temporary, temporary.open("wb") as file:
            for spec in self._of("parameter"):
                tensor = self.tensors[spec.name]
                seen = torch.from_numpy(np.array(bases[spec.name])).to(tensor.dtype)
                update = _float32(seen) - _float32(tensor)
                square += float(np.square(update, dtype=np.float64).sum())
                file.write(update.tobytes())
            self._write_buffers(file)
        for spec in self._of("float_buffer"):
            finite = finite and bool(np.isfinite(_float32(self.tensors[spec.name])).all())
        return math.sqrt(square), finite and math.isfinite(square)

    def _write_buffers(self, file: BinaryIO) -> None:
        file.writelines(_float32(self.tensors[spec.name]).tobytes() for spec in self._of("float_buffer"))
        for spec in self._of("integer_buffer"):
            values = self.tensors[spec.name].detach().to("cpu", torch.int64).contiguous().numpy()
            file.write(values.astype("<i8", copy=False).tobytes())

    def _of(self, role: str) -> list[TensorSpec]:
        return [spec for spec in self.layout.specs if spec.role == role]

    def _map(self, path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        octets = np.memmap(path, dtype=np.uint8, mode="r")
        expected = self.layout.state_bytes(self._slots)
        if octets.nbytes != expected:  # a larger one is another model's: its slots would be taken for values
            raise LocalError(f"{path} has {octets.nbytes} bytes, a state of this model {expected}")
        return octets


def _float32(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    array: np.ndarray[Any, np.dtype[np.float32]] = (
        tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    )
    return array.astype("<f4", copy=False)


def hash_value(value: Any, update: Callable[[bytes], object]) -> None:
    """Feed a sample to a hash so that equal values give equal bytes on every machine. Of a type that is not known here (a
    picture object, for instance) only the name counts."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        update(f"tensor {value.dtype} {list(value.shape)};".encode())
        update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    elif isinstance(value, np.ndarray | np.generic):
        array = np.asarray(value)
        update(f"array {array.dtype.str} {list(array.shape)};".encode())
        update(array.tobytes() if array.dtype != object else repr(array.tolist()).encode())
    elif isinstance(value, bytes | bytearray):
        update(f"bytes {len(value)};".encode())
        update(bytes(value))
    elif isinstance(value, Mapping):
        update(f"mapping {len(value)};".encode())
        for key in sorted(value, key=str):
            hash_value(str(key), update)
            hash_value(value[key], update)
    elif isinstance(value, list | tuple):
        update(f"sequence {len(value)};".encode())
        for inner in value:
            hash_value(inner, update)
    elif value is None or isinstance(value, bool | int | float | str):
        update(f"{type(value).__name__} {value!r};".encode())
    else:
        update(f"object {type(value).__qualname__};".encode())

"""Which tensor lies where in the flat bytes of a state, a contribution, a partial sum and a result.

Theory of operation
    A model's tensors are listed once, in the model's own order, as a **layout**; the run pins it, so all members
    agree on it byte for byte. Every tensor has a role, and all tensors of one role lie one after the other in one
    **section**, without padding, little-endian, whatever the machine:

        contribution, partial sum, result   [parameters float32][float buffers float32][integer buffers int64]
        state                               the same three, then [optimizer slots, float32: k x the parameters]

    In a contribution the parameters' section holds the pseudo-gradient (base minus local), the other two hold
    values; in a partial sum and a result the float sections hold weighted sums, the integer section maxima. So a
    state's first bytes and a result fit each other element by element, and all arithmetic is on flat vectors.

        role            torch dtypes                                  in the bytes
        parameter       float16, bfloat16, float32, float64           float32 master, goes through the optimizer
        float_buffer    the same                                      float32, set to the contributors' mean
        integer_buffer  bool, (u)int8, (u)int16, (u)int32, int64      int64, set to the contributors' maximum
        frozen          any                                           absent: its hash is pinned, it never travels

    float64 is accepted and rounded to float32: the master copy of everything is float32, and a value beyond its
    range shows as infinite, which refuses the contribution. Refused by name are complex numbers (nothing agreed
    says how to clip or step them), quantized, sub-byte and float8 types (their numbers mean nothing without a scale
    that lies elsewhere), and uint64 (does not fit in int64).

This module imports no numpy: it describes, and its views are slices of the array that it is given.
"""

from __future__ import annotations

import math
import re
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Final, Literal

import msgspec

from p2pcoord.content import MAX_CONTENT_BYTES
from p2pcoord.errors import LocalError, UserError

if TYPE_CHECKING:
    from typing import TypeAlias

    import numpy as np
    from numpy.typing import NDArray

    Octets: TypeAlias = NDArray[np.uint8]
    Float32s: TypeAlias = NDArray[np.float32]
    Int64s: TypeAlias = NDArray[np.int64]

FLOAT_BYTES: Final = 4
INTEGER_BYTES: Final = 8

MAX_TENSORS: Final = 1 << 15
"""32,768: the largest open models have some 1,000 tensors a stage, mixtures of experts up to 30,000."""

MAX_NAME_LENGTH: Final = 256
"""Characters of a tensor's name; a deeply wrapped transformer's reach 100."""

MAX_DIMENSIONS: Final = 16
"""numpy allows 64, convolutions need 5."""

FLOAT_DTYPES: Final = frozenset({"float16", "bfloat16", "float32", "float64"})
INTEGER_DTYPES: Final = frozenset({"bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "int64"})

Role = Literal["parameter", "frozen", "float_buffer", "integer_buffer"]

_DTYPE_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")


class TensorSpec(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One tensor: its name in the model, its shape (empty for a scalar), its dtype as torch names it without
    "torch.", and its role. Tied tensors are one tensor under one name.

    Raises ValueError for what no model can have.
    """

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME_LENGTH)]
    shape: Annotated[
        tuple[Annotated[int, msgspec.Meta(ge=0, le=MAX_CONTENT_BYTES)], ...],
        msgspec.Meta(max_length=MAX_DIMENSIONS),
    ]
    dtype: str
    role: Role

    def __post_init__(self) -> None:
        # ValueError, because msgspec turns it into the ValidationError by which wire.decode blames a peer.
        if not _DTYPE_NAME.fullmatch(self.dtype):
            raise ValueError(f"{self.name!r}: {self.dtype[:32]!r} names no dtype")
        wanted = {"parameter": FLOAT_DTYPES, "float_buffer": FLOAT_DTYPES, "integer_buffer": INTEGER_DTYPES}
        if self.role in wanted and self.dtype not in wanted[self.role]:
            raise ValueError(f"{self.name!r}: a {self.role} cannot be {self.dtype}")

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def parameter_spec(name: str, shape: tuple[int, ...], dtype: str, *, trainable: bool) -> TensorSpec:
    """The spec of a parameter; one with `requires_grad=False` is frozen, and may have any dtype.

    Raises UserError for a trainable parameter whose dtype has no float32 master.
    """
    if not trainable:
        return TensorSpec(name, shape, dtype, "frozen")
    if dtype not in FLOAT_DTYPES:
        raise UserError(
            f"parameter {name!r} is {dtype}, which cannot be averaged between machines: trainable parameters "
            f"are {_listed(FLOAT_DTYPES)}. Store it in one of these, or freeze it (requires_grad = False)."
        )
    return TensorSpec(name, shape, dtype, "parameter")


def buffer_spec(name: str, shape: tuple[int, ...], dtype: str) -> TensorSpec:
    """The spec of a persistent buffer. Raises UserError when its dtype has no mean and no maximum."""
    if dtype in FLOAT_DTYPES:
        return TensorSpec(name, shape, dtype, "float_buffer")
    if dtype in INTEGER_DTYPES:
        return TensorSpec(name, shape, dtype, "integer_buffer")
    raise UserError(
        f"buffer {name!r} is {dtype}, which cannot be kept equal between machines: buffers are "
        f"{_listed(FLOAT_DTYPES)} (averaged) or {_listed(INTEGER_DTYPES)} (largest value). Store it in one of "
        "these, or register it with persistent=False."
    )


def _listed(names: frozenset[str]) -> str:
    *most, last = sorted(names)
    return f"{', '.join(most)} or {last}"


class Layout(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, dict=True):
    """All tensors of a model, in the model's order. Offsets and counts follow from it.

    Raises ValueError for a name that occurs twice, and for more than MAX_CONTENT_BYTES.
    """

    specs: Annotated[tuple[TensorSpec, ...], msgspec.Meta(max_length=MAX_TENSORS)]

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for spec in self.specs:
            if spec.name in seen:
                raise ValueError(f"two tensors are named {spec.name!r}")
            seen.add(spec.name)
        if self.contribution_bytes > MAX_CONTENT_BYTES:
            raise ValueError(
                f"a contribution of {self.contribution_bytes} bytes, at most {MAX_CONTENT_BYTES}"
            )

    # Counts, in elements

    @cached_property
    def parameter_count(self) -> int:
        """Elements of all trainable parameters."""
        return self._count("parameter")

    @cached_property
    def float_buffer_count(self) -> int:
        """Elements of all float buffers."""
        return self._count("float_buffer")

    @cached_property
    def integer_count(self) -> int:
        """Elements of all integer and bool buffers."""
        return self._count("integer_buffer")

    def _count(self, role: Role) -> int:
        return sum(spec.count for spec in self.specs if spec.role == role)

    # Sizes and offsets, in bytes

    @property
    def float_buffer_offset(self) -> int:
        """Where the float buffers begin."""
        return FLOAT_BYTES * self.parameter_count

    @property
    def integer_offset(self) -> int:
        """Where the integer buffers begin: a multiple of 4, not always of 8."""
        return self.float_buffer_offset + FLOAT_BYTES * self.float_buffer_count

    @property
    def contribution_bytes(self) -> int:
        """Size of a contribution, a partial sum or a result; a state's slots begin here."""
        return self.integer_offset + INTEGER_BYTES * self.integer_count

    def slot_offset(self, index: int) -> int:
        """Where optimizer slot `index` begins in a state."""
        return self.contribution_bytes + index * FLOAT_BYTES * self.parameter_count

    def state_bytes(self, slots: int) -> int:
        """Size of a state with this many optimizer slots (optimizer.optimizer(kind).slots)."""
        return self.slot_offset(slots)

    @cached_property
    def tensor_offsets(self) -> dict[str, int]:
        """Byte offset of every tensor that travels, by name: the same in a state and in a contribution."""
        at = {
            "parameter": 0,
            "float_buffer": self.float_buffer_offset,
            "integer_buffer": self.integer_offset,
        }
        offsets = {}
        for spec in self.specs:
            if spec.role != "frozen":
                offsets[spec.name] = at[spec.role]
                at[spec.role] += spec.count * (
                    INTEGER_BYTES if spec.role == "integer_buffer" else FLOAT_BYTES
                )
        return offsets

    # Views over a flat uint8 array (np.memmap, np.frombuffer(..., "u1")): no copies, writable if it is

    def parameters(self, octets: Octets) -> Float32s:
        """The parameters' section, float32 of shape (parameter_count,)."""
        return _floats(octets, 0, self.parameter_count)

    def float_buffers(self, octets: Octets) -> Float32s:
        """The float buffers' section, float32 of shape (float_buffer_count,)."""
        return _floats(octets, self.float_buffer_offset, self.float_buffer_count)

    def integers(self, octets: Octets) -> Int64s:
        """The integer section, int64 of shape (integer_count,).

        It may lie at an odd multiple of 4: numpy copes, torch does not, so copy before torch.from_numpy.
        """
        return _integers(octets, self.integer_offset, self.integer_count)

    def slots(self, octets: Octets) -> tuple[Float32s, ...]:
        """A state's optimizer slots, as many as fit, each float32 of shape (parameter_count,)."""
        size = FLOAT_BYTES * self.parameter_count
        beyond = octets.nbytes - self.contribution_bytes
        if beyond < 0 or (beyond % size if size else beyond):
            raise LocalError(f"{octets.nbytes} bytes are no state of this layout")
        return tuple(
            _floats(octets, self.slot_offset(index), self.parameter_count)
            for index in range(beyond // size if size else 0)
        )

    def tensor_views(self, octets: Octets) -> dict[str, Float32s | Int64s]:
        """Every tensor that travels, by name and in its shape: float32, or int64 for integers and bools."""
        views: dict[str, Float32s | Int64s] = {}
        for spec in self.specs:
            if spec.role == "frozen":
                continue
            at = self.tensor_offsets[spec.name]
            if spec.role == "integer_buffer":
                views[spec.name] = _integers(octets, at, spec.count).reshape(spec.shape)
            else:
                views[spec.name] = _floats(octets, at, spec.count).reshape(spec.shape)
        return views


def _floats(octets: Octets, offset: int, count: int) -> Float32s:
    return _section(octets, offset, FLOAT_BYTES * count).view("<f4")


def _integers(octets: Octets, offset: int, count: int) -> Int64s:
    return _section(octets, offset, INTEGER_BYTES * count).view("<i8")


def _section(octets: Octets, offset: int, size: int) -> Octets:
    if octets.ndim != 1 or octets.itemsize != 1:
        raise LocalError("a view needs a flat array of bytes (dtype uint8)")
    if offset + size > octets.nbytes:
        raise LocalError(f"a section ends at byte {offset + size} of {octets.nbytes}")
    return octets[offset : offset + size]


MAX_DIFFERENCES_TOLD: Final = 5
"""Differences that a message lists; after a handful, the reader knows that it is another model."""


def difference(ours: Layout, theirs: Layout) -> str:
    """How our layout differs from the run's, in words for a refusal; empty when they are equal."""
    here = {spec.name: spec for spec in ours.specs}
    there = {spec.name: spec for spec in theirs.specs}
    told = [f"{name!r} is not in the run's model" for name in here if name not in there]
    told += [f"{name!r} is missing here" for name in there if name not in here]
    for name, spec in here.items():
        other = there.get(name, spec)
        if spec.shape != other.shape:
            told.append(f"{name!r} has shape {list(spec.shape)} here and {list(other.shape)} in the run")
        if spec.dtype != other.dtype:
            told.append(f"{name!r} is {spec.dtype} here and {other.dtype} in the run")
        if spec.role != other.role:
            told.append(f"{name!r} is a {_spoken(spec.role)} here and a {_spoken(other.role)} in the run")
    if not told and ours.specs != theirs.specs:
        at = next(i for i, (a, b) in enumerate(zip(ours.specs, theirs.specs, strict=True)) if a != b)
        told.append(
            f"the tensors come in another order: number {at + 1} is {ours.specs[at].name!r} here and "
            f"{theirs.specs[at].name!r} in the run"
        )
    if len(told) > MAX_DIFFERENCES_TOLD:
        told[MAX_DIFFERENCES_TOLD:] = [f"and {len(told) - MAX_DIFFERENCES_TOLD} more differences"]
    return "; ".join(told)


def _spoken(role: Role) -> str:
    spoken = {
        "parameter": "trainable parameter",
        "frozen": "frozen parameter",
        "float_buffer": "float buffer",
        "integer_buffer": "integer buffer",
    }
    return spoken[role]

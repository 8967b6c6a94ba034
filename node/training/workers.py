"""What worker threads do for the effects Combine and Step: tensor arithmetic from files to a file.

Theory of operation
    The peer names content by hash; the store turns hashes into paths; the functions here read and write those paths. They
    are synchronous and run in a thread (`trio.to_thread.run_sync`) while the trio thread goes on: numpy lets other threads
    run during every block. Inputs are mapped into memory, output is written in pieces of PIECE_BYTES, so a state of any
    size passes through some megabytes of memory of our own. Output is written, not mapped: on a full disk a write raises
    OSError, while a mapped page kills the process with SIGBUS.

    `between_pieces` is called after each piece, and may raise to stop the work: pass `trio.from_thread.check_cancelled`.
    Whatever is raised, the unfinished output file is removed. Making the output durable, hashing it (content.manifest_of)
    and giving it its final name are the store's.

    Input may come from peers. Content that does not fit the layout, or holds an integer that its tensor's dtype cannot
    hold, raises RemoteError; what is not finite is an outcome, because the peer has to say who sent it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np

from p2pcoord.aggregation.mean import Factors
from p2pcoord.aggregation.summation import (
    NORM_LANES,
    NormSum,
    all_finite,
    maximum,
    require_ieee_arithmetic,
    weighted_sum,
)
from p2pcoord.errors import RemoteError
from p2pcoord.layout import FLOAT_BYTES, Layout
from p2pcoord.optimization.step import step as outer_step

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from io import FileIO
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from numpy.typing import NDArray

    from p2pcoord.layout import Octets
    from p2pcoord.optimization.optimizer import StepParameters

PIECE: Final = 1 << 20
"""Elements in a piece: 4 MiB of float32 are a write call that costs nothing beside its copy, and some milliseconds between
two questions whether to stop. A multiple of NORM_LANES."""

assert PIECE % NORM_LANES == 0


class CombineInput(msgspec.Struct, frozen=True):
    """A contribution or partial sum, and by what it enters (mean.PARTIAL for a partial sum)."""

    path: Path
    factors: Factors


class CombineOutcome(msgspec.Struct, frozen=True):
    """`norm`: L2 norm of the parameters' section of the sum, float64, the same bits on every machine.

    When `finite` is False, `non_finite` lists the positions of the inputs that are not finite themselves; none if
    finite inputs added up beyond float32.
    """

    finite: bool
    norm: float
    size_bytes: int
    non_finite: tuple[int, ...] = ()


class StepOutcome(msgspec.Struct, frozen=True):
    """`finite`: whether every parameter, float buffer and slot of the new state is."""

    finite: bool
    size_bytes: int


def _nothing() -> None:
    pass


def combine(
    layout: Layout,
    inputs: Sequence[CombineInput],
    out_path: Path,
    between_pieces: Callable[[], None] = _nothing,
) -> CombineOutcome:
    """Write the weighted sum of `inputs`, in their order, to `out_path`: the bytes of a partial sum or result.

    Raises RemoteError "bad_size" or "bad_integer" for an input that does not fit the layout, OSError for the disk,
    LocalError for no inputs or arithmetic that is not IEEE 754's.
    """
    require_ieee_arithmetic()
    mapped = [_map(entry.path, layout.contribution_bytes) for entry in inputs]
    for entry, octets in zip(inputs, mapped, strict=True):
        _check_integers(layout, octets, entry.path)
    norm = NormSum()
    finite = True
    with _Output(out_path) as out:
        parameters = [layout.parameters(octets) for octets in mapped]
        piece = np.empty(min(PIECE, layout.parameter_count), "<f4")
        for start in range(0, layout.parameter_count, PIECE):
            total = piece[: layout.parameter_count - start]
            terms = [
                (vector[start : start + total.size], entry.factors.parameters)
                for vector, entry in zip(parameters, inputs, strict=True)
            ]
            finite &= weighted_sum(terms, total)
            norm.add(total)
            out.write(FLOAT_BYTES * start, total)
            between_pieces()
        buffers = np.empty(layout.float_buffer_count, "<f4")
        finite &= weighted_sum(
            [
                (layout.float_buffers(octets), entry.factors.float_buffers)
                for octets, entry in zip(mapped, inputs, strict=True)
            ],
            buffers,
        )
        out.write(layout.float_buffer_offset, buffers)
        integers = np.empty(layout.integer_count, "<i8")
        maximum([layout.integers(octets) for octets in mapped], integers)
        out.write(layout.integer_offset, integers)
    non_finite = (
        () if finite else tuple(at for at, octets in enumerate(mapped) if not _is_finite(layout, octets))
    )
    return CombineOutcome(finite, norm.norm(), layout.contribution_bytes, non_finite)


def step(
    layout: Layout,
    state_path: Path,
    result_path: Path,
    scalars: StepParameters,
    out_path: Path,
    between_pieces: Callable[[], None] = _nothing,
) -> StepOutcome:
    """Write the state that the outer step makes of a state and a result: parameters and slots by the optimizer, float
    buffers and integers as the result has them.

    Raises as `combine` does.
    """
    require_ieee_arithmetic()
    size = layout.state_bytes(scalars.slots)
    state = _map(state_path, size)
    result = _map(result_path, layout.contribution_bytes)
    _check_integers(layout, result, result_path)
    finite = True
    with _Output(out_path) as out:
        parameters, gradient = layout.parameters(state), layout.parameters(result)
        slots = [
            state[layout.slot_offset(index) : layout.slot_offset(index + 1)].view("<f4")
            for index in range(scalars.slots)
        ]
        piece = np.empty((1 + scalars.slots, min(PIECE, layout.parameter_count)), "<f4")
        for start in range(0, layout.parameter_count, PIECE):
            part = slice(start, min(start + PIECE, layout.parameter_count))
            new, *new_slots = piece[:, : part.stop - start]
            finite &= outer_step(
                parameters[part], gradient[part], [slot[part] for slot in slots], scalars, new, new_slots
            )
            out.write(FLOAT_BYTES * start, new)
            for index, slot in enumerate(new_slots):
                out.write(layout.slot_offset(index) + FLOAT_BYTES * start, slot)
            between_pieces()
        buffers = layout.float_buffers(result)
        finite &= all_finite(buffers)
        out.write(layout.float_buffer_offset, buffers)
        out.write(layout.integer_offset, layout.integers(result))
    return StepOutcome(finite, size)


def _map(path: Path, size_bytes: int) -> Octets:
    """The file's bytes, mapped read-only. Raises RemoteError "bad_size" if there are not exactly `size_bytes`."""
    found = path.stat().st_size
    if found != size_bytes:
        raise RemoteError("bad_size", f"{path.name} has {found} bytes; the run's model makes {size_bytes}")
    if size_bytes == 0:  # nothing cannot be mapped
        return np.empty(0, np.uint8)
    return np.memmap(path, np.uint8, "r").view(np.ndarray)


def _check_integers(layout: Layout, octets: Octets, path: Path) -> None:
    if not layout.integer_count:
        return
    views = layout.tensor_views(octets)
    for spec in layout.specs:
        if spec.role == "integer_buffer" and spec.count:
            low, high = (0, 1) if spec.dtype == "bool" else _limits(spec.dtype)
            if views[spec.name].min() < low or views[spec.name].max() > high:
                raise RemoteError("bad_integer", f"{path.name}: {spec.name!r} holds what is no {spec.dtype}")


def _limits(dtype: str) -> tuple[int, int]:
    limits = np.iinfo(np.dtype(dtype))
    return limits.min, limits.max


def _is_finite(layout: Layout, octets: Octets) -> bool:
    return all_finite(layout.parameters(octets)) and all_finite(layout.float_buffers(octets))


class _Output:
    """A file that is written at offsets, in any order; removed when the block is left by an exception."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: FileIO

    def __enter__(self) -> Self:
        self._file = open(self._path, "wb", buffering=0)  # closed in __exit__
        return self

    def write(self, offset: int, values: NDArray[np.generic]) -> None:
        left = values.view(np.uint8).data
        self._file.seek(offset)
        while left:
            left = left[self._file.write(left) :]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if error is not None:
            self._path.unlink(missing_ok=True)

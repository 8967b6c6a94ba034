"""The simulated workload: minimise a quadratic by real float32 arithmetic, on a few dozen bytes.

Sample i of the data is a point c_i, drawn by hash from its index; the loss of parameters x on it is |x - c_i|^2 / 2, so the
optimum is the mean of all points. Training, combining, stepping and validating use the same numerics as a node (flat
float32 sections of `layout.py`, `summation`, `step`), so that equal inputs give equal bytes and a mixed-up sum gives others.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from p2pcoord.aggregation.mean import Factors, Mean
from p2pcoord.aggregation.summation import maximum, norm, weighted_sum
from p2pcoord.content import ContentRef, manifest_of
from p2pcoord.layout import Layout, TensorSpec
from p2pcoord.optimization.optimizer import StepParameters, optimizer
from p2pcoord.optimization.step import step as outer_step
from p2pcoord.rounds.setting import Rules
from p2pcoord.synchronization.bsp import StragglerPolicy

DIMENSION = 4
LOCAL_RATE = np.float32(0.2)
LOCAL_STEPS = 3

LAYOUT = Layout(
    (
        TensorSpec("point", (DIMENSION,), "float32", "parameter"),
        TensorSpec("seen", (1,), "float32", "float_buffer"),
        TensorSpec("batches", (), "int64", "integer_buffer"),
    )
)
OPTIMIZER = optimizer("sgd", momentum=0.5, nesterov=True, weight_decay=0.0)
STATE_BYTES = LAYOUT.state_bytes(OPTIMIZER.slots)

Octets = NDArray[np.uint8]


def _empty(size: int) -> Octets:
    return np.zeros(size, np.uint8)


def _array(data: bytes) -> Octets:
    return np.frombuffer(data, np.uint8)


@lru_cache(maxsize=65_536)
def ref_of(data: bytes) -> ContentRef:
    return manifest_of(data).ref


STATE_ZERO = bytes(_empty(STATE_BYTES))


def rules(
    *,
    rounds: int,
    barrier_ns: int = 5_000_000_000,
    straggler_policy: StragglerPolicy = StragglerPolicy.LEAVE_OUT,
    minimum_share: float = 0.5,
    minimum_members: int = 1,
    fan_out: int = 2,
    train_length: int = 100,
    validation_length: int = 40,
    learning_rate: float = 0.7,
) -> Rules:
    """The rules of a run that trains this workload."""
    rate = float(np.float32(learning_rate))
    return Rules(
        rounds=rounds,
        barrier_ns=barrier_ns,
        straggler_policy=straggler_policy,
        minimum_share=minimum_share,
        minimum_members=minimum_members,
        mean=Mean(),
        fan_out=fan_out,
        optimizer=OPTIMIZER,
        learning_rate=lambda version: rate,
        train_length=train_length,
        validation_length=validation_length,
        contribution_bytes=LAYOUT.contribution_bytes,
        state_zero=ref_of(STATE_ZERO),
        seed=0,
    )


@lru_cache(maxsize=4096)
def _point(index: int) -> tuple[float, ...]:
    digest = sha256(b"point" + index.to_bytes(8, "big")).digest()
    return tuple(byte / 255 for byte in digest[:DIMENSION])


def _points(ranges: Sequence[tuple[int, int]]) -> NDArray[np.float32]:
    return np.array([_point(i) for low, high in ranges for i in range(low, high)], np.float32).reshape(
        -1, DIMENSION
    )


def train(base: bytes, ranges: Sequence[tuple[int, int]]) -> tuple[bytes, int, float, float]:
    """Local gradient steps from the state `base`: (contribution, samples, norm, mean loss)."""
    octets = _array(base)
    start = LAYOUT.parameters(octets)
    points = _points(ranges)
    mean = points.mean(axis=0, dtype=np.float32)
    local = start.copy()
    for _ in range(LOCAL_STEPS):
        local = local - LOCAL_RATE * (local - mean)
    out = _empty(LAYOUT.contribution_bytes)
    LAYOUT.parameters(out)[:] = start - local
    LAYOUT.float_buffers(out)[:] = np.float32(len(points))
    LAYOUT.integers(out)[:] = LAYOUT.integers(octets) + LOCAL_STEPS
    loss = float(((local - points) ** 2).sum() / 2 / len(points))
    return out.tobytes(), len(points), norm(LAYOUT.parameters(out)), loss


def combine(inputs: Sequence[tuple[bytes, Factors]]) -> tuple[bytes, float, bool]:
    """(sum, L2 norm of its parameters, finite)."""
    arrays = [(_array(data), factors) for data, factors in inputs]
    out = _empty(LAYOUT.contribution_bytes)
    finite = weighted_sum([(LAYOUT.parameters(a), f.parameters) for a, f in arrays], LAYOUT.parameters(out))
    finite &= weighted_sum(
        [(LAYOUT.float_buffers(a), f.float_buffers) for a, f in arrays], LAYOUT.float_buffers(out)
    )
    total = np.empty_like(LAYOUT.integers(out))
    maximum([np.array(LAYOUT.integers(a)) for a, _ in arrays], total)
    LAYOUT.integers(out)[:] = total
    return out.tobytes(), norm(LAYOUT.parameters(out)), finite


def step(state: bytes, result: bytes, parameters: StepParameters) -> tuple[bytes, bool]:
    """(new state, finite)."""
    old, update, new = _array(state), _array(result), _empty(STATE_BYTES)
    finite = outer_step(
        LAYOUT.parameters(old),
        LAYOUT.parameters(update),
        LAYOUT.slots(old),
        parameters,
        LAYOUT.parameters(new),
        LAYOUT.slots(new),
    )
    LAYOUT.float_buffers(new)[:] = LAYOUT.float_buffers(update)
    LAYOUT.integers(new)[:] = LAYOUT.integers(update)
    return new.tobytes(), finite


def validate(state: bytes, ranges: Sequence[tuple[int, int]]) -> tuple[int, float]:
    """(samples, sum of losses)."""
    points = _points(ranges)
    loss = ((LAYOUT.parameters(_array(state)) - points) ** 2).sum(axis=1) / 2
    return len(points), float(loss.sum(dtype=np.float64))

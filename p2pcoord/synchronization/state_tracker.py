"""The state tracker of the specification: the run's global state, and what is known of each member's.

The global state follows certified records alone, so it is equal on all peers that certified the same prefix. Local states
are what members say of themselves: gossiped, and perhaps stale; the version vector says how new they are (`gossip/`).
"""

from __future__ import annotations

from collections import deque

import msgspec

from p2pcoord.consensus.record import Round
from p2pcoord.gossip.records import PeerRecord

# Losses kept in memory for people and schedules; the whole history lies in the ledger's records.
LOSS_HISTORY = 1000


class GlobalState(msgspec.Struct, frozen=True):
    """`training_step`: local optimizer steps summed over all certified contributions; `best_checkpoint`: the root of the
    state with the lowest validation loss so far, and its version."""

    model_version: int
    training_step: int
    loss_history: tuple[tuple[int, float], ...]
    best_checkpoint: bytes
    best_version: int


class LocalState(msgspec.Struct, frozen=True):
    """One member's own account of itself. `last_sync` is the version it last adopted; norm and loss are of its last local
    training, None before the first."""

    local_step: int = 0
    last_sync: int = 0
    gradient_norm: float | None = None
    local_loss: float | None = None


def local_state(record: PeerRecord | None) -> LocalState:
    """What a member's newest record says; the beginning for one that was not heard of yet."""
    if record is None:
        return LocalState()
    return LocalState(record.local_step, record.last_sync, record.gradient_norm, record.local_loss)


class StateTracker:
    """Follows certified rounds."""

    def __init__(self, state_zero: bytes) -> None:
        self._version = 0
        self._steps = 0
        self._losses: deque[tuple[int, float]] = deque(maxlen=LOSS_HISTORY)
        self._best: tuple[float, bytes, int] = (float("inf"), state_zero, 0)

    def certified(self, body: Round) -> None:
        metrics = dict(body.metrics)
        self._version = body.version
        self._steps += int(metrics.get("training_steps", 0))
        loss = metrics.get("loss", metrics.get("training_loss"))
        if loss is not None:
            self._losses.append((body.version, loss))
            self._best = min(self._best, (loss, body.state, body.version))

    def state(self) -> GlobalState:
        return GlobalState(self._version, self._steps, tuple(self._losses), self._best[1], self._best[2])

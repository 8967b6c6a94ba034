"""The state tracker of the specification: the run's global state, and what is known of each member's.

The global state follows certified records alone: version, steps and best checkpoint stand in the newest round's record, so
they are equal on all peers that certified it. The loss history is a window: it begins where a peer's own rounds do (who
joined late, or dropped old rounds, has a shorter one).

Local states are what members say of themselves: gossiped, and perhaps stale; the version vector says how new they are
(`gossip/`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import msgspec

from p2pcoord.consensus.record import Round, Totals
from p2pcoord.gossip.records import PeerRecord

# Losses kept in memory for people.
LOSS_HISTORY = 1000

# Steps are counted up to here: exact in float64 and far from what any run makes, whatever a member claims.
MAX_STEPS = 2**53


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


def loss_of(metrics: Mapping[str, float]) -> float | None:
    """A round's loss: of the validation, else of the training; None without either."""
    return metrics.get("loss", metrics.get("training_loss"))


def totals_after(before: Totals, version: int, state: bytes, metrics: Mapping[str, float]) -> Totals:
    """What a run came to with the round that made `version`; its metrics are finite."""
    steps = min(before.training_step + int(max(metrics.get("training_steps", 0.0), 0.0)), MAX_STEPS)
    loss = loss_of(metrics)
    if loss is None or (before.best_loss is not None and loss >= before.best_loss):
        return Totals(steps, before.best_version, before.best_loss, before.best_checkpoint)
    return Totals(steps, version, loss, state)


class StateTracker:
    """Follows certified rounds."""

    def __init__(self, state_zero: bytes) -> None:
        self._state_zero = state_zero
        self._version = 0
        self._totals = Totals()
        self._losses: deque[tuple[int, float]] = deque(maxlen=LOSS_HISTORY)

    def certified(self, body: Round) -> None:
        self._version, self._totals = body.version, body.totals
        loss = loss_of(dict(body.metrics))
        if loss is not None:
            self._losses.append((body.version, loss))

    def state(self) -> GlobalState:
        totals = self._totals
        best = totals.best_checkpoint or self._state_zero
        return GlobalState(
            self._version, totals.training_step, tuple(self._losses), best, totals.best_version
        )

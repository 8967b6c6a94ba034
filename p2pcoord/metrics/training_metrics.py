"""The metrics of every round, in a ring buffer: what the records agree, read for people.

All of the specification's: loss, accuracy or what the workload measures, gradient_norm, learning_rate, node_participation,
communication_time, computation_time. They are agreed in the round's record; the ring is a window on it.
"""

from __future__ import annotations

from collections import deque

import msgspec

from p2pcoord.consensus.record import Round

# A day of rounds of 90 seconds; older ones are in the ledger.
RING_SIZE = 1024

MEASURE_PREFIX = "measure."


class TrainingMetrics(msgspec.Struct, frozen=True):
    """One round. Times in seconds; `loss` and `measures` over `validation_samples` samples (loss falls back to the training
    loss when there is no validation data); `node_participation` is contributors / living members."""

    version: int
    loss: float
    training_loss: float
    measures: dict[str, float]
    gradient_norm: float
    learning_rate: float
    node_participation: float
    communication_time: float
    computation_time: float
    round_time: float
    validation_samples: int
    contributors: tuple[str, ...]


def metrics_of(body: Round) -> TrainingMetrics:
    values = dict(body.metrics)
    training_loss = values.get("training_loss", 0.0)
    return TrainingMetrics(
        body.version,
        values.get("loss", training_loss),
        training_loss,
        {k.removeprefix(MEASURE_PREFIX): v for k, v in body.metrics if k.startswith(MEASURE_PREFIX)},
        values.get("gradient_norm", 0.0),
        values.get("learning_rate", 0.0),
        values.get("node_participation", 0.0),
        values.get("communication_time", 0.0),
        values.get("computation_time", 0.0),
        values.get("round_time", 0.0),
        int(values.get("validation_samples", 0)),
        tuple(dict.fromkeys(counted.contributor for counted in body.contributors)),
    )


class MetricsRing:
    """The newest RING_SIZE rounds."""

    def __init__(self) -> None:
        self._ring: deque[TrainingMetrics] = deque(maxlen=RING_SIZE)

    def certified(self, body: Round) -> TrainingMetrics:
        metrics = metrics_of(body)
        self._ring.append(metrics)
        return metrics

    @property
    def newest(self) -> TrainingMetrics | None:
        return self._ring[-1] if self._ring else None

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._ring)

"""The eight phases of a round, as the coordinator goes through them.

    phase                what happens                                          left when
    initialization       members are chosen; a new coordinator asks what they  the members are known
                         have of a round that its predecessor began
    task_distribution    the signed plan goes out                              all have accepted it, or a header came
    local_training       members train; nothing has arrived yet                the first header arrives
    gradient_collection  headers arrive                                        the synchronization rule closes the round
    aggregation          the attempt is signed; bytes flow up the tree         the root has signed the result
    model_update         the result comes down; members step                   a quorum of voters reports one state
    validation           members validate their shares                         all shares came, or their time is over
    completed            the record is proposed                                its certificate: the one commit point

Death in any phase but the last leads to a new attempt of the same round (back to gradient_collection or aggregation); the
death of the coordinator leads to initialization under a higher term.
"""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    INITIALIZATION = "initialization"
    TASK_DISTRIBUTION = "task_distribution"
    LOCAL_TRAINING = "local_training"
    GRADIENT_COLLECTION = "gradient_collection"
    AGGREGATION = "aggregation"
    MODEL_UPDATE = "model_update"
    VALIDATION = "validation"
    COMPLETED = "completed"


FOLLOWS: dict[Phase, frozenset[Phase]] = {
    Phase.INITIALIZATION: frozenset({Phase.TASK_DISTRIBUTION}),
    Phase.TASK_DISTRIBUTION: frozenset(
        {Phase.LOCAL_TRAINING, Phase.GRADIENT_COLLECTION, Phase.INITIALIZATION}
    ),
    Phase.LOCAL_TRAINING: frozenset({Phase.GRADIENT_COLLECTION, Phase.INITIALIZATION}),
    Phase.GRADIENT_COLLECTION: frozenset({Phase.AGGREGATION, Phase.INITIALIZATION}),
    Phase.AGGREGATION: frozenset({Phase.MODEL_UPDATE, Phase.GRADIENT_COLLECTION, Phase.INITIALIZATION}),
    Phase.MODEL_UPDATE: frozenset({Phase.VALIDATION, Phase.GRADIENT_COLLECTION, Phase.INITIALIZATION}),
    Phase.VALIDATION: frozenset({Phase.COMPLETED, Phase.GRADIENT_COLLECTION, Phase.INITIALIZATION}),
    Phase.COMPLETED: frozenset({Phase.INITIALIZATION}),
}
"""From a phase to those that may come next; from anywhere to initialization when the plan as a whole failed."""

COLLECTING = frozenset({Phase.TASK_DISTRIBUTION, Phase.LOCAL_TRAINING, Phase.GRADIENT_COLLECTION})
"""Phases in which the plan may be revised and contributions are taken."""

RECONFIGURABLE = COLLECTING | {Phase.INITIALIZATION}
"""Phases in which records other than the round's may be ordered: nothing of the round rests on the committee yet."""

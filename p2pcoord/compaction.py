"""What is forgotten of a run that grows: bodies of old rounds at once, in memory; the log is rewritten when it has doubled.

All headers stay, the bodies of the last rounds, and what an acknowledgement promised.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import msgspec

from p2pcoord.consensus.record import Record
from p2pcoord.consensus.voter import Voter
from p2pcoord.outbox import Outbox


class Compaction:
    """Of one peer's ledger and log.

    `after_bytes`: the log's size from which it is rewritten, 0 for every time; `kept_bodies`: rounds whose bodies stay.
    """

    def __init__(self, voter: Voter, outbox: Outbox, after_bytes: int, kept_bodies: int) -> None:
        self._voter = voter
        self._outbox = outbox
        self._due_above = after_bytes
        self._after_bytes = after_bytes
        # Rounds are counted, not heights: after many elections at rest the newest round may lie far below the top.
        self._rounds: deque[int] = deque(maxlen=kept_bodies)

    def certified(self, records: Sequence[Record]) -> None:
        """Follows newly certified records, in order: the rounds that are too many for `kept_bodies` lose their bodies."""
        for record in records:
            height = record.header.height
            if record.header.kind == "round" and (not self._rounds or height > self._rounds[-1]):
                self._rounds.append(height)
        if len(self._rounds) == self._rounds.maxlen:
            self._voter.ledger.compact(self._rounds[0] - 1)

    @property
    def due(self) -> bool:
        return self._outbox.written_bytes > self._due_above

    def rewrite(self, others: Sequence[msgspec.Struct]) -> None:
        """Begins a new log without what a certified state makes superfluous; `others` are frames to keep besides."""
        self._outbox.persist([*self._voter.compacted_frames(), *others], replace=True)
        self._outbox.emit(
            "compacted", height=self._voter.ledger.compacted, size_bytes=self._outbox.written_bytes
        )
        # What cannot be dropped any more must not make every certificate rewrite the whole file.
        self._due_above = max(self._after_bytes, 2 * self._outbox.written_bytes) if self._after_bytes else 0

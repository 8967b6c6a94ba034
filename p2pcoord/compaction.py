"""When the log is rewritten, and what stays: all headers, the bodies of the last rounds, and what an acknowledgement promised."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from p2pcoord.consensus.voter import Voter
from p2pcoord.outbox import Outbox


class Compaction:
    """Of one peer's log. `after_bytes`: its size from which it is rewritten; `kept_bodies`: rounds whose bodies stay."""

    def __init__(self, voter: Voter, outbox: Outbox, after_bytes: int, kept_bodies: int) -> None:
        self._voter = voter
        self._outbox = outbox
        self._due_above = after_bytes
        self._after_bytes = after_bytes
        self._kept_bodies = kept_bodies

    @property
    def due(self) -> bool:
        return self._outbox.written_bytes > self._due_above

    def compact(self, others: Sequence[msgspec.Struct]) -> None:
        """Begins a new log without what a certified state makes superfluous; `others` are frames to keep besides."""
        ledger = self._voter.ledger
        certified = ledger.records[: ledger.certified + 1]
        rounds = [record.header.height for record in certified if record.header.kind == "round"]
        # Rounds are counted, not heights: after many elections at rest the newest round may lie far below the top.
        height = rounds[-self._kept_bodies] - 1 if len(rounds) >= self._kept_bodies else 0
        self._outbox.persist([*self._voter.compacted_frames(height), *others], replace=True)
        self._outbox.emit("compacted", height=max(height, 0), size_bytes=self._outbox.written_bytes)
        # What cannot be dropped any more must not make every certificate rewrite the whole file.
        self._due_above = max(self._after_bytes, 2 * self._outbox.written_bytes)

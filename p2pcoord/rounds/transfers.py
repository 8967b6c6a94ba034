"""Fetching what an attempt needs from the members that have it, and telling the coordinator who does not give it.

A member of the tree whose bytes cannot be had is an obstacle: the attempt as signed cannot succeed. One to whom there is no
connection yet (a run is no full mesh) is dialled first, and given a moment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from p2pcoord.content import ContentRef
from p2pcoord.effects import Done, Failed, FetchReport, Outcome
from p2pcoord.rounds.attempt_book import AttemptBook
from p2pcoord.rounds.holdings import Holdings
from p2pcoord.rounds.messages import Obstacle
from p2pcoord.rounds.setting import Setting

# What its first sources did not give is looked for again after this long: a result with all members of the tree.
REFETCH_RESULT_NS = 300_000_000

# A neighbour in the tree to whom there is no connection yet (a run is no full mesh) is dialled, and no obstacle for so long.
LINK_PATIENCE_NS = 2_000_000_000

RESULT = "result"
CONTRIBUTION = "contribution"


class Transfers:
    def __init__(self, setting: Setting, holdings: Holdings, book: AttemptBook) -> None:
        self.setting = setting
        self.holdings = holdings
        self.book = book
        self._unlinked: dict[tuple[bytes, str], int] = {}
        """(Attempt, member): since when bytes are wanted from it, and there is no connection to it."""

    def fetch(
        self,
        content: ContentRef,
        sources: Sequence[str],
        purpose: str,
        culprit: str,
        arrived: Callable[[int], None],
        now: int,
    ) -> None:
        """Gets content for the current attempt. `culprit` is who should have it; `arrived(now)` is called when it is here."""
        if self.holdings.fetches(content.root) or self.holdings.has(content.root):
            return
        for source in sources:
            self.setting.neighbours.link(source, now)
        name = self.book.current_name

        def fetched(outcome: Outcome, at: int) -> None:
            if isinstance(outcome, Done):
                self._tell(content, purpose, outcome)
                arrived(at)
            elif isinstance(outcome, Failed) and name == self.book.current_name:
                self._failed(name, purpose, culprit, outcome.reason, at)

        self.holdings.fetch(content, sources, purpose, fetched)

    def _tell(self, content: ContentRef, purpose: str, outcome: Done) -> None:
        if isinstance(outcome.value, FetchReport):
            self.setting.outbox.emit(
                "fetched",
                purpose=purpose,
                size_bytes=content.size_bytes,
                sources=outcome.value.bytes_by_source,
            )

    def _failed(self, name: bytes, purpose: str, culprit: str, reason: str, now: int) -> None:
        setting = self.setting
        if not setting.neighbours.link(culprit, now):
            since = self._unlinked.setdefault((name, culprit), now)
            if now < since + LINK_PATIENCE_NS:
                self.holdings.refetch_after(REFETCH_RESULT_NS, now)
                return
        setting.outbox.emit("fetch-failed", purpose=purpose, source=culprit, reason=reason)
        setting.neighbours.send(setting.coordinator, Obstacle(name, culprit, reason[:200]), now)
        if purpose == RESULT:
            self.holdings.refetch_after(REFETCH_RESULT_NS, now)

    def certified(self) -> None:
        self._unlinked.clear()

"""A voter's judgement of a round's record, by what it did itself in the attempt that the record names."""

from __future__ import annotations

import math

from p2pcoord.consensus.record import Round
from p2pcoord.content import ContentRef
from p2pcoord.rounds.attempt import Attempt
from p2pcoord.rounds.attempt_book import AttemptBook
from p2pcoord.rounds.holdings import Holdings
from p2pcoord.rounds.messages import AttemptRequest
from p2pcoord.rounds.setting import Setting
from p2pcoord.rounds.stepping import Stepping
from p2pcoord.synchronization.state_tracker import totals_after

# An attempt that a record names, and that nobody has shown, is asked for this often.
ASK_AGAIN_NS = 300_000_000


class Judge:
    """`mismatches`: how often the state computed here was not the certified one; after the second this peer never
    acknowledges."""

    def __init__(self, setting: Setting, holdings: Holdings, book: AttemptBook, stepping: Stepping) -> None:
        self.setting = setting
        self.holdings = holdings
        self.book = book
        self.stepping = stepping
        self.mismatches = 0
        self._asked, self._asked_at = b"", 0

    def check(self, ordered_by: str, body: Round, now: int) -> str | None:
        """Why a voter does not append this round, and who coordinates does not order it ("" when it may; None: not yet). See
        following.Check."""
        setting, version = self.setting, self.holdings.version
        if body.version <= version:
            return f"version {body.version} is certified already"
        if body.version > version + 1:
            return None
        if body.parent != self.holdings.state.root:
            return f"its parent is not the state of version {version}"
        if setting.voter.silenced:
            return setting.voter.silenced
        if not all(math.isfinite(value) for _, value in body.metrics):
            return "a metric is not finite"
        entry = self.book.get(body.attempt)
        if entry is None:
            self._ask_attempt(ordered_by, body.attempt, now)
            return None
        if reason := self._check_contributors(body, entry.attempt):
            return reason
        if entry.result is None:
            self._ask_attempt(ordered_by, body.attempt, now)
            return None
        if entry.state is None:
            # An earlier life may have ended between the result and the state.
            self.stepping.go_on(entry.result, self._sources(ordered_by, entry.result.sender), now)
            return None
        if entry.result.content.root != body.result:
            return "its result is not the one that the tree's root signed"
        if (entry.state.root, entry.state.size_bytes) != (body.state, body.state_bytes):
            setting.outbox.emit("state-differs", version=body.version, here=entry.state.root.hex())
            return f"another state was computed here: {entry.state.root.hex()[:16]}"
        if body.totals != totals_after(self.holdings.totals, body.version, body.state, dict(body.metrics)):
            return f"its totals do not follow from those of version {version}"
        self.book.keep(body.attempt)
        return ""

    def _check_contributors(self, body: Round, attempt: Attempt) -> str:
        roster = self.setting.roster
        claimed = [(c.origin_round, c.assignment, c.contributor, c.weight) for c in body.contributors]
        signed = [
            (e.origin_round, e.assignment, e.contributor, e.factors.float_buffers) for e in attempt.entries
        ]
        if claimed != signed:
            return "its contributors are not those of its attempt"
        strangers = [c.contributor for c in body.contributors if not roster.is_member(c.contributor)]
        if strangers:
            return f"{strangers[0]} does not count: {roster.excluded(strangers[0]) or 'no member'}"
        if any(c.origin_round != body.version for c in body.contributors):
            return "a contribution to another version"
        return ""

    def _sources(self, ordered_by: str, root: str) -> list[str]:
        """Who has a result: whoever ordered its round, whoever sends the record now, and the tree's root."""
        sources = [ordered_by, self.setting.voter.coordinator, root]
        return [peer for peer in sources if peer and self.setting.neighbours.alive(peer)]

    def _ask_attempt(self, ordered_by: str, name: bytes, now: int) -> None:
        """Asks for an attempt and its result: whoever ordered the round, and whoever sends its record now, has them."""
        if name == self._asked and now < self._asked_at + ASK_AGAIN_NS:
            return
        self._asked, self._asked_at = name, now
        for peer in dict.fromkeys((ordered_by, self.setting.voter.coordinator)):
            if peer is not None and peer != self.setting.me:
                self.setting.neighbours.send(peer, AttemptRequest(name), now)

    def compare(self, computed: ContentRef) -> None:
        """What was computed here, with the state that is certified now. That one is fetched; a voter whose state differs
        twice has hardware or libraries to look at."""
        holdings, setting = self.holdings, self.setting
        if computed == holdings.state:
            return
        self.mismatches += 1
        setting.outbox.emit(
            "state-differs",
            version=holdings.version,
            here=computed.root.hex(),
            certified=holdings.state.root.hex(),
        )
        if self.mismatches > 1:
            setting.voter.silenced = (
                "this voter computed other states than those certified, and votes no more"
            )

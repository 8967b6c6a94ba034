"""A member's part in the sum of an attempt: fetch what its children have, combine, and send the partial sum up the tree.

With no children and one contribution it has nothing to sum: its contribution is fetched as it is. The root signs the result.
"""

from __future__ import annotations

from p2pcoord.aggregation.mean import PARTIAL, Factors
from p2pcoord.content import ContentRef
from p2pcoord.effects import Combine, Combined, Done, Failed, Offer, Outcome
from p2pcoord.errors import RemoteError
from p2pcoord.rounds.attempt import Partial, Result
from p2pcoord.rounds.attempt_book import AttemptBook, Attempted
from p2pcoord.rounds.holdings import Holdings
from p2pcoord.rounds.messages import Obstacle, PartialMessage, ResultMessage
from p2pcoord.rounds.setting import Setting
from p2pcoord.rounds.stepping import Stepping
from p2pcoord.rounds.transfers import CONTRIBUTION, Transfers


class Summing:
    def __init__(
        self,
        setting: Setting,
        holdings: Holdings,
        book: AttemptBook,
        transfers: Transfers,
        stepping: Stepping,
    ) -> None:
        self.setting = setting
        self.holdings = holdings
        self.book = book
        self.transfers = transfers
        self.stepping = stepping

    def gather(self, now: int) -> None:
        """Fetches what this member has to sum in the current attempt; combines when all is here."""
        entry = self.book.current
        if entry is None or entry.combining or entry.summed:
            return
        attempt, me = entry.attempt, self.setting.me
        if me not in attempt.tree or not (attempt.sends_partial(me) or attempt.tree.root == me):
            return
        inputs: list[tuple[ContentRef, Factors]] = [(own.content, own.factors) for own in attempt.of(me)]
        missing = False
        for child in attempt.tree.children(me):
            if attempt.sends_partial(child):
                partial = entry.partials.get(child)
                wanted = [(partial.content, PARTIAL)] if partial else []
                missing = missing or partial is None
            else:
                wanted = [(leaf.content, leaf.factors) for leaf in attempt.of(child)]
            for content, factors in wanted:
                inputs.append((content, factors))
                if not self.holdings.has(content.root):
                    missing = True
                    self.transfers.fetch(content, (child,), CONTRIBUTION, child, self.gather, now)
        if missing or any(not self.holdings.has(content.root) for content, _ in inputs):
            return
        entry.combining = True
        name = self.book.current_name
        effect = Combine(self.setting.outbox.new_id(), tuple(inputs))
        self.setting.start(effect, lambda outcome, at: self._combined(name, outcome, at))

    def on_partial(self, message: PartialMessage, now: int) -> None:
        partial = message.partial
        entry = self.book.get(partial.attempt)
        if entry is None or partial.sender not in entry.attempt.tree:
            return
        if entry.attempt.tree.parent(partial.sender) != self.setting.me:
            return
        self.setting.authority.check(partial.sender, partial)
        if partial.content.size_bytes != self.setting.rules.contribution_bytes:
            raise RemoteError("bad_partial", f"{partial.content.size_bytes} bytes")
        entry.partials.setdefault(partial.sender, partial)
        self.gather(now)

    def _combined(self, name: bytes, outcome: Outcome, now: int) -> None:
        entry, setting = self.book.get(name), self.setting
        if entry is None or name != self.book.current_name:
            return
        entry.combining = False
        if not isinstance(outcome, Done) or not isinstance(outcome.value, Combined):
            reason = outcome.reason if isinstance(outcome, Failed) else "cancelled"
            obstacle = Obstacle(name, setting.me, f"could not combine: {reason}"[:200])
            setting.neighbours.send(setting.coordinator, obstacle, now)
            return
        combined = outcome.value
        if not combined.finite:
            self._blame_nonfinite(name, entry, combined.nonfinite, now)
            return
        entry.summed = True
        self.holdings.add(combined.content)
        setting.outbox.put(Offer(combined.content))
        parent = entry.attempt.tree.parent(setting.me)
        if parent is None:
            result = setting.authority.sign(Result(name, setting.me, combined.content, combined.norm))
            setting.neighbours.send(setting.coordinator, ResultMessage(result), now)
            if setting.coordinator != setting.me:
                self.stepping.on_result(setting.me, ResultMessage(result), now)
            return
        entry.partial = partial = setting.authority.sign(Partial(name, setting.me, combined.content))
        for peer in dict.fromkeys((parent, setting.coordinator)):
            setting.neighbours.send(peer, PartialMessage(partial), now)

    def _blame_nonfinite(self, name: bytes, entry: Attempted, roots: tuple[bytes, ...], now: int) -> None:
        by_root = {e.content.root: e.contributor for e in entry.attempt.entries}
        by_root |= {partial.content.root: partial.sender for partial in entry.partials.values()}
        culprits = {by_root.get(root, self.setting.me) for root in roots} or {self.setting.me}
        for culprit in sorted(culprits):
            obstacle = Obstacle(name, culprit, "not finite")
            self.setting.neighbours.send(self.setting.coordinator, obstacle, now)

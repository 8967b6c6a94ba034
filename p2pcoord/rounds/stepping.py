"""From the result of an attempt to the new state and its validation.

on           does                                                                      waits for
result       fetch it from the parent, pass it on to the children                      the bytes
its bytes    step beside the old state, report the new one                             the state of version - 1
the state    validate the own share                                                    -
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from p2pcoord.effects import Done, Failed, Offer, Outcome, Step, Stepped, Validate, Validated
from p2pcoord.errors import RemoteError
from p2pcoord.rounds.attempt import Result
from p2pcoord.rounds.attempt_book import AttemptBook, Attempted
from p2pcoord.rounds.holdings import Holdings
from p2pcoord.rounds.messages import Report, ResultMessage, Share
from p2pcoord.rounds.setting import Setting
from p2pcoord.rounds.transfers import RESULT, Transfers

# A step that failed (a full disk, a cancelled effect) is tried again after this long.
RETRY_NS = 2_000_000_000


class Stepping:
    def __init__(self, setting: Setting, holdings: Holdings, book: AttemptBook, transfers: Transfers) -> None:
        self.setting = setting
        self.holdings = holdings
        self.book = book
        self.transfers = transfers
        self._retry_at: int | None = None

    # Time

    def tick(self, now: int) -> None:
        if self._retry_at is not None and now >= self._retry_at:
            self._retry_at = None
            self.step(self.book.current_name, now)

    def next_deadline(self) -> int | None:
        return self._retry_at

    # The result

    def on_result(self, sender: str, message: ResultMessage, now: int) -> None:
        result, setting = message.result, self.setting
        entry = self.book.get(result.attempt)
        if entry is None or entry.result is not None or result.attempt != self.book.current_name:
            return
        if result.sender != entry.attempt.tree.root:
            raise RemoteError("bad_result", f"a result by {result.sender}, which is not the root")
        setting.authority.check(result.sender, result)
        if result.content.size_bytes != setting.rules.contribution_bytes or not math.isfinite(result.norm):
            raise RemoteError("bad_result", f"{result.content.size_bytes} bytes, norm {result.norm}")
        entry.result = result
        parent = entry.attempt.tree.parent(setting.me) if setting.me in entry.attempt.tree else None
        self.go_on(result, [sender, parent or result.sender, result.sender], now)

    def go_on(self, result: Result, sources: Sequence[str], now: int) -> None:
        """From the result to the state; the result comes from the first of `sources` that gives it."""
        if self.holdings.has(result.content.root):
            self.step(result.attempt, now)
        else:
            self.fetch(result, sources, now)

    def fetch(self, result: Result, sources: Sequence[str], now: int) -> None:
        others = [peer for peer in dict.fromkeys(sources) if peer != self.setting.me]
        name = self.book.current_name
        self.transfers.fetch(
            result.content, others, RESULT, result.sender, lambda at: self.step(name, at), now
        )

    def look_again(self, now: int) -> None:
        """A result that its first sources did not give is asked of all members of the tree."""
        entry = self.book.current
        if (
            entry is not None
            and entry.result is not None
            and not self.holdings.has(entry.result.content.root)
        ):
            members = [m for m in entry.attempt.tree.members if self.setting.neighbours.alive(m)]
            self.fetch(entry.result, members, now)

    # The new state

    def step(self, name: bytes, now: int) -> None:
        """The result is here: let the children have it, and make the new state."""
        entry, setting = self.book.get(name), self.setting
        if entry is None or entry.result is None or entry.stepping or name != self.book.current_name:
            return
        setting.outbox.put(Offer(entry.result.content))
        if setting.me in entry.attempt.tree:
            for child in entry.attempt.tree.children(setting.me):
                setting.neighbours.send(child, ResultMessage(entry.result), now)
        if not self.holdings.held:
            self.holdings.fetch_state(now)
            return
        entry.stepping = True
        effect = Step(setting.outbox.new_id(), self.holdings.state, entry.result.content, entry.attempt.step)
        setting.start(effect, lambda outcome, at: self._stepped(name, outcome, at))

    def _stepped(self, name: bytes, outcome: Outcome, now: int) -> None:
        entry, setting = self.book.get(name), self.setting
        if entry is None or entry.attempt.version != self.holdings.version + 1:
            return
        if not isinstance(outcome, Done) or not isinstance(outcome.value, Stepped):
            entry.stepping = False
            self._retry_at = now + RETRY_NS
            reason = outcome.reason if isinstance(outcome, Failed) else "cancelled"
            setting.outbox.emit("step-failed", version=entry.attempt.version, reason=reason)
            return
        stepped = outcome.value
        entry.state, entry.finite = stepped.content, stepped.finite
        self.holdings.add(stepped.content)
        setting.outbox.put(Offer(stepped.content))
        report = Report(name, stepped.content, stepped.finite)
        setting.neighbours.send(setting.coordinator, report, now)
        setting.agreement.following.retry(now)
        if stepped.finite and setting.me in entry.attempt.tree:
            self._validate(name, entry, now)

    # Validation

    def _validate(self, name: bytes, entry: Attempted, now: int) -> None:
        attempt, setting = entry.attempt, self.setting
        if entry.state is None:
            return
        ranges = attempt.validation[attempt.tree.members.index(setting.me)] if attempt.validation else ()
        if attempt.validation and not ranges:
            setting.neighbours.send(setting.coordinator, Share(name, 0, 0.0, ()), now)
            return
        effect = Validate(setting.outbox.new_id(), entry.state, ranges)
        setting.start(effect, lambda outcome, at: self._validated(name, outcome, at))

    def _validated(self, name: bytes, outcome: Outcome, now: int) -> None:
        if isinstance(outcome, Done) and isinstance(outcome.value, Validated):
            value = outcome.value
            share = Share(name, value.samples, value.loss_sum, tuple(sorted(value.measure_sums.items())))
        else:
            reason = outcome.reason if isinstance(outcome, Failed) else "cancelled"
            share = Share(name, 0, 0.0, (), reason[:200] or "failed")
        entry = self.book.get(name)
        if entry is not None:
            entry.share = share
        self.setting.neighbours.send(self.setting.coordinator, share, now)

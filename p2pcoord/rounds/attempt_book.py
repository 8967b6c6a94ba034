"""The attempts at the round under way that this peer was shown, and what it holds and did in each.

The newest is the current one, and only that is worked at. The others are kept because any of the last few may be the one that
comes to be certified. Before a round enters this log, its attempt and its result are made durable (`keep`): a voter that
restarts can judge the record, and show others what they need for it.
"""

from __future__ import annotations

import msgspec

from p2pcoord.aggregation.contribution import ContributionHeader
from p2pcoord.content import ContentRef
from p2pcoord.rounds.attempt import Attempt, Partial, Result
from p2pcoord.rounds.frames import Checked
from p2pcoord.rounds.holdings import Holdings
from p2pcoord.rounds.messages import AttemptMessage, Share
from p2pcoord.rounds.setting import Setting

# Attempts whose headers are kept, newest first: the one that is certified is among the last few.
MAX_ATTEMPTS_KEPT = 8


class Attempted(msgspec.Struct):
    """What this peer holds and did in one attempt."""

    attempt: Attempt
    headers: dict[bytes, ContributionHeader]
    partials: dict[str, Partial] = {}
    combining: bool = False
    summed: bool = False
    partial: Partial | None = None
    result: Result | None = None
    stepping: bool = False
    state: ContentRef | None = None
    finite: bool = True
    share: Share | None = None
    kept: bool = False
    """Whether a Checked frame holds it."""

    def message(self) -> AttemptMessage:
        return AttemptMessage(self.attempt, tuple(self.headers.values()))


class AttemptBook:
    """Attempts by name (their hash). `current_name` is that of the newest, empty when there is none."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._entries: dict[bytes, Attempted] = {}
        self.current_name = b""

    def __contains__(self, name: bytes) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, name: bytes) -> Attempted | None:
        return self._entries.get(name)

    @property
    def current(self) -> Attempted | None:
        return self._entries.get(self.current_name)

    def entries(self) -> list[Attempted]:
        return list(self._entries.values())

    def add(self, name: bytes, entry: Attempted) -> bool:
        """Takes up an attempt; True when it is the current one from now on. Of too many, the oldest goes."""
        self._entries[name] = entry
        while len(self._entries) > MAX_ATTEMPTS_KEPT:
            del self._entries[min(self._entries, key=lambda n: self._entries[n].attempt.rank)]
        return self._turn_to(name, entry)

    def _turn_to(self, name: bytes, entry: Attempted) -> bool:
        current = self.current
        newer = current is None or entry.attempt.rank > current.attempt.rank
        if newer:
            self.current_name = name
        return newer

    def clear(self) -> None:
        """The round is certified."""
        self._entries.clear()
        self.current_name = b""

    # On disk

    def keep(self, name: bytes) -> None:
        """Makes an attempt and its result durable, before the round made of it enters this log."""
        entry = self._entries.get(name)
        if entry is not None and entry.result is not None and not entry.kept:
            entry.kept = True
            frame = Checked(entry.attempt, tuple(entry.headers.values()), entry.result)
            self.setting.outbox.persist([frame])

    def kept(self) -> list[Checked]:
        """What of the log's frames must stay when the log is compacted."""
        return [
            Checked(entry.attempt, tuple(entry.headers.values()), entry.result)
            for entry in self._entries.values()
            if entry.kept and entry.result is not None
        ]

    def restore(self, frame: Checked, holdings: Holdings) -> None:
        """Takes up what an earlier life kept, if it is of the round under way."""
        attempt = frame.attempt
        if attempt.version != holdings.version + 1:
            return
        authority = self.setting.authority
        name = authority.hash(attempt)
        headers = {authority.hash(header): header for header in frame.headers}
        entry = Attempted(attempt, headers, summed=True, result=frame.result, kept=True)
        for body in holdings.promised():
            if body.attempt == name and holdings.has(body.state):
                entry.state, entry.stepping = ContentRef(body.state, body.state_bytes), True
        self._entries[name] = entry
        self._turn_to(name, entry)

"""Where the parts of a peer put their effects: numbered in one sequence, taken by the driver after every input."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import msgspec

from p2pcoord.effects import Announce, Effect, Emit, Persist, Send
from p2pcoord.errors import LocalError
from p2pcoord.wire import MAX_MESSAGE_BYTES, encode


class Outbox:
    """Collects effects in order. `durable` is the id of the newest Persist known to be on disk."""

    def __init__(self, me: str = "") -> None:
        self.me = me
        self.local: deque[msgspec.Struct] = deque()
        """Messages to this peer itself: they never become bytes, and are handled before the input that caused them ends."""
        self._effects: list[Effect] = []
        self._next_id = 1
        self.newest_persist = 0
        self.written_bytes = 0
        """Frames in the log since this life began or it was last compacted."""
        self.durable = 0

    def new_id(self) -> int:
        self._next_id += 1
        return self._next_id - 1

    def put(self, effect: Effect) -> None:
        self._effects.append(effect)

    def take(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects

    def persist(self, frames: Iterable[msgspec.Struct], *, replace: bool = False) -> int:
        """Asks for the frames to be made durable, in one write; returns the number to wait for."""
        encoded = tuple(encode(frame) for frame in frames)
        self.written_bytes = sum(map(len, encoded)) + (0 if replace else self.written_bytes)
        self.newest_persist = self.new_id()
        self.put(Persist(self.newest_persist, encoded, replace))
        return self.newest_persist

    def send(self, to: str, message: msgspec.Struct, *, after: int | None = None) -> None:
        """Sends once the Persist `after` (default: the newest one asked for) is durable: persist, then speak."""
        if to == self.me:
            self.local.append(message)
            return
        self.put(Send(to, _bounded(message), self.newest_persist if after is None else after))

    def announce(self, message: msgspec.Struct, *, after: int | None = None) -> None:
        self.put(Announce(_bounded(message), self.newest_persist if after is None else after))

    def emit(self, event: str, **fields: Any) -> None:
        self.put(Emit(event, fields))


def _bounded(message: msgspec.Struct) -> bytes:
    data = encode(message)
    if len(data) > MAX_MESSAGE_BYTES:
        raise LocalError(f"a {type(message).__name__} of {len(data)} bytes; at most {MAX_MESSAGE_BYTES}")
    return data

"""What strangers can cause as often as they like is told once, and then summed up once a minute.

Used for the screen (`console.py`) and for the events file, whose bounded space is for the story of the run. Every single one
is still counted, by kind and by peer, in `rejected` of the status.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Final

REPEAT_S: Final = 60.0
"""A peer that sends garbage is told of once a minute, however much it sends."""

MAX_REPEATED: Final = 256
"""(event and kind, peer) pairs whose repetitions are counted; strangers choose them, so the rest are counted as one."""


class Repetitions:
    """Counts what is kept quiet."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told: dict[tuple[str, str], tuple[float, int]] = {}
        """When it was last told, and how many were not told since."""

    def quiet_before(self, event: str, fields: Mapping[str, Any]) -> int | None:
        """How many of its kind were kept quiet since the last one told; None to keep this one quiet too."""
        who = next((str(fields[key]) for key in ("peer", "by", "source") if fields.get(key)), "")
        key = (f"{event} {fields.get('kind', '')}", who)
        if key not in self._told and len(self._told) >= MAX_REPEATED:
            key = (event, "")
        now = self._clock()
        last, quiet = self._told.get(key, (None, 0))
        if last is not None and now - last < REPEAT_S:
            self._told[key] = (last, quiet + 1)
            return None
        self._told[key] = (now, 0)
        return quiet

"""A machine's own monotonic clock: it began somewhere, and runs a little fast or slow."""

from __future__ import annotations

MILLION = 1_000_000


class Clock:
    """Reads `offset_ns` at world time `since_ns` and gains `drift_ppm` parts per million. Integers only."""

    def __init__(self, offset_ns: int, drift_ppm: int, since_ns: int) -> None:
        self._offset = offset_ns
        self._rate = MILLION + drift_ppm
        self._since = since_ns

    def read(self, now: int) -> int:
        """What the clock shows at world time `now`."""
        return self._offset + (now - self._since) * self._rate // MILLION

    def when(self, reading: int) -> int:
        """The first world time at which it shows at least `reading`."""
        return self._since - (-(reading - self._offset) * MILLION // self._rate)

    def drift(self, drift_ppm: int, now: int) -> None:
        """From now on it gains this many parts per million; what it shows does not jump."""
        self._offset, self._since = self.read(now), now
        self._rate = MILLION + drift_ppm

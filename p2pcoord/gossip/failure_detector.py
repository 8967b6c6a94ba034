"""Phi accrual: how surely a link's other end has failed, from the rhythm of its heartbeats.

Theory of operation
    Hayashibara, Defago, Yared, Katayama, "The phi accrual failure detector" (2004): from the arrivals so far, phi(t) is
    -log10 of the probability that a heartbeat still comes after t of silence. At phi 8 one suspicion in 10^8 is wrong, as
    far as arrivals are normal. It adapts: a steady link is judged in fractions of a second, a restless one later.

    As in Akka: a normal distribution with a least standard deviation (or a perfectly steady link would fail over the
    first hiccup), an acceptable pause (garbage collection, a slow fsync, a busy core), an initial estimate before there
    are samples, and silences that were judged a failure are no samples (what happens after a crash says nothing of the
    rhythm before it).

    One thing differs. Senders **state the interval** after which the next heartbeat follows, and change it (150 ms while a
    round runs, seconds when the run rests). So samples are not intervals but *lateness*: arrival less the moment that
    the previous heartbeat promised. A slower rhythm moves the expectation at once, is no failure, and the samples
    collected before stay true.

    phi must grow for as long as silence does, else two dead links cannot be compared: 1 - F(t) underflows to 0 at 38
    standard deviations, so its logarithm is taken from the asymptotic series.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import NormalDist

import msgspec

from p2pcoord.errors import LocalError

MILLISECOND_NS = 1_000_000
SECOND_NS = 1000 * MILLISECOND_NS

MIN_INTERVAL_NS = 10 * MILLISECOND_NS
"""Heartbeats faster than this measure the scheduler, not the link."""

MAX_INTERVAL_NS = 30 * SECOND_NS
"""A sender may not promise later than this: who could would never look failed."""

MAX_LINKS = 1024
"""Links watched by one peer: voters, tree neighbours, a leaf's anchors; a coordinator of a large flat run has most."""

GAP_NS = SECOND_NS // 2
"""A tick later than this means that this process slept."""

_SERIES_FROM = 5.0  # x from which the series of log erfc(x) is used; its error there is below 2e-5 in phi


class PhiSettings(msgspec.Struct, frozen=True):
    """Defaults and why.

    `threshold`: 8 (Akka, chitchat: 8). `window`: 200 samples, 30 s of a running round; Akka and Hayashibara take 1000, which
    at resting rates is an hour of stale rhythm. `min_std_ns`: 100 ms (Akka), and at least an eighth of the stated
    interval: timers of long intervals are coarser. `acceptable_pause_ns`: 1 s: two cores that train and sync files let a
    process wait for several hundred ms; Akka's cluster takes 3 s, as the JVM collects garbage for longer.
    """

    threshold: float = 8.0
    window: int = 200
    min_std_ns: int = 100 * MILLISECOND_NS
    acceptable_pause_ns: int = SECOND_NS


class LinkSilent(msgspec.Struct, frozen=True):
    """phi of this link reached the threshold."""

    peer: str


class LinkHeard(msgspec.Struct, frozen=True):
    """A heartbeat came on a link that was silent."""

    peer: str


def phi_of_deviation(deviation: float) -> float:
    """-log10(1 - F(z)) of the standard normal distribution, for z standard deviations. Grows with z, never infinite."""
    x = deviation / math.sqrt(2)
    if x < _SERIES_FROM:
        return -math.log10(0.5 * math.erfc(x))
    # erfc(x) = exp(-x^2) / (x sqrt(pi)) * (1 - 1/(2x^2) + 3/(4x^4) - ...), Abramowitz and Stegun 7.1.23
    square = x * x
    series = 1 - 1 / (2 * square) + 3 / (4 * square * square)
    return (square + math.log(2 * x * math.sqrt(math.pi)) - math.log(series)) / math.log(10)


class PhiAccrual:
    """One link. Watching begins as if a heartbeat had come `now`."""

    def __init__(self, now: int, interval_ns: int, settings: PhiSettings) -> None:
        if not 0 < settings.threshold <= 15:
            raise LocalError(f"a threshold of phi lies in (0, 15], not {settings.threshold}")
        self._settings = settings
        self._heard = now
        self._interval = _bounded(interval_ns)
        self._slept = False  # since the last heartbeat
        # Integers, so that sums that forget have no rounding to carry along.
        self._window: deque[int] = deque()
        self._sum = 0
        self._sum_squares = 0
        self._threshold_deviation = -NormalDist().inv_cdf(10.0**-settings.threshold)
        # Akka's initial estimate: the mean is as stated, the deviation a quarter of it.
        for lateness in (-self._interval // 4, self._interval // 4):
            self._add(lateness)

    def heartbeat(self, interval_ns: int, now: int) -> None:
        """A heartbeat came, and states that the next one follows after `interval_ns`.

        An interval beyond the bounds counts as the nearest bound.
        """
        lateness = now - self._heard - self._interval
        # A sender that changes to a faster rhythm speaks before it promised to: no rhythm either.
        changed = lateness < 0 and _bounded(interval_ns) != self._interval
        if not changed and not self._slept and self.phi(now) < self._settings.threshold:
            self._add(lateness)
        self._slept = False
        self._heard = now
        self._interval = _bounded(interval_ns)

    def gap(self, now: int) -> None:
        """This process slept: its silence is no sample, and waiting begins anew."""
        self._heard = max(self._heard, now)
        self._slept = True

    def phi(self, now: int) -> float:
        """How surely the other end has failed: 1 means wrong once in 10, 8 wrong once in 10^8."""
        return phi_of_deviation((now - self._heard - self._expected_ns()) / self._std_ns())

    def deadline(self) -> int:
        """When phi reaches the threshold if nothing comes, ns."""
        silence = self._expected_ns() + self._threshold_deviation * self._std_ns()
        return self._heard + math.ceil(silence) + 1

    def _expected_ns(self) -> float:
        return self._interval + self._settings.acceptable_pause_ns + self._sum / len(self._window)

    def _std_ns(self) -> float:
        count = len(self._window)
        variance = (self._sum_squares * count - self._sum * self._sum) / (count * count)
        return max(math.sqrt(variance), self._settings.min_std_ns, self._interval / 8)

    def _add(self, lateness: int) -> None:
        self._window.append(lateness)
        self._sum += lateness
        self._sum_squares += lateness * lateness
        if len(self._window) > self._settings.window:
            old = self._window.popleft()
            self._sum -= old
            self._sum_squares -= old * old


class FailureDetector:
    """The links that matter to one peer."""

    def __init__(self) -> None:
        self._settings = PhiSettings()
        self._links: dict[str, PhiAccrual] = {}
        self._silent: dict[str, None] = {}

    def watch(self, peer: str, interval_ns: int, now: int) -> None:
        """Expect heartbeats of this peer; a link watched already goes on. Raises LocalError beyond MAX_LINKS."""
        if peer in self._links:
            return
        if len(self._links) >= MAX_LINKS:
            raise LocalError(f"more than {MAX_LINKS} links watched")
        self._links[peer] = PhiAccrual(now, interval_ns, self._settings)

    def unwatch(self, peer: str) -> None:
        """Expect nothing more of this peer."""
        self._links.pop(peer, None)
        self._silent.pop(peer, None)

    def watched(self) -> list[str]:
        return list(self._links)

    def heartbeat(self, peer: str, interval_ns: int, now: int) -> list[LinkSilent | LinkHeard]:
        """A heartbeat came; on a link that is not watched it says nothing."""
        link = self._links.get(peer)
        if link is None:
            return []
        link.heartbeat(interval_ns, now)
        if peer not in self._silent:
            return []
        del self._silent[peer]
        return [LinkHeard(peer)]

    def phi(self, peer: str, now: int) -> float:
        """phi of the link, 0 for one that is not watched."""
        link = self._links.get(peer)
        return link.phi(now) if link else 0.0

    def next_deadline(self) -> int | None:
        """When the next link falls silent if nothing comes."""
        return min(
            (link.deadline() for peer, link in self._links.items() if peer not in self._silent), default=None
        )

    def tick(self, now: int) -> list[LinkSilent | LinkHeard]:
        """Links that fell silent. A tick over 500 ms late is a gap: no link falls silent in it."""
        due = self.next_deadline()
        if due is None or now < due:
            return []
        if now - due > GAP_NS:
            self.gap(now)
            return []
        fallen = [
            peer for peer, link in self._links.items() if peer not in self._silent and link.deadline() <= now
        ]
        self._silent.update(dict.fromkeys(fallen))
        return [LinkSilent(peer) for peer in fallen]

    def gap(self, now: int) -> None:
        """This process slept until now. Links found silent before stay so until they are heard."""
        for peer, link in self._links.items():
            if peer not in self._silent:
                link.gap(now)


def _bounded(interval_ns: int) -> int:
    return min(max(interval_ns, MIN_INTERVAL_NS), MAX_INTERVAL_NS)

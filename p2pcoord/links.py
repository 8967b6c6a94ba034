"""Which connections this peer keeps, and when it dials.

A small run is a full mesh. In a larger one a peer stays connected to the voters, to whoever it works with in the round, and
to a few others at random for gossip, so that connections per peer stay flat as the run grows. A connection that closed is
dialled again at once: whether that works decides, within a round trip, if the other is dead (`gossip/membership.py`).

A peer that knows nobody (a joiner, or one that lost everybody), or less than half of those it should be connected to, dials
the addresses that it was given or that it remembers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from random import Random

import msgspec

from p2pcoord.effects import Dial, Done, Outcome
from p2pcoord.outbox import Outbox

# Up to this many members all are connected to all: a connection costs a ping every few seconds and 0.1 MiB.
FULL_MESH = 32

# In larger runs: this many others at random, besides voters and partners of the round. log2(10,000) is 13.
RANDOM_LINKS = 12

# A dial that failed is tried again after 1, 2, 4 ... s, at most half a minute.
FIRST_BACKOFF_NS = 1_000_000_000
MAX_BACKOFF_NS = 30_000_000_000

# An address that answered is tried again after this long, as long as this peer is with a minority.
REPEAT_NS = 5_000_000_000

# Dials at a time: each costs a handshake of 25-55 ms of CPU on both sides.
MAX_DIALS = 8

CHECK_INTERVAL_NS = 1_000_000_000


class _Backoff(msgspec.Struct):
    next_at: int
    wait_ns: int


class Links:
    """Decides whom to dial. `failed(peer, now)` is called when a known peer could not be dialled."""

    def __init__(
        self,
        me: str,
        outbox: Outbox,
        random: Random,
        bootstrap: Sequence[str],
        *,
        addresses: Callable[[str], tuple[str, ...]],
        failed: Callable[[str, int], None],
    ) -> None:
        self._me = me
        self._outbox = outbox
        self._random = random
        self._bootstrap = tuple(bootstrap)
        self._addresses = addresses
        self._failed = failed
        self.connected: set[str] = set()
        self._wanted: tuple[str, ...] = ()
        self._chosen: set[str] = set()
        self._backoff: dict[str, _Backoff] = {}
        self._dialling: dict[int, str] = {}
        self._check_at = 0

    def start(self, now: int) -> None:
        self._check_at = now

    def want(self, members: Sequence[str], needed: Iterable[str]) -> None:
        """`members` are those to be connected to in general, `needed` those for certain (voters, partners of the round)."""
        others = [member for member in members if member != self._me]
        if len(others) <= FULL_MESH:
            self._wanted = tuple(others)
            return
        present = set(others)
        self._chosen &= present
        spare = [member for member in others if member not in self._chosen]
        while len(self._chosen) < RANDOM_LINKS and spare:
            self._chosen.add(spare.pop(self._random.randrange(len(spare))))
        keep = {peer for peer in needed if peer in present} | self._chosen
        self._wanted = tuple(member for member in others if member in keep)

    def on_connected(self, peer: str, now: int) -> None:
        self.connected.add(peer)
        self._backoff.pop(peer, None)

    def on_disconnected(self, peer: str, now: int) -> None:
        """Dials again at once: the outcome tells a lost connection from a lost peer."""
        self.connected.discard(peer)
        if not self.connected:
            for address in self._bootstrap:
                self._backoff.pop(address, None)
        if peer in self._wanted:
            self._dial(peer, now)

    def dial(self, peer: str, now: int) -> None:
        """Somebody is needed now."""
        if peer not in self.connected and peer not in self._dialling.values():
            self._dial(peer, now)

    def _dial(self, peer: str, now: int) -> None:
        addresses = self._addresses(peer)
        if not addresses:
            self._failed(peer, now)
            return
        if len(self._dialling) < MAX_DIALS:
            self._start(peer, addresses)

    def _start(self, peer: str, addresses: tuple[str, ...]) -> None:
        number = self._outbox.new_id()
        self._dialling[number] = peer or addresses[0]
        self._outbox.put(Dial(number, peer, addresses))

    def complete(self, effect_id: int, outcome: Outcome, now: int) -> bool:
        """The outcome of a Dial; False when the effect was none."""
        target = self._dialling.pop(effect_id, None)
        if target is None:
            return False
        if isinstance(outcome, Done):
            self._backoff.pop(target, None)
            if target in self._bootstrap:  # perhaps somebody it is connected to anyhow: not again so soon
                self._backoff[target] = _Backoff(now + REPEAT_NS, FIRST_BACKOFF_NS)
            return True
        before = self._backoff.get(target)
        wait = min(2 * before.wait_ns, MAX_BACKOFF_NS) if before else FIRST_BACKOFF_NS
        self._backoff[target] = _Backoff(now + wait, wait)
        if target not in self._bootstrap and target not in self.connected:
            self._failed(target, now)
        return True

    def tick(self, now: int) -> None:
        if now < self._check_at:
            return
        self._check_at = now + CHECK_INTERVAL_NS
        under_way = set(self._dialling.values())
        for peer in self._wanted:
            if peer not in self.connected and peer not in under_way and self._may_dial(peer, now):
                self._dial(peer, now)
        if self._lonely:
            for address in self._bootstrap:
                if (
                    address not in under_way
                    and self._may_dial(address, now)
                    and len(self._dialling) < MAX_DIALS
                ):
                    self._start("", (address,))
        self._backoff = {
            target: backoff
            for target, backoff in self._backoff.items()
            if target in self._wanted or target in self._bootstrap
        }

    @property
    def _lonely(self) -> bool:
        """Whether it is connected to nobody, or to less than half of those it should be: perhaps to some who are as lost
        as it is, none of whom knows an address of the others."""
        return not self.connected or 2 * len(self.connected.intersection(self._wanted)) < len(self._wanted)

    def _may_dial(self, target: str, now: int) -> bool:
        backoff = self._backoff.get(target)
        return backoff is None or now >= backoff.next_at

    def next_deadline(self) -> int:
        return self._check_at

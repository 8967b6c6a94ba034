"""The network of the virtual world.

Theory of operation
    Between every two machines there is a link, up or down. A link that is up carries an ordered stream each way: latency
    (a base per pair, jitter with a tail), bandwidth, and whatever is wrong at the moment:

        loss         a message vanishes (a full queue), or the link is reset and all in flight is lost
        ghosts       what was in flight when a link was reset may arrive after the reconnection, once or twice: the only way
                     in which messages are repeated or overtake each other
        cuts         one-way or between two sides; what is sent into a cut is lost or held until it heals (a stream's
                     retransmission), as the seed says for each direction
        keep-alive   a link that is cut for longer than this is closed, both ends are told then and not before
        crash        the other ends are told at once (a reset comes back), unless a cut is in between

    Links that are given (`given`) come up again by themselves, as soon as nothing speaks against it; others only when a
    machine dials: that takes a handshake, is refused at once by a machine that is down, and ends in silence when a cut is
    in between or the other stands still. Announcements (gossipsub) go to everybody connected, unordered, and a share of
    them is lost without a sign.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from random import Random

import msgspec

from simulations.randomness import stream

MILLISECOND = 1_000_000
SECOND = 1_000_000_000

KEEP_ALIVE_NS = 6 * SECOND
"""Longer than a hiccup of Wi-Fi, shorter than the time after which a voter is replaced."""

HANDSHAKE_TRIPS = 6
"""One-way trips of a dial: TCP, Noise and the hello."""

DIAL_TIMEOUT_NS = 3 * SECOND

MAX_HELD = 256
"""Messages that a cut direction holds back: a send buffer."""


class Weather(msgspec.Struct, frozen=True):
    """What the network is like, for the whole run."""

    base_ns: tuple[int, int] = (200_000, 2 * MILLISECOND)
    """One way, drawn once per pair."""
    jitter: float = 0.3
    """Mean of the exponential jitter, as a share of the base."""
    bandwidth: int = 100_000_000
    """Bytes per second of one direction of one link."""
    announce_loss: float = 0.05


class Loss(msgspec.Struct, frozen=True):
    """What goes wrong with one message at a time: probabilities."""

    drop: float = 0.0
    reset: float = 0.0
    ghost: float = 0.0


CALM = Loss()


class Cut(msgspec.Struct, frozen=True):
    """Blocks what goes from a machine of `side` to one that is not; `both` blocks the way back too."""

    side: frozenset[str]
    both: bool

    def blocks(self, sender: str, receiver: str) -> bool:
        out = sender in self.side
        return out != (receiver in self.side) and (out or self.both)


class Direction:
    """One way of one link."""

    __slots__ = ("base", "free_at", "held", "holds", "last_arrival", "random")

    def __init__(self, base: int, random: Random) -> None:
        self.base = base
        self.random = random
        self.last_arrival = 0
        self.free_at = 0
        self.held: list[bytes] = []
        self.holds = random.random() < 0.5


class Link:
    __slots__ = ("ends", "epoch", "told", "up", "ways")

    def __init__(self, ends: tuple[str, str], ways: dict[str, Direction]) -> None:
        self.ends = ends
        self.ways = ways  # by sender
        self.up = False
        self.epoch = 0
        self.told: set[str] = set()
        """Ends that were told `connected` last."""

    def other(self, end: str) -> str:
        return self.ends[1] if end == self.ends[0] else self.ends[0]


class Host(msgspec.Struct, frozen=True):
    """What the network needs of the world around it."""

    now: Callable[[], int]
    later: Callable[..., None]
    """later(delay_ns, function, *arguments)"""
    deliver: Callable[[str, str, bytes], None]
    """deliver(receiver, sender, data)"""
    connected: Callable[[str, str], None]
    disconnected: Callable[[str, str], None]
    answers: Callable[[str], bool]
    """Whether a machine runs and is not frozen."""
    plugged: Callable[[str], bool]
    """Whether it runs, frozen or not."""
    kind_of: Callable[[bytes], str]
    lost: Callable[[bytes, str], None]
    """lost(data, how): for the coverage table."""


class Network:
    """All links of one world."""

    def __init__(self, seed: int, weather: Weather, host: Host, *, given: bool = True) -> None:
        self._seed = seed
        self._given = given
        self.weather = weather
        self._host = host
        self._links: dict[str, dict[str, Link]] = {}
        self._cuts: list[Cut] = []
        self.loss = CALM
        self.losses_of: dict[str, Loss] = {}
        """Kind of message -> a loss of its own."""
        self.sent_bytes: Counter[str] = Counter()
        """By sender; an announcement counts once for each receiver."""
        self.on_send: Callable[[str, str, bytes], None] | None = None
        """Sees (sender, receiver, data) of what is counted there."""

    # Shape

    def add(self, machine: str) -> None:
        """A machine is plugged in; it is dialled from now on."""
        mine = self._links.setdefault(machine, {})
        for other in list(self._links):
            if other != machine and other not in mine:
                low, high = sorted((machine, other))
                base = stream(self._seed, "base", low + high).randint(*self.weather.base_ns)
                ways = {
                    a: Direction(base, stream(self._seed, "way", a + b))
                    for a, b in ((low, high), (high, low))
                }
                link = Link((low, high), ways)
                mine[other] = self._links[other][machine] = link
        self.redial(machine)

    def remove(self, machine: str) -> None:
        """Unplugged for good."""
        self.crash(machine)
        for other in self._links.pop(machine, {}):
            del self._links[other][machine]

    def connected(self, machine: str) -> list[str]:
        return [other for other, link in self._links.get(machine, {}).items() if link.up]

    def distance(self, one: str, other: str) -> int:
        """Nanoseconds from one machine to another, without jitter."""
        link = self._links.get(one, {}).get(other)
        return link.ways[one].base if link is not None else 0

    def severed(self, one: str, other: str) -> bool:
        """Whether a cut lies between two machines, one way at least."""
        return self.blocked(one, other) or self.blocked(other, one)

    # Sending

    def send(self, sender: str, receiver: str, data: bytes) -> None:
        link = self._links.get(sender, {}).get(receiver)
        if link is None or not link.up:
            self._host.lost(data, "no link")
            return
        way = link.ways[sender]
        self._count(sender, receiver, data)
        loss = self.loss
        if self.losses_of:
            loss = self.losses_of.get(self._host.kind_of(data), loss)
        if loss is not CALM:
            drawn = way.random.random()
            if drawn < loss.reset:
                self._host.lost(data, "reset")
                self.close(link)
                return
            if drawn < loss.reset + loss.drop:
                self._host.lost(data, "dropped")
                return
            if drawn > 1 - loss.ghost:
                self._host.later(
                    way.random.randint(SECOND // 2, 5 * SECOND), self._haunt, link, link.epoch, sender, data
                )
        self._travel(link, way, sender, data)

    def _count(self, sender: str, receiver: str, data: bytes) -> None:
        self.sent_bytes[sender] += len(data)
        if self.on_send is not None:
            self.on_send(sender, receiver, data)

    def _travel(self, link: Link, way: Direction, sender: str, data: bytes) -> None:
        now = self._host.now()
        way.free_at = max(way.free_at, now) + len(data) * SECOND // self.weather.bandwidth
        latency = int(way.base * (1 + way.random.expovariate(1 / self.weather.jitter)))
        way.last_arrival = max(way.free_at + latency, way.last_arrival + 1)
        self._host.later(way.last_arrival - now, self._arrive, link, link.epoch, sender, data)

    def _arrive(self, link: Link, epoch: int, sender: str, data: bytes) -> None:
        receiver = link.other(sender)
        if epoch != link.epoch or not link.up:
            self._host.lost(data, "reset")
        elif self.blocked(sender, receiver):
            way = link.ways[sender]
            if way.holds and len(way.held) < MAX_HELD:
                way.held.append(data)
            else:
                self._host.lost(data, "cut")
        elif link.ways[sender].held:
            link.ways[sender].held.append(data)  # behind what is retransmitted
        else:
            self._host.deliver(receiver, sender, data)

    def _haunt(self, link: Link, epoch: int, sender: str, data: bytes) -> None:
        receiver = link.other(sender)
        if link.epoch != epoch and link.up and not self.blocked(sender, receiver):
            self._host.lost(data, "late")
            self._host.deliver(receiver, sender, data)

    def announce(self, sender: str, data: bytes) -> None:
        """Gossipsub: a hop or three to everybody, and no word about what was lost."""
        for receiver, link in self._links.get(sender, {}).items():
            way = link.ways[sender]
            if not link.up or self.blocked(sender, receiver):
                self._host.lost(data, "no link")
            elif way.random.random() < self.weather.announce_loss + self.loss.drop:
                self._host.lost(data, "dropped")
            else:
                delay = int(way.base * way.random.uniform(1, 4))
                self._count(sender, receiver, data)
                self._host.later(delay, self._announced, sender, receiver, data)

    def _announced(self, sender: str, receiver: str, data: bytes) -> None:
        if self.blocked(sender, receiver):
            self._host.lost(data, "cut")
        elif receiver in self._links:
            self._host.deliver(receiver, sender, data)

    # Links

    def blocked(self, sender: str, receiver: str) -> bool:
        return any(cut.blocks(sender, receiver) for cut in self._cuts)

    def _severed(self, link: Link) -> bool:
        one, other = link.ends
        return bool(self._cuts) and (self.blocked(one, other) or self.blocked(other, one))

    def redial(self, machine: str) -> None:
        """Given links of this machine that are down come up again soon, where nothing speaks against it."""
        for link in self._links.get(machine, {}).values():
            if not link.up:
                self._dial(link)

    def _dial(self, link: Link) -> None:
        if not self._given:
            return
        random = link.ways[link.ends[0]].random
        self._host.later(random.randint(20 * MILLISECOND, 500 * MILLISECOND), self._connect, link)

    def dial(self, machine: str, other: str, done: Callable[[str], None]) -> None:
        """A machine connects to another; `done` is told why it could not ("" when both are connected)."""
        link = self._links.get(machine, {}).get(other)
        if link is None:
            self._host.later(DIAL_TIMEOUT_NS, done, "no such machine")
        elif link.up and other in self.connected(machine):
            self._host.later(0, done, "")
        else:
            trip = link.ways[machine].base
            delay = DIAL_TIMEOUT_NS if self._silent(link, other) else HANDSHAKE_TRIPS * trip
            self._host.later(delay, self._dialled, link, other, done)

    def _silent(self, link: Link, other: str) -> bool:
        return self._severed(link) or (self._host.plugged(other) and not self._host.answers(other))

    def _dialled(self, link: Link, other: str, done: Callable[[str], None]) -> None:
        if not link.up:
            self._connect(link)
        if link.up:
            done("")
        else:
            done("timed out" if self._silent(link, other) else "refused")

    def _connect(self, link: Link) -> None:
        one, other = link.ends
        plugged = other in self._links.get(one, {})
        if link.up or not plugged or self._severed(link):
            return
        if not (self._host.answers(one) and self._host.answers(other)):
            return
        for end in link.ends:
            self._tell_down(link, end)
        link.up = True
        link.epoch += 1
        now = self._host.now()
        for way in link.ways.values():
            way.held.clear()
            way.free_at = way.last_arrival = now
        for end in link.ends:
            link.told.add(end)
            self._host.connected(end, link.other(end))

    def close(self, link: Link) -> None:
        """Both ends learn that the link is gone; it is dialled again."""
        if not link.up:
            return
        self._down(link)
        for end in link.ends:
            self._tell_down(link, end)
        self._dial(link)

    def _down(self, link: Link) -> None:
        link.up = False
        link.epoch += 1
        for way in link.ways.values():
            for data in way.held:
                self._host.lost(data, "reset")
            way.held.clear()

    def _tell_down(self, link: Link, end: str) -> None:
        if end in link.told:
            link.told.discard(end)
            self._host.disconnected(end, link.other(end))

    def _tell_later(self, link: Link, end: str, epoch: int) -> None:
        if link.epoch == epoch:
            self._tell_down(link, end)

    def disconnect(self, machine: str, other: str) -> None:
        """One end closes the link on purpose."""
        link = self._links.get(machine, {}).get(other)
        if link is not None:
            self.close(link)

    def crash(self, machine: str) -> None:
        """The machine is gone from one moment to the next."""
        for other, link in self._links.get(machine, {}).items():
            link.told.discard(machine)
            if link.up:
                self._down(link)
                silent = self.blocked(machine, other)
                delay = KEEP_ALIVE_NS if silent else link.ways[machine].base
                self._host.later(delay, self._tell_later, link, other, link.epoch)

    def freeze(self, machine: str) -> None:
        """The machine answers nobody: its links are closed by the others after the keep-alive time."""
        for link in self._links.get(machine, {}).values():
            if link.up:
                self._host.later(KEEP_ALIVE_NS, self._still_frozen, link, machine, link.epoch)

    def _still_frozen(self, link: Link, machine: str, epoch: int) -> None:
        if link.epoch == epoch and link.up and not self._host.answers(machine):
            self.close(link)

    # Cuts

    def cut(self, cut: Cut) -> None:
        self._cuts.append(cut)
        for link in self._all_links():
            if link.up and self._severed(link):
                self._host.later(KEEP_ALIVE_NS, self._still_severed, link, link.epoch, cut)

    def _still_severed(self, link: Link, epoch: int, cut: Cut) -> None:
        if cut in self._cuts and link.epoch == epoch and link.up and self._severed(link):
            self.close(link)

    def heal(self, cut: Cut) -> None:
        if cut in self._cuts:
            self._cuts.remove(cut)
        for link in self._all_links():
            if link.up:
                for sender, way in link.ways.items():
                    if way.held and not self.blocked(sender, link.other(sender)):
                        held, way.held = way.held, []
                        for data in held:
                            self._travel(link, way, sender, data)
            elif not self._severed(link):
                self._dial(link)

    def _all_links(self) -> Iterable[Link]:
        for machine, links in self._links.items():
            for link in links.values():
                if link.ends[0] == machine:
                    yield link

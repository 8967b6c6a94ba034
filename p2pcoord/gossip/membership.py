"""Membership: what this peer holds of every other, from all that tells it something.

Theory of operation
    Three things speak of a peer: its connection (closed and not to be redialled: at once), phi of its heartbeats (frozen, or
    packets dropped: about a second), and probing by everybody (all others: several seconds). Each sets and clears facts:

    Event                                                            sets                clears
    record, ack or probe says alive under a higher incarnation       KNOWN               all but CLOSED, LOST, SILENT
    probe says alive (same incarnation)                              KNOWN               SUSPECTED, CONFIRMED
    probe says suspect                                               SUSPECTED
    probe says dead                                                  CONFIRMED           SUSPECTED
    connected                                                        KNOWN               CLOSED, LOST
    connection closed                                                CLOSED
    redial failed (only after closed)                                LOST
    redial failed, to a leaf that named us among its links no more                       CLOSED
    phi reached the threshold                                        SILENT
    a heartbeat came again                                           KNOWN               SILENT
    any message from it                                              KNOWN
    goodbye, or a record that says leaving                           LEFT

    The state is what the facts say, the first line that applies:

    LEFT                               left        it takes part no more in this incarnation
    LOST or CONFIRMED                  dead        it takes no part until it is heard of anew
    SUSPECTED, SILENT or CLOSED        suspect     may be gone: no new work for it, its old work is waited for
    KNOWN                              alive
    nothing                            unknown

    Facts are kept apart so that one detector's relief does not hide another's alarm. States change in the call that
    brings the news, and every query after it answers accordingly: what the detector knows, the round uses in the same step.

    All of this is this peer's own view. Nothing agreed (quorums, committees, contributors) is ever counted over it.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import msgspec

from p2pcoord.errors import LocalError
from p2pcoord.gossip.failure_detector import FailureDetector, LinkHeard, LinkSilent
from p2pcoord.gossip.records import PeerRecord
from p2pcoord.gossip.suspicion import MAX_MEMBERS, Alive, Dead, Suspect


class PeerState(enum.Enum):
    """What this peer holds of another one."""

    ALIVE = "alive"
    SUSPECT = "suspect"
    DEAD = "dead"
    LEFT = "left"
    UNKNOWN = "unknown"


class Fact(enum.Flag):
    """What was heard of a peer and still holds."""

    NONE = 0
    KNOWN = enum.auto()
    SUSPECTED = enum.auto()
    CONFIRMED = enum.auto()
    CLOSED = enum.auto()
    LOST = enum.auto()
    SILENT = enum.auto()
    LEFT = enum.auto()


_STATES = (
    (Fact.LEFT, PeerState.LEFT),
    (Fact.LOST | Fact.CONFIRMED, PeerState.DEAD),
    (Fact.SUSPECTED | Fact.SILENT | Fact.CLOSED, PeerState.SUSPECT),
    (Fact.KNOWN, PeerState.ALIVE),
)


class PeerView(msgspec.Struct, frozen=True):
    """One peer as seen from here. `last_seen`: ns, when a message came from it directly, None if never; `phi`: 0 where
    the link is not watched."""

    state: PeerState
    last_seen: int | None
    phi: float


class Changed(msgspec.Struct, frozen=True):
    """A peer's state changed."""

    peer: str
    before: PeerState
    after: PeerState


class _Entry:
    __slots__ = ("facts", "incarnation", "last_seen", "leaf", "links")

    def __init__(self) -> None:
        self.facts = Fact.NONE
        self.incarnation = 0
        self.last_seen: int | None = None
        self.leaf = False
        self.links: tuple[str, ...] = ()

    @property
    def state(self) -> PeerState:
        return next((state for facts, state in _STATES if self.facts & facts), PeerState.UNKNOWN)


class Membership:
    """The states of all peers that were added. Events of other peers are ignored; their state is unknown."""

    def __init__(self, own: str) -> None:
        self._own = own
        self._entries: dict[str, _Entry] = {}
        self._detector = FailureDetector()

    # Queries ---------------------------------------------------------------------------------------------------------

    def state(self, peer: str) -> PeerState:
        """The state; our own is alive."""
        if peer == self._own:
            return PeerState.ALIVE
        entry = self._entries.get(peer)
        return entry.state if entry else PeerState.UNKNOWN

    def alive(self, peer: str) -> bool:
        """Not known to be gone: alive or suspect. What it has been given to do is waited for."""
        return self.state(peer) in (PeerState.ALIVE, PeerState.SUSPECT)

    def reachable(self, peer: str) -> bool:
        """Alive beyond suspicion, and to be talked to from here: not a leaf that others hold."""
        if peer == self._own:
            return True
        entry = self._entries.get(peer)
        if entry is None or entry.state is not PeerState.ALIVE:
            return False
        return not entry.leaf or self._own in entry.links

    def view(self, peer: str, now: int) -> PeerView:
        """All that is held of a peer."""
        entry = self._entries.get(peer) or _Entry()
        return PeerView(self.state(peer), entry.last_seen, self._detector.phi(peer, now))

    def peers(self) -> list[str]:
        """All peers added, in the order of their addition."""
        return list(self._entries)

    # Who there is ----------------------------------------------------------------------------------------------------

    def add(self, peer: str) -> None:
        """Hold a state of this peer. Raises LocalError beyond MAX_MEMBERS."""
        if peer == self._own or peer in self._entries:
            return
        if len(self._entries) >= MAX_MEMBERS:
            raise LocalError(f"more than {MAX_MEMBERS} peers")
        self._entries[peer] = _Entry()

    def remove(self, peer: str) -> list[Changed]:
        """Hold nothing of this peer any more."""
        before = self.state(peer)
        if self._entries.pop(peer, None) is None:
            return []
        self._detector.unwatch(peer)
        return self._note(peer, before)

    # Events ----------------------------------------------------------------------------------------------------------

    def heard(self, peer: str, now: int) -> list[Changed]:
        """A message came from it, of any kind, on a connection that proves who it is."""
        entry = self._entries.get(peer)
        if entry is not None:
            entry.last_seen = now
        return self._change(peer, sets=Fact.KNOWN)

    def record(self, record: PeerRecord) -> list[Changed]:
        """Its newest signed record (RecordBook's RecordChanged)."""
        entry = self._entries.get(record.peer)
        if entry is None:
            return []
        entry.leaf = not record.reachable
        entry.links = record.links
        changed = self._rise(record.peer, record.incarnation)
        if record.leaving and record.incarnation >= entry.incarnation:
            changed += self.left(record.peer)
        return changed

    def left(self, peer: str) -> list[Changed]:
        """It said goodbye."""
        return self._change(peer, sets=Fact.LEFT)

    def probed(self, found: Alive | Suspect | Dead) -> list[Changed]:
        """What the Prober found out. Of an incarnation that is over it says nothing any more."""
        entry = self._entries.get(found.peer)
        if entry is None or found.incarnation < entry.incarnation:
            return []
        changed = self._rise(found.peer, found.incarnation)
        if isinstance(found, Alive):
            changed += self._change(found.peer, sets=Fact.KNOWN, clears=Fact.SUSPECTED | Fact.CONFIRMED)
        elif isinstance(found, Suspect):
            changed += self._change(found.peer, sets=Fact.SUSPECTED)
        else:
            changed += self._change(found.peer, sets=Fact.CONFIRMED, clears=Fact.SUSPECTED)
        return changed

    def connected(self, peer: str, now: int) -> list[Changed]:
        """A connection stands, whoever dialled."""
        entry = self._entries.get(peer)
        if entry is not None:
            entry.last_seen = now
        return self._change(peer, sets=Fact.KNOWN, clears=Fact.CLOSED | Fact.LOST)

    def disconnected(self, peer: str) -> list[Changed]:
        """The last connection closed. Redial at once: the outcome decides."""
        return self._change(peer, sets=Fact.CLOSED)

    def redial_failed(self, peer: str) -> list[Changed]:
        """It cannot be dialled (or, a leaf, never could be). Says nothing of a peer that was not connected before."""
        entry = self._entries.get(peer)
        if entry is None or not entry.facts & Fact.CLOSED:
            return []
        if entry.leaf and self._own not in entry.links:
            return self._change(peer, clears=Fact.CLOSED)  # it moved on to other members
        return self._change(peer, sets=Fact.LOST)

    # Heartbeats ------------------------------------------------------------------------------------------------------

    def watch(self, peer: str, interval_ns: int, now: int) -> None:
        """Expect heartbeats of an added peer, the first within `interval_ns` from now."""
        if peer in self._entries:
            self._detector.watch(peer, interval_ns, now)

    def watched(self) -> list[str]:
        """Peers of which heartbeats are expected."""
        return self._detector.watched()

    def unwatch(self, peer: str) -> list[Changed]:
        """Expect no more heartbeats; their silence is forgotten."""
        self._detector.unwatch(peer)
        return self._change(peer, clears=Fact.SILENT)

    def heartbeat(self, peer: str, interval_ns: int, now: int) -> list[Changed]:
        """A heartbeat came, and states the interval after which the next follows."""
        changed = self.heard(peer, now)
        return changed + self._links(self._detector.heartbeat(peer, interval_ns, now))

    def next_deadline(self) -> int | None:
        return self._detector.next_deadline()

    def tick(self, now: int) -> list[Changed]:
        """Links that fell silent by now."""
        return self._links(self._detector.tick(now))

    def gap(self, now: int) -> None:
        """This process slept until now: silence says nothing."""
        self._detector.gap(now)

    # Facts -----------------------------------------------------------------------------------------------------------

    def _links(self, found: Sequence[LinkSilent | LinkHeard]) -> list[Changed]:
        changed = []
        for link in found:
            if isinstance(link, LinkSilent):
                changed += self._change(link.peer, sets=Fact.SILENT)
            else:
                changed += self._change(link.peer, sets=Fact.KNOWN, clears=Fact.SILENT)
        return changed

    def _rise(self, peer: str, incarnation: int) -> list[Changed]:
        entry = self._entries.get(peer)
        if entry is None or incarnation <= entry.incarnation:
            return []
        entry.incarnation = incarnation
        return self._change(peer, sets=Fact.KNOWN, clears=Fact.LEFT | Fact.SUSPECTED | Fact.CONFIRMED)

    def _change(self, peer: str, sets: Fact = Fact.NONE, clears: Fact = Fact.NONE) -> list[Changed]:
        entry = self._entries.get(peer)
        if entry is None:
            return []
        before = entry.state
        entry.facts = (entry.facts & ~clears) | sets
        return self._note(peer, before)

    def _note(self, peer: str, before: PeerState) -> list[Changed]:
        after = self.state(peer)
        return [] if after is before else [Changed(peer, before, after)]

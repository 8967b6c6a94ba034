"""One simulated machine: a key, a clock, a disk, and the peer that runs on it while it is up."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from p2pcoord.effects import Announce, Persist, Send
from p2pcoord.identity import Signer
from p2pcoord.peer import Peer
from simulations.clock import Clock
from simulations.disk import Disk


class Machine:
    """What the world keeps of a machine. Its peer id names it: a machine that loses its disk comes back as another."""

    def __init__(self, name: str, signer: Signer, clock: Clock, disk: Disk) -> None:
        self.name = name
        self.signer = signer
        self.id = signer.peer_id
        self.clock = clock
        self.disk = disk
        self.peer: Peer | None = None
        self.life = 0
        """Rises with every start; what belongs to an earlier life is dropped."""
        self.frozen = False
        self.gone = False
        """Its disk is lost, or it left: it never comes back."""
        self.known: dict[str, None] = {}
        """Machines it ever had a link with: the addresses that a node keeps on its disk."""
        self.slow_disk_ns = 0
        """Added to every write while a disk is busy."""
        self.inputs: deque[tuple[str, tuple[Any, ...]]] = deque()
        """What arrived while it was frozen."""
        self.tick_at: int | None = None
        self.persists: deque[Persist] = deque()
        """Persists in order; the first `writing` of them are being written."""
        self.writing = 0
        self.durable = 0
        """The id of the newest Persist that is on the disk."""
        self.in_flight: set[int] = set()
        """Effects that wait for their outcome, Persists apart."""
        self.waiting: dict[str, deque[Send]] = {}
        """For each link, what must not leave before a Persist, in order."""
        self.announcements: deque[Announce] = deque()
        self.crash_when: Callable[[str], bool] | None = None
        """Asked with the kind of every message that leaves; True: the machine dies right after this input."""
        self.doomed = False

    @property
    def up(self) -> bool:
        return self.peer is not None

    @property
    def runs(self) -> bool:
        return self.peer is not None and not self.frozen

    def forget(self) -> None:
        """What a crash takes: memory, effects under way, what had not left."""
        self.peer = None
        self.life += 1
        self.frozen = self.doomed = False
        self.crash_when = None
        self.inputs.clear()
        self.tick_at = None
        self.persists.clear()
        self.durable = 0
        self.in_flight.clear()
        self.waiting.clear()
        self.announcements.clear()

"""Rumors: who is said to be suspect or dead, and how that spreads on messages that are sent anyhow.

Theory of operation
    What is said of a peer waits in a queue and rides on the messages of probing to whomever they go (SWIM's infection-style
    dissemination). It rides lambda * log(n) times, which reaches everybody with high probability, and then goes; what rode
    least goes first, so news overtakes what many have heard. Nobody is told what it said itself.

    A refutation is the suspect's newly signed record. It spreads in the same queue, and takes the place of all that was said
    of the suspect before.
"""

from __future__ import annotations

import math
from typing import Annotated

import msgspec

from p2pcoord.gossip.version_vector import MAX_COUNTER
from p2pcoord.identity import PeerId

MAX_RUMORS = 8
"""Rumors in one message: about 1 KiB. A burst of deaths takes a few more messages."""

MAX_RECORDS = 2
"""Signed records (refutations) that travel with one message, and as many again in answer to outdated rumors: about 1.5 KiB
each."""

MAX_BROADCASTS = 1024
"""Rumors waiting to be sent on. Beyond it (half of a large run dies) the most sent goes; probing finds what is lost."""

RETRANSMIT_MULTIPLIER = 4
"""lambda, as in memberlist."""


class Rumor(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """`origin` says that `peer` in `incarnation` did not answer (dead=False), or that it died of that (dead=True)."""

    peer: PeerId
    incarnation: Annotated[int, msgspec.Meta(ge=0, le=MAX_COUNTER)]
    origin: PeerId
    dead: bool


class _Broadcast:
    __slots__ = ("added", "rumor", "sent", "subject")

    def __init__(self, subject: str, rumor: Rumor | None) -> None:
        self.subject = subject
        self.rumor = rumor  # None: the subject's signed record
        self.added = 0
        self.sent = 0


class Rumors:
    """What one peer still has to pass on."""

    def __init__(self) -> None:
        self._broadcasts: dict[Rumor | str, _Broadcast] = {}  # a rumor, or whose record
        self._count = 0

    def spread(self, rumor: Rumor) -> None:
        """Pass a rumor on; one that still waits begins anew."""
        self._enqueue(rumor, _Broadcast(rumor.peer, rumor))

    def spread_record(self, peer: str) -> None:
        """Pass a peer's signed record on, in place of the rumors of it."""
        self.drop(peer)
        self._enqueue(peer, _Broadcast(peer, None))

    def drop(self, peer: str, *, rumors_only: bool = False) -> None:
        """Say no more of this peer (`rumors_only`: but its record goes on)."""
        keys = [key for key, item in self._broadcasts.items() if item.subject == peer]
        for key in keys:
            if self._broadcasts[key].rumor is not None or not rumors_only:
                del self._broadcasts[key]

    def take(self, to: str, members: int) -> tuple[list[Rumor], list[str]]:
        """Rumors for one message to `to`, and whose records go along; counted as sent. `members`: how many others there are.

        The least sent first, the newest of those first.
        """
        if not self._broadcasts:
            return [], []
        rumors: list[Rumor] = []
        records_of: list[str] = []
        limit = math.ceil(RETRANSMIT_MULTIPLIER * math.log10(members + 2))
        for key, item in sorted(self._broadcasts.items(), key=lambda pair: (pair[1].sent, -pair[1].added)):
            if to == (item.rumor.origin if item.rumor else item.subject):
                continue
            if item.rumor is not None:
                rumors.append(item.rumor)
            elif len(records_of) < MAX_RECORDS:
                records_of.append(item.subject)
            else:
                continue
            item.sent += 1
            if item.sent >= limit:
                del self._broadcasts[key]
            if len(rumors) + len(records_of) == MAX_RUMORS:
                break
        return rumors, records_of

    def _enqueue(self, key: Rumor | str, broadcast: _Broadcast) -> None:
        if key not in self._broadcasts and len(self._broadcasts) >= MAX_BROADCASTS:
            most = max(self._broadcasts, key=lambda each: self._broadcasts[each].sent)
            del self._broadcasts[most]
        self._count += 1
        broadcast.added = self._count
        self._broadcasts[key] = broadcast

"""The peers around this one: who is connected, who lives, who can be reached, and what is gossiped with them.

Composes `gossip/` and `links.py` for `Peer`. Without gossip (tests of the agreement alone, where links are given) whoever is
connected counts as alive, and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from random import Random

import msgspec

from p2pcoord.consensus.agreement import Agreement
from p2pcoord.consensus.messages import Append, AppendReply
from p2pcoord.effects import NEVER, Done, Outcome, Reach
from p2pcoord.errors import RemoteError
from p2pcoord.gossip.gossip import Gossip
from p2pcoord.gossip.membership import Changed, PeerState
from p2pcoord.gossip.records import PeerRecord
from p2pcoord.identity import Authority
from p2pcoord.links import FULL_MESH, Links
from p2pcoord.messages import ReachReply, ReachRequest
from p2pcoord.outbox import Outbox
from p2pcoord.rounds.participation import MAX_ADDRESSES, Roster
from p2pcoord.wire import Message
from p2pcoord.work import LocalProgress

# Members that an unreachable leaf names as those it can be probed through.
MAX_LEAF_LINKS = 8

# Askers that this peer tries to reach at a time: each is a few dials to addresses of the asker's choice.
MAX_REACHING = 8


class Neighbours:
    """`connected` are the peers with a connection now. `changed()` is called when somebody's state changed."""

    def __init__(
        self, authority: Authority, outbox: Outbox, roster: Roster, changed: Callable[[], None]
    ) -> None:
        self._authority = authority
        self._me = authority.peer_id
        self._outbox = outbox
        self._roster = roster
        self._changed = changed
        self.connected: set[str] = set()
        self.gossip: Gossip | None = None
        self.links: Links | None = None
        self._addresses: tuple[str, ...] = ()
        self._reaching: dict[int, str] = {}
        self._asked_to_reach: set[str] = set()
        """Connected peers that were asked to dial this one, and have not answered."""

    def start_gossip(
        self,
        first: PeerRecord,
        bootstrap: Sequence[str],
        random: Callable[[str], Random],
        now: int,
        *,
        began: Callable[[int], None],
        reject: Callable[[str, RemoteError], None],
    ) -> None:
        """Begins to gossip, probe and dial. `first` is this peer's own record; `began` makes an incarnation durable."""
        self._addresses = first.addresses
        self.gossip = gossip = Gossip(
            self._authority,
            self._outbox,
            first,
            random,
            now,
            began=began,
            changed=self._on_changed,
            reject=reject,
            evidence=lambda one, other: self._outbox.emit("equivocation", peer=one.peer, stamp=one.version),
        )
        self.links = Links(
            self._me,
            self._outbox,
            random("links"),
            bootstrap,
            addresses=self._addresses_of,
            failed=gossip.redial_failed,
        )
        self.links.start(now)

    # Who is there

    def alive(self, peer: str) -> bool:
        """Not known to be gone: what it was given to do is waited for."""
        if self.gossip is None or peer == self._me:
            return peer == self._me or peer in self.connected
        return self.gossip.membership.alive(peer)

    def fit(self, peer: str) -> bool:
        """Alive beyond suspicion, by what is known now: new work may rest on it."""
        if self.gossip is None or peer == self._me:
            return peer == self._me or peer in self.connected
        if self.gossip.membership.state(peer) is not PeerState.ALIVE:
            return False
        return peer in self.connected or len(self._roster.members) > FULL_MESH

    def leaf(self, peer: str) -> bool:
        """Whether others tried to dial it and could not, by what it says: then it names those that it is connected to."""
        return bool(self._leaf_links(peer))

    def _leaf_links(self, peer: str) -> tuple[str, ...]:
        """Whom a leaf is connected to; of any other, nobody."""
        record = self.gossip.book.get(peer) if self.gossip is not None else None
        return record.links if record is not None and not record.reachable else ()

    def apart(self, one: str, other: str) -> bool:
        """Whether both are leaves, so that neither can dial the other, and neither says that they are connected."""
        first, second = self._leaf_links(one), self._leaf_links(other)
        return bool(first and second) and other not in first and one not in second

    def voter_candidates(self, but: Collection[str]) -> list[str]:
        """Living, reachable members, in order of admission; a leaf that nobody can dial never votes."""
        here = [peer for peer in self._roster.members if peer in self.connected and peer not in but]
        if self.gossip is None:
            return here
        book = self.gossip.book
        return [p for p in here if self.fit(p) and (record := book.get(p)) is not None and record.reachable]

    def _addresses_of(self, peer: str) -> tuple[str, ...]:
        record = self.gossip.book.get(peer) if self.gossip is not None else None
        if (
            record is None
        ):  # it was admitted where we heard nothing of it: what its admission says is all we have
            return self._roster.addresses_of(peer)
        return record.addresses if record.reachable else ()

    def _on_changed(self, changes: Sequence[Changed], now: int) -> None:
        for change in changes:
            if change.after is PeerState.DEAD:
                self._outbox.emit("failed", peer=change.peer, was=change.before.value)
            elif change.after is PeerState.ALIVE:
                self._outbox.emit("alive", peer=change.peer, was=change.before.value, now=change.after.value)
        self._changed()

    # Inputs

    def on_connected(self, peer: str, now: int) -> None:
        self.connected.add(peer)
        if self.gossip is not None and self.links is not None:
            self.links.on_connected(peer, now)
            self.gossip.connected(peer, now)
            if not self.gossip.book.own.reachable and self._addresses:
                self._outbox.send(peer, ReachRequest(self._addresses))
                self._asked_to_reach.add(peer)

    def on_disconnected(self, peer: str, now: int) -> None:
        self.connected.discard(peer)
        self._asked_to_reach.discard(peer)
        if self.gossip is not None and self.links is not None:
            self.gossip.disconnected(peer, now)
            self.links.on_disconnected(peer, now)

    def send(self, peer: str, message: msgspec.Struct, now: int) -> None:
        """Sends; a peer without a connection is dialled, and what it misses is sent again by whoever needs it."""
        if self.links is not None and peer != self._me:
            self.links.dial(peer, now)
        self._outbox.send(peer, message)

    def link(self, peer: str, now: int) -> bool:
        """Whether there is a connection to this peer; if not, it is dialled where its address is known."""
        if peer in self.connected or peer == self._me:
            return True
        if self.links is not None and self._addresses_of(peer):
            self.links.dial(peer, now)
        return False

    def heard(self, sender: str, message: Message, agreement: Agreement, now: int) -> None:
        """Every message is a sign of life; a heartbeat, and its answer, also promise the next one."""
        if self.gossip is None or sender == self._me:
            return
        self.gossip.heard(sender, now)
        if isinstance(message, Append) and message.term == agreement.voter.term:
            self.gossip.heartbeat(sender, message.interval_ns, now)
        elif isinstance(message, AppendReply) and agreement.is_coordinator:
            self.gossip.heartbeat(sender, agreement.replication.interval_ns, now)

    def receive(self, sender: str, message: Message, now: int) -> bool:
        """Handles a message of gossip, or about reaching each other; False when it is none."""
        if self.gossip is None:
            return False
        if isinstance(message, ReachRequest):
            if len(message.addresses) > MAX_ADDRESSES:
                raise RemoteError("oversized", f"{len(message.addresses)} addresses to be reached at")
            if sender in self._reaching.values() or len(self._reaching) >= MAX_REACHING:
                return True  # it asks again with its next connection
            number = self._outbox.new_id()
            self._reaching[number] = sender
            self._outbox.put(Reach(number, sender, message.addresses))
        elif isinstance(message, ReachReply):
            self._on_reach_reply(sender, message, now)
        else:
            return self.gossip.receive(sender, message, now)
        return True

    def _on_reach_reply(self, sender: str, message: ReachReply, now: int) -> None:
        """Whether others can dial this peer: one that did is proof; one that could not may have its own reasons."""
        if self.gossip is None or self.gossip.book.own.reachable or sender not in self._asked_to_reach:
            return
        self._asked_to_reach.discard(sender)
        self._outbox.emit("reachable" if message.reachable else "unreachable", by=sender)
        links = () if message.reachable else tuple(sorted(self.connected))[:MAX_LEAF_LINKS]
        self.gossip.update(now, reachable=message.reachable, links=links)

    def complete(self, effect_id: int, outcome: Outcome, now: int) -> bool:
        """The outcome of a Dial or a Reach; False when the effect was neither."""
        asker = self._reaching.pop(effect_id, None)
        if asker is not None:
            self._outbox.send(asker, ReachReply(isinstance(outcome, Done) and outcome.value is True))
            return True
        return self.links is not None and self.links.complete(effect_id, outcome, now)

    # What is told of this peer's own work

    def tell(self, progress: LocalProgress | None, now: int) -> None:
        """Gossips which version this peer holds, and what its last training came to (coalesced to every few seconds)."""
        if self.gossip is None or progress is None:
            return
        self.gossip.update(
            now,
            last_sync=progress.version if progress.holds_state else self.gossip.book.draft.last_sync,
            base_version=progress.version,
            queue_length=progress.queue_length,
            local_step=progress.steps,
            local_loss=progress.loss,
            gradient_norm=progress.gradient_norm,
        )

    def tell_step(self, before: LocalProgress | None, step: int, loss: float | None, now: int) -> None:
        """A training under way has made so many steps since what was there before it."""
        if self.gossip is not None:
            self.gossip.update(now, local_step=(before.steps if before else 0) + step, local_loss=loss)

    # Time

    def tick(self, agreement: Agreement, now: int) -> None:
        if self.gossip is None or self.links is None:
            return
        if agreement.is_coordinator:  # heartbeats are expected of the coordinator, and by it of the voters
            watched: Sequence[str] = agreement.committee.everyone
        else:
            # A coordinator's heartbeats go to voters: from whoever is none (any more) they are not expected.
            coordinator = agreement.voter.coordinator
            watched = [coordinator] if coordinator and agreement.voter.is_voter() else []
        self.gossip.watch_only(watched, now)
        self.gossip.tick(now)
        self.links.tick(now)

    def gap(self, now: int) -> None:
        if self.gossip is not None:
            self.gossip.gap(now)

    def next_deadline(self) -> int:
        if self.gossip is None or self.links is None:
            return NEVER
        return min(self.gossip.next_deadline(), self.links.next_deadline())

    # The certified roster

    def follow(self, voters: Sequence[str], now: int) -> None:
        """Gossip and links follow the certified roster and committee."""
        if self.gossip is None or self.links is None:
            return
        members = self._roster.everyone
        for peer in members:
            if peer == self._me or self.gossip.membership.state(peer) is PeerState.UNKNOWN:
                self.gossip.admit(peer, now)
                if peer in self.connected:
                    self.gossip.connected(peer, now)
        for peer in self.gossip.membership.peers():
            if peer not in members:
                self.gossip.remove(peer, now)
        self.links.want(members, voters)

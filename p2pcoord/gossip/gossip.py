"""Gossip of one peer: records, probing and membership as one machine, its outputs turned into messages.

    record book   what everybody says of itself                                  `record_book.py`
    exchange      how records spread: anti-entropy                               `exchange.py`
    prober        who answers                                                    `probing.py`
    membership    what follows for every other peer, with connections and phi    `membership.py`

These are told of each other's findings here and nowhere else. Two things come out: messages, and `changed`: the peers
whose state changed, given to the owner in the same step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from random import Random

import msgspec

from p2pcoord.effects import NEVER
from p2pcoord.errors import RemoteError
from p2pcoord.gossip import exchange, pings, record_book, suspicion
from p2pcoord.gossip.exchange import Exchange
from p2pcoord.gossip.membership import Changed, Membership, PeerState
from p2pcoord.gossip.messages import (
    ExchangeEnd,
    ExchangeReply,
    ExchangeRequest,
    Ping,
    PingAck,
    PingNack,
    PingRequest,
)
from p2pcoord.gossip.probing import Prober
from p2pcoord.gossip.record_book import RecordBook
from p2pcoord.gossip.records import PeerRecord
from p2pcoord.identity import Authority
from p2pcoord.outbox import Outbox
from p2pcoord.wire import Message


class Gossip:
    """`began` makes an incarnation durable; `changed` hears of every peer whose state changed; `reject` counts what a peer
    sent wrongly; `evidence` gets two records that contradict each other."""

    def __init__(
        self,
        authority: Authority,
        outbox: Outbox,
        first: PeerRecord,
        random: Callable[[str], Random],
        now: int,
        *,
        began: Callable[[int], None],
        changed: Callable[[Sequence[Changed], int], None],
        reject: Callable[[str, RemoteError], None],
        evidence: Callable[[PeerRecord, PeerRecord], None],
    ) -> None:
        self.me = authority.peer_id
        self._outbox = outbox
        self._began = began
        self._changed = changed
        self._reject = reject
        self._evidence = evidence
        self.membership = Membership(self.me)
        self.book = RecordBook(
            first,
            authority.sign,
            lambda record: authority.verify(record.peer, record),
            now,
        )
        self.exchange = Exchange(self.book, random("records"), now)
        self.prober = Prober(self.me, first.incarnation, random("probing"), now)

    # Who there is

    def admit(self, peer: str, now: int) -> None:
        """A certified record made `peer` a member."""
        self.book.admit([peer])
        if peer == self.me:
            return
        self.membership.add(peer)
        self.exchange.partner(peer, alive=True)
        record = self.book.get(peer)
        self.prober.add_member(peer, record.incarnation if record else 0, _links(record), now)

    def remove(self, peer: str, now: int) -> None:
        """A certified record let `peer` go."""
        if peer == self.me:
            return
        self._tell(self.membership.left(peer), now)
        self._tell(self.membership.remove(peer), now)
        self.prober.remove_member(peer)
        self.book.forget(peer)
        self.exchange.forget(peer)

    def update(self, now: int, **fields: object) -> None:
        """Says something new of this peer (fields of PeerRecord)."""
        if self.book.update(msgspec.structs.replace(self.book.draft, **fields), now):
            self._tick_records(now)

    # Links

    def connected(self, peer: str, now: int) -> None:
        self._tell(self.membership.connected(peer, now), now)
        self._probes(self.prober.connection_opened(peer, now), now)

    def disconnected(self, peer: str, now: int) -> None:
        self._tell(self.membership.disconnected(peer), now)
        self._probes(self.prober.connection_closed(peer, now), now)

    def redial_failed(self, peer: str, now: int) -> None:
        self._tell(self.membership.redial_failed(peer), now)

    def heard(self, peer: str, now: int) -> None:
        """Some message came from it."""
        self._tell(self.membership.heard(peer, now), now)

    def heartbeat(self, peer: str, interval_ns: int, now: int) -> None:
        """A heartbeat, or the answer to one, on a link that matters; the next is promised within `interval_ns`."""
        self.membership.watch(peer, interval_ns, now)
        self._tell(self.membership.heartbeat(peer, interval_ns, now), now)

    def watch_only(self, peers: Iterable[str], now: int) -> None:
        """Heartbeats are no longer expected of anybody else."""
        keep = set(peers)
        for peer in self.membership.watched():
            if peer not in keep:
                self._tell(self.membership.unwatch(peer), now)

    # Messages and time

    def receive(self, sender: str, message: Message, now: int) -> bool:
        match message:
            case ExchangeRequest():
                self._records(self.exchange.receive_syn(sender, message.digest, now), now)
            case ExchangeReply():
                self._records(
                    self.exchange.receive_syn_ack(sender, message.records, message.wanted, now), now
                )
            case ExchangeEnd():
                self._records(self.book.merge(sender, message.records, now), now)
            case Ping() | PingRequest() | PingAck() | PingNack():
                self._records(self.book.merge(sender, message.records, now), now)
                self._receive_probe(sender, message, now)
            case _:
                return False
        return True

    def _receive_probe(self, sender: str, message: Ping | PingRequest | PingAck | PingNack, now: int) -> None:
        common = (sender, message.sequence, message.incarnation)
        match message:
            case Ping():
                outputs = self.prober.receive_ping(*common, message.rumors, now)
            case PingRequest():
                outputs = self.prober.receive_ping_request(*common, message.target, message.rumors, now)
            case PingAck():
                outputs = self.prober.receive_ack(*common, message.subject, message.rumors, now)
            case PingNack():
                outputs = self.prober.receive_nack(*common, message.subject, message.rumors, now)
        self._probes(outputs, now)

    def tick(self, now: int) -> None:
        self._tick_records(now)
        self._probes(self.prober.tick(now), now)
        self._tell(self.membership.tick(now), now)

    def _tick_records(self, now: int) -> None:
        self._records(self.book.tick(now), now)
        self._records(self.exchange.tick(now), now)

    def gap(self, now: int) -> None:
        """This process slept: nothing follows from the others' silence."""
        self.prober.gap(now)
        self.membership.gap(now)

    def next_deadline(self) -> int:
        parts = (self.book, self.exchange, self.prober, self.membership)
        times = [at for part in parts if (at := part.next_deadline()) is not None]
        return min(times, default=NEVER)

    # Findings

    def _records(self, outputs: Sequence[record_book.Output], now: int) -> None:
        for output in outputs:
            match output:
                case exchange.SendSyn():
                    self._outbox.send(output.to, ExchangeRequest(output.digest))
                case exchange.SendSynAck():
                    self._outbox.send(output.to, ExchangeReply(output.records, output.wanted))
                case exchange.SendAck():
                    self._outbox.send(output.to, ExchangeEnd(output.records))
                case record_book.OwnRecordChanged():
                    if output.urgent:
                        self.exchange.hurry(now)
                case record_book.RecordChanged():
                    self._record_changed(output.record, now)
                case record_book.IncarnationRaised():
                    self._began(output.incarnation)
                    self.prober.raise_incarnation(output.incarnation)
                case record_book.Equivocation():
                    self._evidence(output.first, output.second)
                case record_book.Rejected():
                    self._reject(output.sender, RemoteError(output.kind, output.detail))

    def _record_changed(self, record: PeerRecord, now: int) -> None:
        if (
            self.membership.state(record.peer) is not PeerState.UNKNOWN
            or record.peer in self.membership.peers()
        ):
            self.prober.add_member(record.peer, record.incarnation, _links(record), now)
        self._tell(self.membership.record(record), now)
        self._probes(self.prober.alive(record.peer, record.incarnation, now), now)

    def _probes(self, outputs: Sequence[suspicion.Output], now: int) -> None:
        for output in outputs:
            match output:
                case pings.Carrier():
                    self._carry(output)
                case suspicion.RaiseIncarnation():
                    self._began(output.incarnation)
                    self._records(self.book.raise_incarnation(output.incarnation, now), now)
                case suspicion.Alive() | suspicion.Suspect() | suspicion.Dead():
                    self._tell(self.membership.probed(output), now)

    def _carry(self, output: pings.Carrier) -> None:
        known = (self.book.get(peer) for peer in output.records_of)
        carried = tuple(record for record in known if record is not None)
        common = (output.sequence, output.incarnation, output.rumors, carried)
        match output:
            case pings.SendPing():
                self._outbox.send(output.to, Ping(*common))
            case pings.SendPingRequest():
                self._outbox.send(output.to, PingRequest(*common, output.target))
            case pings.SendAck():
                self._outbox.send(output.to, PingAck(*common, output.subject))
            case pings.SendNack():
                self._outbox.send(output.to, PingNack(*common, output.subject))

    def _tell(self, changes: Sequence[Changed], now: int) -> None:
        for change in changes:
            if change.after is PeerState.LEFT:
                self.exchange.no_partner(change.peer)
            elif change.peer in self.membership.peers():
                self.exchange.partner(change.peer, alive=change.after is not PeerState.DEAD)
        if changes:
            self._changed(changes, now)


def _links(record: PeerRecord | None) -> tuple[str, ...]:
    """The members that hold an unreachable leaf."""
    return record.links if record is not None and not record.reachable else ()

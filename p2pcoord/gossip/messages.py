"""What all peers say to each other about each other: records and their exchange, pings and what rides along."""

from __future__ import annotations

from p2pcoord.gossip.records import PeerRecord
from p2pcoord.gossip.rumors import Rumor
from p2pcoord.gossip.version_vector import Digest, Wanted
from p2pcoord.identity import PeerId
from p2pcoord.wire import Message

# Exchange -----------------------------------------------------------------------------------------------------------


class ExchangeRequest(Message, frozen=True, tag="syn"):
    """Opens an exchange of records: what the sender holds."""

    digest: Digest


class ExchangeReply(Message, frozen=True, tag="syn-ack"):
    """What the other lacks, and what is wanted of it."""

    records: tuple[PeerRecord, ...]
    wanted: tuple[Wanted, ...]


class ExchangeEnd(Message, frozen=True, tag="syn-end"):
    records: tuple[PeerRecord, ...]


# Probing ------------------------------------------------------------------------------------------------------------


class Ping(Message, frozen=True, tag="ping"):
    """Are you there? `rumors` and `records` ride along, here and on the three messages below."""

    sequence: int
    incarnation: int
    rumors: tuple[Rumor, ...]
    records: tuple[PeerRecord, ...]


class PingRequest(Message, frozen=True, tag="ping?"):
    """Ping `target` for me."""

    sequence: int
    incarnation: int
    rumors: tuple[Rumor, ...]
    records: tuple[PeerRecord, ...]
    target: PeerId


class PingAck(Message, frozen=True, tag="ping-ack"):
    """`subject` is there: the sender, or the target it was asked to ping."""

    sequence: int
    incarnation: int
    rumors: tuple[Rumor, ...]
    records: tuple[PeerRecord, ...]
    subject: PeerId


class PingNack(Message, frozen=True, tag="ping-nack"):
    """The sender is there, but `subject` has not answered it."""

    sequence: int
    incarnation: int
    rumors: tuple[Rumor, ...]
    records: tuple[PeerRecord, ...]
    subject: PeerId


GossipMessage = ExchangeRequest | ExchangeReply | ExchangeEnd | Ping | PingRequest | PingAck | PingNack

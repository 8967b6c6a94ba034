"""What a transport tells the node, and the bounds it keeps: plain values, without any of libp2p."""

from __future__ import annotations

from collections.abc import Callable

import msgspec


class LinkLimits(msgspec.Struct, frozen=True):
    """Bounds on one link. Times in seconds, sizes in bytes."""

    # Closing a silent connection is the last resort: phi accrual and probes know of a frozen process much earlier.
    ping_interval_s: float = 3.0
    silence_limit_s: float = 12.0
    # One frame of 1 MiB takes 8 s at 1 Mbit/s.
    write_timeout_s: float = 15.0
    retire_linger_s: float = 2.0
    queue_bytes: int = 16 * 1024 * 1024
    queue_frames: int = 4_096
    # Sustained rates, with bursts of two seconds' worth. A busy coordinator of a thousand members receives a few hundred
    # frames a second in all.
    inbound_bytes_per_s: int = 16 * 1024 * 1024
    inbound_frames_per_s: int = 2_000


class TransportLimits(msgspec.Struct, frozen=True):
    """Bounds of a transport. Times in seconds."""

    dial_timeout_s: float = 5.0
    # From the accepted TCP connection to an accepted hello. The steps are eight round trips and 25-55 ms of CPU.
    handshake_timeout_s: float = 5.0
    # Connections that have not said an acceptable hello: in all, and from one address (a NAT in front of a whole lab).
    pending_connections: int = 64
    pending_connections_per_host: int = 16
    # Well above the few dozen links a node keeps; each costs 1 MiB at rest at most.
    connections: int = 512
    # Streams a peer may have open towards us: messages, gossip, identify, and its transfers.
    streams_per_peer: int = 16
    # Received messages that wait for `receive()`, of at most MAX_FRAME_BYTES each.
    waiting_messages: int = 64
    # What leaving may take: to let peers read the last words, and to close everything.
    goodbye_s: float = 1.0
    link: LinkLimits = LinkLimits()


class Event(msgspec.Struct, frozen=True):
    """Base of what `Libp2pTransport.receive()` gives."""


class Connected(Event, frozen=True):
    """`addresses`: the other end of this connection as a multiaddr; for an inbound one its port is not one to dial."""

    peer: str
    addresses: tuple[str, ...]
    inbound: bool


class Disconnected(Event, frozen=True):
    """The last link to the peer is gone. What was sent and not acknowledged by the peer itself may be lost."""

    peer: str
    reason: str


class Received(Event, frozen=True):
    peer: str
    frame: bytes


class Announced(Event, frozen=True):
    """`peer` is the author, proved by gossipsub's signature; it need not be connected to us."""

    peer: str
    data: bytes


class DialError(Exception):
    """A dial that led to no link.

    `kind`: "bad_address", "unreachable" (nobody listens there, no route, or no p2pcoord node), "timeout", "wrong_peer"
    (somebody else lives there now), "refused" (the peer refused our hello, or we its: `detail` is the text).
    """

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail


CheckHello = Callable[[str, bytes], str | None]
"""(peer id, its hello) -> None, or why it is refused, in words for people. Must not raise."""

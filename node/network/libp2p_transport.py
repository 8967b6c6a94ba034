"""The network as the node sees it: peers by id, messages, announcements, and streams for bulk bytes. All of libp2p is behind it.

Theory of operation
    Connections are TCP, Noise and Yamux, made by our own listener and dialler (`introductions.py`, with the bounds of
    `transport_guard.py`) and handed to a py-libp2p host, which runs gossipsub and answers identify. The host never listens
    or dials: its listener binds with SO_REUSEPORT, so that two processes share a port in silence, and its dialler keeps a
    list of peers it refuses to dial for a minute.

    A peer is connected when both sides' hello was accepted on a messages stream (`link.py`). Peers that dial each other at
    the same moment get two links; the one with the lower id retires all but its newest. `Connected` and `Disconnected`
    alternate for each peer, and `Received` lies between them. A link of a restarted process (another session) ends the
    links of the one before.

    Everything that happens is an event, taken with `receive()`. Messages waiting to be taken are bounded; a consumer that
    is slow slows the peers down.

Refused hellos, broken frames and the rest are counted in `counters`, by kind and by peer id or address.
"""

from __future__ import annotations

import errno
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial

import msgspec
import trio
from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol
from libp2p.identity.identify_push.identify_push import ID_PUSH
from libp2p.io.exceptions import IOException
from libp2p.network.config import ConnectionConfig
from libp2p.network.stream.net_stream import NetStream
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from libp2p.tools.anyio_service import background_trio_service
from libp2p.transport.upgrader import TransportUpgrader
from multiaddr import Multiaddr

from node.network.addresses import Address, parse_address, parse_listen_address, reachable_hosts
from node.network.announcements import MAX_ANNOUNCEMENT_BYTES, Announcements, check_announcement
from node.network.introductions import GONE, MESSAGES, Introductions, plain_reason
from node.network.link import MAX_FRAME_BYTES, MAX_HELLO_BYTES, SESSION_BYTES, Link
from node.network.rejections import Rejections
from node.network.streams import StreamEnded
from node.network.transport_events import (
    Announced,
    CheckHello,
    Connected,
    DialError,
    Disconnected,
    Event,
    Received,
    TransportLimits,
)
from node.network.transport_guard import (
    ConnectedSwarm,
    QuietHost,
    accept_protocol,
    end_stream,
    muxer_of,
    prepare_libp2p,
    request_protocol,
)
from node.storage.identity_key import IdentityKey
from p2pcoord.errors import LocalError, RemoteError, UserError

ANNOUNCEMENTS_TOPIC = "/p2pcoord/announcements/1"

# Announcements that nobody has taken yet; more are dropped, as gossipsub itself does.
MAX_WAITING_ANNOUNCEMENTS = 256

# trio.serve_listeners waits as long when the process has no descriptors left.
ACCEPT_RETRY_S = 0.1


class Libp2pTransport:
    """Made by `open_transport`."""

    def __init__(
        self,
        key: IdentityKey,
        hello: bytes,
        check_hello: CheckHello,
        session: bytes,
        announce: Sequence[str],
        check_announcement: Callable[[bytes], None],
        limits: TransportLimits,
    ) -> None:
        self.peer_id = key.peer_id
        self.counters = Rejections()
        self._limits = limits
        self._links: dict[str, list[Link]] = {}
        self._announce = tuple(announce)
        self._listening: list[tuple[str, int]] = []
        self._put, self._take = trio.open_memory_channel[Event](math.inf)  # bounded by what puts into it
        self._room = trio.Semaphore(limits.waiting_messages)
        self._waiting_announcements = 0
        self._nursery: trio.Nursery
        self._swarm = _swarm(key, limits)
        self._host = QuietHost(
            self._swarm,
            addrs_factory=lambda _: list(self._identify_addresses),
            disable_identify_address_discovery=True,
        )
        self._introductions = Introductions(
            key, self._swarm, hello, check_hello, session, limits, self.counters, self._admit
        )
        self._host.remove_stream_handler(ID_PUSH)
        self._host.set_stream_handler(MESSAGES, self._introductions.answer)
        self._swarm.set_stream_handler(self._serve_stream)
        self._announcements = Announcements(
            self._host, ANNOUNCEMENTS_TOPIC, self.is_connected, check_announcement, self.counters.count
        )

    _identify_addresses: Sequence[
        Multiaddr
    ] = ()  # parsing one takes py-multiaddr 100 us, and gossipsub asks often

    # What the node uses -----------------------------------------------------------------------------------------------

    async def receive(self) -> Event:
        """The next event. Cancelling loses none."""
        event = await self._take.receive()
        if isinstance(event, Received):
            self._room.release()
        elif isinstance(event, Announced):
            self._waiting_announcements -= 1
        return event

    def addresses(self) -> tuple[str, ...]:
        """Multiaddrs with our id under which others may reach this node; first those it was told to announce."""
        found = [
            Address(host, port, self.peer_id).multiaddr()
            for listen_host, port in self._listening
            for host in reachable_hosts(listen_host)
        ]
        return tuple(dict.fromkeys([*self._announce, *found]))

    def ports(self) -> tuple[int, ...]:
        """The TCP ports that it accepts connections on."""
        return tuple(dict.fromkeys(port for _, port in self._listening))

    def set_hello(self, hello: bytes) -> None:
        """What links say from now on; those that exist are not affected."""
        if len(hello) > MAX_HELLO_BYTES:
            raise LocalError(f"a hello of {len(hello)} bytes; the limit is {MAX_HELLO_BYTES}")
        self._introductions.hello = hello

    def is_connected(self, peer: str) -> bool:
        return peer in self._links

    def connected_peers(self) -> tuple[str, ...]:
        return tuple(self._links)

    def send(self, peer: str, frame: bytes) -> bool:
        """Queue a message. False when there is no link (any more): nothing is kept for later."""
        if len(frame) > MAX_FRAME_BYTES:
            raise LocalError(f"a message of {len(frame)} bytes; the limit is {MAX_FRAME_BYTES}")
        link = self._link(peer)
        return link is not None and link.send(frame)

    def disconnect(self, peer: str, reason: str) -> None:
        """Close the links to a peer; what is queued for it is not sent. `Disconnected` follows."""
        for link in self._links.get(peer, ()):
            link.close(reason)

    async def announce(self, data: bytes) -> None:
        """Publish to all members by gossipsub. Losing it is possible at any time."""
        if len(data) > MAX_ANNOUNCEMENT_BYTES:
            raise LocalError(f"an announcement of {len(data)} bytes; the limit is {MAX_ANNOUNCEMENT_BYTES}")
        await self._announcements.announce(data)

    async def connect(self, peer: str | None, addresses: Iterable[str]) -> str:
        """Make sure there is a link; returns the peer's id, learned from the handshake where it was not given.

        Addresses are multiaddrs or host:port, tried one after the other, each a quarter of a second after the one before.
        Raises DialError.
        """
        if peer is not None and self.is_connected(peer):
            return peer
        if peer == self.peer_id:
            raise DialError("wrong_peer", "that is this node itself")
        try:
            link = await self._introductions.dial(peer, addresses)
        except DialError:
            if peer is not None and self.is_connected(peer):  # it has reached us in the meantime
                return peer
            raise
        return link.peer

    async def reachable(self, address: str, expected_peer: str) -> bool:
        """Whether a new connection to this address leads to this peer. Existing links are neither used nor touched."""
        return await self._introductions.reachable(address, expected_peer)

    def serve(self, protocol: TProtocol, handle: Callable[[str, NetStream], Awaitable[None]]) -> None:
        """Let connected peers open streams of a protocol. `handle` runs once per stream; when it returns the stream is
        closed, when it raises it is reset and the failure counted."""

        async def each(stream: INetStream) -> None:
            assert isinstance(stream, NetStream)
            await handle(muxer_of(stream).peer, stream)

        self._host.set_stream_handler(protocol, each)

    async def open_stream(self, peer: str, protocol: TProtocol) -> NetStream:
        """A new stream to a connected peer; the caller ends it with `transport_guard.end_stream`. Raises StreamEnded."""
        link = self._link(peer)
        if link is None:
            raise StreamEnded("not connected")
        # Shielded: a cancelled write would tear the connection that everything else to this peer rides on.
        with trio.CancelScope(shield=True, deadline=trio.current_time() + self._limits.dial_timeout_s):
            stream: INetStream | None = None
            try:
                stream = await link.connection.new_stream()
                assert isinstance(stream, NetStream)
                await request_protocol(stream, protocol, self._limits.dial_timeout_s)
            except GONE as error:
                if stream is not None:
                    await end_stream(stream, gracefully=False)
                raise StreamEnded(f"no {protocol} stream: {error}") from error
            return stream
        link.close("does not answer to a new stream")
        raise StreamEnded("no answer to a new stream")

    # Links ------------------------------------------------------------------------------------------------------------

    def _link(self, peer: str) -> Link | None:
        """The newest link on which messages may still be sent, else the newest."""
        links = self._links.get(peer)
        if not links:
            return None
        return next((link for link in reversed(links) if not link.retiring), links[-1])

    def _admit(self, link: Link, inbound: bool) -> None:
        links = self._links.setdefault(link.peer, [])
        outdated = [old for old in links if old.session != link.session]
        for old in outdated:
            links.remove(old)
            old.close("the peer has restarted")
        if outdated and not links:
            self._put.send_nowait(Disconnected(link.peer, "the peer has restarted"))
        if not links:
            self._put.send_nowait(Connected(link.peer, (link.address,), inbound))
        links.append(link)
        link.muxer.decide(admitted=True)
        self._announcements.peer_admitted(link.peer)
        if self.peer_id < link.peer:  # one side decides, so that the two never retire each other's choice
            for surplus in links[:-1]:
                surplus.retire()
        self._nursery.start_soon(self._live, link)

    async def _live(self, link: Link) -> None:
        try:
            await link.run(partial(self._deliver, link.peer))
        finally:
            links = self._links.get(link.peer, [])
            if link in links:
                links.remove(link)
                if not links:
                    del self._links[link.peer]
                    self._put.send_nowait(Disconnected(link.peer, link.reason))
            self._announcements.connection_lost(link.peer)

    async def _deliver(self, peer: str, frame: bytes) -> None:
        await self._room.acquire()
        self._put.send_nowait(Received(peer, frame))

    def _deliver_announcement(self, author: str, data: bytes) -> None:
        if self._waiting_announcements < MAX_WAITING_ANNOUNCEMENTS:
            self._waiting_announcements += 1
            self._put.send_nowait(Announced(author, data))

    # Connections and streams that others open -------------------------------------------------------------------------

    async def _listen(self, addresses: Sequence[Address]) -> list[trio.SocketListener]:
        listeners: list[trio.SocketListener] = []
        for address in addresses:
            try:
                opened = await trio.open_tcp_listeners(address.port, host=address.host)
            except OSError as error:
                for listener in listeners:
                    listener.socket.close()
                if error.errno == errno.EADDRINUSE:
                    raise UserError(
                        f"port {address.port} is taken by another program (or another node): "
                        f"stop it, or choose another port with --listen"
                    ) from error
                raise UserError(f"cannot listen on {address}: {plain_reason(error)}") from error
            listeners += opened
            self._listening += [(address.host, listener.socket.getsockname()[1]) for listener in opened]
        self._identify_addresses = [Multiaddr(text) for text in self.addresses()]
        return listeners

    async def _accept_all(self, listener: trio.SocketListener) -> None:
        # Not trio.serve_listeners: it closes the connection when the task that accepted it returns.
        while True:
            try:
                accepted = await listener.accept()
            except trio.ClosedResourceError:
                return
            except OSError as error:  # out of descriptors or memory: connections wait in the kernel meanwhile
                self.counters.count("accept_failed", plain_reason(error))
                await trio.sleep(ACCEPT_RETRY_S)
                continue
            links = sum(map(len, self._links.values()))
            self._nursery.start_soon(self._introductions.accept, accepted, links)

    async def _serve_stream(self, stream: INetStream) -> None:
        """Every stream that a peer opens comes here. Must not raise: the host would end with it."""
        assert isinstance(stream, NetStream)
        muxer = muxer_of(stream)
        finished = False
        muxer.inbound_streams += 1
        try:
            if muxer.inbound_streams > self._limits.streams_per_peer:
                raise RemoteError("too_many_streams", f"{muxer.inbound_streams} open")
            timeout_s = self._limits.handshake_timeout_s
            protocol = await accept_protocol(stream, self._host.multiselect, timeout_s)
            if protocol != MESSAGES:
                # It may open streams as soon as it has heard our hello, which is before we have heard that it did.
                await muxer.decided.wait()
                if not muxer.admitted:
                    return
            handle = self._host.multiselect.handlers[protocol]
            if handle is not None:
                await handle(stream)
            finished = True
        except (IOException, StreamEnded):
            pass  # it has gone away
        except RemoteError as error:
            self.counters.count(error.kind, muxer.peer)
        except Exception:  # py-libp2p's services raise whatever bad input leads to
            if not muxer.lost.is_set():
                self.counters.count("bad_stream", muxer.peer)
        finally:
            muxer.inbound_streams -= 1
            await end_stream(stream, gracefully=finished)

    async def _say_goodbye(self) -> None:
        """Let every peer read what was sent to it, then close."""
        links = [link for links in self._links.values() for link in links]
        for link in links:
            link.retire()
        with trio.move_on_after(self._limits.goodbye_s):
            for link in links:
                await link.ended.wait()
        for link in links:
            link.close("shutting down")
        for link in links:
            await link.ended.wait()


def _swarm(key: IdentityKey, limits: TransportLimits) -> ConnectedSwarm:
    peerstore = PeerStore()
    identity = ID.from_string(key.peer_id)
    peerstore.add_key_pair(identity, key.libp2p_key_pair())
    bound = 2 * limits.connections  # never reached: ours come first
    config = ConnectionConfig(
        min_connections=0,
        low_watermark=0,
        high_watermark=bound,
        max_connections=bound,
        max_connections_per_peer=bound,
    )
    nothing = TransportUpgrader({}, {})  # connections come upgraded
    return ConnectedSwarm(identity, peerstore, nothing, transports=[], connection_config=config)


@asynccontextmanager
async def open_transport(
    key: IdentityKey,
    listen: Sequence[str],
    *,
    hello: bytes,
    check_hello: CheckHello,
    session: bytes,
    announce: Sequence[str] = (),
    check_announcement: Callable[[bytes], None] = check_announcement,
    limits: TransportLimits | None = None,
) -> AsyncIterator[Libp2pTransport]:
    """Run a transport. On leaving, peers get what was sent to them, then everything is closed (a second at most for each).

    `listen`: addresses with an IP (`/ip4/0.0.0.0/tcp/4001`; port 0: any); empty: dial only. `announce`: addresses to tell
    others besides those found. `check_announcement` raises RemoteError for what members do not announce: it is dropped.
    `session`: SESSION_BYTES random bytes of this process.
    Raises UserError: a bad address, a port that is taken.
    """
    if len(hello) > MAX_HELLO_BYTES or len(session) != SESSION_BYTES:
        raise LocalError(f"a hello of {len(hello)} bytes, a session of {len(session)}")
    prepare_libp2p()
    try:
        announced = [
            msgspec.structs.replace(parse_address(text), peer=key.peer_id).multiaddr() for text in announce
        ]
    except RemoteError as error:
        raise UserError(f"cannot announce that: {error.detail}", exit_code=2) from error
    addresses = [parse_listen_address(text) for text in listen]
    transport = Libp2pTransport(
        key, hello, check_hello, session, announced, check_announcement, limits or TransportLimits()
    )
    announcements = transport._announcements
    listeners: list[trio.SocketListener] = []
    failure: Exception | None = None
    try:
        listeners = await transport._listen(addresses)
        async with (
            transport._host.run([]),
            background_trio_service(announcements.gossip),
            background_trio_service(announcements),
            trio.open_nursery() as nursery,
        ):
            transport._nursery = nursery
            await announcements.wait_until_ready()
            nursery.start_soon(announcements.listen, transport._deliver_announcement)
            for listener in listeners:
                nursery.start_soon(transport._accept_all, listener)
            try:
                yield transport
            except Exception as error:
                failure = error  # raised below, outside: five nurseries would each wrap it in a group
            finally:
                with trio.CancelScope(shield=True):
                    for listener in listeners:
                        listener.socket.close()
                    await transport._say_goodbye()
                    with trio.move_on_after(transport._limits.goodbye_s):
                        await transport._host.close()
                nursery.cancel_scope.cancel()
    finally:
        for listener in listeners:
            listener.socket.close()
        announcements.seen_messages.stop()
    if failure is not None:
        raise failure

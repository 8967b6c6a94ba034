"""From a TCP connection to a link: dialling and accepting, up to the point where both sides know and accept each other.

Theory of operation
    Both ways lead through the same steps: TCP, `upgrade` (who is it?), the messages stream, hello and hello. The dialler
    takes them in one function. On the accepting side py-libp2p hands over the stream in a task of its own, so there are
    two: `accept` bounds the time of a connection until its peer is admitted, `answer` hears the hello and admits.

    Nothing here raises what the other side caused, except DialError to whoever dials: it is counted, and the socket
    closed. A connection that leaves before it says hello is no offence; it may be a probe of `reachable`.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Iterable

import msgspec
import trio
from libp2p.abc import INetConn, INetStream
from libp2p.custom_types import TProtocol
from libp2p.io.exceptions import IOException
from libp2p.network.exceptions import SwarmException
from libp2p.network.stream.net_stream import NetStream
from libp2p.network.swarm import Swarm
from libp2p.protocol_muxer.exceptions import MultiselectClientError
from libp2p.stream_muxer.exceptions import MuxedStreamError

from node.network.addresses import Address, parse_address
from node.network.link import HELLO_LIMITS, Link, hear_hello, refuse, say_hello
from node.network.rejections import Rejections
from node.network.streams import FrameReader, StreamEnded
from node.network.transport_events import CheckHello, DialError, TransportLimits
from node.network.transport_guard import (
    BoundedStream,
    GuardedYamux,
    HandshakeError,
    muxer_of,
    noise_transport,
    request_protocol,
    upgrade,
)
from node.storage.identity_key import IdentityKey
from p2pcoord.errors import RemoteError

MESSAGES = TProtocol("/p2pcoord/messages/1")

# A try on the next address starts so long after the one before (RFC 8305, "Connection Attempt Delay").
DIAL_STAGGER_S = 0.25
MAX_ADDRESSES_PER_DIAL = 8

# When several addresses fail, the error that says most about the peer is reported.
_TELLING = ("refused", "wrong_peer", "timeout", "unreachable", "bad_address")

# What py-libp2p raises when a connection or stream goes away under it.
GONE = (IOException, StreamEnded, SwarmException, MuxedStreamError, MultiselectClientError)


class Introductions:
    """Makes links. `admit(link, inbound)` is called for each, at once and before anything is received on it."""

    def __init__(
        self,
        key: IdentityKey,
        swarm: Swarm,
        hello: bytes,
        check_hello: CheckHello,
        session: bytes,
        limits: TransportLimits,
        counters: Rejections,
        admit: Callable[[Link, bool], None],
    ) -> None:
        self.hello = hello
        self._peer_id = key.peer_id
        self._noise = noise_transport(key)
        self._swarm = swarm
        self._check_hello = check_hello
        self._session = session
        self._limits = limits
        self._counters = counters
        self._admit = admit
        self._pending: Counter[str] = Counter()

    # Dialling ---------------------------------------------------------------------------------------------------------

    async def dial(self, peer: str | None, addresses: Iterable[str]) -> Link:
        """A link to the peer (None: to whoever is there), over the first address that leads to one. Raises DialError."""
        errors: list[DialError] = []
        made: list[Link] = []
        async with trio.open_nursery() as nursery:
            for target in self._targets(peer, addresses, errors):
                failed = trio.Event()
                nursery.start_soon(self._try, target, made, errors, failed, nursery.cancel_scope)
                with trio.move_on_after(DIAL_STAGGER_S):
                    await failed.wait()
        if made:
            return made[0]
        raise min(errors, key=lambda error: _TELLING.index(error.kind))

    async def reachable(self, address: str, expected_peer: str) -> bool:
        """Whether a new connection to this address leads to this peer. Existing links are neither used nor touched."""
        try:
            target = parse_address(address)
            with trio.fail_after(self._limits.dial_timeout_s):
                stream = await self._open_tcp(target)
                try:
                    muxer = await self._upgrade(stream, initiator=True)
                finally:
                    stream.abort()
        except (RemoteError, DialError, HandshakeError, trio.TooSlowError):
            return False
        return muxer.peer == expected_peer and target.peer in {None, expected_peer}

    def _targets(self, peer: str | None, addresses: Iterable[str], errors: list[DialError]) -> list[Address]:
        targets = []
        for text in addresses:
            try:
                target = parse_address(text)
            except RemoteError as error:
                errors.append(DialError("bad_address", error.detail))
                continue
            if peer is not None and target.peer not in {None, peer}:
                errors.append(DialError("bad_address", f"{text} belongs to another peer than {peer}"))
            else:
                targets.append(msgspec.structs.replace(target, peer=peer or target.peer))
        if not targets and not errors:
            errors.append(DialError("bad_address", "no address is known"))
        return list(dict.fromkeys(targets))[:MAX_ADDRESSES_PER_DIAL]

    async def _try(
        self,
        target: Address,
        made: list[Link],
        errors: list[DialError],
        failed: trio.Event,
        race: trio.CancelScope,
    ) -> None:
        try:
            with trio.fail_after(self._limits.dial_timeout_s):
                made.append(await self._dial_one(target))
            race.cancel()
        except DialError as error:
            errors.append(error)
        except trio.TooSlowError:
            text = f"no answer from {target} within {self._limits.dial_timeout_s:g} s"
            errors.append(DialError("timeout", text))
        failed.set()

    async def _dial_one(self, target: Address) -> Link:
        stream = await self._open_tcp(target)
        link: Link | None = None
        try:
            muxer = await self._upgrade(stream, initiator=True)
            if muxer.peer == self._peer_id:
                raise DialError("wrong_peer", f"{target} is this node itself")
            if target.peer not in {None, muxer.peer}:
                raise DialError("wrong_peer", f"{target} is {muxer.peer}, not {target.peer}")
            connection = await self._swarm.add_conn(muxer, "outbound")
            link = await self._introduce(connection, muxer)
            self._admit(link, False)
        except HandshakeError as error:
            raise DialError("unreachable", f"{target} is no p2pcoord node ({error.detail})") from error
        except RemoteError as error:
            if error.kind == "refused":
                raise DialError("refused", error.detail) from error
            self._counters.count(error.kind, muxer.peer)
            raise DialError("unreachable", f"{target}: {error}") from error
        except GONE as error:
            raise DialError("unreachable", f"{target} closed the connection ({error})") from error
        finally:
            if link is None:
                stream.abort()
        return link

    async def _introduce(self, connection: INetConn, muxer: GuardedYamux) -> Link:
        """The dialler's side of hello and hello. Raises RemoteError("refused", text) and what GONE lists."""
        stream = await connection.new_stream()
        assert isinstance(stream, NetStream)
        await request_protocol(stream, MESSAGES, self._limits.handshake_timeout_s)
        await say_hello(stream, self._session, self.hello, self._limits.handshake_timeout_s)
        reader = FrameReader(stream, HELLO_LIMITS)
        session, hello = await hear_hello(reader)
        refusal = self._check_hello(muxer.peer, hello)
        if refusal is not None:
            self._counters.count("hello_refused", muxer.peer)
            await refuse(stream, refusal, self._limits.goodbye_s)
            raise RemoteError("refused", refusal)
        return self._link(connection, stream, reader, session)

    async def _open_tcp(self, target: Address) -> BoundedStream:
        try:
            return BoundedStream(await trio.open_tcp_stream(target.host, target.port))
        except OSError as error:
            raise DialError("unreachable", f"{target}: {plain_reason(error)}") from error

    # Accepting --------------------------------------------------------------------------------------------------------

    async def accept(self, accepted: trio.SocketStream, links: int) -> None:
        """Bring a new connection to its hello, or close it. `links`: how many there are already."""
        stream = BoundedStream(accepted)
        host = stream.remote_host
        limits = self._limits
        if (
            self._pending.total() >= limits.pending_connections
            or self._pending[host] >= limits.pending_connections_per_host
            or links >= limits.connections
        ):
            self._counters.count("too_many_connections", host)
            stream.abort()
            return
        self._pending[host] += 1
        muxer: GuardedYamux | None = None
        try:
            with trio.move_on_after(limits.handshake_timeout_s) as scope:
                muxer = await self._upgrade(stream, initiator=False)
                if muxer.peer == self._peer_id:
                    raise HandshakeError("own_identity", "our own key, or a copy of it, dials us")
                await self._swarm.add_conn(muxer, "inbound")
                await muxer.decided.wait()
            if scope.cancelled_caught:
                self._counters.count(*(("no_hello", muxer.peer) if muxer else ("handshake_timeout", host)))
        except HandshakeError as error:
            if stream.received_bytes:  # who said nothing and left only looked whether the port is open
                self._counters.count(error.kind, host)
        except SwarmException:
            self._counters.count("bad_handshake", host)
        finally:
            self._pending[host] -= 1
            if not self._pending[host]:
                del self._pending[host]
            if muxer is None or not muxer.admitted:
                stream.abort()

    async def answer(self, stream: INetStream) -> None:
        """The acceptor's side of a messages stream, for as long as the link lives."""
        assert isinstance(stream, NetStream)
        assert stream.swarm_conn is not None
        muxer = muxer_of(stream)
        if muxer.decided.is_set():
            raise RemoteError("second_hello", "a second messages stream on one connection")
        reader = FrameReader(stream, HELLO_LIMITS)
        try:
            session, hello = await hear_hello(reader)
            refusal = self._check_hello(muxer.peer, hello)
            if refusal is not None:
                self._counters.count("hello_refused", muxer.peer)
                await refuse(stream, refusal, self._limits.goodbye_s)
                return
            link = self._link(stream.swarm_conn, stream, reader, session)
            # Our hello is the first frame that the link writes, and it is admitted before the peer can hear it: the peer
            # may retire an older link as soon as it does.
            link.say_first(self._session, self.hello)
            self._admit(link, True)
        finally:
            muxer.decide(admitted=False)  # has no effect once it is admitted
        await link.ended.wait()

    # Both -------------------------------------------------------------------------------------------------------------

    async def _upgrade(self, stream: BoundedStream, *, initiator: bool) -> GuardedYamux:
        timeout_s = self._limits.handshake_timeout_s
        return await upgrade(
            stream, self._noise, self._counters.count, initiator=initiator, timeout_s=timeout_s
        )

    def _link(self, connection: INetConn, stream: NetStream, reader: FrameReader, session: bytes) -> Link:
        socket = muxer_of(stream).socket_stream
        address = Address(socket.remote_host, socket.remote_port).multiaddr()
        return Link(
            connection,
            stream,
            reader,
            session=session,
            address=address,
            limits=self._limits.link,
            on_rejected=self._counters.count,
        )


def plain_reason(error: OSError) -> str:
    """The plain words of an OSError; trio wraps those of several addresses into one."""
    inner = error.__cause__
    while isinstance(inner, BaseExceptionGroup):
        inner = inner.exceptions[0]
    if isinstance(inner, OSError) and error.errno is None:
        error = inner
    return {
        errno.ECONNREFUSED: "nobody listens there",
        errno.EHOSTUNREACH: "no route to it",
        errno.ENETUNREACH: "no route to its network",
    }.get(error.errno or 0, error.strerror or str(error))

"""Bounds around py-libp2p: what a stranger can make this process hold, and what a bad peer can break.

Theory of operation
    A TCP connection becomes useful in three steps: multistream-select agrees on Noise, Noise authenticates both ends,
    multistream-select agrees on Yamux. Everything before the end of Noise comes from anybody. py-libp2p 0.8.1 reads a
    length there and then as many bytes as it says, and knows no time limit on the dialling side. So:

    - `BoundedStream` is the socket. It gives exactly what is asked for (py-libp2p's own loop gives up after 100 partial
      reads), never holds more than one buffer, and until `handshake_over()` lets HANDSHAKE_BYTES through in all.
    - `upgrade` does the three steps, with Noise as the only security (py-libp2p's default list has /plaintext/2.0.0, where
      anybody may claim any id) and Yamux as the only muxer. The caller bounds its time.
    - `BoundedCommunicator` reads lines of multistream-select, of MAX_LINE_BYTES each and MAX_LINES in all. Streams of
      authenticated peers are negotiated with it too.
    - `GuardedYamux` closes a connection whose peer announces a frame over MAX_YAMUX_FRAME_BYTES or ignores the
      receive windows until MAX_BUFFERED_BYTES wait unread: py-libp2p logs that and goes on buffering.

    A write that is cancelled half way leaves a torn frame on the connection. `write_within` is therefore the only way
    anything here writes on a stream: it cannot be cancelled from outside, and when its time is over the connection goes.
    py-libp2p itself writes inside of reads (a window update, after the bytes were taken): `GuardedYamux` shields those, so
    that a read may be cancelled at any moment.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
from collections.abc import Callable

import trio
from libp2p.abc import INetConn, INetStream, ISecureConn
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519_key_pair
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import ConnectionClosedError, IOException
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.exceptions import SwarmException
from libp2p.network.stream.net_stream import NetStream
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.protocol_muxer.exceptions import MultiselectCommunicatorError
from libp2p.protocol_muxer.multiselect import Multiselect
from libp2p.protocol_muxer.multiselect_client import MultiselectClient
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.yamux.yamux import (
    DEFAULT_WINDOW_SIZE,
    HEADER_SIZE,
    TYPE_WINDOW_UPDATE,
    YAMUX_HEADER_FORMAT,
    Yamux,
)
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX

from node.storage.identity_key import IdentityKey
from p2pcoord.errors import RemoteError
from p2pcoord.identity import public_key_of

# The three steps take about 700 bytes in each direction; the longest honest Noise payloads (extensions) add a few KiB.
HANDSHAKE_BYTES = 16 * 1024

# multistream-select lines are protocol names. go-multistream refuses lines over 1,024 bytes; an honest dialler sends the
# header and one or two proposals.
MAX_LINE_BYTES = 1_024
MAX_LINES = 16

# One receive buffer per connection. A Noise message has at most 65,535 bytes and its two bytes of length.
RECEIVE_BYTES = 128 * 1024
MAX_READ_BYTES = 65_535 + 2

# py-libp2p and go-yamux write frames of up to 64 KiB. The buffered bytes of a connection are bounded by what we asked for
# (chunks of 1 MiB, two ahead) and one window of messages; Yamux windows grow up to 16 MiB.
MAX_YAMUX_FRAME_BYTES = 256 * 1024
MAX_BUFFERED_BYTES = 32 * 1024 * 1024

# The beginning of a Yamux frame that does nothing but enlarge a window: version, type, no flags (`_write_frame`).
WINDOW_UPDATE = bytes((0, TYPE_WINDOW_UPDATE, 0, 0))

# py-libp2p 0.8.1 sends one for every small read (for every other with PY_YAMUX_RELEASE_ON_READ=0). Below an eighth of the
# smallest window they are saved up: the other end always has the rest of it, and half of all frames are not sent.
WINDOW_UPDATE_BYTES = DEFAULT_WINDOW_SIZE // 8

# It waits behind a frame of 64 KiB at most, which takes longer than this only where nothing moves any more.
WINDOW_UPDATE_TIMEOUT_S = 15.0

# A TCP connection whose data stays unacknowledged so long is dead (pulled cable, dropped packets): the kernel closes it
# even when nobody here is waiting for an answer. Linux's default is about 15 minutes.
TCP_USER_TIMEOUT_MS = 15_000


class HandshakeError(Exception):
    """The other end did not get through the handshake. `kind` is the word it is counted under."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail


class BoundedStream(TrioTCPStream):
    """One TCP connection as py-libp2p wants it, with bounded reads.

    `last_received` is trio's time of the newest bytes from the other end, `received_bytes` their number.
    """

    def __init__(self, stream: trio.SocketStream) -> None:
        super().__init__(stream)
        self.last_received = trio.current_time()
        self.received_bytes = 0
        self._budget: int | None = HANDSHAKE_BYTES
        self._buffer = b""
        self._position = 0
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
            with contextlib.suppress(OSError):  # closed again already
                stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, TCP_USER_TIMEOUT_MS)
        address = self.get_remote_address()
        self.remote_host = address[0] if address else "unknown"
        self.remote_port = address[1] if address else 0

    def handshake_over(self) -> None:
        self._budget = None

    def get_remote_address(self) -> tuple[str, int] | None:
        if self._cached_remote_address is None:
            try:
                name = self.stream.socket.getpeername()
            except OSError:
                return None
            # IPv6 names have four parts, which py-libp2p takes for no address at all.
            self._cached_remote_address = (str(name[0]).removeprefix("::ffff:"), int(name[1]))
        return self._cached_remote_address

    async def read(self, n: int | None = None) -> bytes:
        """Exactly n bytes. Raises ConnectionClosedError at the end of the connection, IOException past a bound."""
        if n is None or n > MAX_READ_BYTES:
            raise IOException(f"a read of {n} bytes is over the limit of {MAX_READ_BYTES}")
        async with self.read_lock:
            if len(self._buffer) - self._position < n:
                await self._fill(n)
            start = self._position
            self._position += n
            return self._buffer[start : self._position]

    async def _fill(self, n: int) -> None:
        # Parts are joined once: a Noise message over a slow link arrives in dozens of pieces.
        parts = [self._buffer[self._position :]]
        have = len(parts[0])
        while have < n:
            limit = RECEIVE_BYTES
            if self._budget is not None:
                if self._budget == 0:
                    raise IOException(f"more than {HANDSHAKE_BYTES} bytes before the handshake was over")
                limit = min(limit, self._budget)
            try:
                data = await self.stream.receive_some(limit)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise ConnectionClosedError("the connection is gone", transport="tcp") from error
            if not data:
                raise ConnectionClosedError("closed by the other end", transport="tcp")
            if self._budget is not None:
                self._budget -= len(data)
            self.received_bytes += len(data)
            self.last_received = trio.current_time()
            parts.append(bytes(data))
            have += len(data)
        self._buffer = b"".join(parts)
        self._position = 0

    def abort(self) -> None:
        """Close the socket now. Whoever reads or writes on it is woken; nothing is flushed."""
        self.stream.socket.close()


class BoundedCommunicator(MultiselectCommunicator):
    """Reads multistream-select lines with a bound on each and on their number."""

    def __init__(self, read_writer: ReadWriteCloser) -> None:
        super().__init__(read_writer)
        self._lines = 0

    async def read(self) -> str:
        self._lines += 1
        if self._lines > MAX_LINES:
            raise MultiselectCommunicatorError(f"more than {MAX_LINES} lines")
        try:
            size = shift = 0
            while True:
                byte = (await self._exactly(1))[0]
                size |= (byte & 0x7F) << shift
                if byte < 0x80:
                    break
                shift += 7
                if shift > 14:
                    raise MultiselectCommunicatorError("overlong length of a line")
            if not 1 <= size <= MAX_LINE_BYTES:
                raise MultiselectCommunicatorError(f"a line of {size} bytes")
            line = await self._exactly(size)
        except IOException as error:
            raise MultiselectCommunicatorError(str(error)) from error
        if not line.endswith(b"\n"):
            raise MultiselectCommunicatorError("a line without its end")
        try:
            return line[:-1].decode()
        except UnicodeDecodeError as error:
            raise MultiselectCommunicatorError("a line that is no text") from error

    async def _exactly(self, n: int) -> bytes:
        data = await self.read_writer.read(n)
        while len(data) < n:
            more = await self.read_writer.read(n - len(data))
            if not more:
                raise MultiselectCommunicatorError("closed in the middle of a line")
            data += more
        return data


async def _agree(
    connection: ReadWriteCloser, protocol: TProtocol, *, initiator: bool, timeout_s: float
) -> None:
    communicator = BoundedCommunicator(connection)
    limit_s = max(1, round(timeout_s))
    if initiator:
        await MultiselectClient().select_one_of([protocol], communicator, limit_s)
    else:
        await Multiselect({protocol: None}).negotiate(communicator, limit_s)


class GuardedYamux(Yamux):
    """Yamux that closes the connection of a peer that ignores its limits.

    Also what this node knows about the connection: its socket, whether its peer was admitted (its hello was accepted),
    how many streams the peer has open.
    """

    def __init__(
        self,
        connection: ISecureConn,
        peer: ID,
        socket_stream: BoundedStream,
        on_violation: Callable[[str, str], None],
        *,
        initiator: bool,
    ) -> None:
        super().__init__(connection, peer, is_initiator=initiator)
        self.socket_stream = socket_stream
        self.peer = peer.to_base58()
        self.decided = trio.Event()  # admitted, refused or closed
        self.admitted = False
        self.lost = trio.Event()
        self.inbound_streams = 0
        self._on_violation = on_violation
        self._saved_up: dict[int, int] = {}
        """Stream -> bytes by which its window is larger than the other end was told."""

    def decide(self, *, admitted: bool) -> None:
        if not self.decided.is_set():
            self.admitted = admitted
            self.decided.set()

    async def _cleanup_on_error(self) -> None:
        # The first to know that the connection is gone; what follows takes py-libp2p 100 ms and more.
        self.lost.set()
        self.decide(admitted=False)
        await super()._cleanup_on_error()

    async def _write_frame(self, data: bytes) -> None:
        if len(data) != HEADER_SIZE or not data.startswith(WINDOW_UPDATE):
            await super()._write_frame(data)
            return
        *_, stream_id, increment = struct.unpack(YAMUX_HEADER_FORMAT, data)
        increment += self._saved_up.pop(stream_id, 0)
        if increment < WINDOW_UPDATE_BYTES:
            self._saved_up[stream_id] = increment
            for ended in self._saved_up.keys() - self.streams.keys():
                del self._saved_up[ended]
            return
        data = WINDOW_UPDATE + struct.pack("!II", stream_id, increment)
        with trio.CancelScope(
            shield=True, deadline=trio.current_time() + WINDOW_UPDATE_TIMEOUT_S
        ) as scope:  # inside of somebody's read: if that is cancelled, the frame must still leave whole
            await super()._write_frame(data)
        if scope.cancelled_caught:
            self.socket_stream.abort()
            raise ConnectionClosedError("a window update could not be written", transport="tcp")

    async def read_stream(self, stream_id: int, n: int = -1) -> bytes:
        try:
            return await super().read_stream(stream_id, n)
        finally:
            # A read that was waiting when its stream ended has just put a new event in the place of the removed one.
            if stream_id not in self.streams:
                self.stream_events.pop(stream_id, None)

    async def _read_data_body(self, length: int) -> bytes:
        buffered = sum(len(buffer) for buffer in self.stream_buffers.values())
        if length > MAX_YAMUX_FRAME_BYTES:
            self._on_violation("yamux_frame_oversized", self.peer)
        elif buffered + length > MAX_BUFFERED_BYTES:
            self._on_violation("yamux_window_ignored", self.peer)
        else:
            return await super()._read_data_body(length)
        # The one exception that makes `handle_incoming` close the connection from each of its branches.
        raise trio.TooSlowError


async def upgrade(
    stream: BoundedStream,
    noise: NoiseTransport,
    on_violation: Callable[[str, str], None],
    *,
    initiator: bool,
    timeout_s: float,
) -> GuardedYamux:
    """Authenticate the other end and put Yamux on the connection. The caller bounds the time and closes on failure.

    Raises HandshakeError, never anything else that the other end could cause.
    """
    connection = RawConnection(stream, initiator)
    step = "security protocol"
    try:
        await _agree(connection, NOISE, initiator=initiator, timeout_s=timeout_s)
        step = "Noise handshake"
        pattern = noise.get_pattern()
        # Without an expected id: the caller compares, and can say who answered instead.
        secured = await (
            pattern.handshake_outbound(connection, None)
            if initiator
            else pattern.handshake_inbound(connection)
        )
        peer = secured.get_remote_peer()
        public_key_of(peer.to_base58())  # other kinds of key have no place in our protocol
        step = "stream multiplexer"
        await _agree(secured, TProtocol(YAMUX), initiator=initiator, timeout_s=timeout_s)
    except RemoteError as error:
        raise HandshakeError(error.kind, error.detail) from error
    except Exception as error:
        # py-libp2p, its Noise library, protobuf and cryptography raise a dozen unrelated types for bad input.
        detail = f"{step}: {type(error).__name__} {error}"
        raise HandshakeError("bad_handshake", detail) from error
    stream.handshake_over()
    return GuardedYamux(secured, peer, stream, on_violation, initiator=initiator)


class ConnectedSwarm(Swarm):
    """A Swarm that only holds connections made elsewhere (by our own listener and dialler) and never dials by itself."""

    async def dial_peer(self, peer_id: ID) -> list[INetConn]:
        raise SwarmException(f"not connected to {peer_id}")

    async def notify_disconnected(self, conn: INetConn) -> None:
        await self._notify("disconnected", conn)  # without the auto-connector, which would dial or take notes


class QuietHost(BasicHost):
    """A host that answers identify but asks nobody: our hello tells what we need, and identify costs each side a stream
    and 10 ms per connection. Identify-push is not served, since it writes what strangers say into the peer store."""

    def _schedule_identify(self, peer_id: ID, *, reason: str) -> None:
        pass


def noise_transport(key: IdentityKey) -> NoiseTransport:
    return NoiseTransport(key.libp2p_key_pair(), create_x25519_key_pair().private_key)


async def accept_protocol(stream: NetStream, protocols: Multiselect, timeout_s: float) -> TProtocol:
    """Negotiate a stream that the peer opened. Raises libp2p's exceptions when that fails."""
    protocol, _ = await protocols.negotiate(BoundedCommunicator(stream), max(1, round(timeout_s)))
    if protocol is None:
        raise MultiselectCommunicatorError("no protocol selected")
    stream.set_protocol(protocol)
    return protocol


async def request_protocol(stream: NetStream, protocol: TProtocol, timeout_s: float) -> None:
    """Negotiate a stream that we opened. Raises libp2p's exceptions when that fails."""
    await MultiselectClient().select_one_of([protocol], BoundedCommunicator(stream), max(1, round(timeout_s)))
    stream.set_protocol(protocol)


def muxer_of(stream: INetStream) -> GuardedYamux:
    """The connection a stream is on."""
    muxer = stream.muxed_conn
    assert isinstance(muxer, GuardedYamux)
    return muxer


def abort(stream: INetStream) -> None:
    """Close the connection under a stream, at once."""
    muxer_of(stream).socket_stream.abort()


async def write_within(stream: INetStream, data: bytes, timeout_s: float) -> None:
    """Write all of data on a stream, or close its connection and raise trio.TooSlowError.

    Not cancelled from outside before the time is over (see the theory of operation). Raises libp2p's StreamError when
    the stream or the connection is gone.
    """
    with trio.CancelScope(shield=True, deadline=trio.current_time() + timeout_s) as scope:
        await stream.write(data)
    if scope.cancelled_caught:
        abort(stream)
        raise trio.TooSlowError(f"wrote less than {len(data)} bytes in {timeout_s} s")


async def end_stream(stream: INetStream, *, gracefully: bool, timeout_s: float = 1.0) -> None:
    """Close (or reset) a stream; if even that little frame cannot be written in time, close the connection."""
    scope = trio.CancelScope(shield=True, deadline=trio.current_time() + timeout_s)
    with scope, contextlib.suppress(Exception):  # gone already: what was wanted
        await (stream.close() if gracefully else stream.reset())
    if scope.cancelled_caught:
        abort(stream)


def prepare_libp2p() -> None:
    """Process-wide settings that py-libp2p needs before its first host."""
    # py-libp2p logs through the root logger's functions, which call basicConfig() when root has no handler, and through
    # "libp2p", whose warnings Python prints to stderr when it has none. What matters we count and tell ourselves.
    if not logging.root.handlers:
        logging.root.addHandler(logging.NullHandler())
    ours = logging.getLogger("libp2p")
    if not ours.handlers:
        ours.addHandler(logging.NullHandler())

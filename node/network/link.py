"""A link: one authenticated connection to a peer, and the one long-lived stream on it that carries messages both ways.

Theory of operation
    The dialler opens the stream and sends HELLO; the acceptor answers HELLO or REFUSED (a text for people). Nothing else
    is accepted before that. From then on either side sends MESSAGE frames, and:

        PING, PONG     every `ping_interval_s` a ping; a connection on which nothing at all arrives for `silence_limit_s`
                       is closed. (py-libp2p has no keep-alive.) A pong also gives the round-trip time.
        RETIRE         "I send nothing more here; do the same, then I close." Two peers that dial each other at the same
                       moment have two links; both carry messages until one is retired, so none is lost. A node that
                       leaves retires its links too: what Yamux has received and nobody has read yet is dropped when a
                       connection closes, so the last words before a plain close would often be lost.

    Sending is a bounded queue and a writer task; a queue that overflows or a write that takes longer than
    `write_timeout_s` ends the link, because a peer that does not keep up must not hold memory here. Receiving is paced by
    a token bucket per link: a peer that sends faster is read more slowly, which only delays itself.

    HELLO's body is SESSION_BYTES of a random number, made anew by each process, and then the hello of the layer above. The
    session tells a second link of the same process from the first link of a restarted one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import trio
from libp2p.io.exceptions import IOException
from libp2p.network.stream.net_stream import NetStream

from node.network.streams import FrameReader, StreamEnded, frame
from node.network.transport_events import LinkLimits
from node.network.transport_guard import abort, muxer_of, write_within
from p2pcoord.errors import RemoteError

if TYPE_CHECKING:
    from libp2p.abc import INetConn

HELLO, REFUSED, MESSAGE, PING, PONG, RETIRE = range(6)

SESSION_BYTES = 8
MAX_HELLO_BYTES = 16 * 1024
MAX_REFUSAL_BYTES = 1_024
PING_BYTES = 8

# A record travels with payloads of up to 64 KiB inside, a delta or a batch of records in up to 1 MiB.
MAX_FRAME_BYTES = 1024 * 1024 + 64 * 1024

# Several small frames go out in one write: each write costs a Yamux frame, a Noise message and a system call.
BATCH_BYTES = 60 * 1024

# A timer that fires this late says that the process was stopped (a suspended laptop, SIGSTOP), not that peers are silent.
LATE_S = 0.5

HELLO_LIMITS = {HELLO: SESSION_BYTES + MAX_HELLO_BYTES, REFUSED: MAX_REFUSAL_BYTES}
LINK_LIMITS = {
    MESSAGE: MAX_FRAME_BYTES,
    PING: PING_BYTES,
    PONG: PING_BYTES,
    RETIRE: 0,
    REFUSED: MAX_REFUSAL_BYTES,
}


class TokenBucket:
    """Lets `rate` units a second through on average, and bursts of two seconds' worth."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._level = 2 * rate
        self._at = trio.current_time()

    def take(self, amount: float) -> float:
        """Take `amount`; the seconds to wait before going on (0 when there was enough)."""
        now = trio.current_time()
        self._level = min(2 * self._rate, self._level + (now - self._at) * self._rate) - amount
        self._at = now
        return max(0.0, -self._level / self._rate)


class Link:
    """An established link. `run` is its life; `send` and `close` never block."""

    def __init__(
        self,
        connection: INetConn,
        stream: NetStream,
        reader: FrameReader,
        *,
        session: bytes,
        address: str,
        limits: LinkLimits,
        on_rejected: Callable[[str, str], None],
    ) -> None:
        self.connection = connection
        self.stream = stream
        self.muxer = muxer_of(stream)
        self.peer = self.muxer.peer
        self.session = session
        self.address = address
        self.ended = trio.Event()
        self.reason = ""
        self.retiring = False  # nothing new is sent here
        self._reader = reader
        reader.limits = LINK_LIMITS
        self._limits = limits
        self._on_rejected = on_rejected
        self._first = b""
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._wakeup = trio.Event()
        self._closing = trio.Event()
        self._asked_to_retire = False

    def send(self, message: bytes) -> bool:
        """Queue a message. False when the link is ending or retiring; a queue that overflows ends it."""
        return not self.retiring and self._enqueue(frame(MESSAGE, message))

    def say_first(self, session: bytes, hello: bytes) -> None:
        """Put our hello before everything else that is ever written here."""
        self._first = frame(HELLO, session + hello)

    def retire(self) -> None:
        """Ask the peer to use another link; this one closes when it has agreed, or after a while."""
        if not self.retiring:
            self._asked_to_retire = self.retiring = True
            self._enqueue(frame(RETIRE))

    def close(self, reason: str) -> None:
        """End the link. What is queued is not sent."""
        if not self._closing.is_set():
            self.reason = reason
            self._closing.set()

    async def run(self, deliver: Callable[[bytes], Awaitable[None]]) -> None:
        """Read, write and watch until the link ends; `reason` says why. The connection is unusable afterwards."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                nursery.start_soon(self._read, deliver)
                nursery.start_soon(self._watch)
                nursery.start_soon(self._notice_loss)
                await self._closing.wait()
                # Before cancelling: a write is shielded, and one that is blocked only ends with its socket.
                abort(self.stream)
                nursery.cancel_scope.cancel()
        finally:
            if not self.reason:
                self.reason = "shutting down"
            self._queue.clear()
            self.ended.set()

    def _enqueue(self, data: bytes, *, first: bool = False) -> bool:
        if self._closing.is_set() or self.ended.is_set():
            return False
        if (
            self._queued_bytes + len(data) > self._limits.queue_bytes
            or len(self._queue) >= self._limits.queue_frames
        ):
            self._on_rejected("send_queue_overflow", self.peer)
            self.close("does not read what it is sent (send queue overflow)")
            return False
        if first:
            self._queue.appendleft(data)
        else:
            self._queue.append(data)
        self._queued_bytes += len(data)
        self._wakeup.set()
        return True

    async def _write(self) -> None:
        batch, self._first = self._first, b""
        try:
            while True:
                await write_within(self.stream, batch, self._limits.write_timeout_s)
                while not self._queue:
                    self._wakeup = trio.Event()
                    await self._wakeup.wait()
                batch = self._next_batch()
        except trio.TooSlowError:
            self._on_rejected("write_timeout", self.peer)
            self.close(f"does not read what it is sent (for {self._limits.write_timeout_s:g} s)")
        except IOException:
            self._lose()

    def _next_batch(self) -> bytes:
        parts = [self._queue.popleft()]
        size = len(parts[0])
        while self._queue and size + len(self._queue[0]) <= BATCH_BYTES:
            parts.append(self._queue.popleft())
            size += len(parts[-1])
        self._queued_bytes -= size
        return b"".join(parts)

    async def _read(self, deliver: Callable[[bytes], Awaitable[None]]) -> None:
        frames = TokenBucket(self._limits.inbound_frames_per_s)
        octets = TokenBucket(self._limits.inbound_bytes_per_s)
        try:
            while True:
                kind, body = await self._reader.next()
                pause_s = max(frames.take(1), octets.take(len(body)))
                if pause_s:
                    self._on_rejected("too_fast", self.peer)
                    await trio.sleep(pause_s)
                if kind == MESSAGE:
                    await deliver(body)
                elif kind == PING:
                    self._enqueue(frame(PONG, body), first=True)
                elif kind == PONG:
                    pass  # that something came is all that counts (`_watch`)
                elif kind == RETIRE:
                    self._peer_retires()
                else:
                    self.close(f"refused us: {body.decode(errors='replace')}")
                    return
        except RemoteError as error:
            self._on_rejected(error.kind, self.peer)
            self.close(str(error))
        except StreamEnded:
            self._lose()

    async def _watch(self) -> None:
        socket = self.muxer.socket_stream
        interval_s = self._limits.ping_interval_s
        while True:
            asked_at = trio.current_time()
            self._enqueue(frame(PING, b"\x00" * PING_BYTES), first=True)
            await trio.sleep(interval_s)
            if self._asked_to_retire:
                await trio.sleep(self._limits.retire_linger_s)
                self.close("retired")
            now = trio.current_time()
            silence_s = now - socket.last_received
            # Waking up late means that this process was stopped, and what the peer sent still waits in the socket.
            if silence_s > self._limits.silence_limit_s and now - asked_at < interval_s + LATE_S:
                self._on_rejected("silent", self.peer)
                self.close(f"no answer for {silence_s:.1f} s")

    async def _notice_loss(self) -> None:
        # Beside the reader, which may be waiting for the consumer of messages.
        await self.muxer.lost.wait()
        self._lose()

    def _lose(self) -> None:
        self.close("the peer left" if self.retiring and not self._asked_to_retire else "connection lost")

    def _peer_retires(self) -> None:
        if self._asked_to_retire:
            self.close("retired")
        elif not self.retiring:
            # The answer goes behind everything queued here, so when the peer sees it nothing is on its way any more.
            self.retiring = True
            self._enqueue(frame(RETIRE))


async def say_hello(stream: NetStream, session: bytes, hello: bytes, timeout_s: float) -> None:
    await write_within(stream, frame(HELLO, session + hello), timeout_s)


async def hear_hello(reader: FrameReader) -> tuple[bytes, bytes]:
    """The other side's (session, hello). Raises RemoteError, with kind "refused" and the peer's text if it refused us."""
    kind, body = await reader.next()
    if kind == REFUSED:
        raise RemoteError("refused", body.decode(errors="replace"))
    if len(body) < SESSION_BYTES:
        raise RemoteError("bad_hello", f"{len(body)} bytes")
    return body[:SESSION_BYTES], body[SESSION_BYTES:]


async def refuse(stream: NetStream, reason: str, timeout_s: float) -> None:
    """Tell the other side why, and give it a moment to read it before the connection goes."""
    text = reason.encode()[:MAX_REFUSAL_BYTES].decode(errors="ignore").encode()
    try:
        await write_within(stream, frame(REFUSED, text), timeout_s)
        with trio.move_on_after(timeout_s):
            while await stream.read(1024):  # until the other side, having read it, closes
                pass
    except (IOException, trio.TooSlowError):
        pass

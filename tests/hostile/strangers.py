"""What strangers send to a node's port: raw bytes, half of a handshake, frames that break the link's rules, messages that break
the protocol's. A `Stranger` knows the run's secret, so its hello is welcome; what it says after that is not.
"""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from typing import Final

import trio
from libp2p.io.exceptions import IOException
from libp2p.network.exceptions import SwarmException
from libp2p.network.stream.net_stream import NetStream

from node.network.hello import JoinToken, check_hello, make_hello
from node.network.introductions import MESSAGES
from node.network.libp2p_transport import Libp2pTransport, open_transport
from node.network.link import HELLO, SESSION_BYTES
from node.network.streams import frame
from node.network.transport_events import DialError, Received
from node.network.transport_guard import (
    BoundedStream,
    noise_transport,
    request_protocol,
    upgrade,
    write_within,
)
from node.storage.identity_key import IdentityKey
from p2pcoord.consensus.record import Admission
from p2pcoord.errors import RemoteError
from p2pcoord.messages import AnyMessage, GenesisReply, GenesisRequest, decode_message
from p2pcoord.rounds.participation import join_proof
from p2pcoord.wire import encode

HELLO_OF_MULTISTREAM: Final = b"\x13/multistream/1.0.0\n"
ANSWER_S: Final = 5.0


def raw(port: int, data: bytes) -> socket.socket:
    """A connection on which these bytes, and no others, were sent. The caller closes it."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=ANSWER_S)
    if data:
        connection.sendall(data)
    return connection


def garbage(port: int) -> None:
    """Bytes that are no handshake, then the end."""
    with closing(raw(port, os.urandom(4000))) as connection, suppress(OSError):
        while connection.recv(4096):
            pass


def half_a_handshake(port: int) -> None:
    """A right beginning, then the end."""
    with closing(raw(port, HELLO_OF_MULTISTREAM)) as connection, suppress(OSError):
        connection.recv(4096)


async def unframed(port: int, token: JoinToken, data: bytes) -> None:
    """A peer with a right hello that then writes `data` on the messages stream itself, past every check of our own."""
    key = IdentityKey.generate()
    with trio.move_on_after(ANSWER_S):
        tcp = BoundedStream(await trio.open_tcp_stream("127.0.0.1", port))
        try:
            async with trio.open_nursery() as nursery:
                muxer = await upgrade(tcp, noise_transport(key), lambda *_: None, initiator=True, timeout_s=5)
                nursery.start_soon(muxer.start)
                await muxer.event_started.wait()
                stream = NetStream(await muxer.open_stream(), None, None)
                await _speak(stream, key, token, data)
                nursery.cancel_scope.cancel()
        finally:
            tcp.abort()


async def _speak(stream: NetStream, key: IdentityKey, token: JoinToken, data: bytes) -> None:
    await request_protocol(stream, MESSAGES, 5)
    hello = make_hello(token.run, join_proof(token.secret, token.run, key.peer_id))
    with suppress(IOException, SwarmException):
        await write_within(stream, frame(HELLO, os.urandom(SESSION_BYTES) + hello) + data, 5)
        while await stream.read(65_536):
            pass


class Stranger:
    """A peer with a link: `send` puts any bytes into a message."""

    def __init__(self, key: IdentityKey, token: JoinToken, transport: Libp2pTransport, node: str) -> None:
        self.key = key
        self.token = token
        self.node = node
        self._transport = transport

    @property
    def peer_id(self) -> str:
        return self.key.peer_id

    @property
    def proof(self) -> bytes:
        return join_proof(self.token.secret, self.token.run, self.peer_id)

    @property
    def linked(self) -> bool:
        return self._transport.is_connected(self.node)

    def send(self, data: bytes) -> bool:
        return self._transport.send(self.node, data)

    def say(self, message: AnyMessage) -> bool:
        return self.send(encode(message))

    async def announce(self, data: bytes) -> None:
        await self._transport.announce(data)

    async def ask(self, message: AnyMessage, kind: type[AnyMessage]) -> AnyMessage:
        """Its answer of this kind. Raises trio.TooSlowError."""
        self.say(message)
        answer = await self.hears(kind)
        if answer is None:
            raise trio.TooSlowError
        return answer

    async def hears(self, kind: type[AnyMessage], within_s: float = ANSWER_S) -> AnyMessage | None:
        """The next message of this kind; None when there is none in time."""
        with trio.move_on_after(within_s):
            while True:
                event = await self._transport.receive()
                if isinstance(event, Received):
                    with suppress(RemoteError):
                        answer = decode_message(event.frame)
                        if isinstance(answer, kind):
                            return answer
        return None

    async def introduce(self) -> None:
        """Shows the proof, as a joiner does before it asks for anything."""
        await self.ask(GenesisRequest(Admission(self.peer_id, "stranger", self.proof)), GenesisReply)


@asynccontextmanager
async def stranger(token: JoinToken, address: str, *, hello: bytes | None = None) -> AsyncIterator[Stranger]:
    """A linked stranger. `hello` in place of the right one. Raises DialError when it is refused."""
    key = IdentityKey.generate()
    right = make_hello(token.run, join_proof(token.secret, token.run, key.peer_id))
    refused: DialError | None = None
    async with open_transport(
        key,
        (),
        hello=right if hello is None else hello,
        check_hello=lambda peer, data: check_hello(data, token.run, lambda _: ""),
        session=os.urandom(SESSION_BYTES),
        check_announcement=lambda data: None,
    ) as transport:
        try:
            node = await transport.connect(None, (address,))
        except DialError as error:
            refused = error
        else:
            yield Stranger(key, token, transport, node)
    if refused is not None:
        raise refused


async def refusal(token: JoinToken, address: str, hello: bytes) -> tuple[str, str]:
    """Kind and words with which a hello is refused."""
    try:
        async with stranger(token, address, hello=hello):
            return "welcome", ""
    except DialError as error:
        return error.kind, error.detail

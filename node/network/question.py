"""One question to one peer and its answer, before there is a `Peer`: how a joiner and `p2pcoord status --peer` begin.

Whoever asks is a stranger, so the question carries an Admission that shows the run's secret. What else arrives meanwhile is
nothing yet to either of them, and is dropped.
"""

from __future__ import annotations

from typing import TypeVar

import trio

from node.network.libp2p_transport import Libp2pTransport
from node.network.transport_events import Disconnected, Received
from p2pcoord.errors import RemoteError
from p2pcoord.messages import decode_message
from p2pcoord.wire import Message, encode

# One round trip, on a link that was made a moment ago.
ANSWER_TIMEOUT_S = 10.0

A = TypeVar("A", bound=Message)


class NoAnswer(Exception):
    """`closed`: the peer closed the connection, for this reason; None when it stayed silent."""

    def __init__(self, closed: str | None) -> None:
        super().__init__(closed or "no answer")
        self.closed = closed


async def ask(transport: Libp2pTransport, peer: str, question: Message, kind: type[A]) -> A:
    """The first message of this kind that a connected peer sends after the question. Raises NoAnswer."""
    transport.send(peer, encode(question))
    with trio.move_on_after(ANSWER_TIMEOUT_S):
        while True:
            event = await transport.receive()
            if isinstance(event, Disconnected) and event.peer == peer:
                raise NoAnswer(event.reason)
            if isinstance(event, Received) and event.peer == peer:
                try:
                    message = decode_message(event.frame)
                except RemoteError:
                    continue
                if isinstance(message, kind):
                    return message
    raise NoAnswer(None)

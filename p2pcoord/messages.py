"""Every message between peers, one frozen struct each: those of consensus, gossip, rounds and the few of a node.

docs/protocol.md describes them in prose.

A message arrives over an authenticated stream, so its sender is known; only what must convince a third party is signed
(`identity.Statement`). `decode_message` is the only way in: size, canonical form and types are checked there, and ranges by
`check_ranges`.
"""

from __future__ import annotations

from typing import Final

from p2pcoord.consensus.messages import MAX_INTERVAL_NS, MIN_INTERVAL_NS, Append, ConsensusMessage
from p2pcoord.consensus.record import Admission, Record
from p2pcoord.errors import RemoteError
from p2pcoord.gossip.messages import GossipMessage
from p2pcoord.rounds.messages import RoundMessage
from p2pcoord.wire import Message, decode


class GenesisRequest(Message, frozen=True, tag="genesis?"):
    """What a joiner asks first: which run is this? Answered to those whose proof holds."""

    admission: Admission


class GenesisReply(Message, frozen=True, tag="genesis"):
    genesis: Record


class StatusRequest(Message, frozen=True, tag="status?"):
    """For `p2pcoord status --peer`; answered to those whose proof holds."""

    admission: Admission


class StatusReply(Message, frozen=True, tag="status"):
    """The status document, as JSON."""

    document: bytes


class ReachRequest(Message, frozen=True, tag="reach?"):
    """Can you dial me at these addresses? Who cannot be dialled is a leaf: it takes part, and never votes."""

    addresses: tuple[str, ...]


class ReachReply(Message, frozen=True, tag="reach"):
    reachable: bool


AnyMessage = (
    ConsensusMessage
    | GossipMessage
    | RoundMessage
    | GenesisRequest
    | GenesisReply
    | StatusRequest
    | StatusReply
    | ReachRequest
    | ReachReply
)

# 2**53: far beyond any term, height or version reached by one a nanosecond in a century, and exact in every language.
MAX_INTEGER: Final = 1 << 53


def decode_message(data: bytes) -> AnyMessage:
    """The message in `data`. Raises RemoteError (see wire.decode), "out_of_range" for impossible numbers."""
    message: AnyMessage = decode(data, AnyMessage)  # type: ignore[arg-type]  # a union is a type to msgspec
    _check_ranges(message)
    return message


def _check_ranges(message: AnyMessage) -> None:
    for name in message.__struct_fields__:
        value = getattr(message, name)
        if isinstance(value, int) and not 0 <= value <= MAX_INTEGER:
            raise RemoteError("out_of_range", f"{type(message).__name__}.{name} is {value}")
    if isinstance(message, Append) and not MIN_INTERVAL_NS <= message.interval_ns <= MAX_INTERVAL_NS:
        raise RemoteError("out_of_range", f"heartbeat interval of {message.interval_ns} ns")

"""Announcements: gossipsub on one topic, fenced in so that no peer can stop, stall or fill this process through it.

Theory of operation
    py-libp2p's gossipsub 1.1 spreads small signed messages over a mesh in a few round trips. It loses messages in silence
    (32 queued per peer and per subscription), so it only announces what peers can also fetch: certified records.

    As shipped, a frame that does not parse, a key that does not deserialize or a failing write raises through the service
    and ends the host; the subclasses here catch, count and drop instead. Control messages about other topics are
    dropped before they leave traces in tables that nobody bounds, peer exchange (which makes a node dial what a stranger
    names) too. Only peers that passed the hello take part, and what they announce is looked at before it is passed on.
    Scoring, spam and eclipse protection are off: they throttle honest traffic of small runs, and membership is our own
    business.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from libp2p.abc import IHost, INetStream
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub

from p2pcoord.consensus.messages import Records
from p2pcoord.errors import RemoteError
from p2pcoord.messages import decode_message

# Gossipsub's own mesh degrees (libp2p specification, gossipsub v1.0, "Parameters").
DEGREE, DEGREE_LOW, DEGREE_HIGH = 6, 4, 12
HEARTBEAT_S = 1

# A certified record without its payload is 1-2 KiB with seven signatures. An RPC carries at most a few of them.
MAX_ANNOUNCEMENT_BYTES = 16 * 1024
MAX_RPC_BYTES = 128 * 1024
MAX_CONTROLS_PER_RPC = 32
MAX_MESSAGE_IDS_PER_CONTROL = 512


def check_announcement(data: bytes) -> None:
    """Raises RemoteError for anything but certified records. Whether their certificate holds is for the peer to say: it has the
    ledger. All other messages are for one receiver: announced, one would act on, or be answered by, every member at once."""
    message = decode_message(data)
    if not isinstance(message, Records):
        raise RemoteError("not_announced", f"a message of kind {message.__struct_config__.tag}")


class Router(GossipSub):
    """GossipSub that only hears control messages about our topic."""

    def __init__(self, topic: str) -> None:
        super().__init__(
            protocols=[PROTOCOL_ID_V11],
            degree=DEGREE,
            degree_low=DEGREE_LOW,
            degree_high=DEGREE_HIGH,
            heartbeat_interval=HEARTBEAT_S,
            adaptive_gossip_enabled=False,
            spam_protection_enabled=False,
            eclipse_protection_enabled=False,
        )
        self.scorer = None
        self._topic = topic

    async def handle_rpc(self, rpc: rpc_pb2.RPC, sender_peer_id: ID) -> None:
        heard, control = rpc.control, rpc_pb2.ControlMessage()
        control.graft.extend([graft for graft in heard.graft if graft.topicID == self._topic][:1])
        for prune in [prune for prune in heard.prune if prune.topicID == self._topic][:1]:
            control.prune.add(
                topicID=prune.topicID, backoff=min(prune.backoff, 3_600)
            )  # without peers: no exchange
        for ihave in [ihave for ihave in heard.ihave if ihave.topicID == self._topic][:MAX_CONTROLS_PER_RPC]:
            control.ihave.add(
                topicID=ihave.topicID, messageIDs=ihave.messageIDs[:MAX_MESSAGE_IDS_PER_CONTROL]
            )
        for iwant in heard.iwant[:MAX_CONTROLS_PER_RPC]:
            control.iwant.add(messageIDs=iwant.messageIDs[:MAX_MESSAGE_IDS_PER_CONTROL])
        await super().handle_rpc(rpc_pb2.RPC(control=control), sender_peer_id)

    async def publish(self, msg_forwarder: ID, pubsub_msg: rpc_pb2.Message) -> None:
        await super().publish(msg_forwarder, pubsub_msg)
        self.recent_message_deliveries.clear()  # grows with every message and is read only by adaptive gossip
        # A thousand whole messages, to find an author that uses a number twice: ours are records whose certificate is checked.
        self.equivocation_detection.clear()


class Announcements(Pubsub):
    """Publish and subscribe on one topic among admitted peers. `admitted` tells whether a peer passed the hello; `check` raises
    RemoteError for what is not to be announced."""

    def __init__(
        self,
        host: IHost,
        topic: str,
        admitted: Callable[[str], bool],
        check: Callable[[bytes], None],
        on_rejected: Callable[[str, str], None],
    ) -> None:
        self.gossip = Router(topic)
        super().__init__(
            host,
            self.gossip,
            strict_signing=True,
            max_subscriptions_per_rpc=8,
            max_subscriptions_per_peer=8,
            max_inbound_rpc_size=MAX_RPC_BYTES,
            allowed_topics={topic},
        )
        # Starting from the clock: a restarted node that counted from small numbers would look like a replay.
        self.counter = time.time_ns()
        self._topic = topic
        self._admitted = admitted
        self._check = check
        self._on_rejected = on_rejected
        self.set_topic_validator(topic, self._acceptable, is_async_validator=False)

    def peer_admitted(self, peer: str) -> None:
        """Start to gossip with a peer that has just passed the hello."""
        if self.manager.is_running:
            self.manager.run_task(self._handle_new_peer_with_retry, ID.from_string(peer))

    def connection_lost(self, peer: str) -> None:
        """A connection to the peer ended. If another one remains, gossip moves there."""
        self._handle_dead_peer(ID.from_string(peer))

    async def announce(self, data: bytes) -> None:
        await self.publish(self._topic, data)

    async def _handle_new_peer_with_retry(self, peer_id: ID, timeout: float | None = None) -> None:
        if self._admitted(peer_id.to_base58()):
            await super()._handle_new_peer_with_retry(peer_id, timeout)

    async def continuously_read_stream(self, stream: INetStream) -> None:
        peer = stream.muxed_conn.peer_id
        try:
            await super().continuously_read_stream(stream)
        except Exception:  # protobuf's DecodeError, and whatever a table of the router makes of odd contents
            self._on_rejected("bad_announcement", peer.to_base58())
            await stream.reset()
            self._handle_dead_peer(peer)

    def _acceptable(self, msg_forwarder: ID, msg: rpc_pb2.Message) -> bool:
        """Called once for each message, after its signature has proved the author. Who passes on what is not acceptable is to
        blame as its author is: it should have looked."""
        try:
            self._check(msg.data)
        except RemoteError:
            self._on_rejected("bad_announcement", msg_forwarder.to_base58())
            return False
        return True

    async def push_msg(self, msg_forwarder: ID, msg: rpc_pb2.Message) -> None:
        forwarder = msg_forwarder.to_base58()
        if list(msg.topicIDs) != [self._topic] or len(msg.data) > MAX_ANNOUNCEMENT_BYTES:
            self._on_rejected("bad_announcement", forwarder)
            return
        try:
            await super().push_msg(msg_forwarder, msg)
        except Exception:  # an author's key that does not deserialize, an id that is none
            self._on_rejected("bad_announcement", forwarder)

    async def write_msg(self, stream: INetStream, rpc_msg: rpc_pb2.RPC) -> bool:
        # Called from gossipsub's heartbeat and from tasks of the service, which both end with it when this raises.
        try:
            return await super().write_msg(stream, rpc_msg)
        except Exception:
            self._handle_dead_peer(stream.muxed_conn.peer_id)
            return False

    async def listen(self, deliver: Callable[[str, bytes], None]) -> None:
        """Subscribe, and hand over (author, data) of what others announce, until cancelled. `deliver` must not block:
        a subscription that is not drained loses messages after 32."""
        subscription = await self.subscribe(self._topic)
        while True:
            message = await subscription.get()
            author = ID(message.from_id)
            if author != self.my_id:
                deliver(author.to_base58(), message.data)

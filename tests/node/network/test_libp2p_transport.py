"""The transport between real hosts on 127.0.0.1: what it delivers, what it refuses, and what strangers cannot do to it."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import TypeVar

import pytest
import trio
from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol
from libp2p.io.exceptions import IOException
from libp2p.network.stream.net_stream import NetStream
from libp2p.stream_muxer.yamux.yamux import HEADER_SIZE, Yamux

import node.network.transport_guard
from node.network.announcements import check_announcement
from node.network.introductions import MESSAGES
from node.network.libp2p_transport import Libp2pTransport, open_transport
from node.network.link import HELLO, MAX_FRAME_BYTES, MESSAGE, PONG
from node.network.streams import HEADER, FrameReader, StreamEnded, frame
from node.network.transport_events import (
    Announced,
    CheckHello,
    Connected,
    DialError,
    Disconnected,
    Event,
    LinkLimits,
    Received,
    TransportLimits,
)
from node.network.transport_guard import (
    HANDSHAKE_BYTES,
    WINDOW_UPDATE,
    BoundedStream,
    GuardedYamux,
    noise_transport,
    request_protocol,
    upgrade,
    write_within,
)
from node.storage.identity_key import IdentityKey
from p2pcoord.consensus.messages import Records, RecordsRequest
from p2pcoord.consensus.statements import Certificate
from p2pcoord.errors import LocalError, UserError
from p2pcoord.messages import StatusReply
from p2pcoord.wire import encode

E = TypeVar("E", bound=Event)

LOOPBACK = ["/ip4/127.0.0.1/tcp/0"]


def accept_all(peer: str, hello: bytes) -> str | None:
    return None


def opened(
    key: IdentityKey | None = None,
    *,
    hello: bytes = b"hello",
    check_hello: CheckHello = accept_all,
    check_announcement: Callable[[bytes], None] = lambda data: None,
    limits: TransportLimits | None = None,
) -> AbstractAsyncContextManager[Libp2pTransport]:
    return open_transport(
        key or IdentityKey.generate(),
        LOOPBACK,
        hello=hello,
        check_hello=check_hello,
        session=os.urandom(8),
        check_announcement=check_announcement,
        limits=limits,
    )


async def next_of(transport: Libp2pTransport, kind: type[E]) -> E:
    event = await transport.receive()
    assert isinstance(event, kind), event
    return event


async def nothing_happens(transport: Libp2pTransport, seconds: float = 0.2) -> None:
    with trio.move_on_after(seconds):
        event = await transport.receive()
        raise AssertionError(event)


async def eventually(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  # what is inside a transport has no events
        await trio.sleep(0.01)


@asynccontextmanager
async def linked(
    limits: TransportLimits | None = None,
) -> AsyncIterator[tuple[Libp2pTransport, Libp2pTransport]]:
    """Two transports, the second of which has dialled the first; their Connected events are taken."""
    async with opened(limits=limits) as a, opened(limits=limits) as b:
        await b.connect(a.peer_id, a.addresses())
        await next_of(a, Connected)
        await next_of(b, Connected)
        yield a, b


async def stranger(transport: Libp2pTransport) -> trio.SocketStream:
    return await trio.open_tcp_stream("127.0.0.1", transport.ports()[0])


async def closed_after(stream: trio.SocketStream) -> bytes:
    """What the other end says until it closes."""
    said = b""
    async with stream:
        with suppress(trio.BrokenResourceError):
            while data := await stream.receive_some(65_536):
                said += data
    return said


async def authenticated(transport: Libp2pTransport, key: IdentityKey, nursery: trio.Nursery) -> GuardedYamux:
    """A connection that passed Noise and Yamux, and said no hello."""
    stream = BoundedStream(await stranger(transport))
    muxer = await upgrade(stream, noise_transport(key), lambda *_: None, initiator=True, timeout_s=2)
    nursery.start_soon(muxer.start)
    await muxer.event_started.wait()
    return muxer


async def ended(stream: INetStream) -> None:
    """Wait until the other end closes or resets the stream; what it says before is of no interest."""
    with suppress(IOException):
        while await stream.read(65_536):
            pass


async def still_works(transport: Libp2pTransport) -> None:
    """A newcomer connects and is heard."""
    async with opened() as newcomer:
        await newcomer.connect(transport.peer_id, transport.addresses())
        await next_of(transport, Connected)
        assert newcomer.send(transport.peer_id, b"works")
        assert await next_of(transport, Received) == Received(newcomer.peer_id, b"works")


# Links --------------------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_dialler_that_knows_only_host_and_port_learns_the_id_and_both_can_talk() -> None:
    with trio.fail_after(10):
        async with opened() as a, opened() as b:
            assert await b.connect(None, [f"127.0.0.1:{a.ports()[0]}"]) == a.peer_id
            inbound, outbound = await next_of(a, Connected), await next_of(b, Connected)
            assert (inbound.peer, inbound.inbound) == (b.peer_id, True)
            assert (outbound.peer, outbound.inbound) == (a.peer_id, False)
            assert outbound.addresses == (f"/ip4/127.0.0.1/tcp/{a.ports()[0]}",)
            frames = [b"", b"one", os.urandom(MAX_FRAME_BYTES)]
            for data in frames:
                assert a.send(b.peer_id, data)
                assert b.send(a.peer_id, data)
            assert [(await next_of(b, Received)).frame for _ in frames] == frames
            assert [(await next_of(a, Received)).frame for _ in frames] == frames
            assert a.counters.total == b.counters.total == 0


@pytest.mark.trio
async def test_connecting_again_uses_the_link_that_is_there() -> None:
    with trio.fail_after(10):
        async with linked() as (a, b):
            assert await b.connect(a.peer_id, []) == a.peer_id
            assert await a.connect(b.peer_id, ["nonsense"]) == b.peer_id
            await nothing_happens(a)


@pytest.mark.trio
async def test_hellos_are_shown_to_the_other_side_with_the_id_that_said_them() -> None:
    heard: list[tuple[str, bytes]] = []

    def check(peer: str, hello: bytes) -> str | None:
        heard.append((peer, hello))
        return None

    with trio.fail_after(10):
        async with (
            opened(hello=b"from a", check_hello=check) as a,
            opened(hello=b"from b", check_hello=check) as b,
        ):
            b.set_hello(b"changed")
            await b.connect(None, a.addresses())
            assert heard == [(b.peer_id, b"changed"), (a.peer_id, b"from a")]


@pytest.mark.trio
async def test_a_refused_hello_reaches_the_dialler_in_words_and_makes_no_link() -> None:
    text = "peer speaks protocol 2, this program 1: upgrade"
    with trio.fail_after(10):
        async with opened(check_hello=lambda peer, hello: text) as a, opened() as b:
            with pytest.raises(DialError) as refused:
                await b.connect(a.peer_id, a.addresses())
            assert (refused.value.kind, refused.value.detail) == ("refused", text)
            assert a.counters.of(b.peer_id) == {"hello_refused": 1}
            await nothing_happens(a)
            await nothing_happens(b)
            assert not a.send(b.peer_id, b"x")
            assert not b.send(a.peer_id, b"x")


@pytest.mark.trio
async def test_the_dialler_refuses_too_and_the_acceptor_sees_the_link_end() -> None:
    with trio.fail_after(10):
        async with opened() as a, opened(check_hello=lambda peer, hello: "another run") as b:
            with pytest.raises(DialError, match="another run"):
                await b.connect(a.peer_id, a.addresses())
            await next_of(a, Connected)
            assert await next_of(a, Disconnected) == Disconnected(b.peer_id, "refused us: another run")
            assert b.counters.of(a.peer_id) == {"hello_refused": 1}


@pytest.mark.trio
async def test_a_dial_that_fails_says_how() -> None:
    other = IdentityKey.generate().peer_id
    with trio.fail_after(20):
        async with opened() as a, opened(limits=TransportLimits(dial_timeout_s=0.4)) as b:

            async def kind(peer: str | None, *addresses: str) -> str:
                with pytest.raises(DialError) as failed:
                    await b.connect(peer, addresses)
                return failed.value.kind

            here = f"/ip4/127.0.0.1/tcp/{a.ports()[0]}"
            assert await kind(other, here) == "wrong_peer"
            assert await kind(None, f"{here}/p2p/{other}") == "wrong_peer"
            assert await kind(None, *b.addresses()) == "wrong_peer"  # itself
            assert await kind(b.peer_id, here) == "wrong_peer"
            assert await kind(other, *a.addresses()) == "bad_address"  # the address names another peer
            assert await kind(None) == "bad_address"
            assert await kind(None, "nonsense", "/ip4/127.0.0.1/udp/1") == "bad_address"
            with socket.create_server(("127.0.0.1", 0)) as silent:
                silent_port = silent.getsockname()[1]
                assert await kind(None, f"127.0.0.1:{silent_port}") == "timeout"
                # What says most wins, and a good address among bad ones is found.
                assert await kind(other, f"127.0.0.1:{silent_port}", "nonsense", here) == "wrong_peer"
                assert await b.connect(None, ["nonsense", f"127.0.0.1:{silent_port}", here]) == a.peer_id
            assert await kind(None, f"127.0.0.1:{silent_port}") == "unreachable"
            assert await kind(None, "no-such-host.invalid:1") == "unreachable"


@pytest.mark.trio
async def test_two_that_dial_each_other_at_once_end_with_one_link_and_lose_nothing() -> None:
    with trio.fail_after(30):
        for _ in range(5):
            async with opened() as a, opened() as b:

                async def dial_and_talk(me: Libp2pTransport, other: Libp2pTransport) -> None:
                    await me.connect(other.peer_id, other.addresses())
                    for number in range(100):
                        assert me.send(other.peer_id, b"%d" % number)
                        await trio.sleep(0.001)

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(dial_and_talk, a, b)
                    nursery.start_soon(dial_and_talk, b, a)
                for me, other in ((a, b), (b, a)):
                    await next_of(me, Connected)
                    numbers = {int((await next_of(me, Received)).frame) for _ in range(100)}
                    assert numbers == set(range(100))
                    await eventually(lambda me=me, other=other: len(me._links[other.peer_id]) == 1)  # type: ignore[misc]
                    await nothing_happens(me, 0.05)
                assert a.send(b.peer_id, b"after")
                assert (await next_of(b, Received)).frame == b"after"
                assert b.send(a.peer_id, b"after")
                assert (await next_of(a, Received)).frame == b"after"


@pytest.mark.trio
async def test_a_restarted_peer_is_told_apart_from_a_second_link() -> None:
    key = IdentityKey.generate()
    with trio.fail_after(10):
        async with opened() as a, opened(key) as before, opened(key) as after:
            await before.connect(a.peer_id, a.addresses())
            await next_of(a, Connected)
            await after.connect(a.peer_id, a.addresses())
            assert await next_of(a, Disconnected) == Disconnected(key.peer_id, "the peer has restarted")
            await next_of(a, Connected)
            assert a.send(key.peer_id, b"to the new one")
            await next_of(after, Connected)
            assert (await next_of(after, Received)).frame == b"to the new one"
            await nothing_happens(a)


@pytest.mark.trio
async def test_the_last_words_before_leaving_arrive() -> None:
    with trio.fail_after(20):
        async with opened() as a:
            for _ in range(5):
                async with opened() as b:
                    await b.connect(a.peer_id, a.addresses())
                    for number in range(20):
                        b.send(a.peer_id, b"%d" % number + bytes(50_000))
                    leaver = b.peer_id
                await next_of(a, Connected)
                for number in range(20):
                    assert (await next_of(a, Received)).frame.startswith(b"%d\0" % number)
                assert await next_of(a, Disconnected) == Disconnected(leaver, "the peer left")


@pytest.mark.trio
async def test_disconnect_closes_and_both_can_connect_again_at_once() -> None:
    with trio.fail_after(10):
        async with linked() as (a, b):
            for _ in range(3):
                a.disconnect(b.peer_id, "excluded")
                assert await next_of(a, Disconnected) == Disconnected(b.peer_id, "excluded")
                await next_of(b, Disconnected)
                await b.connect(a.peer_id, a.addresses())
                await next_of(a, Connected)
                await next_of(b, Connected)


@pytest.mark.trio
async def test_a_cancelled_dial_leaves_nothing_behind() -> None:
    with trio.fail_after(20):
        async with opened() as a, opened() as b:
            for delay_ms in range(1, 16, 2):
                with trio.move_on_after(delay_ms / 1000):
                    await b.connect(a.peer_id, a.addresses())
            await b.connect(a.peer_id, a.addresses())
            assert b.send(a.peer_id, b"after all")
            while not isinstance(event := await a.receive(), Received):
                pass
            assert event.frame == b"after all"


@pytest.mark.trio
async def test_a_plain_libp2p_host_can_take_part() -> None:
    from libp2p import new_host
    from libp2p.peer.peerinfo import info_from_p2p_addr
    from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
    from multiaddr import Multiaddr

    key = IdentityKey.generate()
    host = new_host(key_pair=key.libp2p_key_pair(), sec_opt={NOISE: noise_transport(key)})
    with trio.fail_after(20):
        async with opened() as a, host.run([]):
            await host.connect(info_from_p2p_addr(Multiaddr(a.addresses()[0])))
            stream = await host.new_stream(
                info_from_p2p_addr(Multiaddr(a.addresses()[0])).peer_id, [MESSAGES]
            )
            await stream.write(frame(HELLO, bytes(8) + b"from elsewhere"))
            assert (await next_of(a, Connected)).peer == key.peer_id
            assert isinstance(stream, NetStream)
            kind, body = await FrameReader(stream, {HELLO: 100}).next(stall_s=5)
            assert (kind, body[8:]) == (HELLO, b"hello")
            await stream.write(frame(MESSAGE, b"a message"))
            assert await next_of(a, Received) == Received(key.peer_id, b"a message")
            await host.close()


# A peer that dies, stops or does not keep up ----------------------------------------------------------------------------------

CHILD = """
import os, sys, trio
from node.storage.identity_key import IdentityKey
from node.network.libp2p_transport import open_transport
async def main():
    async with open_transport(IdentityKey.generate(), ["/ip4/127.0.0.1/tcp/0"], hello=b"", session=os.urandom(8),
                              check_hello=lambda peer, hello: None) as transport:
        print(transport.addresses()[0], flush=True)
        while True:
            print(type(await transport.receive()).__name__, flush=True)
trio.run(main)
"""


@asynccontextmanager
async def other_process() -> AsyncIterator[tuple[subprocess.Popen[bytes], str]]:
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE)  # noqa: ASYNC220
    try:
        assert child.stdout is not None
        yield child, (await trio.to_thread.run_sync(child.stdout.readline)).decode().strip()
    finally:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


@pytest.mark.trio
async def test_a_killed_process_is_noticed_at_once() -> None:
    by_the_connection = TransportLimits(link=LinkLimits(silence_limit_s=3600))  # and not by its silence
    with trio.fail_after(30):
        async with opened(limits=by_the_connection) as a, other_process() as (child, address):
            peer = await a.connect(None, [address])
            await next_of(a, Connected)
            killed_at = trio.current_time()
            child.send_signal(signal.SIGKILL)
            assert (await next_of(a, Disconnected)).peer == peer
            print(f"from SIGKILL to Disconnected: {(trio.current_time() - killed_at) * 1000:.1f} ms")
            with pytest.raises(DialError) as failed:
                await a.connect(peer, [address])
            assert failed.value.kind == "unreachable"


@pytest.mark.trio
async def test_a_stopped_process_is_given_up_after_the_silence_limit_and_can_come_back() -> None:
    limits = TransportLimits(link=LinkLimits(ping_interval_s=0.1, silence_limit_s=0.6))
    with trio.fail_after(30):
        async with opened(limits=limits) as a, other_process() as (child, address):
            peer = await a.connect(None, [address])
            await next_of(a, Connected)
            await nothing_happens(a, 1.0)  # resting is not silence
            child.send_signal(signal.SIGSTOP)
            gone = await next_of(a, Disconnected)
            assert gone.reason.startswith("no answer for")
            assert a.counters.of(peer) == {"silent": 1}
            child.send_signal(signal.SIGCONT)
            assert await a.connect(peer, [address]) == peer
            await next_of(a, Connected)


@pytest.mark.trio
async def test_a_peer_that_reads_nothing_costs_a_bounded_queue_and_then_its_link() -> None:
    limits = TransportLimits(link=LinkLimits(queue_bytes=3 * MAX_FRAME_BYTES))
    with trio.fail_after(30):
        async with opened(limits=limits) as a, other_process() as (child, address):
            peer = await a.connect(None, [address])
            await next_of(a, Connected)
            child.send_signal(signal.SIGSTOP)
            sent = 0
            while a.send(peer, bytes(1024 * 1024)):
                sent += 1
                await trio.sleep(0.01)
            assert sent < 40  # the queue, socket buffers, and no more
            assert "queue overflow" in (await next_of(a, Disconnected)).reason
            assert a.counters.of(peer) == {"send_queue_overflow": 1}


@pytest.mark.trio
async def test_a_slow_consumer_slows_the_sender_and_loses_nothing() -> None:
    with trio.fail_after(20):
        async with linked(TransportLimits(waiting_messages=4)) as (a, b):
            for number in range(200):
                assert b.send(a.peer_id, b"%d" % number)
            await trio.sleep(0.3)
            assert a._take.statistics().current_buffer_used == 4
            assert [int((await next_of(a, Received)).frame) for _ in range(200)] == list(range(200))


@pytest.mark.trio
async def test_small_messages_cost_few_window_updates_and_the_window_never_closes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    updates = 0
    write = Yamux._write_frame

    async def counting(muxer: Yamux, data: bytes) -> None:
        nonlocal updates
        updates += len(data) == HEADER_SIZE and data.startswith(WINDOW_UPDATE)
        await write(muxer, data)

    monkeypatch.setattr(Yamux, "_write_frame", counting)
    with trio.fail_after(30):
        async with linked() as (a, b):
            for number in range(1000):  # a MiB: four times the window
                assert b.send(a.peer_id, b"%1024d" % number)
                assert int((await next_of(a, Received)).frame) == number
                assert a.send(b.peer_id, b"yes")
                await next_of(b, Received)
    assert 0 < updates < 100


@pytest.mark.trio
async def test_a_peer_that_sends_too_fast_is_read_at_its_rate() -> None:
    limits = TransportLimits(waiting_messages=1000, link=LinkLimits(inbound_frames_per_s=200))
    with trio.fail_after(20):
        async with linked(limits) as (a, b):
            started = trio.current_time()
            for _ in range(600):
                assert b.send(a.peer_id, b"x")
            for _ in range(600):
                await next_of(a, Received)
            assert trio.current_time() - started > 0.7  # 400 at once, the rest at 200 a second
            assert a.counters.of(b.peer_id)["too_fast"] > 0
            await nothing_happens(a)


# Strangers and liars ------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_garbage_before_the_handshake_is_counted_and_harms_nobody() -> None:
    with trio.fail_after(20):
        async with opened() as a:
            for garbage in (
                b"GET / HTTP/1.1\r\n\r\n",
                os.urandom(3000),
                b"\x00" * 64,
                b"\xff" * 64,
                b"\x13\xff\xfe\n",
            ):
                stream = await stranger(a)
                with suppress(trio.BrokenResourceError):
                    await stream.send_all(garbage)
                    await stream.send_eof()
                await closed_after(stream)
            await eventually(lambda: a.counters.of("127.0.0.1") == {"bad_handshake": 5})
            await still_works(a)


@pytest.mark.trio
async def test_endless_bytes_before_the_handshake_are_cut_off() -> None:
    multistream = b"\x13/multistream/1.0.0\n"
    noise = b"\x07/noise\n"
    starts = {
        "a line of 2^62 bytes": b"\xff" * 8 + b"\x3f",
        "lines without end": multistream * 100,
        "a Noise message over all that a handshake needs": multistream + noise + b"\xff\xff",
    }
    with trio.fail_after(20):
        async with opened(
            limits=TransportLimits(handshake_timeout_s=3600)
        ) as a:  # at once, and not by the time limit
            for number, start in enumerate(starts.values(), 1):
                stream = await stranger(a)
                with suppress(trio.BrokenResourceError):
                    await stream.send_all(start + bytes(HANDSHAKE_BYTES))
                await closed_after(stream)
                await eventually(lambda n=number: a.counters.of("127.0.0.1") == {"bad_handshake": n})  # type: ignore[misc]
            await still_works(a)


@pytest.mark.trio
async def test_half_a_handshake_and_silence_end_with_the_time_limit() -> None:
    with trio.fail_after(20):
        async with opened(limits=TransportLimits(handshake_timeout_s=1.5)) as a:
            started = trio.current_time()
            silent, half, dripping = [await stranger(a) for _ in range(3)]
            await half.send_all(b"\x13/multistream/1.0.0\n\x07/noise\n\x00\x20" + bytes(7))

            async def drip() -> None:
                with suppress(trio.BrokenResourceError):
                    while True:  # a byte now and then does not prolong it
                        await dripping.send_all(b"\x13")
                        await trio.sleep(0.2)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(drip)
                for stream in (silent, half):
                    await closed_after(stream)
                await closed_after(dripping)
                nursery.cancel_scope.cancel()
            assert trio.current_time() - started > 1.2
            assert a.counters.of("127.0.0.1") == {"handshake_timeout": 3}
            await still_works(a)


@pytest.mark.trio
async def test_silent_connections_are_bounded_in_number_and_do_not_keep_others_out_for_long() -> None:
    limits = TransportLimits(handshake_timeout_s=0.5, pending_connections_per_host=4)
    with trio.fail_after(20):
        async with opened(limits=limits) as a:
            silent = [await stranger(a) for _ in range(4)]
            await trio.sleep(0.05)
            assert await closed_after(await stranger(a)) == b""
            assert a.counters.of("127.0.0.1") == {"too_many_connections": 1}
            for stream in silent:
                await closed_after(stream)
            await still_works(a)


@pytest.mark.trio
async def test_plaintext_is_not_spoken() -> None:
    with trio.fail_after(10):
        async with opened() as a:
            for protocol in (b"/plaintext/2.0.0\n", b"/secio/1.0.0\n", b"/tls/1.0.0\n"):
                stream = await stranger(a)
                await stream.send_all(b"\x13/multistream/1.0.0\n" + bytes([len(protocol)]) + protocol)
                answer = b""
                while len(answer) < 24:
                    answer += await stream.receive_some()
                assert answer == b"\x13/multistream/1.0.0\n\x03na\n"
                await stream.aclose()


@pytest.mark.trio
async def test_who_only_looks_whether_the_port_is_open_is_not_counted() -> None:
    with trio.fail_after(10):
        async with opened() as a:
            await (await stranger(a)).aclose()
            await still_works(a)
            assert a.counters.total == 0


@pytest.mark.trio
async def test_nothing_is_accepted_before_hello_and_a_peer_without_one_is_dropped() -> None:
    served: list[str] = []

    async def handle(peer: str, stream: object) -> None:
        served.append(peer)

    key = IdentityKey.generate()
    protocol = TProtocol("/test/1")
    with trio.fail_after(20):
        async with (
            opened(limits=TransportLimits(handshake_timeout_s=0.5)) as a,
            trio.open_nursery() as nursery,
        ):
            a.serve(protocol, handle)
            muxer = await authenticated(a, key, nursery)
            for name in (protocol, TProtocol("/meshsub/1.1.0"), TProtocol("/ipfs/id/1.0.0")):
                await request_protocol(NetStream(await muxer.open_stream(), None, None), name, 2)
            await muxer.lost.wait()
            assert served == []
            assert a.counters.of(key.peer_id) == {"no_hello": 1}
            await nothing_happens(a)
            await still_works(a)


@pytest.mark.trio
async def test_a_first_frame_that_is_no_hello_ends_the_connection() -> None:
    with trio.fail_after(20):
        async with opened() as a, trio.open_nursery() as nursery:
            cases = {
                "unknown_kind": frame(MESSAGE, b"too early"),
                "oversized": HEADER.pack(HELLO, 1 << 31),
                "bad_hello": frame(HELLO, b"short"),
            }
            for kind, data in cases.items():
                key = IdentityKey.generate()
                muxer = await authenticated(a, key, nursery)
                stream = NetStream(await muxer.open_stream(), None, None)
                await request_protocol(stream, MESSAGES, 2)
                await stream.write(data)
                await muxer.lost.wait()
                assert a.counters.of(key.peer_id) == {kind: 1}
            await nothing_happens(a)
            await still_works(a)


@pytest.mark.trio
@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("oversized", HEADER.pack(MESSAGE, MAX_FRAME_BYTES + 1)),
        ("oversized", HEADER.pack(PONG, 9)),
        ("unknown_kind", frame(77, b"?")),
        ("unknown_kind", frame(HELLO, b"a second time")),
    ],
)
async def test_a_broken_frame_costs_the_link_and_is_counted(kind: str, data: bytes) -> None:
    with trio.fail_after(10):
        async with linked() as (a, b):
            await write_within(b._links[a.peer_id][0].stream, data, 1)
            gone = await next_of(a, Disconnected)
            assert gone.peer == b.peer_id
            assert gone.reason.startswith(kind)
            assert a.counters.of(b.peer_id) == {kind: 1}
            await next_of(b, Disconnected)
            await b.connect(a.peer_id, a.addresses())
            await next_of(a, Connected)


@pytest.mark.trio
async def test_a_yamux_frame_beyond_all_measure_costs_the_connection() -> None:
    with trio.fail_after(10):
        async with linked() as (a, b):
            muxer = b._links[a.peer_id][0].muxer
            await muxer._write_frame(
                bytes([0, 0, 0, 0]) + (1).to_bytes(4, "big") + (8 << 20).to_bytes(4, "big")
            )
            await next_of(a, Disconnected)
            assert a.counters.of(b.peer_id) == {"yamux_frame_oversized": 1}


@pytest.mark.trio
async def test_a_peer_that_ignores_the_receive_window_costs_bounded_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(node.network.transport_guard, "MAX_BUFFERED_BYTES", 1_000_000)
    with trio.fail_after(20):
        async with linked() as (a, b):

            async def never_read(peer: str, stream: object) -> None:
                await trio.sleep_forever()

            a.serve(TProtocol("/test/1"), never_read)
            stream = await b.open_stream(a.peer_id, TProtocol("/test/1"))
            stream.muxed_stream.send_window = 1 << 40  # type: ignore[attr-defined]
            with pytest.raises(IOException):
                await stream.write(bytes(64 * 1024 * 1024))
            await next_of(a, Disconnected)
            assert a.counters.of(b.peer_id) == {"yamux_window_ignored": 1}


@pytest.mark.trio
async def test_stream_negotiation_survives_what_is_no_text_and_endless_listing() -> None:
    with trio.fail_after(20):
        async with linked() as (a, b):
            for data in (
                b"\x05\xff\xff\xff\xff\n",
                b"\x13/multistream/1.0.0\n" + b"\x03ls\n" * 100,
                b"\xff\xff\xff\x7f",
            ):
                stream = await b._links[a.peer_id][0].connection.new_stream()
                await stream.write(data)
                await ended(stream)
            assert b.send(a.peer_id, b"unharmed")
            assert (await next_of(a, Received)).frame == b"unharmed"


@pytest.mark.trio
async def test_streams_of_one_peer_are_bounded_and_a_failing_server_stops_nothing() -> None:
    async def handle(peer: str, stream: object) -> None:
        await trio.sleep_forever()

    async def fail(peer: str, stream: object) -> None:
        raise ValueError("a bug")

    with trio.fail_after(20):
        async with linked(TransportLimits(streams_per_peer=5)) as (a, b):
            a.serve(TProtocol("/hang/1"), handle)
            a.serve(TProtocol("/fail/1"), fail)
            with suppress(StreamEnded):  # the reset often overtakes the answer of the negotiation
                await ended(await b.open_stream(a.peer_id, TProtocol("/fail/1")))
            assert a.counters.of(b.peer_id) == {"bad_stream": 1}
            hanging = 0
            with suppress(StreamEnded):
                while hanging < 10:
                    await b.open_stream(a.peer_id, TProtocol("/hang/1"))
                    hanging += 1
            assert hanging in {3, 4}  # beside the messages stream, and gossip's if it was there before
            assert a.counters.of(b.peer_id)["too_many_streams"] == 1
            with pytest.raises(StreamEnded):
                await b.open_stream(a.peer_id, TProtocol("/unknown/1"))
            assert b.send(a.peer_id, b"unharmed")
            assert (await next_of(a, Received)).frame == b"unharmed"


# Announcements --------------------------------------------------------------------------------------------------------------


async def announced(transport: Libp2pTransport) -> Announced:
    while not isinstance(event := await transport.receive(), Announced):
        pass
    return event


@pytest.mark.trio
async def test_an_announcement_reaches_who_is_not_connected_to_its_author() -> None:
    with trio.fail_after(20):
        async with opened() as a, opened() as b, opened() as c:
            await b.connect(a.peer_id, a.addresses())
            await c.connect(b.peer_id, b.addresses())
            for number in range(3):
                await trio.sleep(1.2 if number == 0 else 0)  # a heartbeat, for the mesh to form
                await a.announce(b"record %d" % number)
                expected = Announced(a.peer_id, b"record %d" % number)
                assert await announced(b) == expected
                assert await announced(c) == expected
            await nothing_happens(b)


@pytest.mark.trio
async def test_a_node_that_announces_and_hears_much_keeps_the_last_seconds_of_it_only() -> None:
    with trio.fail_after(30):
        async with linked() as (a, b):
            for number in range(20):
                await trio.sleep(1.2 if number == 0 else 0)  # a heartbeat, for the mesh to form
                await a.announce(b"record %d" % number)
                await announced(b)
            for transport in (a, b):
                router = transport._announcements.gossip
                assert not router.equivocation_detection
                assert not router.recent_message_deliveries
                # What others may still ask for goes with the next heartbeats.
                await eventually(lambda router=router: not router.mcache.msgs)  # type: ignore[misc]


@pytest.mark.trio
async def test_malformed_gossip_is_counted_and_gossip_goes_on() -> None:
    with trio.fail_after(20):
        async with linked() as (a, b):
            for garbage in (
                b"\x08" + b"\xff" * 8,  # a number without an end
                b"\x04\xff\xff\xff\xff",
                b"\xff\xff\xff\xff\x0f",
                b"\x03\x12\x01\xff",
            ):
                stream = await b.open_stream(a.peer_id, TProtocol("/meshsub/1.1.0"))
                await write_within(stream, garbage, 1)
                with pytest.raises(StreamEnded):
                    await FrameReader(stream, {}).next(stall_s=5)
            assert a.counters.by_kind().keys() <= {"bad_announcement"}
            assert a.counters.total > 0
            await trio.sleep(1.5)
            await b.announce(b"afterwards")
            assert await announced(a) == Announced(b.peer_id, b"afterwards")


@pytest.mark.trio
async def test_what_is_no_certified_record_is_counted_and_not_passed_on() -> None:
    certificate = Certificate(1, 1, bytes(32), ())
    records = encode(Records((), certificate, 1))
    with trio.fail_after(20):
        async with opened() as author, opened(check_announcement=check_announcement) as b, opened() as c:
            await b.connect(author.peer_id, author.addresses())
            await c.connect(b.peer_id, b.addresses())
            await trio.sleep(1.2)  # a heartbeat, for the mesh to form
            for data in (
                encode(RecordsRequest(1)),
                encode(StatusReply(b"")),
                b"",
                os.urandom(100),
                records + b"x",
            ):
                await author.announce(data)
            await author.announce(records)
            assert (await announced(b)).data == records
            assert (await announced(c)).data == records, "of the rest, nothing went further"
            assert b.counters.of(author.peer_id) == {"bad_announcement": 5}


@pytest.mark.trio
async def test_what_is_too_large_to_send_is_our_own_mistake() -> None:
    with trio.fail_after(10):
        async with opened() as a:
            with pytest.raises(LocalError):
                a.send("anybody", bytes(MAX_FRAME_BYTES + 1))
            with pytest.raises(LocalError):
                await a.announce(bytes(20_000))
            with pytest.raises(LocalError):
                a.set_hello(bytes(20_000))


# Listening and being reached --------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_port_that_is_taken_is_refused_even_by_one_that_would_share_it() -> None:
    for share in (False, True):
        with socket.socket() as other:
            if share:  # as py-libp2p's own listener does
                other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            other.bind(("127.0.0.1", 0))
            other.listen()
            port = other.getsockname()[1]
            with pytest.raises(UserError, match=f"port {port} is taken"):
                async with open_transport(
                    IdentityKey.generate(),
                    [f"/ip4/127.0.0.1/tcp/{port}"],
                    hello=b"",
                    check_hello=accept_all,
                    session=bytes(8),
                ):
                    raise AssertionError


@pytest.mark.trio
async def test_a_port_is_free_again_after_leaving() -> None:
    with trio.fail_after(20):
        key = IdentityKey.generate()
        async with opened(key) as a:
            address = a.addresses()[0].split("/p2p/")[0]
        for _ in range(2):
            async with (
                open_transport(
                    key, [address], hello=b"", check_hello=accept_all, session=os.urandom(8)
                ) as again,
                opened() as b,
            ):
                assert await b.connect(key.peer_id, [address]) == again.peer_id


@pytest.mark.trio
async def test_announced_addresses_come_first_and_bad_ones_are_the_users_mistake() -> None:
    key = IdentityKey.generate()

    def announcing(*addresses: str) -> AbstractAsyncContextManager[Libp2pTransport]:
        return open_transport(
            key, LOOPBACK, hello=b"", check_hello=accept_all, session=bytes(8), announce=addresses
        )

    async with announcing("example.org:4001") as a:
        assert a.addresses()[0] == f"/dns/example.org/tcp/4001/p2p/{key.peer_id}"
        assert len(a.addresses()) == 2
    with pytest.raises(UserError, match="cannot announce"):
        async with announcing("nonsense"):
            raise AssertionError


@pytest.mark.trio
async def test_reachability_is_tried_on_a_new_connection_and_disturbs_nobody() -> None:
    with trio.fail_after(20):
        async with linked() as (a, b):
            assert await b.reachable(a.addresses()[0], a.peer_id)
            assert await b.reachable(f"127.0.0.1:{a.ports()[0]}", a.peer_id)
            assert not await b.reachable(f"127.0.0.1:{a.ports()[0]}", b.peer_id)
            assert not await b.reachable("nonsense", a.peer_id)
            with socket.create_server(("127.0.0.1", 0)) as closed:
                port = closed.getsockname()[1]
            assert not await b.reachable(f"127.0.0.1:{port}", a.peer_id)
            await nothing_happens(a)
            await nothing_happens(b)
            assert a.counters.total == b.counters.total == 0

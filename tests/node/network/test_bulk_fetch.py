"""Fetching content from several peers: what arrives is right whoever lies, stalls, refuses or dies."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from node.network.bulk_fetch import FetchError, FetchReport, fetch, fetch_into
from node.network.transport_events import Disconnected
from node.storage.identity_key import IdentityKey
from node.storage.store import Store
from p2pcoord.content import CHUNK_BYTES, ContentRef, Manifest, manifest_of
from p2pcoord.errors import LocalError
from tests.node.network.bulk_sources import (
    CONTENT,
    REF,
    Held,
    MemorySink,
    OnceCaught,
    Sinks,
    fetcher_and_sources,
    ids,
)


@pytest.mark.trio
async def test_two_sources_share_the_work_and_every_byte_is_accounted_for() -> None:
    asked = threading.Event(), threading.Event()

    def meet(mine: int) -> Callable[[int, bytes], bytes]:
        def twist(index: int, chunk: bytes) -> bytes:
            asked[mine].set()
            asked[1 - mine].wait(10)  # no source answers before both were asked
            return chunk

        return twist

    with trio.fail_after(20):
        async with fetcher_and_sources(Held(twist=meet(0)), Held(twist=meet(1))) as (fetcher, sources):
            sinks, seen = Sinks(), []
            report = await fetch(
                fetcher, REF, ids(sources), sinks, lambda done, size: seen.append((done, size))
            )
            assert sinks.content == CONTENT
            assert set(report.bytes_by_source) == set(ids(sources))
            assert sum(report.bytes_by_source.values()) == len(CONTENT)
            assert report.bad_sources == {}
            assert report.seconds > 0
            assert [done for done, _ in seen] == sorted(done for done, _ in seen)
            assert seen[0] == (0, len(CONTENT))
            assert seen[-1] == (len(CONTENT), len(CONTENT))


@pytest.mark.trio
async def test_nothing_of_a_transfer_that_is_over_stays_in_the_connections() -> None:
    with trio.fail_after(20):
        async with fetcher_and_sources(Held()) as (fetcher, sources):
            ends = fetcher._links[sources[0].peer_id][0].muxer, sources[0]._links[fetcher.peer_id][0].muxer
            for _ in range(10):
                await fetch(fetcher, REF, ids(sources), Sinks())
            for muxer in ends:
                # Messages, gossip in both directions; the last transfer is just ending.
                while len(muxer.streams) > 5:  # noqa: ASYNC110  # a connection's streams have no event
                    await trio.sleep(0.01)
                assert set(muxer.stream_events) <= set(muxer.streams)
                assert set(muxer.stream_buffers) <= set(muxer.streams)


@pytest.mark.trio
@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1])
async def test_any_size_arrives(size: int) -> None:
    content = os.urandom(size)
    with trio.fail_after(20):
        async with fetcher_and_sources(Held(content)) as (fetcher, sources):
            sinks = Sinks()
            await fetch(fetcher, manifest_of(content).ref, ids(sources), sinks)
            assert sinks.content == content


@pytest.mark.trio
async def test_a_wrong_chunk_names_its_source_and_is_fetched_elsewhere() -> None:
    def flipped(index: int, chunk: bytes) -> bytes:
        return chunk if index % 2 else bytes([chunk[0] ^ 1]) + chunk[1:]

    with trio.fail_after(20):
        async with fetcher_and_sources(Held(twist=flipped), Held()) as (fetcher, sources):
            liar, honest = ids(sources)
            sinks = Sinks()
            report = await fetch(fetcher, REF, OnceCaught(fetcher, liar, honest), sinks)
            assert sinks.content == CONTENT
            assert set(report.bad_sources) == {liar}
            assert "bad_chunk" in report.bad_sources[liar]
            assert fetcher.counters.of(liar) == {"bad_chunk": 1}
            assert fetcher.is_connected(liar)  # what it costs besides is decided elsewhere
            assert sum(report.bytes_by_source.values()) == len(CONTENT)


@pytest.mark.trio
@pytest.mark.parametrize(
    "twist",
    [
        lambda i, chunk: chunk[:-1],
        lambda i, chunk: b"",
        lambda i, chunk: chunk + b"x" if i == 7 else chunk[1:],
    ],
)
async def test_a_chunk_of_the_wrong_length_is_a_wrong_chunk(twist: Callable[[int, bytes], bytes]) -> None:
    with trio.fail_after(20):
        async with fetcher_and_sources(Held(twist=twist), Held()) as (fetcher, sources):
            sinks = Sinks()
            report = await fetch(fetcher, REF, OnceCaught(fetcher, *ids(sources)), sinks)
            assert sinks.content == CONTENT
            assert set(report.bad_sources) == {sources[0].peer_id}


@pytest.mark.trio
async def test_a_manifest_that_does_not_have_the_root_is_not_believed() -> None:
    with trio.fail_after(20):
        async with fetcher_and_sources(Held(os.urandom(len(CONTENT))), Held()) as (fetcher, sources):
            sinks = Sinks()
            report = await fetch(fetcher, REF, OnceCaught(fetcher, *ids(sources)), sinks)
            assert sinks.content == CONTENT
            assert "bad_manifest" in report.bad_sources[sources[0].peer_id]


@pytest.mark.trio
async def test_when_no_source_is_left_each_ones_reason_is_told() -> None:
    def broken(index: int, chunk: bytes) -> bytes:
        raise LocalError("the disk changed it")

    with trio.fail_after(20):
        async with fetcher_and_sources(
            None, Held(twist=broken), Held(twist=lambda i, chunk: bytes(len(chunk)))
        ) as (fetcher, sources):
            nothing, unreadable, liar = ids(sources)
            stranger = IdentityKey.generate().peer_id
            sinks = Sinks()
            with pytest.raises(FetchError) as failed:
                await fetch(fetcher, REF, [nothing, unreadable, liar, stranger], sinks)
            reasons = failed.value.reasons
            assert reasons[nothing] == "unavailable: not here, or not for you"
            assert reasons[unreadable] == "unavailable: not readable any more"
            assert "bad_chunk" in reasons[liar]
            assert reasons[stranger] == "connection lost (not connected)"
            assert set(failed.value.bad_sources) == {liar}
            assert all(peer in str(failed.value) for peer in reasons)
            with pytest.raises(FetchError, match="no source is known"):
                await fetch(fetcher, REF, [], sinks)


@pytest.mark.trio
async def test_a_source_that_stalls_loses_its_chunks_to_another() -> None:
    stuck = threading.Event()

    def stall(index: int, chunk: bytes) -> bytes:
        stuck.wait(15)
        return chunk

    with trio.fail_after(20):
        async with fetcher_and_sources(Held(twist=stall), Held()) as (fetcher, sources):
            sinks = Sinks()
            # Long before the stall is declared: idle sources ask again.
            report = await fetch(fetcher, REF, ids(sources), sinks, stall_s=60)
            assert report.bytes_by_source == {sources[1].peer_id: len(CONTENT)}
            sinks = Sinks()
            with pytest.raises(FetchError, match=r"sent nothing for 0\.3 s"):
                await fetch(fetcher, REF, ids(sources[:1]), sinks, stall_s=0.3)
            stuck.set()


@pytest.mark.trio
async def test_a_source_added_while_fetching_is_used_and_a_fast_one_carries_more() -> None:
    def slow(index: int, chunk: bytes) -> bytes:
        time.sleep(0.3)
        return chunk

    with trio.fail_after(20):
        async with fetcher_and_sources(Held(twist=slow), Held()) as (fetcher, sources):
            live, sinks = [sources[0].peer_id], Sinks()

            async def add() -> None:
                await trio.sleep(0.4)
                live.append(sources[1].peer_id)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(add)
                report = await fetch(fetcher, REF, live, sinks)
            assert sinks.content == CONTENT
            assert report.bytes_by_source[sources[1].peer_id] > report.bytes_by_source[sources[0].peer_id]


@pytest.mark.trio
async def test_a_link_that_is_replaced_or_lost_and_made_again_costs_no_source() -> None:
    def slow(index: int, chunk: bytes) -> bytes:
        time.sleep(0.25)
        return chunk

    with trio.fail_after(20):
        async with fetcher_and_sources(Held(twist=slow), Held(twist=slow)) as (fetcher, sources):
            replaced, lost = ids(sources)

            async def disturb() -> None:
                await trio.sleep(0.15)
                # As when two peers dial each other at once: a second link, and the first is retired.
                await fetcher._introductions.dial(replaced, sources[0].addresses())
                for older in fetcher._links[replaced][:-1]:
                    older.close("retired")
                fetcher.disconnect(lost, "a hiccup")
                await trio.sleep(0.1)
                await fetcher.connect(lost, sources[1].addresses())

            sinks = Sinks()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(disturb)
                report = await fetch(fetcher, REF, [replaced, lost], sinks)
            assert sinks.content == CONTENT
            assert set(report.bytes_by_source) == {replaced, lost}
            assert report.bad_sources == {}


@pytest.mark.trio
async def test_a_sink_that_has_part_of_it_already_gets_the_rest_only() -> None:
    held = Held()
    sink = MemorySink(held.manifest())
    for index in (0, 3, 7):
        sink.write(index, held.read_chunk(index))
    held.asked.clear()
    with trio.fail_after(20):
        async with fetcher_and_sources(held) as (fetcher, sources):
            seen: list[int] = []
            report = await fetch(
                fetcher, REF, ids(sources), lambda _: sink, lambda done, size: seen.append(done)
            )
            assert sink.content() == CONTENT
            assert sorted(held.asked) == [1, 2, 4, 5, 6]
            assert sum(report.bytes_by_source.values()) == 5 * CHUNK_BYTES
            assert seen[0] == len(CONTENT) - 5 * CHUNK_BYTES
            again = await fetch(fetcher, REF, ids(sources), lambda _: sink)
            assert again.bytes_by_source == {}


@pytest.mark.trio
async def test_a_sink_that_fails_ends_the_fetch_with_its_own_error() -> None:
    class FullDisk(MemorySink):
        def write(self, index: int, chunk: bytes) -> None:
            raise LocalError("the disk is full")

    def cannot(manifest: Manifest) -> MemorySink:
        raise LocalError("no room for it")

    with trio.fail_after(20):
        async with fetcher_and_sources(Held(), Held()) as (fetcher, sources):
            with pytest.raises(LocalError, match="the disk is full"):
                await fetch(fetcher, REF, ids(sources), FullDisk)
            with pytest.raises(LocalError, match="no room for it"):
                await fetch(fetcher, REF, ids(sources), cannot)
            assert fetcher.counters.total == 0


@pytest.mark.trio
async def test_cancelling_keeps_what_arrived_and_the_link_unharmed() -> None:
    def slow(index: int, chunk: bytes) -> bytes:
        time.sleep(0.1)
        return chunk

    with trio.fail_after(30):
        async with fetcher_and_sources(Held(twist=slow)) as (fetcher, sources):
            sinks = Sinks()
            for _ in range(2):
                with trio.move_on_after(0.3) as scope:
                    await fetch(fetcher, REF, ids(sources), sinks)
                assert scope.cancelled_caught
            (first, *_) = sinks.made
            assert 0 < len(first.missing) < 8
            report = await fetch(fetcher, REF, ids(sources), lambda _: first)
            assert first.content() == CONTENT
            assert sum(report.bytes_by_source.values()) < len(CONTENT)
            assert fetcher.is_connected(sources[0].peer_id)
            assert fetcher.counters.total == sources[0].counters.total == 0


@pytest.mark.trio
async def test_cancelling_at_any_moment_leaves_the_link_unharmed() -> None:
    """py-libp2p writes window updates inside of reads: one that is cut off by a cancelled read would end the connection."""
    with trio.fail_after(60):
        async with fetcher_and_sources(Held()) as (fetcher, sources):
            for at in range(60):
                with trio.move_on_after(0.004 + at * 0.0006):
                    await fetch(fetcher, REF, ids(sources), Sinks())
            sinks = Sinks()
            await fetch(fetcher, REF, ids(sources), sinks)
            assert sinks.content == CONTENT
            with trio.move_on_after(0.2):
                while True:
                    assert not isinstance(await fetcher.receive(), Disconnected)


@pytest.mark.trio
async def test_what_is_fetched_into_a_store_appears_there_whole_or_is_gone_on_with(tmp_path: Path) -> None:
    fail = [True]

    def broken(index: int, chunk: bytes) -> bytes:
        if index == 5 and fail[0]:
            raise LocalError("the disk changed it")
        return chunk

    with trio.fail_after(20):
        async with fetcher_and_sources(Held(twist=broken)) as (fetcher, sources):
            with Store.open(tmp_path / "node") as store:
                with pytest.raises(FetchError, match="not readable any more"):
                    await fetch_into(store, fetcher, REF, ids(sources))
                assert not store.has(REF)
                fail[0] = False
                report = await fetch_into(store, fetcher, REF, ids(sources))
                assert store.has(REF)
                assert store.file_of(REF).read_bytes() == CONTENT
                assert 0 < sum(report.bytes_by_source.values()) < len(CONTENT)


SERVER = """
import os, sys, time, trio
from node.network.bulk import serve
from node.storage.identity_key import IdentityKey
from node.network.libp2p_transport import open_transport
from p2pcoord.content import CHUNK_BYTES, manifest_of
content = sys.stdin.buffer.read()
class Held:
    def manifest(self): return manifest_of(content)
    def read_chunk(self, index):
        time.sleep(0.05)
        return content[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
async def main():
    async with open_transport(IdentityKey.generate(), ["/ip4/127.0.0.1/tcp/0"], hello=b"", session=os.urandom(8),
                              check_hello=lambda peer, hello: None) as transport:
        serve(transport, lambda peer, root: Held())
        print(transport.addresses()[0], flush=True)
        while True:
            await transport.receive()
trio.run(main)
"""


@pytest.mark.trio
async def test_a_source_process_killed_in_mid_transfer_costs_only_what_it_owed() -> None:
    def slow(index: int, chunk: bytes) -> bytes:
        time.sleep(0.05)
        return chunk

    with trio.fail_after(40):
        async with fetcher_and_sources(Held(twist=slow)) as (
            fetcher,
            sources,
        ):
            child = subprocess.Popen(  # noqa: ASYNC220
                [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            try:
                assert child.stdin is not None
                assert child.stdout is not None
                await trio.to_thread.run_sync(child.stdin.write, CONTENT)
                child.stdin.close()
                address = (await trio.to_thread.run_sync(child.stdout.readline)).decode().strip()
                victim = await fetcher.connect(None, [address])
                killed_at: list[float] = []

                def kill_halfway(done: int, size: int) -> None:
                    if done > size // 3 and not killed_at:
                        killed_at.append(trio.current_time())
                        child.send_signal(signal.SIGKILL)

                sinks = Sinks()
                report: FetchReport = await fetch(
                    fetcher, REF, [victim, sources[0].peer_id], sinks, kill_halfway
                )
                assert killed_at
                print(f"from SIGKILL of a source to the end: {trio.current_time() - killed_at[0]:.2f} s")
                assert sinks.content == CONTENT
                assert sum(report.bytes_by_source.values()) == len(CONTENT)
                assert report.bad_sources == {}
                while not isinstance(event := await fetcher.receive(), Disconnected):
                    pass
                assert event.peer == victim
                with pytest.raises(FetchError, match="not connected"):
                    await fetch(fetcher, ContentRef(bytes(32), 5), [victim], Sinks())
            finally:
                child.kill()
                child.wait()
                assert child.stdout is not None
                child.stdout.close()

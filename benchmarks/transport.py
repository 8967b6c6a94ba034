"""Figures of the transport on this machine: python -m benchmarks.transport [--megabytes 10 100]

Every peer is a process of its own on 127.0.0.1. Printed: time to connect; round trip of a small message; MB/s of fetching
content from one and two sources, beside raw TCP between two Python processes in the same run; time from SIGKILL to the
event; CPU of a resting node with three links.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TypeVar

import trio

from node.network.bulk import serve
from node.network.bulk_fetch import fetch
from node.network.libp2p_transport import Libp2pTransport, open_transport
from node.network.transport_events import Connected, Disconnected, Event, Received
from node.storage.identity_key import IdentityKey
from p2pcoord.content import CHUNK_BYTES, Manifest, manifest_of
from tests.node.network.bulk_sources import MemorySink

E = TypeVar("E", bound=Event)

MEGABYTE = 1_000_000
RAW_TCP_BYTES = 256 * MEGABYTE


class Held:
    """Content that both sides can make from its size alone."""

    def __init__(self, size_bytes: int) -> None:
        self._content = memoryview((b"\x5a\x13\xc7" * (size_bytes // 3 + 1))[:size_bytes])
        self._manifest = manifest_of(self._content)

    def manifest(self) -> Manifest:
        return self._manifest

    def read_chunk(self, index: int) -> bytes:
        return bytes(self._content[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES])


def transport() -> AbstractAsyncContextManager[Libp2pTransport]:
    return open_transport(
        IdentityKey.generate(),
        ["/ip4/127.0.0.1/tcp/0"],
        hello=b"",
        check_hello=lambda peer, hello: None,
        session=os.urandom(8),
    )


async def peer_process(sizes: list[int]) -> None:
    """The other side: echoes messages and serves content."""
    contents = {held.manifest().root: held for held in map(Held, sizes)}
    async with transport() as here:
        serve(here, lambda peer, root: contents.get(root))
        print(here.addresses()[0], flush=True)
        while True:
            if isinstance(event := await here.receive(), Received):
                here.send(event.peer, event.frame)


@asynccontextmanager
async def other_peer(sizes: list[int]) -> AsyncIterator[tuple[subprocess.Popen[bytes], str]]:
    command = [sys.executable, "-m", "benchmarks.transport", "--serve", *map(str, sizes)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE)  # noqa: ASYNC220
    try:
        assert child.stdout is not None
        yield child, (await trio.to_thread.run_sync(child.stdout.readline)).decode().strip()
    finally:
        child.kill()
        child.wait()


async def next_of(here: Libp2pTransport, kind: type[E]) -> E:
    while not isinstance(event := await here.receive(), kind):
        pass
    return event


def milliseconds(samples: list[float]) -> str:
    ordered = sorted(samples)
    p99 = ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]
    return f"median {statistics.median(ordered) * 1e3:.2f} ms, p99 {p99 * 1e3:.2f} ms"


def raw_tcp_megabytes_per_s() -> float:
    """Plain sockets, a sender process and this one receiving into one buffer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = (
            "import socket, sys\n"
            "s = socket.create_connection(('127.0.0.1', int(sys.argv[1])))\n"
            "block = bytes(262144)\n"
            "for _ in range(int(sys.argv[2]) // len(block)): s.sendall(block)\n"
        )
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(server.getsockname()[1]), str(RAW_TCP_BYTES)]
        )
        connection, _ = server.accept()
        buffer, received, started = bytearray(262_144), 0, time.perf_counter()
        while count := connection.recv_into(buffer):
            received += count
        seconds = time.perf_counter() - started
        connection.close()
        child.wait()
    return received / MEGABYTE / seconds


async def measure_connecting(here: Libp2pTransport, peer: str, address: str) -> None:
    samples = []
    for _ in range(30):
        here.disconnect(peer, "measuring")
        await next_of(here, Disconnected)
        started = time.perf_counter()
        await here.connect(peer, [address])
        samples.append(time.perf_counter() - started)
        await next_of(here, Connected)
    print(f"connect (TCP, Noise, Yamux, hello):     {milliseconds(samples)}")


async def measure_round_trips(here: Libp2pTransport, peer: str) -> None:
    for size in (100, 64 * 1024):
        samples = []
        for _ in range(300):
            started = time.perf_counter()
            here.send(peer, bytes(size))
            await next_of(here, Received)
            samples.append(time.perf_counter() - started)
        print(f"round trip of a message of {size:>6} bytes: {milliseconds(samples[20:])}")


async def measure_fetching(here: Libp2pTransport, sources: list[str], sizes: list[int]) -> None:
    raw = raw_tcp_megabytes_per_s()
    print(f"raw TCP between two Python processes:   {raw:.0f} MB/s")
    for size in sizes:
        ref = Held(size).manifest().ref
        for count in range(1, len(sources) + 1):
            rates, cpu = [], []
            for _ in range(3):
                before = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
                report = await fetch(here, ref, sources[:count], MemorySink)
                cpu.append((sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) - before) / size * 1e9)
                rates.append(size / MEGABYTE / report.seconds)
            rate = statistics.median(rates)
            print(
                f"fetch of {size / MEGABYTE:>4.0f} MB from {count} source{'s' if count > 1 else ' '}:           "
                f"{rate:.0f} MB/s, {rate / raw:.1%} of raw TCP, {statistics.median(cpu):.1f} CPU-seconds/GB here"
            )


async def measure_kill(here: Libp2pTransport) -> None:
    samples = []
    for _ in range(5):
        async with other_peer([]) as (child, address):
            peer = await here.connect(None, [address])
            await trio.sleep(0.2)
            started = time.perf_counter()
            child.send_signal(signal.SIGKILL)
            while (await next_of(here, Disconnected)).peer != peer:
                pass
            samples.append(time.perf_counter() - started)
    print(f"from SIGKILL to Disconnected:           {milliseconds(samples)}")


async def measure_rest(here: Libp2pTransport, seconds: float = 10.0) -> None:
    before = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    await trio.sleep(seconds)
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) - before
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"resting with {len(here.connected_peers())} links:                   "
        f"{used / seconds:.1%} of a core; peak memory of this process {peak_mib:.0f} MiB"
    )


async def main(sizes: list[int]) -> None:
    async with (
        transport() as here,
        other_peer(sizes) as (_, first),
        other_peer(sizes) as (_, second),
        other_peer([]) as (_, third),
    ):
        peers = [await here.connect(None, [address]) for address in (first, second, third)]
        await measure_rest(here)
        await measure_round_trips(here, peers[0])
        await measure_fetching(here, peers[:2], sizes)
        await measure_kill(here)
        await measure_connecting(here, peers[2], third)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--serve", type=int, nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        trio.run(peer_process, arguments.serve)
    else:
        trio.run(main, [number * MEGABYTE for number in arguments.megabytes])

"""Bulk bytes on the wire, and serving them: content that peers fetch chunk by chunk (`bulk_fetch.py` is the other end).

Theory of operation
    A transfer stream (`/p2pcoord/transfer/1`) carries requests one way and answers, in the same order, the other way:

        WANT_MANIFEST root           ->  MANIFEST size (8 bytes), then the hash of each chunk
        WANT_CHUNK    root, index    ->  CHUNK bytes
                                     or  UNAVAILABLE text, when the content is not here or not for this peer

Hashing and disk always run in worker threads: handing over costs 0.1-0.3 ms, a slow disk would cost everybody's heartbeats.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Protocol

import trio
from libp2p.custom_types import TProtocol
from libp2p.network.stream.net_stream import NetStream

from node.network.libp2p_transport import Libp2pTransport
from node.network.streams import FrameReader, StreamEnded, frame
from node.network.transport_guard import write_within
from p2pcoord.content import CHUNK_BYTES, HASH_BYTES, MAX_CONTENT_BYTES, Manifest
from p2pcoord.errors import LocalError, RemoteError

TRANSFER = TProtocol("/p2pcoord/transfer/1")

WANT_MANIFEST, WANT_CHUNK, MANIFEST, CHUNK, UNAVAILABLE = range(16, 21)

SIZE = struct.Struct("!Q")
INDEX = struct.Struct("!I")
MAX_MANIFEST_BYTES = SIZE.size + HASH_BYTES * (MAX_CONTENT_BYTES // CHUNK_BYTES)
MAX_TEXT_BYTES = 256

REQUEST_LIMITS = {WANT_MANIFEST: HASH_BYTES, WANT_CHUNK: HASH_BYTES + INDEX.size}
ANSWER_LIMITS = {MANIFEST: MAX_MANIFEST_BYTES, CHUNK: CHUNK_BYTES, UNAVAILABLE: MAX_TEXT_BYTES}

# How long a serving stream waits for a next request; a fetcher that pauses opens a new one.
IDLE_S = 60.0
WRITE_TIMEOUT_S = 15.0

# Threads that read chunks for others: disk, not computing.
READERS = 4


class Readable(Protocol):
    """Content that is served. Both are called in worker threads, and may raise LocalError when it is gone or damaged."""

    def manifest(self) -> Manifest: ...

    def read_chunk(self, index: int) -> bytes: ...


def serve(transport: Libp2pTransport, lookup: Callable[[str, bytes], Readable | None]) -> None:
    """Answer transfer streams. `lookup(peer, root)` decides what a peer may have: None when nothing of that root is here or
    it is not for this peer (the peer cannot tell which). It is called on the trio thread and must not block."""
    limiter = trio.CapacityLimiter(READERS)

    async def handle(peer: str, stream: NetStream) -> None:
        reader = FrameReader(stream, REQUEST_LIMITS)
        root, readable, manifest = b"", None, None
        while True:
            try:
                with trio.fail_after(IDLE_S):
                    kind, body = await reader.next()
            except (trio.TooSlowError, StreamEnded):
                return
            if len(body) != REQUEST_LIMITS[kind]:
                raise RemoteError("bad_request", f"a transfer request of {len(body)} bytes")
            # Asked each time: membership may have changed since the last chunk.
            found = lookup(peer, body[:HASH_BYTES])
            if found is None:
                await _answer(stream, UNAVAILABLE, b"not here, or not for you")
                continue
            try:
                if readable is None or root != body[:HASH_BYTES]:
                    manifest = await trio.to_thread.run_sync(found.manifest, limiter=limiter)
                    root, readable = body[:HASH_BYTES], found
                assert manifest is not None
                if kind == WANT_MANIFEST:
                    await _answer(stream, MANIFEST, encode_manifest(manifest))
                    continue
                (index,) = INDEX.unpack(body[HASH_BYTES:])
                if index >= len(manifest.chunk_hashes):
                    raise RemoteError("bad_request", f"no chunk {index} of {len(manifest.chunk_hashes)}")
                chunk = await trio.to_thread.run_sync(readable.read_chunk, index, limiter=limiter)
            except LocalError:
                root, readable = b"", None
                await _answer(stream, UNAVAILABLE, b"not readable any more")
            else:
                await _answer(stream, CHUNK, chunk)

    transport.serve(TRANSFER, handle)


async def _answer(stream: NetStream, kind: int, body: bytes) -> None:
    try:
        await write_within(stream, frame(kind, body), WRITE_TIMEOUT_S)
    except trio.TooSlowError as error:
        raise RemoteError("write_timeout", "does not read the chunk it asked for") from error


def encode_manifest(manifest: Manifest) -> bytes:
    return SIZE.pack(manifest.size_bytes) + b"".join(manifest.chunk_hashes)


def decode_manifest(data: bytes) -> Manifest:
    """Not checked against anything but its form. Raises RemoteError("bad_manifest")."""
    if len(data) < SIZE.size or (len(data) - SIZE.size) % HASH_BYTES:
        raise RemoteError("bad_manifest", f"{len(data)} bytes")
    (size_bytes,) = SIZE.unpack_from(data)
    hashes = tuple(data[at : at + HASH_BYTES] for at in range(SIZE.size, len(data), HASH_BYTES))
    return Manifest(size_bytes, hashes)

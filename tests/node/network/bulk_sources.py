"""Transports that serve content to each other on 127.0.0.1, honest or with a twist: for the tests of both ends of a transfer."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from random import Random

from node.network.bulk import Readable, serve
from node.network.libp2p_transport import Libp2pTransport, open_transport
from node.storage.identity_key import IdentityKey
from p2pcoord.content import CHUNK_BYTES, Manifest, check_chunk, manifest_of
from p2pcoord.errors import LocalError

CONTENT = Random(7).randbytes(7 * CHUNK_BYTES + 12_345)
REF = manifest_of(CONTENT).ref


class Held:
    """Content in memory, served with an optional twist per chunk."""

    def __init__(self, content: bytes = CONTENT, twist: Callable[[int, bytes], bytes] | None = None) -> None:
        self.content = content
        self.twist = twist
        self.asked: list[int] = []

    def manifest(self) -> Manifest:
        return manifest_of(self.content)

    def read_chunk(self, index: int) -> bytes:
        self.asked.append(index)
        chunk = self.content[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
        return self.twist(index, chunk) if self.twist else chunk


class MemorySink:
    """Keeps small content in memory; `content` gives it when the fetch is done."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._chunks: dict[int, bytes] = {}

    @property
    def missing(self) -> tuple[int, ...]:
        return tuple(i for i in range(len(self._manifest.chunk_hashes)) if i not in self._chunks)

    def write(self, index: int, chunk: bytes) -> None:
        check_chunk(self._manifest, index, chunk)
        self._chunks[index] = chunk

    def content(self) -> bytes:
        """Raises LocalError while chunks are missing."""
        if self.missing:
            raise LocalError(f"{len(self.missing)} chunks are missing")
        return b"".join(self._chunks[index] for index in range(len(self._chunks)))


class Sinks:
    """Makes one MemorySink and keeps it."""

    def __init__(self) -> None:
        self.made: list[MemorySink] = []

    def __call__(self, manifest: Manifest) -> MemorySink:
        self.made.append(MemorySink(manifest))
        return self.made[0]

    @property
    def content(self) -> bytes:
        (sink,) = self.made
        return sink.content()


class OnceCaught:
    """Sources of a fetch: the liar alone, and the honest one from when the fetcher has counted a failure of the liar. So the
    liar is asked and caught however busy the machine is."""

    def __init__(self, fetcher: Libp2pTransport, liar: str, honest: str) -> None:
        self._fetcher = fetcher
        self._liar = liar
        self._honest = honest

    def __iter__(self) -> Iterator[str]:
        yield self._liar
        if self._fetcher.counters.of(self._liar):
            yield self._honest


@asynccontextmanager
async def fetcher_and_sources(
    *readables: Readable | None,
) -> AsyncIterator[tuple[Libp2pTransport, list[Libp2pTransport]]]:
    """A fetcher connected to one source for each readable (None: a source that has nothing)."""
    async with AsyncExitStack() as stack:

        async def opened() -> Libp2pTransport:
            return await stack.enter_async_context(
                open_transport(
                    IdentityKey.generate(),
                    ["/ip4/127.0.0.1/tcp/0"],
                    hello=b"",
                    check_hello=lambda peer, hello: None,
                    session=os.urandom(8),
                )
            )

        fetcher = await opened()
        sources = []
        for readable in readables:
            source = await opened()
            serve(source, lambda peer, root, held=readable: held)  # type: ignore[misc]
            await fetcher.connect(source.peer_id, source.addresses())
            sources.append(source)
        yield fetcher, sources


def ids(sources: list[Libp2pTransport]) -> list[str]:
    return [source.peer_id for source in sources]

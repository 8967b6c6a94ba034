"""Serving content: who may have it is asked each time, and a broken request costs its stream only."""

from contextlib import suppress

import pytest
import trio
from libp2p.io.exceptions import IOException

from node.network.bulk import TRANSFER, Readable, decode_manifest, encode_manifest, serve
from node.network.bulk_fetch import FetchError, fetch
from node.network.streams import HEADER
from node.network.transport_guard import write_within
from p2pcoord.content import CHUNK_BYTES, manifest_of
from p2pcoord.errors import RemoteError
from tests.node.network.bulk_sources import CONTENT, REF, Held, Sinks, fetcher_and_sources, ids


@pytest.mark.trio
async def test_permission_is_asked_for_each_chunk() -> None:
    allowed = [True]
    with trio.fail_after(20):
        async with fetcher_and_sources(None) as (fetcher, sources):
            asked: list[tuple[str, bytes]] = []

            def lookup(peer: str, root: bytes) -> Readable | None:
                asked.append((peer, root))
                return Held() if allowed[0] and root == REF.root else None

            serve(sources[0], lookup)

            def withdraw(done: int, size: int) -> None:
                if done >= 2 * CHUNK_BYTES:
                    allowed[0] = False

            with pytest.raises(FetchError, match="not for you"):
                await fetch(fetcher, REF, ids(sources), Sinks(), withdraw)
            assert set(asked) == {(fetcher.peer_id, REF.root)}


@pytest.mark.trio
@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("bad_request", HEADER.pack(16, 3) + b"abc"),
        ("bad_request", HEADER.pack(17, 36) + REF.root + b"\xff\xff\xff\xff"),
        ("oversized", HEADER.pack(16, 1 << 31)),
        ("unknown_kind", HEADER.pack(19, 0)),
    ],
)
async def test_a_broken_request_is_counted_and_ends_its_stream_only(kind: str, data: bytes) -> None:
    with trio.fail_after(20):
        async with fetcher_and_sources(Held()) as (fetcher, sources):
            stream = await fetcher.open_stream(sources[0].peer_id, TRANSFER)
            await write_within(stream, data, 1)
            with suppress(IOException):
                while await stream.read(1024):
                    pass
            assert sources[0].counters.of(fetcher.peer_id) == {kind: 1}
            sinks = Sinks()
            await fetch(fetcher, REF, ids(sources), sinks)
            assert sinks.content == CONTENT


def test_a_manifest_survives_the_wire_and_a_broken_one_is_refused() -> None:
    manifest = manifest_of(CONTENT)
    data = encode_manifest(manifest)
    assert decode_manifest(data) == manifest
    for broken in (b"", data[:7], data[:-1], data + b"x"):
        with pytest.raises(RemoteError):
            decode_manifest(broken)

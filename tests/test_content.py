"""Content addressing: roots, chunks, and what a lying peer can send."""

import cbor2
import msgspec
import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from p2pcoord.content import (
    CHUNK_BYTES,
    MAX_CONTENT_BYTES,
    ContentRef,
    Manifest,
    check_chunk,
    check_manifest,
    chunk_count,
    chunk_hash,
    chunk_span,
    manifest_of,
)
from p2pcoord.errors import LocalError, RemoteError

CONTENT = b"".join(bytes([number]) * CHUNK_BYTES for number in range(3)) + b"rest"


def kind_of(function, *arguments) -> str:
    with pytest.raises(RemoteError) as error:
        function(*arguments)
    return error.value.kind


def test_a_chunk_hash_is_plain_blake3():
    assert chunk_hash(b"abc").hex() == "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"


def test_a_manifest_lists_each_chunk_and_every_chunk_passes_its_check():
    manifest = manifest_of(CONTENT)
    assert manifest.size_bytes == len(CONTENT)
    assert len(manifest.chunk_hashes) == chunk_count(len(CONTENT)) == 4
    for index in range(4):
        offset, length = chunk_span(len(CONTENT), index)
        check_chunk(manifest, index, CONTENT[offset : offset + length])
    check_manifest(manifest, manifest.ref)


def test_the_root_covers_size_order_and_every_chunk():
    manifest = manifest_of(CONTENT)
    size, hashes = manifest.size_bytes, manifest.chunk_hashes
    others = [
        Manifest(size - 1, hashes),
        Manifest(size, hashes[::-1]),
        Manifest(size, (*hashes[:3], chunk_hash(b"Rest"))),
    ]
    assert len({manifest.root, *(other.root for other in others)}) == 4
    assert all(len(other.root) == 32 for other in others)


def test_a_root_is_not_the_chunk_hash_of_the_same_bytes():
    manifest = manifest_of(b"x")
    listed = (1).to_bytes(8, "big") + manifest.chunk_hashes[0]
    assert manifest.root != chunk_hash(listed)
    assert manifest.root == blake3(listed, derive_key_context="p2pcoord 1 content manifest root").digest()


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES])
def test_sizes_around_a_chunk_split_without_a_gap(size: int):
    spans = [chunk_span(size, index) for index in range(chunk_count(size))]
    assert sum(length for _, length in spans) == size
    assert all(0 < length <= CHUNK_BYTES for _, length in spans)
    assert [offset for offset, _ in spans] == [index * CHUNK_BYTES for index in range(len(spans))]
    check_manifest(manifest_of(bytes(size)), manifest_of(bytes(size)).ref)


def test_arrays_maps_and_bytes_with_the_same_content_have_the_same_root():
    array = np.arange(400_000, dtype=np.float32).reshape(1000, 400)
    assert manifest_of(array) == manifest_of(array.tobytes()) == manifest_of(bytearray(array.tobytes()))
    assert manifest_of(np.empty((0, 3), dtype=np.float32)) == manifest_of(b"")


def test_a_chunk_that_does_not_exist_is_our_own_mistake_when_asked_for_and_the_peers_when_sent():
    for index in (-1, 4):
        with pytest.raises(LocalError, match=f"has no chunk {index}"):
            chunk_span(len(CONTENT), index)
        assert kind_of(check_chunk, manifest_of(CONTENT), index, b"rest") == "bad_chunk"


@given(st.integers(0, 3), st.integers(0, CHUNK_BYTES - 1))
def test_a_flipped_byte_or_a_wrong_length_is_a_bad_chunk(index: int, at: int):
    manifest = MANIFEST
    offset, length = chunk_span(len(CONTENT), index)
    chunk = bytearray(CONTENT[offset : offset + length])
    chunk[at % length] ^= 1
    assert kind_of(check_chunk, manifest, index, chunk) == "bad_chunk"
    for wrong in (CONTENT[offset : offset + length - 1], CONTENT[offset : offset + length] + b"x"):
        with pytest.raises(
            RemoteError, match=f"bad_chunk: chunk {index} has {len(wrong)} bytes, not {length}"
        ):
            check_chunk(manifest, index, wrong)


MANIFEST = manifest_of(CONTENT)


def test_a_peers_manifest_that_does_not_fit_is_refused_by_kind():
    ref, hashes = MANIFEST.ref, MANIFEST.chunk_hashes
    assert kind_of(check_manifest, MANIFEST, ref, len(CONTENT) - 1) == "oversized"
    assert kind_of(check_manifest, Manifest(MAX_CONTENT_BYTES + 1, hashes), ref) == "oversized"
    for wrong in (
        Manifest(-1, ()),
        Manifest(len(CONTENT), hashes[:3]),
        Manifest(len(CONTENT), (*hashes, hashes[0])),
        Manifest(len(CONTENT), (*hashes[:3], hashes[3][:31])),
        Manifest(len(CONTENT), (hashes[1], hashes[0], *hashes[2:])),
        Manifest(len(CONTENT) - 1, hashes),
        manifest_of(b"another"),
    ):
        assert kind_of(check_manifest, wrong, ref) == "bad_manifest"
    assert kind_of(check_manifest, MANIFEST, ContentRef(ref.root, len(CONTENT) + 1)) == "bad_manifest"


def test_refs_and_manifests_from_the_wire_are_bounded_as_they_are_decoded():
    sent = cbor2.dumps(msgspec.to_builtins(MANIFEST, builtin_types=(bytes,)), canonical=True)
    assert msgspec.convert(cbor2.loads(sent), Manifest) == MANIFEST
    largest = MAX_CONTENT_BYTES // CHUNK_BYTES
    for wrong in (
        {"size_bytes": -1, "chunk_hashes": []},
        {"size_bytes": MAX_CONTENT_BYTES + 1, "chunk_hashes": []},
        {"size_bytes": 1, "chunk_hashes": [bytes(31)]},
        {"size_bytes": 1, "chunk_hashes": [bytes(32)] * (largest + 1)},
        {"size_bytes": 1, "chunk_hashes": [bytes(32)], "more": 1},
    ):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(wrong, Manifest)
    for wrong in ({"root": bytes(33), "size_bytes": 1}, {"root": bytes(32), "size_bytes": -1}):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(wrong, ContentRef)


def test_the_manifest_of_the_largest_content_fits_in_one_message():
    largest = Manifest(MAX_CONTENT_BYTES, (bytes(32),) * (MAX_CONTENT_BYTES // CHUNK_BYTES))
    assert len(cbor2.dumps(msgspec.to_builtins(largest, builtin_types=(bytes,)))) < 1 << 20

"""Content-addressed objects in a data directory, and downloads on their way to be one.

Theory of operation
    DIR/objects/ab/<root>   content by its root, beside it `<root>.hashes`: the hashes of its chunks
    DIR/partial/<root>      downloads that are not complete, with their `.hashes`; they survive a restart

    An object has its name only when all of it was hashed and synced (see `directory`), and never changes
    after that. Hashes files are not synced: they are checked against the root when they are read, and can be
    made anew from the bytes. A download takes chunks in any order; after a restart every byte that is there is
    hashed again, so what a crash left of it needs no record of its own.
"""

import os
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from node.storage.directory import Directory, write_at
from node.storage.whole_file import sync, sync_directory
from p2pcoord.content import (
    CHUNK_BYTES,
    HASH_BYTES,
    MAX_CONTENT_BYTES,
    ContentRef,
    Manifest,
    check_chunk,
    check_manifest,
    chunk_count,
    chunk_hash,
    chunk_span,
)
from p2pcoord.errors import LocalError, RemoteError

if TYPE_CHECKING:
    from typing_extensions import Buffer

_HASHES = ".hashes"

# A download that nobody has gone on with for so long is of a round that is over: what is still wanted is asked for again
# within seconds, also after a restart.
STOPPED_S = 600


class MissingObject(LocalError):
    """The store does not hold the content that was asked for."""


class DamagedObject(LocalError):
    """Bytes on this disk no longer have their hash. Delete the object and fetch it again."""


class ObjectWriter:
    """A download in progress: chunks in any order, from any thread, each checked before it is written.

    It goes on where an earlier one stopped: `missing` lists the chunks that are still to come. From
    `Store.writer`.
    """

    def __init__(self, store: "Objects", manifest: Manifest, path: Path) -> None:
        """Not for use outside: `Store.writer` sees to it that there is one for each object."""
        self.manifest = manifest
        self._store, self._path = store, path
        self._lock = threading.Lock()
        self._closed = False
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            begun = os.fstat(self._file).st_size == manifest.size_bytes
            if not begun:
                os.ftruncate(self._file, manifest.size_bytes)
            everything = range(chunk_count(manifest.size_bytes))
            self._missing = set(_damaged_chunks(self._file, manifest) if begun else everything)
        except BaseException:
            os.close(self._file)
            raise

    @property
    def missing(self) -> tuple[int, ...]:
        """Indices of the chunks that are still to be written, in order."""
        with self._lock:
            return tuple(sorted(self._missing))

    def write(self, index: int, chunk: "Buffer") -> None:
        """Check a chunk and write it; a chunk that is there already changes nothing.

        Raises RemoteError "bad_chunk" when it does not belong there, StorageError when the disk refuses it.
        """
        check_chunk(self.manifest, index, chunk)
        with self._lock:
            self._check_open()
            if index in self._missing:
                with self._store._writing(f"chunk {index} of {self._path.name}", retriable=True):
                    write_at(self._file, index * CHUNK_BYTES, chunk)
                self._missing.discard(index)

    def commit(self) -> ContentRef:
        """Read everything back, check it, and make it an object.

        Raises LocalError while chunks are missing, DamagedObject when what was read back is not what was
        written (those chunks are missing again), StorageError when the disk fails.
        """
        with self._lock:
            self._check_open()
            if not self._missing:
                self._missing.update(_damaged_chunks(self._file, self.manifest))
                if self._missing:
                    raise DamagedObject(
                        f"{self._path}: chunks {sorted(self._missing)[:8]} changed on the disk"
                    )
            if self._missing:
                raise LocalError(f"{len(self._missing)} chunks of {self._path.name} are missing")
            self._closed = True
            try:
                ref = self._store._adopt(self._file, self._path, self.manifest)
                with self._store._writing(str(self._path)):
                    _hashes_of(self._path).unlink(missing_ok=True)
                return ref
            finally:
                self._store._release(self)

    def close(self) -> None:
        """Stop without an object; what was written stays for a later writer. Harmless when repeated."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._store._release(self)

    def _check_open(self) -> None:
        if self._closed:
            raise LocalError(f"the writer of {self._path.name} is closed")

    def __enter__(self) -> "ObjectWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Objects(Directory):
    """Content by its root: whole, immutable, and checked when it is read for others."""

    def __init__(self, path: Path, lock_file: int | None) -> None:
        super().__init__(path, lock_file)
        self._objects_lock = threading.RLock()
        self._sizes: dict[bytes, int] = {}
        self._writers: dict[bytes, ObjectWriter | None] = {}  # None: about to be there

    def look_again(self) -> None:
        """List what is there now: a store that is open for reading does not hear what the node beside it stores and drops."""
        sizes: dict[bytes, int] = {}
        for path in (self.path / "objects").glob("??/" + "?" * 2 * HASH_BYTES):
            # The node may delete it now; or the name is not hexadecimal.
            with suppress(FileNotFoundError, ValueError):
                sizes[bytes.fromhex(path.name)] = path.stat().st_size
        with self._objects_lock:
            self._sizes = sizes

    def refs(self) -> frozenset[ContentRef]:
        """Everything that is held."""
        with self._objects_lock:
            return frozenset(ContentRef(root, size) for root, size in self._sizes.items())

    def has(self, ref: ContentRef) -> bool:
        """Whether the object is complete here. Waits for nothing and does not read it: `check` does."""
        return self._sizes.get(ref.root) == ref.size_bytes

    def ref_of(self, root: bytes) -> ContentRef | None:
        """The ref of the complete object with this root; None when it is not here."""
        with self._objects_lock:
            size = self._sizes.get(root)
        return None if size is None else ContentRef(root, size)

    def file_of(self, ref: ContentRef) -> Path:
        """Where the object lies, for programs that map it; it is never written again. Raises MissingObject."""
        return self._object(ref)

    def put(self, buffer: "Buffer") -> ContentRef:
        """Store bytes (or a contiguous array, or a map) durably; return their ref. Raises StorageError."""
        octets = memoryview(buffer)
        octets = octets.cast("B") if octets.nbytes else memoryview(b"")
        return self._put(octets[at : at + CHUNK_BYTES] for at in range(0, octets.nbytes, CHUNK_BYTES))

    def put_file(self, source: Path | str, *, move: bool = False) -> ContentRef:
        """Store a file's content durably; return its ref.

        `move` gives the file away: on the same file system it is hashed, synced and renamed instead of
        copied, and it is gone afterwards. Nobody may write to it any more. Raises StorageError when the
        store's disk refuses, OSError when the source cannot be read.
        """
        source = Path(source)
        renames = move and source.stat().st_dev == self.path.stat().st_dev
        # Not through a symbolic link when it is renamed: the link would move, and not the file.
        flags = os.O_RDWR | os.O_NOFOLLOW if renames else os.O_RDONLY
        descriptor = os.open(source, flags | os.O_CLOEXEC)
        try:
            size = os.fstat(descriptor).st_size
            if size > MAX_CONTENT_BYTES:
                raise LocalError(f"{source}: content has at most {MAX_CONTENT_BYTES} bytes, not {size}")
            if renames:
                return self._adopt(descriptor, source, _manifest_of_file(descriptor, size))
            ref = self._put(_chunks(descriptor, size))
        finally:
            os.close(descriptor)
        if move:
            source.unlink()
        return ref

    def writer(self, manifest: Manifest) -> ObjectWriter:
        """Begin or go on with a download. `manifest` is checked already (`content.check_manifest`).

        Raises LocalError when the object is here or is being written, StorageError when the disk refuses.
        """
        ref = manifest.ref
        with self._objects_lock:
            if self.has(ref) or ref.root in self._writers:
                raise LocalError(f"object {ref.root.hex()} is here already or being written")
            self._writers[ref.root] = None  # reserved: what is there already is read without the lock
        path = self.path / "partial" / ref.root.hex()
        try:
            with self._writing(str(path), retriable=True):
                self._write_hashes(path, manifest)
                writer = ObjectWriter(self, manifest, path)
        except BaseException:
            with self._objects_lock:
                del self._writers[ref.root]
            raise
        with self._objects_lock:
            self._writers[ref.root] = writer
        return writer

    def manifest(self, ref: ContentRef) -> Manifest:
        """The manifest of an object; read, or made anew from the bytes if it was lost.

        Raises MissingObject, and DamagedObject when the bytes don't have this root any more.
        """
        path = self._object(ref)
        with suppress(DamagedObject, OSError):
            return _read_hashes(_hashes_of(path), ref.root)
        with self._reading(ref) as descriptor:
            manifest = _manifest_of_file(descriptor, ref.size_bytes)
        if manifest.ref != ref:
            raise DamagedObject(f"{path} does not have the root that it is named by")
        return manifest

    def read_chunk(self, ref: ContentRef, index: int, manifest: Manifest | None = None) -> bytes:
        """One chunk's bytes, checked, so that this node never sends a chunk that its disk has changed.

        Who reads many chunks passes the object's `manifest`. Raises MissingObject, DamagedObject, LocalError
        (no such chunk).
        """
        offset, length = chunk_span(ref.size_bytes, index)
        hashes = manifest or self.manifest(ref)
        with self._reading(ref) as descriptor:
            chunk = os.pread(descriptor, length, offset)
        if chunk_hash(chunk) != hashes.chunk_hashes[index]:
            raise DamagedObject(f"chunk {index} of {self._path_of(ref.root)} changed on the disk")
        return chunk

    def check(self, ref: ContentRef) -> None:
        """Read all of an object and compare it with its root. Raises MissingObject or DamagedObject."""
        manifest = self.manifest(ref)
        with self._reading(ref) as descriptor:
            damaged = tuple(_damaged_chunks(descriptor, manifest))
        if damaged:
            raise DamagedObject(f"chunks {damaged[:8]} of {self._path_of(ref.root)} changed on the disk")

    def discard(self, roots: Collection[bytes]) -> int:
        """Forget these objects, and downloads that nobody goes on with; return the bytes freed. What is open stays readable."""
        freed = 0
        with self._objects_lock:
            for root in roots:
                with self._writing("objects"):
                    if root not in self._sizes:
                        continue
                    self._remove(self._path_of(root))
                    freed += self._sizes.pop(root)
            at_work = {root.hex() for root in self._writers}
            for path in self._partial_files():
                if path.name in at_work or time.time() - (status := path.stat()).st_mtime <= STOPPED_S:
                    continue
                with self._writing("partial"):
                    self._remove(path)
                freed += status.st_size
        return freed

    def _partial_files(self) -> tuple[Path, ...]:
        return tuple(path for path in (self.path / "partial").glob("*") if not path.name.endswith(_HASHES))

    def _path_of(self, root: bytes) -> Path:
        return self.path / "objects" / root.hex()[:2] / root.hex()

    def _object(self, ref: ContentRef) -> Path:
        if not self.has(ref):
            raise MissingObject(f"object {ref.root.hex()} of {ref.size_bytes} bytes is not here")
        return self._path_of(ref.root)

    @contextmanager
    def _reading(self, ref: ContentRef) -> Iterator[int]:
        path = self._object(ref)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # deleted by another thread, or by the node beside this reader
            raise MissingObject(f"object {ref.root.hex()} is gone") from None
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _put(self, chunks: Iterable["Buffer"]) -> ContentRef:
        size, hashes = 0, []
        with self._temporary() as (descriptor, path):
            for chunk in chunks:
                hashes.append(chunk_hash(chunk))
                with self._writing(str(path), retriable=True):
                    write_at(descriptor, size, chunk)
                size += memoryview(chunk).nbytes
                if size > MAX_CONTENT_BYTES:
                    raise LocalError(f"content has at most {MAX_CONTENT_BYTES} bytes")
            return self._adopt(descriptor, path, Manifest(size, tuple(hashes)))

    def _adopt(self, descriptor: int, path: Path, manifest: Manifest) -> ContentRef:
        """Sync a complete file and give it its place among the objects."""
        ref = manifest.ref
        place = self._path_of(ref.root)
        with self._writing(str(place)):
            sync(descriptor)
        with self._objects_lock, self._writing(str(place)):
            if not place.parent.exists():
                place.parent.mkdir(mode=0o700, exist_ok=True)
                sync_directory(place.parent.parent)
            self._write_hashes(place, manifest)
            os.rename(path, place)
            sync_directory(place.parent)
            self._sizes[ref.root] = ref.size_bytes
        return ref

    def _write_hashes(self, path: Path, manifest: Manifest) -> None:
        """Not synced: it is checked against the root when it is read, and can be made anew."""
        listed = manifest.size_bytes.to_bytes(8, "big") + b"".join(manifest.chunk_hashes)
        with self._temporary() as (descriptor, temporary):
            with self._writing(str(_hashes_of(path)), retriable=True):
                write_at(descriptor, 0, listed)
            os.rename(temporary, _hashes_of(path))

    def _remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        _hashes_of(path).unlink(missing_ok=True)

    def _release(self, writer: ObjectWriter) -> None:
        os.close(writer._file)
        with self._objects_lock:
            self._writers.pop(writer.manifest.root, None)


def _read_hashes(path: Path, root: bytes) -> Manifest:
    """Read a manifest from the disk. Raises DamagedObject when it is not the one of this root."""
    with path.open("rb") as file:
        data = file.read(8 + HASH_BYTES * chunk_count(MAX_CONTENT_BYTES) + 1)
    hashes = tuple(data[at : at + HASH_BYTES] for at in range(8, len(data), HASH_BYTES))
    manifest = Manifest(int.from_bytes(data[:8], "big"), hashes)
    try:
        check_manifest(manifest, ContentRef(root, manifest.size_bytes))
    except RemoteError as error:
        raise DamagedObject(f"{path}: {error}") from error
    return manifest


def _hashes_of(path: Path) -> Path:
    return path.with_name(path.name + _HASHES)


def _manifest_of_file(descriptor: int, size_bytes: int) -> Manifest:
    return Manifest(size_bytes, tuple(map(chunk_hash, _chunks(descriptor, size_bytes))))


def _chunks(descriptor: int, size_bytes: int) -> Iterator[bytes]:
    for index in range(chunk_count(size_bytes)):
        offset, length = chunk_span(size_bytes, index)
        yield os.pread(descriptor, length, offset)


def _damaged_chunks(descriptor: int, manifest: Manifest) -> Iterator[int]:
    for index, chunk in enumerate(_chunks(descriptor, manifest.size_bytes)):
        if chunk_hash(chunk) != manifest.chunk_hashes[index]:
            yield index

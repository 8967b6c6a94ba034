"""The store: durable appends, whole objects, one process a directory, and no write after a failed one."""

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from node.storage import store as store_module
from node.storage.objects import STOPPED_S
from node.storage.store import DamagedObject, MissingObject, StorageError, Store
from node.storage.whole_file import temporary_beside
from p2pcoord.consensus import log
from p2pcoord.content import CHUNK_BYTES, ContentRef, Manifest, chunk_span, manifest_of
from p2pcoord.errors import LocalError, RemoteError, UserError

ROOT = Path(store_module.__file__).parents[2]
CONTENT = random.Random(1).randbytes(2 * CHUNK_BYTES + 777)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def store(directory: Path) -> Iterator[Store]:
    with Store.open(directory) as opened:
        yield opened


def held_bytes(store: Store) -> int:
    """Of objects and of downloads; their hashes not counted."""
    files = [path for folder in ("objects", "partial") for path in (store.path / folder).rglob("*")]
    return sum(path.stat().st_size for path in files if path.is_file() and path.suffix != ".hashes")


def unfinished(store: Store) -> set[str]:
    """Roots of downloads that are not complete."""
    return {path.name for path in (store.path / "partial").iterdir() if path.suffix != ".hashes"}


def chunk_of(content: bytes, index: int) -> bytes:
    offset, length = chunk_span(len(content), index)
    return content[offset : offset + length]


def object_file(store: Store, ref: ContentRef) -> Path:
    return store.path / "objects" / ref.root.hex()[:2] / ref.root.hex()


def python(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


# Opening


def test_a_new_directory_is_private_and_opens_again(directory: Path):
    with Store.open(directory / "deep") as store:
        assert (directory / "deep").stat().st_mode & 0o777 == 0o700
        assert store.recovered().payloads == ()
        store.append([b"one", b"two"])
    with Store.open(directory / "deep") as store:
        assert store.recovered().payloads == (b"one", b"two")


def test_an_empty_directory_of_the_users_is_taken_and_made_private(directory: Path):
    directory.mkdir(mode=0o755)
    with Store.open(directory):
        assert directory.stat().st_mode & 0o777 == 0o700


def test_a_directory_that_holds_something_else_is_refused_and_left_as_it_is(directory: Path):
    directory.mkdir()
    (directory / "thesis.tex").write_text("mine")
    for read_only in (False, True):
        with pytest.raises(UserError, match="is not a p2pcoord data directory"):
            Store.open(directory, read_only=read_only)
    assert [path.name for path in directory.iterdir()] == ["thesis.tex"]


def test_a_directory_inside_another_ones_is_refused_and_not_made(directory: Path):
    with Store.open(directory):
        pass
    inside = directory / "objects" / "x"
    with pytest.raises(UserError, match="which already takes part in a run: choose another") as caught:
        Store.open(inside)
    assert str(directory) in str(caught.value)
    assert caught.value.exit_code == 2
    assert not inside.exists()
    with Store.open(directory):
        pass


def test_a_file_a_missing_directory_and_another_format_are_refused_in_words(directory: Path, tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot use .*file as data directory: Not a directory"):
        Store.open(tmp_path / "file")
    with pytest.raises(UserError, match="no node has run there"):
        Store.open(directory, read_only=True)
    Store.open(directory).close()
    (directory / "format").write_text("p2pcoord data directory, format 2\n")
    with pytest.raises(UserError, match="format 2, this program knows format 1"):
        Store.open(directory)


def test_a_second_process_is_refused_by_a_message_with_the_first_ones_pid(directory: Path):
    script = "import sys; from node.storage.store import Store; Store.open(sys.argv[1]); print('up', flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"up\n"
        with pytest.raises(UserError, match=f"is in use by process {holder.pid}: stop it, or choose"):
            Store.open(directory)
        Store.open(directory, read_only=True).close()
    finally:
        holder.kill()
        holder.communicate()
    Store.open(directory).close()


def test_one_process_cannot_open_a_directory_twice(store: Store):
    with pytest.raises(UserError, match=f"process {os.getpid()}"):
        Store.open(store.path)


def test_a_founding_that_was_cut_short_is_founded_again(directory: Path):
    directory.mkdir()
    (directory / "lock").write_text("1")
    temporary_beside(directory / "format").write_text("p2p")
    Store.open(directory).close()
    Store.open(directory, read_only=True).close()


# The log


def test_a_damaged_copy_is_repaired_and_an_unsynced_tail_is_cut_on_opening(directory: Path):
    with Store.open(directory) as store:
        for number in range(5):
            store.append([b"record %d" % number])
    whole = (directory / "log").read_bytes()
    damaged = bytearray(whole + b"torn" * 50)
    damaged[10] ^= 1
    damaged[len(whole) // 2] ^= 1
    (directory / "log").write_bytes(damaged)
    with Store.open(directory, read_only=True) as reader:
        assert len(reader.recovered().damaged) == 2
    assert (directory / "log").read_bytes() == damaged
    with Store.open(directory) as store:
        recovery = store.recovered()
        assert len(recovery.payloads) == 5 and recovery.cut and len(recovery.repairs) == 2
        assert (directory / "log").read_bytes() == whole
        assert store.append([b"record 5"]) == 6
    with Store.open(directory) as store:
        assert store.recovered().payloads == tuple(b"record %d" % number for number in range(6))


def test_a_log_that_lost_synced_frames_is_never_used_but_can_be_set_aside(directory: Path):
    with Store.open(directory) as store:
        for number in range(3):
            store.append([b"vote %d" % number])
    damaged = bytearray((directory / "log").read_bytes())
    for at in range(0, len(damaged) // 3, 8):
        damaged[at] ^= 1
    (directory / "log").write_bytes(damaged)
    with Store.open(directory) as store:
        for use in (store.recovered, lambda: store.append([b"x"]), lambda: store.rewrite_log([b"x"])):
            with pytest.raises(log.CorruptLog, match="log frame 0 at byte 0"):
                use()
        assert (directory / "log").read_bytes() == damaged
        kept = store.set_aside_log()
        assert kept.read_bytes() == damaged
        assert store.recovered().payloads == ()
        store.append([b"new key"])
        with pytest.raises(LocalError, match="not set aside"):
            store.set_aside_log()
    with Store.open(directory) as store:
        assert store.recovered().payloads == (b"new key",)


def test_what_was_recovered_is_dropped_from_memory_at_the_first_change(store: Store):
    store.append([b"one"])
    with pytest.raises(LocalError, match="has changed since"):
        store.recovered()


def test_a_rewritten_log_takes_the_old_ones_place_and_goes_on(directory: Path):
    with Store.open(directory) as store:
        store.append([b"old %d" % number for number in range(500)])
        before = (directory / "log").stat().st_size
        store.rewrite_log([b"kept", b"also kept"])
        assert (directory / "log").stat().st_size < before
        rewritten = bytearray((directory / "log").read_bytes())
        store.append([b"after"])
    with Store.open(directory) as store:
        assert store.recovered().payloads == (b"kept", b"also kept", b"after")
        assert list((directory / "tmp").iterdir()) == []
    rewritten[0] ^= 1
    rewritten[log.HEADER_BYTES + 4] ^= 1
    with pytest.raises(log.CorruptLog):  # all of it was synced before it got the name: nothing of it is cut
        log.recover(bytes(rewritten))


def test_a_rewrite_that_does_not_finish_leaves_the_old_log(directory: Path):
    def payloads() -> Iterator[bytes]:
        yield bytes(1 << 20)
        raise RuntimeError("stopped here")

    with Store.open(directory) as store:
        store.append([b"old"])
        with pytest.raises(RuntimeError):
            store.rewrite_log(payloads())
        store.append([b"newer"])
    with Store.open(directory) as store:
        assert store.recovered().payloads == (b"old", b"newer")


def test_appends_from_many_threads_are_each_whole(directory: Path):
    with Store.open(directory) as store:

        def work(name: int) -> None:
            for number in range(10):
                store.append([b"%d:%d:a" % (name, number), b"%d:%d:b" % (name, number)])

        threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    payloads = log.recover((directory / "log").read_bytes()).payloads
    assert len(payloads) == 80
    assert all(a[:-1] == b[:-1] for a, b in zip(payloads[::2], payloads[1::2], strict=True))
    for name in range(4):
        mine = [p for p in payloads if p.startswith(b"%d:" % name)]
        assert mine == [b"%d:%d:%s" % (name, number, half) for number in range(10) for half in (b"a", b"b")]


def test_a_payload_that_is_too_large_writes_nothing_and_breaks_nothing(store: Store):
    with pytest.raises(LocalError, match="at most"):
        store.append([b"fine", bytes(log.MAX_PAYLOAD_BYTES + 1)])
    assert (store.path / "log").stat().st_size == 0
    assert store.append([b"fine"]) == 1


def test_writes_that_the_system_cuts_short_are_continued(directory: Path, monkeypatch: pytest.MonkeyPatch):
    pwrite = os.pwrite
    with Store.open(directory) as store:
        monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[: max(1, len(data) // 3)], at))
        store.append([b"x" * 1000])
        assert store.read_chunk(store.put(CONTENT), 1) == chunk_of(CONTENT, 1)
    assert log.recover((directory / "log").read_bytes()).payloads == (b"x" * 1000,)


@pytest.mark.parametrize("call", ["fdatasync", "pwrite"])
def test_after_a_failed_append_the_store_takes_no_change_any_more(
    directory: Path, monkeypatch: pytest.MonkeyPatch, call: str
):
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with Store.open(directory) as store:
        store.append([b"durable"])
        ref = store.put(b"content")
        with monkeypatch.context() as broken:
            broken.setattr(os, call, fail)
            with pytest.raises(StorageError, match="writing the log failed: Input/output error"):
                store.append([b"lost"])
        size = (directory / "log").stat().st_size
        for change in (
            lambda: store.append([b"again"]),
            lambda: store.rewrite_log([]),
            lambda: store.put(b"more"),
            lambda: store.discard([ref.root]),
            lambda: store.write_file("key", b""),
        ):
            with pytest.raises(StorageError, match="takes no more changes: writing the log failed"):
                change()
        assert (directory / "log").stat().st_size == size
        assert store.read_chunk(ref, 0) == b"content"
    with Store.open(directory) as store:
        assert store.recovered().payloads[0] == b"durable"


def test_opening_writes_the_newest_append_again_since_its_sync_may_have_failed(
    directory: Path, monkeypatch: pytest.MonkeyPatch
):
    with Store.open(directory) as store:
        store.append([b"one"])
        store.append([b"two", b"three"])
        newest = 2 * (log.HEADER_BYTES + 3)
        data = (directory / "log").read_bytes()
    writes: list[tuple[int, bytes]] = []
    pwrite = os.pwrite

    def record(descriptor: int, written: bytes, offset: int) -> int:
        writes.append((offset, bytes(written)))
        return pwrite(descriptor, written, offset)

    monkeypatch.setattr(os, "pwrite", record)
    Store.open(directory).close()
    assert (newest, data[newest:]) in writes
    assert all(offset == 0 and len(written) < 20 for offset, written in writes if offset != newest)  # the pid


def test_a_full_disk_while_an_object_is_written_is_reported_and_leaves_the_store_usable(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "pwrite", full)
        with pytest.raises(StorageError, match="No space left"):
            store.put(CONTENT)
        with pytest.raises(StorageError, match="No space left"):
            store.write_file("key", b"secret")
    assert list((store.path / "tmp").iterdir()) == []
    assert (held_bytes(store), store.read_file("key")) == (0, None)
    assert store.has(store.put(CONTENT))
    assert store.append([b"fine"]) == 1


def test_a_failed_sync_of_an_object_is_the_last_change(store: Store, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", fail)
        with pytest.raises(StorageError, match="Input/output error"):
            store.put(CONTENT)
    assert not store.has(manifest_of(CONTENT).ref)
    with pytest.raises(StorageError, match="takes no more changes"):
        store.append([b"x"])


APPENDER = """
import sys
from node.storage.store import Store
store = Store.open(sys.argv[1])
number = len(store.recovered().payloads)
while True:
    batch = [b"%d " % n + b"x" * (n * 37 % 3000) for n in range(number, number + 1 + number % 3)]
    number = store.append(batch)
    sys.stdout.write("%d\\n" % number)
    sys.stdout.flush()
"""


def test_every_acknowledged_payload_is_there_after_kill_9_in_the_middle_of_appends(directory: Path):
    rng = random.Random(9)
    before = 0
    for _ in range(5):
        process = python(APPENDER, directory)
        assert process.stdout is not None
        acknowledged = int(process.stdout.readline())
        time.sleep(rng.uniform(0.0, 0.15))
        process.send_signal(signal.SIGKILL)
        acknowledged = max(acknowledged, *map(int, process.stdout.read().split()), 0, 0)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        payloads = log.recover((directory / "log").read_bytes()).payloads
        assert len(payloads) >= acknowledged > before
        assert all(payload.startswith(b"%d " % number) for number, payload in enumerate(payloads))
        before = acknowledged


# Objects


def test_an_object_is_stored_under_its_root_and_read_by_chunk_and_by_map(store: Store):
    ref = store.put(CONTENT)
    assert ref == manifest_of(CONTENT).ref
    assert store.has(ref) and store.refs() == {ref}
    assert store.manifest(ref) == manifest_of(CONTENT)
    assert b"".join(store.read_chunk(ref, index) for index in range(3)) == CONTENT
    assert object_file(store, ref).read_bytes() == CONTENT
    assert held_bytes(store) == len(CONTENT)
    store.check(ref)
    with pytest.raises(LocalError, match="has no chunk 3"):
        store.read_chunk(ref, 3)


def test_arrays_and_empty_content_are_objects_too(store: Store):
    array = np.linspace(0, 1, 1000, dtype=np.float32).reshape(10, 100)
    ref = store.put(array)
    assert store.file_of(ref).read_bytes() == array.tobytes()
    empty = store.put(b"")
    assert store.has(empty) and store.file_of(empty).read_bytes() == b""
    store.check(empty)


def test_objects_survive_a_restart_and_half_written_ones_do_not(directory: Path):
    with Store.open(directory) as store:
        ref = store.put(CONTENT)
    (directory / "tmp" / "0123").write_bytes(b"half")
    with Store.open(directory) as store:
        assert store.refs() == {ref}
        assert held_bytes(store) == len(CONTENT)
        assert list((directory / "tmp").iterdir()) == []
        store.check(ref)


def test_nothing_gets_a_name_before_its_bytes_are_synced(store: Store, monkeypatch: pytest.MonkeyPatch):
    steps: list[str] = []
    fsync, rename = os.fsync, os.rename

    def record_fsync(descriptor: int) -> None:
        steps.append("sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).parent.name)
        fsync(descriptor)

    def record_rename(source: Path, target: Path) -> None:
        if not target.name.endswith(".hashes"):
            steps.append("rename")
        rename(source, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to see which file is synced")
    store.put(b"first in its folder")
    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    for number in range(300):
        if (place := object_file(store, manifest_of(b"%d" % number).ref).parent).exists():
            store.put(b"%d" % number)
            assert steps == ["sync tmp", "rename", "sync objects"], place
            break
    else:
        pytest.fail("no content fell into the folder")
    steps.clear()
    store.write_file("key", b"k")
    assert steps[0] == "sync tmp" and steps[-2:] == ["rename", "sync " + store.path.parent.name]


@pytest.mark.parametrize("move", [False, True])
def test_a_file_becomes_an_object_by_copy_or_by_move(store: Store, tmp_path: Path, move: bool):
    source = tmp_path / "update.bin"
    source.write_bytes(CONTENT)
    (tmp_path / "update.bin.hashes").write_text("somebody's")
    inode = source.stat().st_ino
    ref = store.put_file(source, move=move)
    assert ref == manifest_of(CONTENT).ref
    store.check(ref)
    assert source.exists() is not move
    assert (object_file(store, ref).stat().st_ino == inode) is move
    assert (tmp_path / "update.bin.hashes").exists()


def test_a_symbolic_link_is_not_moved_in_the_place_of_its_file(store: Store, tmp_path: Path):
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with pytest.raises(OSError):
        store.put_file(tmp_path / "link", move=True)
    assert store.put_file(tmp_path / "link") == manifest_of(b"content").ref


def test_a_download_takes_chunks_in_any_order_and_refuses_wrong_ones(store: Store):
    manifest = manifest_of(CONTENT)
    with store.writer(manifest) as writer:
        assert writer.missing == (0, 1, 2)
        writer.write(2, chunk_of(CONTENT, 2))
        with pytest.raises(RemoteError, match="bad_chunk"):
            writer.write(0, chunk_of(CONTENT, 1))
        with pytest.raises(RemoteError, match="bad_chunk"):
            writer.write(3, b"")
        writer.write(0, chunk_of(CONTENT, 0))
        writer.write(0, chunk_of(CONTENT, 0))
        assert writer.missing == (1,)
        with pytest.raises(LocalError, match=r"1 chunks of .* are missing"):
            writer.commit()
        assert not store.has(manifest.ref)
        with pytest.raises(LocalError, match="being written"):
            store.writer(manifest)
        writer.write(1, chunk_of(CONTENT, 1))
        assert writer.commit() == manifest.ref
        with pytest.raises(LocalError, match="closed"):
            writer.write(1, chunk_of(CONTENT, 1))
    assert store.has(manifest.ref) and unfinished(store) == set()
    assert list((store.path / "partial").iterdir()) == []
    store.check(manifest.ref)
    with pytest.raises(LocalError, match="here already"):
        store.writer(manifest)


def test_a_download_goes_on_after_a_restart_and_trusts_no_byte_of_before(directory: Path):
    manifest = manifest_of(CONTENT)
    with Store.open(directory) as store:
        writer = store.writer(manifest)
        writer.write(0, chunk_of(CONTENT, 0))
        writer.write(1, chunk_of(CONTENT, 1))
    partial = directory / "partial" / manifest.root.hex()
    damaged = bytearray(partial.read_bytes())
    damaged[5] ^= 1
    partial.write_bytes(damaged)
    with Store.open(directory) as store:
        assert unfinished(store) == {manifest.root.hex()}
        assert held_bytes(store) == len(CONTENT)
        with store.writer(manifest) as writer:
            assert writer.missing == (0, 2)
            writer.write(0, chunk_of(CONTENT, 0))
            writer.write(2, chunk_of(CONTENT, 2))
            writer.commit()
        store.check(manifest.ref)


def test_what_changed_on_the_disk_before_the_commit_is_seen_by_it(store: Store):
    manifest = manifest_of(CONTENT)
    with store.writer(manifest) as writer:
        for index in range(3):
            writer.write(index, chunk_of(CONTENT, index))
        with (store.path / "partial" / manifest.root.hex()).open("r+b") as file:
            file.seek(CHUNK_BYTES + 3)
            file.write(b"?")
        with pytest.raises(DamagedObject, match="chunks \\[1\\] changed"):
            writer.commit()
        assert writer.missing == (1,)
        writer.write(1, chunk_of(CONTENT, 1))
        assert writer.commit() == manifest.ref


def test_a_download_of_empty_content_commits_at_once(store: Store):
    with store.writer(Manifest(0, ())) as writer:
        assert writer.missing == ()
        assert store.has(writer.commit())


def test_chunks_written_from_many_threads_make_one_object(store: Store):
    content = random.Random(2).randbytes(8 * CHUNK_BYTES)
    with store.writer(manifest_of(content)) as writer:
        threads = [
            threading.Thread(target=writer.write, args=(index % 8, chunk_of(content, index % 8)))
            for index in range(16)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        store.check(writer.commit())


def test_a_chunk_that_the_disk_changed_is_never_handed_out(store: Store):
    ref = store.put(CONTENT)
    with object_file(store, ref).open("r+b") as file:
        file.write(b"?")
    with pytest.raises(DamagedObject, match="chunk 0 of"):
        store.read_chunk(ref, 0)
    with pytest.raises(DamagedObject):
        store.check(ref)
    assert store.read_chunk(ref, 1) == chunk_of(CONTENT, 1)
    assert store.put(CONTENT) == ref
    store.check(ref)


@pytest.mark.parametrize("hashes", [None, b"", b"garbage" * 20, bytes(8 + 96)])
def test_a_manifest_that_was_lost_or_damaged_is_made_anew_from_the_bytes(store: Store, hashes: bytes | None):
    ref = store.put(CONTENT)
    beside = object_file(store, ref).with_name(ref.root.hex() + ".hashes")
    beside.unlink() if hashes is None else beside.write_bytes(hashes)
    assert store.manifest(ref) == manifest_of(CONTENT)
    assert store.read_chunk(ref, 2) == chunk_of(CONTENT, 2)
    with object_file(store, ref).open("r+b") as file:
        file.write(b"?")
    with pytest.raises(DamagedObject, match="does not have the root"):
        store.manifest(ref)


def test_a_deleted_object_is_gone_for_everybody_but_who_opened_it(store: Store):
    ref = store.put(CONTENT)
    with store.file_of(ref).open("rb") as opened:
        assert store.discard({ref.root}) == len(CONTENT)
        assert store.discard({ref.root}) == 0
        for read in (store.manifest, store.check, lambda ref: store.read_chunk(ref, 0)):
            with pytest.raises(MissingObject, match=ref.root.hex()):
                read(ref)
        assert opened.read() == CONTENT
    assert held_bytes(store) == 0
    assert not any(path.is_file() for path in (store.path / "objects").rglob("*"))


def test_discard_forgets_what_is_named_and_downloads_that_nobody_went_on_with(store: Store):
    kept, dropped = store.put(b"kept"), store.put(b"dropped")
    at_work, stopped, lately = (manifest_of(content) for content in (CONTENT, CONTENT[::-1], CONTENT[1:]))
    writer = store.writer(at_work)
    for manifest in (stopped, lately):
        store.writer(manifest).close()
    for manifest in (at_work, stopped):
        long_ago = time.time() - STOPPED_S - 1
        os.utime(store.path / "partial" / manifest.root.hex(), (long_ago, long_ago))
    assert store.discard({dropped.root, bytes(32)}) == 7 + len(CONTENT)
    assert store.refs() == {kept} and not store.has(dropped)
    assert unfinished(store) == {at_work.root.hex(), lately.root.hex()}
    writer.close()
    assert store.discard(()) == len(CONTENT)
    assert unfinished(store) == {lately.root.hex()}
    assert store.has(kept)


def test_a_reader_beside_a_running_node_sees_its_log_and_objects_and_changes_nothing(store: Store):
    store.append([b"one", b"two"])
    ref = store.put(CONTENT)
    with Store.open(store.path, read_only=True) as reader:
        assert reader.recovered().payloads == (b"one", b"two")
        assert not reader.recovered().repairs
        reader.check(ref)
        store.append([b"three"])
        store.discard([ref.root])
        with pytest.raises(MissingObject):
            reader.check(ref)
        for change in (
            lambda: reader.append([b"x"]),
            lambda: reader.put(b"x"),
            lambda: reader.discard([ref.root]),
        ):
            with pytest.raises(LocalError, match="open for reading only"):
                change()
    assert store.append([b"four"]) == 4


# Small files


def test_a_small_file_is_replaced_whole_and_is_private(store: Store):
    assert store.read_file("node.key") is None
    store.write_file("node.key", b"secret")
    store.write_file("node.key", b"other secret")
    assert store.read_file("node.key") == b"other secret"
    assert (store.path / "node.key").stat().st_mode & 0o777 == 0o600
    assert list((store.path / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    "name", ["log", "lock", "format", "objects", "log.refused-1", "../x", "a/b", "", ".x", "X"]
)
def test_a_small_file_cannot_take_another_files_place(store: Store, name: str):
    with pytest.raises(LocalError, match="not a name"):
        store.write_file(name, b"")


def test_a_small_file_is_small(store: Store):
    with pytest.raises(LocalError, match="at most"):
        store.write_file("addresses", bytes(store_module.MAX_SMALL_FILE_BYTES + 1))
    (store.path / "addresses").write_bytes(bytes(store_module.MAX_SMALL_FILE_BYTES + 1))
    with pytest.raises(LocalError, match="has more than"):
        store.read_file("addresses")


def test_a_file_for_people_is_replaced_only_when_the_new_one_is_complete(store: Store):
    model = store.path / "model" / "latest.safetensors"
    store.replace_file("model/latest.safetensors", lambda path: path.write_bytes(b"version 1"))
    assert model.read_bytes() == b"version 1"

    def stops(path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        store.replace_file("model/latest.safetensors", stops)
    assert model.read_bytes() == b"version 1"

    def replaces(path: Path) -> None:
        path.unlink()
        path.write_bytes(b"version 2")

    store.replace_file("model/latest.safetensors", replaces)
    assert model.read_bytes() == b"version 2"
    assert list((store.path / "tmp").iterdir()) == []
    for outside in ("../x", "/tmp/x", "objects/x", "log", "."):
        with pytest.raises(LocalError, match="not a place"):
            store.replace_file(outside, lambda path: None)


def test_a_closed_store_takes_no_change_and_gives_the_directory_free(directory: Path):
    store = Store.open(directory)
    writer = store.writer(manifest_of(CONTENT))
    store.close()
    store.close()
    for change in (lambda: store.append([b"x"]), lambda: store.put(b"x"), lambda: store.write_file("a", b"")):
        with pytest.raises(StorageError, match="it is closed"):
            change()
    with pytest.raises(LocalError, match="closed"):
        writer.write(0, chunk_of(CONTENT, 0))
    Store.open(directory).close()

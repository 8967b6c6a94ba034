"""Fetching bulk bytes from several peers at once, chunk by chunk, over the transfer streams that `bulk.py` serves.

Theory of operation
    `fetch` runs one worker per source. Each takes chunks from one pool, keeps PIPELINE requests on its stream, and hands
    each chunk to the sink, which checks it against the manifest (which was checked against the root). So a fast source
    carries more, and nobody has to be trusted:

        a wrong chunk or manifest    the source is named in `bad_sources` and not asked again in this fetch
        no byte for `stall_s`        the source is given up, what it owed goes back into the pool
        a refusal                    likewise
        a lost connection            likewise, and it is asked again (MAX_TRIES) if it is connected (again)
        no source left               FetchError with what each of them did

    Near the end a slow source may hold the last chunks while the others are idle: an idle worker asks for what has been
    owed for DOUBLE_S once more, and the first answer counts.

Checking and writing run in worker threads, as reading does on the other side.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar, TypeVarTuple

import msgspec
import trio
from libp2p.io.exceptions import IOException
from libp2p.network.stream.net_stream import NetStream

from node.network.bulk import (
    ANSWER_LIMITS,
    CHUNK,
    INDEX,
    MANIFEST,
    TRANSFER,
    UNAVAILABLE,
    WANT_CHUNK,
    WANT_MANIFEST,
    WRITE_TIMEOUT_S,
    decode_manifest,
)
from node.network.libp2p_transport import Libp2pTransport
from node.network.streams import FrameReader, StreamEnded, frame
from node.network.transport_guard import end_stream, write_within
from node.storage.store import ObjectWriter, Store
from p2pcoord.content import ContentRef, Manifest, check_manifest, chunk_span
from p2pcoord.errors import RemoteError

# Requests on one stream at once: the next chunk is on its way while one is checked and written. More only fills windows.
PIPELINE = 2

# How long a source may keep us without a byte. Longer than a garbage collection or an fsync under load, shorter than
# anybody's patience.
STALL_S = 4.0

# Threads that check and write chunks: hashing and disk, not computing.
WRITERS = 4

# A chunk takes 10 ms on a fast link and 84 ms at 100 Mbit/s: who has owed one for so long is slow or in trouble.
DOUBLE_S = 0.5

# How often a source is begun with, when its connection was lost and is there again.
MAX_TRIES = 3

# How often a running fetch looks whether its list of sources has grown, and an idle source whether a chunk is overdue.
POLL_S = 0.2


A = TypeVarTuple("A")
T = TypeVar("T")


class Sink(Protocol):
    """Where fetched chunks go; `Store.writer` makes one. `write` is called from several threads, in any order, possibly
    twice for one chunk. It must check the chunk and raise RemoteError if it is wrong."""

    @property
    def missing(self) -> tuple[int, ...]: ...

    def write(self, index: int, chunk: bytes) -> None: ...


class FetchReport(msgspec.Struct, frozen=True):
    """`bytes_by_source`: payload that came from each and was right; chunks the sink had before are in none.
    `bad_sources`: who sent something wrong, and what (kind and detail of the RemoteError)."""

    bytes_by_source: dict[str, int]
    bad_sources: dict[str, str]
    seconds: float


class FetchError(Exception):
    """No source is left. `reasons` says what each did; `bytes_by_source` and `bad_sources` as in the report: what has
    arrived stays in the sink."""

    def __init__(
        self,
        ref: ContentRef,
        reasons: dict[str, str],
        bytes_by_source: dict[str, int],
        bad_sources: dict[str, str],
    ) -> None:
        told = "; ".join(f"{peer}: {reason}" for peer, reason in reasons.items()) or "no source is known"
        super().__init__(f"cannot fetch {ref.root.hex()[:16]} ({ref.size_bytes} bytes): {told}")
        self.reasons = reasons
        self.bytes_by_source = bytes_by_source
        self.bad_sources = bad_sources


async def fetch(
    transport: Libp2pTransport,
    ref: ContentRef,
    sources: Iterable[str],
    make_sink: Callable[[Manifest], Sink],
    progress: Callable[[int, int], None] = lambda done_bytes, size_bytes: None,
    *,
    stall_s: float = STALL_S,
) -> FetchReport:
    """Fetch content from peers into a sink, which is made once its manifest is known and has been checked.

    `sources` are ids of peers; it is read again and again, so what a caller appends while the fetch runs is used. They
    should be connected: one that is not counts as failed. `progress` is called after each chunk with the bytes that are
    here, those the sink had before included. Cancelling leaves in the sink what has arrived.
    Raises FetchError, and whatever the sink raises besides RemoteError.
    """
    started = trio.current_time()
    job = _Fetch(transport, ref, make_sink, progress, stall_s)
    await job.run(sources)
    seconds = trio.current_time() - started
    return FetchReport(dict(job.received), job.bad_sources, seconds)


async def fetch_into(
    store: Store,
    transport: Libp2pTransport,
    ref: ContentRef,
    sources: Iterable[str],
    progress: Callable[[int, int], None] = lambda done_bytes, size_bytes: None,
    *,
    stall_s: float = STALL_S,
) -> FetchReport:
    """`fetch` into a store, where the content appears once all of it is there. Raises as `fetch` does, and what the store
    raises."""
    writers: list[ObjectWriter] = []

    def make_sink(manifest: Manifest) -> Sink:
        writers.append(store.writer(manifest))
        return writers[0]

    try:
        report = await fetch(transport, ref, sources, make_sink, progress, stall_s=stall_s)
        await trio.to_thread.run_sync(writers[0].commit)
    finally:
        for writer in writers:
            writer.close()
    return report


class _Fetch:
    """One fetch in progress: the pool of chunks that all workers take from."""

    def __init__(
        self,
        transport: Libp2pTransport,
        ref: ContentRef,
        make_sink: Callable[[Manifest], Sink],
        progress: Callable[[int, int], None],
        stall_s: float,
    ) -> None:
        self.received: Counter[str] = Counter()
        self.bad_sources: dict[str, str] = {}
        self._transport = transport
        self._ref = ref
        self._make_sink = make_sink
        self._progress = progress
        self._stall_s = stall_s
        self._limiter = trio.CapacityLimiter(WRITERS)
        self._sink: Sink | None = None
        self._sink_lock = trio.Lock()
        self._wanted: deque[int] = deque()
        self._owed: dict[int, dict[str, float]] = {}  # chunk -> who was asked for it, and when
        self._done_bytes = 0
        self._active: set[str] = set()
        self._tries: Counter[str] = Counter()
        self._given_up: set[str] = set()
        self._reasons: dict[str, str] = {}
        self._changed = trio.Event()
        self._complete = trio.Event()
        self._failure: Exception | None = None

    async def run(self, sources: Iterable[str]) -> None:
        async with trio.open_nursery() as nursery:
            while not self._complete.is_set() and self._failure is None:
                for source in dict.fromkeys(sources):
                    if self._worth_asking(source):
                        self._tries[source] += 1
                        self._active.add(source)
                        nursery.start_soon(self._use, source)
                if not self._active:
                    self._failure = FetchError(
                        self._ref, self._reasons, dict(self.received), self.bad_sources
                    )
                    break
                with trio.move_on_after(POLL_S):
                    await self._changed.wait()
            nursery.cancel_scope.cancel()
        if self._failure is not None:
            raise self._failure

    def _worth_asking(self, source: str) -> bool:
        if source in self._active or source in self._given_up:
            return False
        # A connection that was lost may be there again: replaced by another link, or redialled.
        return not self._tries[source] or (
            self._tries[source] < MAX_TRIES and self._transport.is_connected(source)
        )

    async def _use(self, source: str) -> None:
        """Fetch from one source until everything is here or the source fails."""
        owed: deque[int] = deque()
        stream: NetStream | None = None
        try:
            stream = await self._transport.open_stream(source, TRANSFER)
            await self._work(source, stream, owed)
        except RemoteError as error:
            self._reasons[source] = str(error)
            self._given_up.add(source)
            if error.kind != "unavailable":
                self.bad_sources[source] = str(error)
                self._transport.counters.count(error.kind, source)
        except trio.TooSlowError:
            self._reasons[source] = f"sent nothing for {self._stall_s:g} s"
            self._given_up.add(source)
        except (StreamEnded, IOException) as error:
            self._reasons[source] = f"connection lost ({str(error) or type(error).__name__})"
        finally:
            for index in owed:
                self._give_back(index, source)
            if stream is not None:
                await end_stream(stream, gracefully=False)
            self._active.discard(source)
            self._notify()

    async def _work(self, source: str, stream: NetStream, owed: deque[int]) -> None:
        reader = FrameReader(stream, ANSWER_LIMITS)
        if self._sink is None:
            await self._learn_manifest(stream, reader)
        while not self._complete.is_set():
            while len(owed) < PIPELINE and (index := self._take(source)) is not None:
                owed.append(index)
                request = frame(WANT_CHUNK, self._ref.root + INDEX.pack(index))
                await write_within(stream, request, WRITE_TIMEOUT_S)
            if not owed:
                with trio.move_on_after(POLL_S):
                    await self._changed.wait()
                continue
            chunk = await self._answer(reader, CHUNK)
            # It stays in `owed` until the sink has it: a wrong one goes back into the pool.
            await self._accept(source, owed[0], chunk)
            owed.popleft()

    async def _learn_manifest(self, stream: NetStream, reader: FrameReader) -> None:
        # Every source that starts before the first answer is asked: manifests are small, and the first answer counts.
        await write_within(stream, frame(WANT_MANIFEST, self._ref.root), WRITE_TIMEOUT_S)
        manifest = decode_manifest(await self._answer(reader, MANIFEST))
        check_manifest(manifest, self._ref)
        async with self._sink_lock:
            if self._sink is not None:
                return
            sink = await self._guarded(self._make_sink, manifest)
            self._sink = sink
        self._wanted.extend(sink.missing)
        self._done_bytes = self._ref.size_bytes - sum(self._length(index) for index in self._wanted)
        self._progress(self._done_bytes, self._ref.size_bytes)
        self._owed = {index: {} for index in self._wanted}
        if not self._owed:
            self._complete.set()
        self._notify()

    async def _answer(self, reader: FrameReader, expected: int) -> bytes:
        kind, body = await reader.next(stall_s=self._stall_s)
        if kind == UNAVAILABLE:
            raise RemoteError("unavailable", body.decode(errors="replace"))
        if kind != expected:
            raise RemoteError("bad_answer", f"a frame of kind {kind} instead of {expected}")
        return body

    async def _accept(self, source: str, index: int, chunk: bytes) -> None:
        assert self._sink is not None
        if index not in self._owed:  # somebody else was faster
            return
        await self._guarded(self._sink.write, index, chunk)
        if self._owed.pop(index, None) is None:
            return
        self.received[source] += len(chunk)
        self._done_bytes += len(chunk)
        self._progress(self._done_bytes, self._ref.size_bytes)
        if not self._owed:
            self._complete.set()
            self._notify()

    async def _guarded(self, call: Callable[[*A], T], *args: *A) -> T:
        """Call the sink in a thread. What it raises besides RemoteError is not the source's fault and ends the fetch."""
        try:
            return await trio.to_thread.run_sync(call, *args, limiter=self._limiter)
        except RemoteError:
            raise
        except Exception as error:
            self._failure = error
            raise StreamEnded("the fetch failed here") from error

    def _take(self, source: str) -> int | None:
        """A chunk to ask this source for, None when there is nothing for it to do (yet)."""
        now = trio.current_time()
        index: int | None = None
        while index is None and self._wanted:
            index = self._wanted.popleft()
            if index not in self._owed:  # a second answer came while it waited here
                index = None
        if index is None:  # the end game: the chunk that somebody else has owed for longest
            owed = (
                (max(asked.values()), index) for index, asked in self._owed.items() if source not in asked
            )
            asked_at, index = min(owed, default=(now, None))
            if now - asked_at < DOUBLE_S:
                return None
        if index is not None:
            self._owed[index][source] = now
        return index

    def _give_back(self, index: int, source: str) -> None:
        asked = self._owed.get(index)
        if asked is not None:
            asked.pop(source, None)
            if not asked:
                self._wanted.append(index)

    def _length(self, index: int) -> int:
        return chunk_span(self._ref.size_bytes, index)[1]

    def _notify(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()

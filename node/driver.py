"""Runs a `Peer` in the real world: its effects become trio tasks, and what comes of them goes back in.

One rule keeps this simple: the peer is called on the trio thread only, never from within its own effects, and each call's
effects are begun in order before the next call. Nothing here decides anything about the run.

    Persist              one lane, in order; several that wait are written with one fsync
    Send, Announce       wait in a line until the Persist they name is durable
    Dial, Reach, Fetch   a task each
    Combine, Step, Train, Validate, Adopt    `tensor_work.py`
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from node.failpoints import Failpoints
from node.network import bulk
from node.network.bulk_fetch import STALL_S, FetchError, fetch_into
from node.network.libp2p_transport import Libp2pTransport
from node.network.transport_events import Announced, Connected, DialError, Disconnected, Received
from node.storage.directory import StorageError
from node.storage.store import Store
from node.training.tensor_work import TensorWork
from node.training.trainer_process import Trainer
from p2pcoord import effects as fx
from p2pcoord.consensus.voter import Role
from p2pcoord.content import ContentRef, Manifest
from p2pcoord.errors import LocalError, P2PCoordError
from p2pcoord.frames import PeerFrame
from p2pcoord.layout import Layout
from p2pcoord.messages import StatusReply
from p2pcoord.peer import LATE_TICK_NS, Peer
from p2pcoord.rounds.rounds import Rounds
from p2pcoord.run_config import RunConfig
from p2pcoord.wire import decode, encode

# How long a round's transfer may go without a byte before its source is given up, and the round made without it. A frozen
# member's links stay open; a state, which may be fetched from others meanwhile, is waited for longer (bulk_fetch.STALL_S).
ROUND_STALL_S = 2.5

# Frames written with one fsync at most: what piled up while the one before was running.
MAX_BATCH = 256

# A late tick lets what lies in the queues be delivered first, for this long.
DELIVER_FIRST_S = 0.05


class Driver:
    """Drives one peer. `event` is told of every Emit; `run` returns the reason when the peer halted."""

    def __init__(
        self,
        peer: Peer,
        transport: Libp2pTransport,
        store: Store,
        trainer: Trainer,
        config: RunConfig,
        layout: Layout,
        *,
        event: Callable[[str, dict[str, Any]], None],
        status: Callable[[], bytes],
    ) -> None:
        self.peer = peer
        self.transport = transport
        self.store = store
        self.tensors = TensorWork(store, trainer, config, layout, self.progress, event)
        self.failpoints = Failpoints(os.environ.get("P2PCOORD_FAILPOINTS", ""))
        self.halted = ""
        self.stopped = trio.Event()
        self._event = event
        self._status = status
        self._nursery: trio.Nursery
        self._wake = trio.Event()
        self._persists: list[fx.Persist] = []
        self._persist_due = trio.Event()
        self._durable = 0
        self._waiting: list[fx.Send | fx.Announce] = []
        self._scopes: dict[int, trio.CancelScope] = {}

    @staticmethod
    def now() -> int:
        return time.monotonic_ns()

    # The peer

    def put(self, call: Callable[[int], list[fx.Effect]]) -> None:
        """One input: `call(now)` is a method of the peer; its effects are begun."""
        if self.failpoints.held or self.stopped.is_set():
            return
        for effect in call(self.now()):
            self._begin(effect)
            if self.failpoints.held:
                break  # what comes behind the failpoint does not happen
        self._wake.set()

    def complete(self, effect_id: int, outcome: fx.Outcome) -> None:
        self.put(lambda now: self.peer.complete(effect_id, outcome, now))

    def progress(self, effect_id: int, step: int | None = None, loss: float | None = None) -> None:
        """A long effect goes on: bytes moved, or local steps were made."""
        self.put(lambda now: self.peer.progress(effect_id, now, step=step, loss=loss))

    async def run(self, start: Callable[[int], list[fx.Effect]]) -> None:
        """Until `stop`, or until the peer halts. `start(now)` gives the peer's first effects."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._persist_all)
            nursery.start_soon(self.tensors.export_adopted)
            bulk.serve(self.transport, self._lookup)
            self.put(start)
            for known in self.transport.connected_peers():
                self.put(functools.partial(self.peer.connected, known))
            nursery.start_soon(self._receive_all)
            nursery.start_soon(self._tick_all)
            await self.stopped.wait()
            nursery.cancel_scope.cancel()

    def stop(self, reason: str = "") -> None:
        self.halted = self.halted or reason
        self.stopped.set()

    async def _receive_all(self) -> None:
        while True:
            event = await self.transport.receive()
            match event:
                case Received() | Announced():
                    data = event.frame if isinstance(event, Received) else event.data
                    self.put(functools.partial(self.peer.receive, event.peer, data))
                case Connected():
                    self.put(functools.partial(self.peer.connected, event.peer))
                case Disconnected():
                    self.put(functools.partial(self.peer.disconnected, event.peer))

    async def _tick_all(self) -> None:
        while True:
            self._wake = trio.Event()
            wait_s = (self.peer.next_deadline() - self.now()) / 1e9
            if wait_s > 0:
                with trio.move_on_after(wait_s):
                    await self._wake.wait()
                    continue
            if self.now() - self.peer.next_deadline() > LATE_TICK_NS:
                await trio.sleep(DELIVER_FIRST_S)
            else:
                await trio.lowlevel.checkpoint()
            self.put(self.peer.tick)
            if self.failpoints.held:
                await trio.sleep_forever()

    # Effects

    def _begin(self, effect: fx.Effect) -> None:
        match effect:
            case fx.Persist():
                self._persists.append(effect)
                self._persist_due.set()
            case fx.Send() | fx.Announce():
                if effect.after <= self._durable:
                    self._release(effect)
                else:
                    self._waiting.append(effect)
            case fx.Emit():
                self._emit(effect)
            case fx.Dial():
                self._task(effect.id, self._dial, effect)
            case fx.Disconnect():
                self.transport.disconnect(effect.peer, effect.reason)
            case fx.Reach():
                self._task(effect.id, self._reach, effect)
            case fx.Fetch():
                self._task(effect.id, self._fetch, effect)
            case fx.Combine():
                self._task(effect.id, self.tensors.combine, effect)
            case fx.Step():
                self._task(effect.id, self.tensors.step, effect)
            case fx.Train():
                self._task(effect.id, self.tensors.train, effect)
            case fx.Validate():
                self._task(effect.id, self.tensors.validate, effect)
            case fx.Cancel():
                if scope := self._scopes.get(effect.effect_id):
                    scope.cancel()
            case fx.Adopt():
                self.tensors.adopt(effect)
            case fx.Discard():
                self._nursery.start_soon(self._discard, effect)
            case fx.Offer():
                pass  # members may fetch whatever the store holds; discarding ends the offer
            case fx.AnswerStatus():
                self.transport.send(effect.peer, encode(StatusReply(self._status())))
            case fx.Halt():
                self.stop(effect.reason)
            case _:
                raise LocalError(f"no way to do a {type(effect).__name__}")

    def _emit(self, effect: fx.Emit) -> None:
        self._event(effect.event, effect.fields)
        if effect.event == "phase" and self._reached(f"phase:{effect.fields['phase']}"):
            self._event("held", {"failpoint": self.failpoints.held})

    def _release(self, effect: fx.Send | fx.Announce) -> None:
        if self.failpoints.held:
            return
        if isinstance(effect, fx.Send):
            self.transport.send(effect.to, effect.data)
        else:
            self._nursery.start_soon(self._announce, effect.data)

    async def _announce(self, data: bytes) -> None:
        try:
            await self.transport.announce(data)
        except LocalError as error:  # larger than an announcement may be: members ask for it instead
            self._event("announcement-dropped", {"reason": str(error)})

    def _task(self, effect_id: int, work: Callable[[Any], Awaitable[fx.Outcome]], effect: fx.Effect) -> None:
        """Runs `work(effect)` in a task of its own and gives its outcome back, exactly once."""

        async def run() -> None:
            outcome: fx.Outcome = fx.Cancelled()
            with trio.CancelScope() as scope:
                self._scopes[effect_id] = scope
                try:
                    outcome = await work(effect)
                except (P2PCoordError, OSError) as error:
                    outcome = fx.Failed(str(error) or type(error).__name__)
            del self._scopes[effect_id]
            self.complete(effect_id, outcome)

        self._nursery.start_soon(run)

    # Disk

    async def _persist_all(self) -> None:
        while True:
            await self._persist_due.wait()
            self._persist_due = trio.Event()
            while self._persists:
                batch, self._persists = _next_batch(self._persists)
                frames = [frame for persist in batch for frame in persist.frames]
                if self._held_around(frames, "persist-before"):
                    await trio.sleep_forever()
                try:
                    write = self.store.rewrite_log if batch[0].replace else self.store.append
                    await trio.to_thread.run_sync(write, frames)
                except StorageError as error:
                    self.complete(batch[0].id, fx.Failed(str(error)))
                    return
                if self._held_around(frames, "persist-after"):
                    await trio.sleep_forever()
                self._durable = batch[-1].id
                ready = [effect for effect in self._waiting if effect.after <= self._durable]
                self._waiting = [effect for effect in self._waiting if effect.after > self._durable]
                for effect in ready:
                    self._release(effect)
                for persist in batch:
                    self.complete(persist.id, fx.Done())

    def _held_around(self, frames: list[bytes], where: str) -> bool:
        if not self.failpoints or self.peer.agreement.voter.role is Role.FOLLOWER:
            return self.failpoints.held != ""
        return any(self._reached(f"{where}:{decode_kind(frame)}") for frame in frames)

    def _reached(self, place: str) -> bool:
        work = self.peer.work
        assert isinstance(work, Rounds)
        return self.failpoints.reached(place, work.participant.version)

    async def _discard(self, effect: fx.Discard) -> None:
        await trio.to_thread.run_sync(self.store.discard, effect.roots)

    def _lookup(self, peer: str, root: bytes) -> bulk.Readable | None:
        """What a peer may fetch: all that is here, if it is a member or has shown that it may join."""
        if not self.peer.may_read(peer):
            return None
        ref = self.store.ref_of(root)
        return _Stored(self.store, ref) if ref is not None else None

    # Network

    async def _dial(self, effect: fx.Dial) -> fx.Outcome:
        try:
            peer = await self.transport.connect(effect.peer or None, effect.addresses)
        except DialError as error:
            self._event(
                "dial-failed",
                {"addresses": list(effect.addresses), "kind": error.kind, "detail": error.detail},
            )
            return fx.Failed(f"{error.kind}: {error.detail}")
        return fx.Done(peer)

    async def _reach(self, effect: fx.Reach) -> fx.Outcome:
        for address in effect.addresses:
            if await self.transport.reachable(address, effect.peer):
                return fx.Done(True)
        return fx.Done(False)

    async def _fetch(self, effect: fx.Fetch) -> fx.Outcome:
        if self.store.has(effect.ref):
            return fx.Done(fx.FetchReport({}, {}))

        def progress(done_bytes: int, size_bytes: int) -> None:
            self.progress(effect.id)

        stall_s = STALL_S if effect.purpose == "state" else ROUND_STALL_S
        try:
            report = await fetch_into(
                self.store, self.transport, effect.ref, effect.sources, progress, stall_s=stall_s
            )
        except FetchError as error:
            return fx.Failed(str(error), fx.FetchReport(error.bytes_by_source, error.bad_sources))
        return fx.Done(fx.FetchReport(report.bytes_by_source, report.bad_sources))


def _next_batch(waiting: list[fx.Persist]) -> tuple[list[fx.Persist], list[fx.Persist]]:
    """What is written next with one fsync: one that replaces the log alone, else all up to the next that does."""
    end = next((at for at, persist in enumerate(waiting) if persist.replace), len(waiting))
    end = min(end, MAX_BATCH) or 1
    return waiting[:end], waiting[end:]


class _Stored:
    """An object of the store, as the serving side of a transfer reads it."""

    def __init__(self, store: Store, ref: ContentRef) -> None:
        self._store, self._ref = store, ref

    @functools.cached_property
    def _manifest(self) -> Manifest:
        return self._store.manifest(self._ref)

    def manifest(self) -> Manifest:
        return self._manifest

    def read_chunk(self, index: int) -> bytes:
        return self._store.read_chunk(self._ref, index, self._manifest)


def decode_kind(frame: bytes) -> str:
    """The kind of an encoded frame of the log."""
    return str(decode(frame, PeerFrame).__struct_config__.tag)  # type: ignore[arg-type]

"""The trainer as the node sees it: a process that is started, asked, restarted when it dies, and ended with the node.

Theory of operation
    Training runs in a process of its own, so that an out-of-memory, a fault of the GPU's driver or an interpreter that is busy
    for seconds never stops the node's heartbeat. `Trainer.run` is a task of the caller's nursery: it starts the process, serves
    it, and when it dies starts it again after a wait that doubles. What was being asked then fails with `TrainerDied`, and may be
    asked again at once: it waits until the next process is ready. Nothing is asked again by itself, since only the caller knows
    whether the answer is still wanted.

        starting -> ready -> dead -> (waiting) -> starting ...
                 \\-> broken: the workload itself cannot be loaded (UserError), all requests fail with that, nothing restarts

    Cancelling the scope around a request cancels the request: training stops at the next batch. Cancelling `run` kills the
    process and all that it started; that is safe, as its files appear whole or not at all.

    This module imports no torch, nor does anything that it imports.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

import msgspec
import trio

from node.training.trainer_connection import Connection, TrainerDied, again, start_process
from node.training.trainer_protocol import (
    Body,
    Configure,
    Configured,
    Describe,
    Described,
    Export,
    Exported,
    Initialize,
    Initialized,
    Loaded,
    Progress,
    Request,
    Start,
    Train,
    Trained,
    Validate,
    Validated,
)
from node.training.workload_loading import WorkloadSpec
from p2pcoord.errors import LocalError, P2PCoordError, UserError

__all__ = ["Trainer", "TrainerDied", "TrainerSettings"]

FIRST_WAIT_S: Final = 0.5
"""After the first death: a process that was killed is back (torch's import takes 1.5 to 3.5 s) within a round."""

LONGEST_WAIT_S: Final = 30.0
"""A machine whose GPU is gone asks for it twice a minute, which costs nothing and finds it again."""

STEADY_S: Final = 60.0
"""A process that was ready for so long died for a new reason: its restart waits FIRST_WAIT_S again."""

A = TypeVar("A", bound=Body)


class TrainerSettings(msgspec.Struct, frozen=True):
    """This machine's part: see `trainer_protocol.Start`."""

    workload: WorkloadSpec
    directory: Path
    local: dict[str, str] = {}
    device: str = "auto"
    threads: int | None = None


class Trainer:
    """The trainer process. Start `run` in a nursery, await `ready`, then `configure`, then ask.

    `output` gets each line that the workload prints; `restarted` is told why when the process died and will start again.
    """

    def __init__(
        self,
        settings: TrainerSettings,
        *,
        output: Callable[[str], object] = lambda line: None,
        restarted: Callable[[str], object] = lambda reason: None,
    ) -> None:
        self._settings = settings
        self._output = output
        self._restarted = restarted
        self._configuration: Configure | None = None
        self._broken: UserError | None = None
        self._attempt = _Attempt()
        self._running = False
        self.deaths = 0

    # The task

    async def run(self) -> None:
        """Keep the process running. Ends when cancelled, or when the workload cannot be loaded (`ready` tells)."""
        if self._running:
            raise LocalError("this trainer is running already")
        self._running = True
        wait_s = FIRST_WAIT_S
        try:
            while True:
                began = trio.current_time()
                reason = await self._run_once()
                if self._broken is not None:
                    return
                self.deaths += 1
                if trio.current_time() - began > STEADY_S:
                    wait_s = FIRST_WAIT_S
                self._restarted(reason)
                await trio.sleep(wait_s)
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        finally:
            self._running = False
            self._attempt.fail(self._broken or TrainerDied("the trainer was stopped"))

    async def _run_once(self) -> str:
        """One process from start to end; returns how it ended."""
        connection = await start_process(self._output)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.write_requests)
                nursery.start_soon(connection.read_output)
                nursery.start_soon(self._prepare, connection)
                await connection.until_ended()
                with trio.move_on_after(1):  # what it printed last explains its death
                    await connection.output_ended.wait()
                nursery.cancel_scope.cancel()
        finally:
            await connection.end()
            reason = connection.told_end()
            connection.fail_all(TrainerDied(reason))
            ended, self._attempt = self._attempt, _Attempt()
            ended.fail(self._broken or TrainerDied(reason))
            if self._broken is not None:
                self._attempt.fail(self._broken)
        return reason

    async def _prepare(self, connection: Connection) -> None:
        """Load the workload, and configure it as the process before was; then requests may come."""
        settings = self._settings
        start = Start(
            settings.workload,
            settings.local,
            settings.device,
            settings.threads,
            str(settings.directory.resolve()),
        )
        try:
            loaded = await connection.ask(start, Loaded)
            if self._configuration is not None:
                await connection.ask(self._configuration, Configured)
        except UserError as error:
            self._broken = error
            connection.close_requests()
        except TrainerDied:
            pass  # told by whoever noticed
        else:
            self._attempt.succeed(connection, loaded)

    # Requests: each raises UserError (the user's code or data), TrainerDied (ask again) or LocalError (a bug, a full disk)

    async def ready(self) -> Loaded:
        """Waits until the workload is loaded and returns what it is."""
        return (await self._attempt.wait())[1]

    async def configure(self, configuration: Configure) -> None:
        """Say what the run says. It is kept, and said again to every process that follows.

        Call it again when the data set's or the frozen parameters' file has moved.
        """
        await self._ask(configuration, Configured)
        self._configuration = configuration

    async def initialize(self, request: Initialize) -> Initialized:
        """Make version 0 and its files; the founder's."""
        return await self._ask(request, Initialized)

    async def describe(self) -> Described:
        """Pins of this machine's workload; who joins or resumes compares them with the run's."""
        return await self._ask(Describe(), Described)

    async def train(self, request: Train, progress: Callable[[Progress], object] | None = None) -> Trained:
        """Train and write a contribution. `progress` is called on the way, at most some four times a second."""
        return await self._ask(request, Trained, progress)

    async def validate(self, request: Validate) -> Validated:
        """Loss and metrics of a state on a share of the validation data."""
        return await self._ask(request, Validated)

    async def export(self, request: Export) -> None:
        """Write a model file."""
        await self._ask(request, Exported)

    async def _ask(
        self, request: Request, kind: type[A], progress: Callable[[Progress], object] | None = None
    ) -> A:
        connection, _ = await self._attempt.wait()
        return await connection.ask(request, kind, progress)

    @property
    def pid(self) -> int | None:
        """The process that is ready; None while there is none."""
        return self._attempt.pid


class _Attempt:
    """One start of the process, which those who wait for it learn to be ready or failed."""

    def __init__(self) -> None:
        self._ended = trio.Event()
        self._ready: tuple[Connection, Loaded] | None = None
        self._error: P2PCoordError | None = None

    def succeed(self, connection: Connection, loaded: Loaded) -> None:
        self._ready = connection, loaded
        self._ended.set()

    def fail(self, error: P2PCoordError) -> None:
        self._error = error
        self._ended.set()

    async def wait(self) -> tuple[Connection, Loaded]:
        await self._ended.wait()
        if self._error is not None:
            raise again(self._error)
        if self._ready is None:
            raise LocalError("an attempt ended without an outcome")
        return self._ready

    @property
    def pid(self) -> int | None:
        return None if self._ready is None or self._error is not None else self._ready[0].process.pid

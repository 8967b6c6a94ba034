"""One running trainer process and its pipes, as the node holds them.

Theory of operation
    `start_process` starts the child with two pipes for requests and answers (`trainer_protocol`) and a third for what it
    prints. `Connection.ask` sends a request and waits for its answer; several may wait at once, each is found by its id.
    `until_ended` runs until the process is dead or speaks nonsense; `end` kills what is left and `fail_all` tells those who wait.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeVar

import trio

from node.training.trainer_protocol import (
    LENGTH_BYTES,
    MAX_FRAME_BYTES,
    Answer,
    Body,
    Cancel,
    Failed,
    Progress,
    Request,
    RequestFrame,
    Stopped,
    decode_answer,
    encode_frame,
)
from p2pcoord.errors import LocalError, P2PCoordError, RemoteError, UserError

MAX_REQUESTS: Final = 64
"""Outstanding at once. A node has one training, one validation and one export at most."""

MAX_OUTPUT_LINE_BYTES: Final = 8 << 10
"""Of what the workload prints; the rest of a longer line is cut off."""

TAIL_LINES: Final = 20
"""Of its last output, told when it dies: a traceback's end fits."""

KILL_WAIT_S: Final = 5.0
"""SIGKILL works at once except on a process that waits for a disk or a driver; then the node goes on without it."""

_READ_BYTES: Final = 64 << 10

A = TypeVar("A", bound=Body)


class TrainerDied(P2PCoordError):  # an event, and caught as one
    """The trainer process ended while it was asked something, or before it was ready. Ask again."""


class _Pending:
    def __init__(self, progress: Callable[[Progress], object] | None) -> None:
        self.progress = progress
        self.ended = trio.Event()
        self.answer: Answer | None = None
        self.error: P2PCoordError | None = None


class Connection:
    """A running process and its three pipes: requests, answers, and what it prints."""

    def __init__(
        self,
        process: trio.Process,
        requests: trio.lowlevel.FdStream,
        answers: trio.lowlevel.FdStream,
        output: Callable[[str], object],
    ) -> None:
        self.process = process
        self.output_ended = trio.Event()
        self._requests = requests
        self._answers = answers
        self._output = output
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._pending: dict[int, _Pending] = {}
        self._dead: TrainerDied | None = None
        self._last_id = 0
        self._fault = ""
        # A request and its cancellation each
        self._outgoing, self._to_write = trio.open_memory_channel[RequestFrame](2 * MAX_REQUESTS)

    async def ask(
        self, request: Request, kind: type[A], progress: Callable[[Progress], object] | None = None
    ) -> A:
        if self._dead is not None:
            raise again(self._dead)
        if len(self._pending) >= MAX_REQUESTS:
            raise LocalError(f"more than {MAX_REQUESTS} requests to the trainer at once")
        self._last_id += 1
        number, pending = self._last_id, _Pending(progress)
        self._pending[number] = pending
        try:
            self._outgoing.send_nowait(RequestFrame(number, request))
            await pending.ended.wait()
        except trio.Cancelled:
            with suppress(trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
                self._outgoing.send_nowait(RequestFrame(number, Cancel()))
            raise
        except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
            raise TrainerDied("the trainer process takes no requests") from None
        finally:
            self._pending.pop(number, None)
        if pending.error is not None:
            raise again(pending.error)
        answer = pending.answer
        if isinstance(answer, Failed):
            if answer.user:
                raise UserError(answer.message, exit_code=answer.exit_code)
            raise LocalError(f"{type(request).__name__} failed in the trainer:\n{answer.message}")
        if isinstance(answer, Stopped) or not isinstance(answer, kind):
            raise LocalError(f"{type(request).__name__} was answered by {type(answer).__name__}")
        return answer

    def close_requests(self) -> None:
        """No more requests: the process ends by itself."""
        self._outgoing.close()

    async def write_requests(self) -> None:
        with suppress(trio.BrokenResourceError):  # it died, which the reader sees too
            async for frame in self._to_write:
                await self._requests.send_all(encode_frame(frame))
            await self._requests.aclose()

    async def until_ended(self) -> None:
        """Take answers until the process is dead, closes its end, or says what is no answer."""
        async with trio.open_nursery() as nursery:

            async def answers() -> None:
                try:
                    await self._read_answers()
                except (LocalError, RemoteError) as error:
                    self._fault = str(error)
                nursery.cancel_scope.cancel()

            async def death() -> None:
                # Apart from the pipe: a worker that the workload forked holds the pipe's other end open, too.
                await self._wait_dead()
                nursery.cancel_scope.cancel()

            nursery.start_soon(answers)
            nursery.start_soon(death)

    async def _wait_dead(self) -> None:
        """Without reaping it, so that its id stays its own until `end`."""
        if not hasattr(os, "pidfd_open"):  # Linux has it; elsewhere the closing pipe must do
            await trio.sleep_forever()
        descriptor = os.pidfd_open(self.process.pid)
        try:
            await trio.lowlevel.wait_readable(descriptor)
        finally:
            os.close(descriptor)

    async def _read_answers(self) -> None:
        buffered = bytearray()
        while received := await self._answers.receive_some(_READ_BYTES):
            buffered += received
            while len(buffered) >= LENGTH_BYTES:
                size = int.from_bytes(buffered[:LENGTH_BYTES], "big")
                if size > MAX_FRAME_BYTES:
                    raise LocalError(f"the trainer announces an answer of {size} bytes")
                if len(buffered) < LENGTH_BYTES + size:
                    break
                frame = decode_answer(bytes(buffered[LENGTH_BYTES : LENGTH_BYTES + size]))
                del buffered[: LENGTH_BYTES + size]
                self._answered(frame.id, frame.body)

    def _answered(self, number: int, answer: Answer) -> None:
        pending = self._pending.get(number)
        if pending is None:
            return  # cancelled
        if isinstance(answer, Progress):
            if pending.progress is not None:
                pending.progress(answer)
            return
        pending.answer = answer
        pending.ended.set()

    async def read_output(self) -> None:
        if self.process.stdout is None:
            raise LocalError("the trainer was started without a pipe for its output")
        line = bytearray()
        while received := await self.process.stdout.receive_some(_READ_BYTES):
            *complete, rest = received.split(b"\n")
            for part in complete:
                self._printed(line + part)
                line.clear()
            line += rest[: MAX_OUTPUT_LINE_BYTES - len(line)]
        if line:
            self._printed(line)
        self.output_ended.set()

    def _printed(self, line: bytes | bytearray) -> None:
        text = line[:MAX_OUTPUT_LINE_BYTES].decode(errors="replace").rstrip("\r")
        self._tail.append(text)
        self._output(text)

    def fail_all(self, error: TrainerDied) -> None:
        self._dead = error
        for pending in self._pending.values():
            pending.error = error
            pending.ended.set()

    async def end(self) -> None:
        """Kill the process and what it started, and close the pipes. Takes at most KILL_WAIT_S."""
        with trio.CancelScope(shield=True), trio.move_on_after(KILL_WAIT_S):
            with suppress(ProcessLookupError):
                # Nobody has waited for it yet, so its id, which is its group's too, is still its own.
                os.killpg(self.process.pid, signal.SIGKILL)
            await self.process.wait()
        self._outgoing.close()
        self._to_write.close()
        for stream in (self._requests, self._answers, self.process.stdout):
            if stream is not None:
                await trio.aclose_forcefully(stream)

    def told_end(self) -> str:
        """How the process ended, in words, with its last output."""
        code = self.process.returncode
        if self._fault:
            how = f"spoke out of turn ({self._fault})"
        elif code is None:
            how = "does not end"
        elif code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        else:
            how = f"ended with exit code {code}"
        said = "\n".join(self._tail)
        return f"the trainer process {how}" + (f"; its last output:\n{said}" if said else "")


async def start_process(output: Callable[[str], object]) -> Connection:
    request_reader, request_writer = os.pipe()
    answer_reader, answer_writer = os.pipe()
    try:
        process = await trio.lowlevel.open_process(
            # -P: a folder named `node` where the user is must not be taken for this package
            [
                sys.executable,
                "-P",
                "-u",
                "-m",
                "node.training.trainer_main",
                str(request_reader),
                str(answer_writer),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(request_reader, answer_writer),
            start_new_session=True,  # a group of its own: Ctrl-C is the node's, and killing it takes its children along
            env=_environment(),
        )
    except BaseException:
        os.close(request_writer)
        os.close(answer_reader)
        raise
    finally:
        os.close(request_reader)
        os.close(answer_writer)
    return Connection(
        process, trio.lowlevel.FdStream(request_writer), trio.lowlevel.FdStream(answer_reader), output
    )


def _environment() -> dict[str, str]:
    """This process's, with our packages' folder in the path: -P and a checkout that is not installed go together."""
    ours = str(Path(__file__).resolve().parents[2])
    path = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{ours}{os.pathsep}{path}" if path else ours}


def again(error: P2PCoordError) -> P2PCoordError:
    """A copy to raise: one exception object raised in several tasks mixes up their tracebacks."""
    if isinstance(error, UserError):
        return UserError(str(error), exit_code=error.exit_code)
    return TrainerDied(str(error))

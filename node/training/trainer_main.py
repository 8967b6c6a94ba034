"""The trainer process: `python -m node.training.trainer_main REQUESTS ANSWERS`, started by `trainer_process` and by nobody else.

Theory of operation
    REQUESTS and ANSWERS are the descriptors of two pipes (see `trainer_protocol`). The main thread takes requests from a
    queue and runs them one after the other. A second thread reads the pipe: it fills the queue, notes which requests were
    cancelled, and ends the process the moment the pipe closes, whatever the main thread does: a trainer never outlives its node.

    An interrupt from the terminal (Ctrl-C reaches the whole group) is for the node to act on. When memory runs out the kernel
    takes the trainer and not the node, and when the processor is busy the node's heartbeat goes first.
"""

from __future__ import annotations

import os
import platform
import signal
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, BinaryIO, Final

import psutil

from node.training.trainer_protocol import (
    LENGTH_BYTES,
    MAX_FRAME_BYTES,
    Answer,
    AnswerFrame,
    Cancel,
    Configure,
    Configured,
    Describe,
    Export,
    Failed,
    Initialize,
    Loaded,
    Request,
    RequestFrame,
    Start,
    Stopped,
    Train,
    Validate,
    decode_request,
    encode_frame,
)
from node.training.workload_loading import load_workload, source_hash, user_code
from p2pcoord.errors import LocalError, UserError
from p2pcoord.workload import Workload

if TYPE_CHECKING:
    import torch

    from node.training.local_training import LocalTraining

NICENESS: Final = 10
"""Half way to the lowest priority: the heartbeats of a node that shares its cores with its trainer are on time."""

OUT_OF_MEMORY_SCORE: Final = 500
"""Linux's choice of what to kill, from -1000 to 1000: as if the trainer used half of the memory more than it does."""


class Trainer:
    """Runs requests one after the other, and writes their answers."""

    def __init__(self, answers: BinaryIO) -> None:
        self._answers = answers
        self._cancelled: set[int] = set()
        self._start: Start | None = None
        self._class: type[Workload] | None = None
        self._device: torch.device | None = None
        self._training: LocalTraining | None = None
        self._shown = ""
        """The mistake of the user's that was printed last."""

    def cancel(self, request: int) -> None:
        """The answer to this request is no longer wanted. Called from the reading thread."""
        self._cancelled.add(request)

    def run(self, frame: RequestFrame) -> None:
        """Run one request and answer it."""
        self._cancelled = {number for number in self._cancelled if number >= frame.id}
        answer: Answer
        try:
            answer = Stopped() if self._is_cancelled(frame.id) else self._answer(frame.id, frame.body)
        except UserError as error:
            if isinstance(frame.body, Train | Validate):
                self._show(str(error))
            answer = Failed(True, str(error), error.exit_code)
        except Exception:  # whatever it is, the node is told, and this process goes on
            answer = Failed(False, traceback.format_exc())
        self._say(frame.id, answer)

    def _answer(self, number: int, request: Request) -> Answer:
        if isinstance(request, Start):
            return self._load(request)
        if isinstance(request, Configure):
            return self._configure(request)
        if self._training is None:
            raise LocalError(f"{type(request).__name__} before Configure")
        from node.training.local_training import TrainingStopped

        try:
            match request:
                case Initialize():
                    return self._training.initialize(request)
                case Describe():
                    return self._training.describe()
                case Train():
                    return self._training.train(
                        request,
                        lambda progress: self._say(number, progress),
                        lambda: self._is_cancelled(number),
                    )
                case Validate():
                    return self._training.validate(request, lambda: self._is_cancelled(number))
                case Export():
                    return self._training.export(request)
                case Cancel():
                    raise LocalError("Cancel is no request of the queue")
        except TrainingStopped:
            return Stopped()

    def _load(self, request: Start) -> Loaded:
        import torch

        if request.threads is not None:
            torch.set_num_threads(request.threads)
        self._device, device_name = choose_device(request.device)
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.insert(
                0, str(Path.cwd())
            )  # -P left it out, so that a folder named node is not taken for ours
        self._start = request
        self._class = load_workload(request.workload)
        with user_code("run_defaults()"):
            defaults = {name: dict(table) for name, table in self._class.run_defaults().items()}
        return Loaded(
            source_hash(self._class),
            defaults,
            str(self._device),
            device_name,
            memory_of(self._device),
            str(torch.__version__),
        )

    def _configure(self, request: Configure) -> Configured:
        if self._start is None or self._class is None or self._device is None:
            raise LocalError("Configure before Start")
        from node.training.local_training import LocalTraining

        workload = self._class.__new__(self._class)
        workload.options = request.options  # before __init__, which may use them
        workload.local = self._start.local
        with user_code("creating the workload"):
            workload.__init__()  # type: ignore[misc]
        self._training = LocalTraining(
            workload, source_hash(self._class), self._device, Path(self._start.directory), request
        )
        return Configured()

    def _is_cancelled(self, number: int) -> bool:
        return number in self._cancelled

    def _show(self, mistake: str) -> None:
        """Prints a mistake in the user's code as if it was not caught: whole and in lines, which an answer's reason is not."""
        told = mistake if mistake != self._shown else f"the same again: {mistake.splitlines()[-1]}"
        sys.stdout.write(told + "\n")
        self._shown = mistake

    def _say(self, number: int, answer: Answer) -> None:
        self._answers.write(encode_frame(AnswerFrame(number, answer)))
        self._answers.flush()


def choose_device(wanted: str) -> tuple[torch.device, str]:
    """A device of this machine and its name for people. Raises UserError (exit code 2) when there is none such."""
    import torch

    have = (
        [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    if torch.backends.mps.is_available():
        have.append("mps")
    have.append("cpu")
    chosen = {"auto": have[0], "cuda": "cuda:0"}.get(wanted, wanted)
    if chosen not in have:
        raise UserError(f"--device {wanted}: no such device; this machine has {', '.join(have)}", exit_code=2)
    if chosen.startswith("cuda"):
        return torch.device(chosen), str(torch.cuda.get_device_name(chosen))
    return torch.device(
        chosen
    ), "Apple GPU" if chosen == "mps" else platform.processor() or platform.machine()


def memory_of(device: torch.device) -> int:
    """Bytes of the device's own memory; of the machine's, which the processor and Apple's GPUs work in."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def main() -> None:
    """Serve requests until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(NICENESS)
    with suppress(OSError):  # Linux has it
        Path("/proc/self/oom_score_adj").write_text(str(OUT_OF_MEMORY_SCORE))
    requests, answers = (int(argument) for argument in sys.argv[1:])
    for descriptor in (requests, answers):
        os.set_inheritable(
            descriptor, False
        )  # processes that the workload starts must not hold the pipes open
    queue: SimpleQueue[RequestFrame] = SimpleQueue()
    with os.fdopen(answers, "wb") as output:
        trainer = Trainer(output)
        reading = threading.Thread(
            target=_read, args=(requests, queue, trainer), name="requests", daemon=True
        )
        reading.start()
        while True:
            trainer.run(queue.get())


def _read(descriptor: int, queue: SimpleQueue[RequestFrame], trainer: Trainer) -> None:
    try:
        with os.fdopen(descriptor, "rb") as file:
            while header := file.read(LENGTH_BYTES):
                size = int.from_bytes(header, "big")
                if size > MAX_FRAME_BYTES:
                    raise LocalError(f"a request of {size} bytes")
                frame = decode_request(file.read(size))
                if isinstance(frame.body, Cancel):
                    trainer.cancel(frame.id)
                else:
                    queue.put(frame)
    except Exception:
        traceback.print_exc()  # to the node's log
    finally:
        sys.stdout.flush()
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)  # with whatever the workload started (data loaders)
        os._exit(1)


if __name__ == "__main__":
    main()

"""What is done with tensors: outside of `Peer`, and never on the trio thread.

    Combine, Step      worker threads, one computation at a time (they are bound by memory bandwidth)
    Train, Validate    the trainer process; asked again when it died, or when the workload's code failed (`gave_up`)
    Adopt              the newest one only, written to DIR/model/latest.safetensors by the trainer

What is written on the way lies in DIR/scratch and moves into the store when it is whole.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import trio

from node.storage.export import MODEL_FILE
from node.storage.model_checksum import DamagedModel, check_model
from node.storage.store import Store
from node.training import workers
from node.training.trainer_process import Trainer, TrainerDied
from node.training.trainer_protocol import Export, Progress, Trained
from node.training.trainer_protocol import Train as TrainRequest
from node.training.trainer_protocol import Validate as ValidateRequest
from p2pcoord import effects as fx
from p2pcoord.content import ContentRef
from p2pcoord.errors import LocalError, P2PCoordError, UserError
from p2pcoord.layout import Layout
from p2pcoord.rounds.plan import Ranges
from p2pcoord.run_config import RunConfig

# A trainer that dies is asked again so often before the assignment counts as failed and goes to another member.
TRAINER_RETRIES = 3

# The workload's code may fail so often in a row, in training or in validation. What a moment's wait mends (memory that another
# program holds, a share that is mounted late) is over by then; a bug is not, and only its user can mend it.
WORKLOAD_TRIES = 3
FIRST_BACKOFF_S = 1.0  # doubled each time

T = TypeVar("T")


class TensorWork:
    """The tensor work of one node. `progress(effect_id, step, loss)` is called while it trains; `event` is told what is no
    effect's outcome. Methods named as effects give the effect's outcome, or raise what makes it fail."""

    def __init__(
        self,
        store: Store,
        trainer: Trainer,
        config: RunConfig,
        layout: Layout,
        progress: Callable[[int, int, float], None],
        event: Callable[[str, dict[str, Any]], None],
    ) -> None:
        self._store = store
        self._trainer = trainer
        self._config = config
        self._layout = layout
        self._progress = progress
        self._event = event
        self._computing = trio.CapacityLimiter(1)
        self._scratch = 0
        self._adopted: fx.Adopt | None = None
        self._adopt_due = trio.Event()
        self.exported_version = -1
        """The version that the model file shows; -1 when there is none that is whole."""
        self._workload_failures = {"training": 0, "validation": 0}  # in a row
        self.gave_up = trio.Event()
        """The workload's code failed WORKLOAD_TRIES times in a row: nothing will come of this node. `gave_up_why` says what."""
        self.gave_up_why = ""

    async def combine(self, effect: fx.Combine) -> fx.Outcome:
        inputs = [workers.CombineInput(self._store.file_of(ref), factors) for ref, factors in effect.inputs]
        out = self._scratch_path("sum")

        def work() -> tuple[workers.CombineOutcome, ContentRef]:
            outcome = workers.combine(self._layout, inputs, out, trio.from_thread.check_cancelled)
            return outcome, self._store.put_file(out, move=True)

        outcome, ref = await trio.to_thread.run_sync(work, limiter=self._computing)
        nonfinite = tuple(effect.inputs[at][0].root for at in outcome.non_finite)
        return fx.Done(fx.Combined(ref, outcome.norm, outcome.finite, nonfinite))

    async def step(self, effect: fx.Step) -> fx.Outcome:
        out = self._scratch_path("state")
        state, result = self._store.file_of(effect.state), self._store.file_of(effect.result)

        def work() -> tuple[workers.StepOutcome, ContentRef]:
            outcome = workers.step(
                self._layout, state, result, effect.parameters, out, trio.from_thread.check_cancelled
            )
            return outcome, self._store.put_file(out, move=True)

        outcome, ref = await trio.to_thread.run_sync(work, limiter=self._computing)
        return fx.Done(fx.Stepped(ref, outcome.finite))

    async def train(self, effect: fx.Train) -> fx.Outcome:
        strategy = self._config.strategy
        out = self._scratch_path("contribution")
        request = TrainRequest(
            base=str(self._store.file_of(effect.base)),
            base_version=effect.version - 1,
            slot=f"{effect.version}-{effect.assignment}",
            ranges=effect.ranges if self._config.data.mode == "dealt" else None,
            local_epochs=strategy.local_epochs,
            local_steps=strategy.local_steps,
            sync_interval_s=strategy.sync_interval_s,
            seed=effect.seed,
            output=str(out),
        )

        def progress(told: Progress) -> None:
            self._progress(effect.id, told.local_step, told.loss)

        async def train() -> Trained:
            trained = await self._trainer.train(request, progress)
            if (
                not trained.finite
            ):  # a failure of the workload like any other: the next round would begin no better
                out.unlink(missing_ok=True)
                raise UserError(f"the contribution is not finite (loss {trained.loss})")
            return trained

        trained = await self._work("training", train)
        ref = await trio.to_thread.run_sync(functools.partial(self._store.put_file, out, move=True))
        wall_ns = int(trained.wall_s * 1e9)
        return fx.Done(fx.Trained(ref, trained.samples, trained.steps, trained.norm, trained.loss, wall_ns))

    async def validate(self, effect: fx.Validate) -> fx.Outcome:
        ranges = effect.ranges if self._config.data.mode == "dealt" else None
        request = ValidateRequest(str(self._store.file_of(effect.state)), ranges)
        done = await self._work(
            "validation",
            lambda: self._trainer.validate(request),
            sound=lambda: self._validates_certified(ranges),
        )
        return fx.Done(fx.Validated(done.samples, done.loss_sum, done.metric_sums))

    async def _validates_certified(self, ranges: Ranges | None) -> bool:
        """Whether the certified state can be validated: then a new one that cannot be is to blame for it, and not the code."""
        if self._adopted is None:
            return False
        request = ValidateRequest(str(self._store.file_of(self._adopted.state)), ranges)
        try:
            await self._ask(lambda: self._trainer.validate(request))
        except UserError:
            return False
        return True

    async def _work(
        self, what: str, ask: Callable[[], Awaitable[T]], sound: Callable[[], Awaitable[bool]] | None = None
    ) -> T:
        """Asks the trainer for what the workload's code does, again when that fails; `sound` tells at the end whether the code
        is right all the same. Raises UserError, on one line."""
        failures = self._workload_failures
        while True:
            if failures[what]:
                await trio.sleep(FIRST_BACKOFF_S * 2 ** (failures[what] - 1))
            try:
                done = await self._ask(ask)
            except UserError as error:
                failures[what] += 1
                if failures[what] < WORKLOAD_TRIES:
                    continue
                # The traceback, if it has one, was printed by the trainer, whole.
                lines = str(error).splitlines()
                reason = lines[0] if len(lines) == 1 else f"{lines[0].rstrip(':')}: {lines[-1]}"
                if sound is not None and await sound():
                    failures[what] = 0
                    raise UserError(reason) from None
                self.gave_up_why = f"{reason} ({failures[what]} times in a row)"
                self.gave_up.set()
                raise UserError(reason) from None
            failures[what] = 0
            return done

    async def _ask(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Asks the trainer, again when it died meanwhile."""
        for attempt in range(TRAINER_RETRIES + 1):
            try:
                return await ask()
            except TrainerDied:
                if attempt == TRAINER_RETRIES:
                    raise
        raise LocalError("unreachable")

    def _scratch_path(self, what: str) -> Path:
        self._scratch += 1
        folder = self._store.path / "scratch"
        folder.mkdir(exist_ok=True)
        return folder / f"{what}-{self._scratch}"

    # The model file

    def adopt(self, effect: fx.Adopt) -> None:
        """A version is certified: the model file will show it, or a newer one."""
        self._adopted = effect
        self._adopt_due.set()

    async def export_adopted(self) -> None:
        """Keeps the model file at the newest certified version; those between may be skipped."""
        self.exported_version = await trio.to_thread.run_sync(self._model_on_disk)
        while True:
            await self._adopt_due.wait()
            self._adopt_due = trio.Event()
            adopt = self._adopted
            # A certificate that an earlier life was killed with, before it was durable, is learned again: the file stays.
            if adopt is None or adopt.version <= self.exported_version:
                continue
            try:
                await self._export(adopt)
            except (P2PCoordError, OSError) as error:
                self._event("export-failed", {"version": adopt.version, "reason": str(error)})
            else:
                self.exported_version = adopt.version

    def _model_on_disk(self) -> int:
        try:
            with (self._store.path / MODEL_FILE).open("rb") as file:
                return check_model(file).version
        except (OSError, DamagedModel):
            return -1  # the newest version is written in its place

    async def _export(self, adopt: fx.Adopt) -> None:
        temporary = self._scratch_path("model")
        metadata = {"p2pcoord_version": str(adopt.version), "p2pcoord_state": adopt.state.root.hex()}
        state = str(self._store.file_of(adopt.state))
        await self._ask(lambda: self._trainer.export(Export(state, str(temporary), metadata)))

        def publish(path: Path) -> None:
            temporary.replace(path)

        await trio.to_thread.run_sync(self._store.replace_file, MODEL_FILE, publish)

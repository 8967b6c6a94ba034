"""Tensor work at the trainer: asked again when it dies, and the model file goes forward only."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import trio
import trio.testing

from node.storage.export import MODEL_FILE
from node.storage.model_checksum import CHECKSUM, NO_CHECKSUM, check_model, seal
from node.storage.store import Store
from node.training.tensor_work import TRAINER_RETRIES, WORKLOAD_TRIES, TensorWork
from node.training.trainer_process import Trainer, TrainerDied
from node.training.trainer_protocol import Export, Progress, Train, Trained, Validate, Validated
from p2pcoord import effects as fx
from p2pcoord.content import ContentRef
from p2pcoord.errors import UserError
from p2pcoord.layout import Layout
from p2pcoord.run_config import NONCE_BYTES, found_run, parse_run_file

CONFIG = found_run(
    parse_run_file("", "run.toml", {}), founder="A", nonce=bytes(NONCE_BYTES), workload_spec="text"
)


class Mortal:
    """A trainer that dies so many times, whose workload fails so many times, and that writes model files which name their
    version."""

    def __init__(self, deaths: int = 0, mistakes: int = 0, divergences: int = 0) -> None:
        self.deaths = deaths
        self.mistakes = mistakes
        self.divergences = divergences  # of training: the loss is no number
        self.asked = 0
        self.exported: list[str] = []

    async def _live(self) -> None:
        await trio.lowlevel.checkpoint()
        self.asked += 1
        if self.asked <= self.deaths:
            raise TrainerDied("killed by signal 9")
        if self.asked <= self.deaths + self.mistakes:
            raise UserError("metrics() of the workload failed:\nTraceback\n  File ...\nValueError: a bug")

    async def train(self, request: Train, progress: Callable[[Progress], None]) -> Trained:
        await self._live()
        finite = self.asked > self.divergences
        await trio.Path(request.output).write_bytes(b"a contribution")
        return Trained(5, 40, 0.5 if finite else math.nan, 1.0, finite, 0.1)

    async def validate(self, request: Validate) -> Validated:
        await self._live()
        return Validated(samples=4, loss_sum=2.0, metric_sums={}, finite=True, wall_s=0.1)

    async def export(self, request: Export) -> None:
        await self._live()
        header = msgspec.json.encode({"__metadata__": {CHECKSUM: NO_CHECKSUM, **request.metadata}})
        await trio.Path(request.path).write_bytes(len(header).to_bytes(8, "little") + header)
        seal(Path(request.path))
        self.exported.append(request.metadata["p2pcoord_version"])


class Around:
    def __init__(self, store: Store, trainer: Mortal) -> None:
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.state = store.put(b"a state")
        self.work = TensorWork(
            store,
            cast(Trainer, trainer),
            CONFIG,
            Layout(()),
            lambda *_: None,
            lambda event, fields: self.told.append((event, fields)),
        )

    async def until(self, version: int) -> None:
        while self.work.exported_version != version:  # noqa: ASYNC110
            await trio.sleep(0.01)


@asynccontextmanager
async def around(path: Path, trainer: Mortal) -> AsyncIterator[Around]:
    with Store.open(path / "node") as store:
        yield Around(store, trainer)


@pytest.mark.trio
async def test_a_trainer_that_dies_is_asked_again_but_not_for_ever(tmp_path: Path) -> None:
    trainer = Mortal(deaths=TRAINER_RETRIES)
    async with around(tmp_path, trainer) as here:
        effect = fx.Validate(7, here.state, ((0, 4),))
        assert await here.work.validate(effect) == fx.Done(fx.Validated(4, 2.0, {}))
        trainer.asked, trainer.deaths = 0, TRAINER_RETRIES + 1
        with pytest.raises(TrainerDied, match="signal 9"):
            await here.work.validate(effect)


@pytest.mark.trio
async def test_a_state_that_cannot_be_validated_is_not_the_workloads_fault_where_the_certified_one_can(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """A diverged state makes metrics() raise everywhere at once: then all nodes would end."""
    trainer = Mortal(mistakes=WORKLOAD_TRIES)
    async with around(tmp_path, trainer) as here:
        here.work.adopt(fx.Adopt(3, here.state))
        effect = fx.Validate(7, here.state, ((0, 4),))
        with pytest.raises(UserError, match="ValueError: a bug"):
            await here.work.validate(effect)
        assert not here.work.gave_up.is_set()
        assert await here.work.validate(effect) == fx.Done(fx.Validated(4, 2.0, {}))
        trainer.asked, trainer.mistakes = 0, 100
        with pytest.raises(UserError, match="ValueError: a bug"):
            await here.work.validate(effect)
        assert here.work.gave_up.is_set()


@pytest.mark.trio
async def test_a_workload_that_fails_is_asked_again_later_each_time_and_given_up_after_a_few_times_in_a_row(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    trainer = Mortal(mistakes=WORKLOAD_TRIES - 1)
    async with around(tmp_path, trainer) as here:
        effect = fx.Validate(7, here.state, ((0, 4),))
        began = trio.current_time()
        assert await here.work.validate(effect) == fx.Done(fx.Validated(4, 2.0, {}))
        assert trio.current_time() - began == pytest.approx(1 + 2)
        assert not here.work.gave_up.is_set()
        trainer.asked, trainer.mistakes = 0, 100
        with pytest.raises(UserError, match=r"^metrics\(\) of the workload failed: ValueError: a bug$"):
            await here.work.validate(effect)
        assert trainer.asked == WORKLOAD_TRIES, "what came in time has made it begin anew"
        assert here.work.gave_up.is_set()
        assert (
            here.work.gave_up_why == "metrics() of the workload failed: ValueError: a bug (3 times in a row)"
        )


@pytest.mark.trio
async def test_a_loss_that_is_no_number_is_a_failure_of_the_workload(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    trainer = Mortal(divergences=WORKLOAD_TRIES - 1)
    async with around(tmp_path, trainer) as here:
        effect = fx.Train(7, 1, 0, here.state, ((0, 4),), 3)
        began = trio.current_time()
        assert isinstance(outcome := await here.work.train(effect), fx.Done)
        assert outcome.value.loss == 0.5
        assert trio.current_time() - began == pytest.approx(1 + 2), "not when the next round begins"
        trainer.asked, trainer.divergences = 0, 100
        with pytest.raises(UserError, match=r"^the contribution is not finite \(loss nan\)$"):
            await here.work.train(effect)
        assert here.work.gave_up_why == "the contribution is not finite (loss nan) (3 times in a row)"
        assert not list((tmp_path / "node/scratch").iterdir())


@pytest.mark.trio
async def test_failures_are_counted_over_requests_that_were_cancelled_meanwhile(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    trainer = Mortal(mistakes=100)
    async with around(tmp_path, trainer) as here:
        effect = fx.Validate(7, here.state, ((0, 4),))
        with trio.move_on_after(0.5):  # in the wait before the next try
            await here.work.validate(effect)
        assert trainer.asked == 1
        with pytest.raises(UserError):
            await here.work.validate(effect)
        assert trainer.asked == WORKLOAD_TRIES


@pytest.mark.trio
async def test_the_model_file_shows_the_newest_version_and_never_an_older_one(tmp_path: Path) -> None:
    trainer = Mortal()
    with trio.fail_after(20):
        async with around(tmp_path, trainer) as here, trio.open_nursery() as nursery:
            assert here.work.exported_version == -1
            here.work.adopt(fx.Adopt(1, here.state))
            here.work.adopt(fx.Adopt(2, here.state))
            nursery.start_soon(here.work.export_adopted)
            await here.until(2)
            assert trainer.exported == ["2"], "the one between was skipped"
            here.work.adopt(fx.Adopt(1, here.state))
            await trio.testing.wait_all_tasks_blocked()
            assert trainer.exported == ["2"]
            nursery.cancel_scope.cancel()
        with (tmp_path / "node" / MODEL_FILE).open("rb") as file:
            assert check_model(file).version == 2
        async with around(tmp_path, trainer) as again, trio.open_nursery() as nursery:
            nursery.start_soon(again.work.export_adopted)
            await again.until(2)
            nursery.cancel_scope.cancel()
        with (tmp_path / "node" / MODEL_FILE).open("ab") as file:
            file.write(b"damage")
        async with around(tmp_path, trainer) as again, trio.open_nursery() as nursery:
            nursery.start_soon(again.work.export_adopted)
            again.work.adopt(fx.Adopt(2, again.state))
            await again.until(2)
            assert trainer.exported == ["2", "2"], "it is written anew"
            nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_a_model_file_that_cannot_be_written_is_told_and_tried_with_the_next(tmp_path: Path) -> None:
    trainer = Mortal()
    with trio.fail_after(20):
        async with around(tmp_path, trainer) as here, trio.open_nursery() as nursery:
            nursery.start_soon(here.work.export_adopted)
            here.work.adopt(fx.Adopt(1, ContentRef(bytes(32), 5)))  # not in the store
            while not here.told:  # noqa: ASYNC110
                await trio.sleep(0.01)
            [(event, fields)] = here.told
            assert (event, fields["version"]) == ("export-failed", 1)
            here.work.adopt(fx.Adopt(2, here.state))
            await here.until(2)
            nursery.cancel_scope.cancel()

"""The trainer as a real process: what it computes, what it survives, and whose mistakes it tells."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import safetensors.numpy
import trio
import trio.testing

from node.storage.model_checksum import ModelInfo, check_model
from node.training.trainer_process import STEADY_S, Trainer, TrainerDied, TrainerSettings
from node.training.trainer_protocol import (
    Configure,
    Export,
    Initialize,
    Initialized,
    Progress,
    Train,
    Trained,
    Validate,
)
from node.training.workload_loading import parse_spec
from p2pcoord.errors import LocalError, UserError
from p2pcoord.layout import Layout
from p2pcoord.run_config import LocalOptimizer
from p2pcoord.workload import compare_pins

pytestmark = pytest.mark.trio

LIMIT_S = 60
"""A test takes 3 to 10 s on two cores, most of it torch's import; more means that something hangs."""

LINE = """
    import time
    import torch
    from torch.utils.data import TensorDataset
    import p2pcoord

    class Line(p2pcoord.Workload):
        batch_size = 10

        def model(self):
            return torch.nn.Linear(1, 1)

        def data(self, split):
            x = torch.linspace(-1, 1, 100 if split == "train" else 21).unsqueeze(1)
            return TensorDataset(x, 3 * x + 1)

        def loss(self, model, batch):
            time.sleep(float(self.local.get("sleep", 0)))
            return ((model(batch[0]) - batch[1]) ** 2).mean()

        def metrics(self, model, batch):
            return {"error": (model(batch[0]) - batch[1]).abs().mean()}
"""

ZOO = """
    import torch
    from torch import nn
    from torch.nn import functional as F
    from torch.utils.data import TensorDataset
    import p2pcoord

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4, bias=False)
            self.norm = nn.BatchNorm1d(4)
            self.tied = nn.Linear(4, 4, bias=False)
            self.tied.weight = self.first.weight
            self.frozen = nn.Linear(4, 4)
            self.frozen.requires_grad_(False)
            self.low = nn.Linear(4, 2).to(torch.bfloat16)
            self.unused = nn.Parameter(torch.full((3,), 1 / 3, dtype=torch.bfloat16))
            self.register_buffer("flag", torch.tensor(True))
            self.register_buffer("scratch", torch.zeros(2), persistent=False)

        def forward(self, x):
            x = self.frozen(self.tied(self.norm(self.first(x))))
            return self.low(x.to(torch.bfloat16)).float()

    class Zoo(p2pcoord.Workload):
        batch_size = 8

        def model(self):
            return Net()

        def data(self, split):
            x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
            return TensorDataset(x, (x.sum(1) > 0).long())

        def loss(self, model, batch):
            return F.cross_entropy(model(batch[0]), batch[1])

        def dataset_bytes(self):
            return b"agreed"
"""


@asynccontextmanager
async def trainer_of(
    folder: Path, source: str, name: str, *, configured: bool = True, **settings: Any
) -> AsyncIterator[Trainer]:
    file = folder / "workload.py"
    file.write_text(textwrap.dedent(source))
    directory = folder / "data"
    directory.mkdir(exist_ok=True)
    options = {"device": "cpu", "threads": 1, **settings}
    trainer = Trainer(TrainerSettings(parse_spec(f"{file}:{name}"), directory, **options), output=print)
    with trio.fail_after(LIMIT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trainer.run)
            try:
                if configured:
                    await trainer.configure(configuration())
                yield trainer
            finally:
                nursery.cancel_scope.cancel()


def configuration(**changes: Any) -> Configure:
    said: dict[str, Any] = {"options": {}, "data_mode": "dealt", "batch_size": None, "seed": 7}
    said |= {"optimizer": LocalOptimizer(learning_rate=0.05), "slots": 1}
    return Configure(**{**said, **changes})


async def initialized(trainer: Trainer, folder: Path, init: str | None = None) -> Initialized:
    state, dataset, frozen = (str(folder / name) for name in ("state0", "dataset", "frozen"))
    return await trainer.initialize(Initialize(init, state, dataset, frozen))


def training(folder: Path, output: str = "contribution", **changes: Any) -> Train:
    said: dict[str, Any] = {
        "base": str(folder / "state0"),
        "base_version": 0,
        "slot": "a",
        "ranges": ((0, 50),),
        "local_epochs": 3,
        "local_steps": None,
        "sync_interval_s": None,
        "seed": 11,
        "output": str(folder / output),
    }
    return Train(**{**said, **changes})


def octets(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.fromfile(path, np.uint8)


def stepped(layout: Layout, base: Path, contribution: Path, path: Path) -> Path:
    """The next version by plain averaging of one: base minus pseudo-gradient, buffers as contributed."""
    state, update = octets(base), octets(contribution)
    layout.parameters(state)[:] -= layout.parameters(update)
    layout.float_buffers(state)[:] = layout.float_buffers(update)
    layout.integers(state)[:] = layout.integers(update)
    state.tofile(path)
    return path


async def test_minus_the_pseudo_gradient_lowers_the_loss_and_the_model_file_says_the_same(
    tmp_path: Path,
) -> None:
    async with trainer_of(tmp_path, LINE, "Line") as trainer:
        layout = (await initialized(trainer, tmp_path)).described.pins.layout
        before = await trainer.validate(Validate(str(tmp_path / "state0"), ((0, 21),)))
        seen: list[Progress] = []
        trained = await trainer.train(training(tmp_path, ranges=((0, 30), (60, 100))), seen.append)
        after_path = stepped(layout, tmp_path / "state0", tmp_path / "contribution", tmp_path / "state1")
        after = await trainer.validate(Validate(str(after_path), ((0, 21),)))
        metadata = {"p2pcoord_version": "1", "p2pcoord_state": "ab"}
        await trainer.export(Export(str(after_path), str(tmp_path / "model.safetensors"), metadata))
    assert (trained.steps, trained.samples, trained.finite) == (21, 210, True)
    assert seen and seen[-1].local_step == 21
    assert after.samples == 21 and after.loss_sum < before.loss_sum / 2
    assert after.metric_sums["error"] < before.metric_sums["error"]
    assert octets(tmp_path / "contribution").nbytes == layout.contribution_bytes
    assert octets(tmp_path / "state0").nbytes == layout.state_bytes(1)
    norm = np.linalg.norm(layout.parameters(octets(tmp_path / "contribution")).astype(np.float64))
    assert trained.norm == pytest.approx(norm)
    model = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    views = layout.tensor_views(octets(after_path))
    assert model.keys() == views.keys() == {"weight", "bias"}
    assert all(np.array_equal(model[name], views[name]) for name in model)
    with (tmp_path / "model.safetensors").open("rb") as file:
        assert check_model(file) == ModelInfo(1, "ab")


async def test_the_same_request_gives_the_same_bytes_again_also_in_another_process(tmp_path: Path) -> None:
    async with trainer_of(tmp_path, ZOO, "Zoo") as trainer:
        await initialized(trainer, tmp_path)
        await trainer.train(training(tmp_path, "first"))
        await trainer.train(training(tmp_path, "again"))
        await trainer.train(training(tmp_path, "next", base_version=1))
    async with trainer_of(tmp_path, ZOO, "Zoo") as trainer:
        await trainer.train(training(tmp_path, "elsewhere"))
        await trainer.train(training(tmp_path, "next elsewhere", base_version=1))
        await trainer.train(training(tmp_path, "other seed", seed=12))
    first = (tmp_path / "first").read_bytes()
    assert (tmp_path / "again").read_bytes() == first, (
        "the inner state of this very round was not started from"
    )
    assert (tmp_path / "elsewhere").read_bytes() == first
    assert (tmp_path / "other seed").read_bytes() != first
    following = (tmp_path / "next").read_bytes()
    assert following != first, "the inner optimizer's state goes on from round to round"
    assert (tmp_path / "next elsewhere").read_bytes() == following, "and survives a restart"


async def test_buffers_tied_frozen_and_bfloat16_tensors_make_the_round_trip(tmp_path: Path) -> None:
    async with trainer_of(tmp_path, ZOO, "Zoo") as trainer:
        answer = await initialized(trainer, tmp_path)
        layout = answer.described.pins.layout
        await trainer.train(training(tmp_path))
        after = stepped(layout, tmp_path / "state0", tmp_path / "contribution", tmp_path / "state1")
        await trainer.export(Export(str(after), str(tmp_path / "model.safetensors"), {}))
        await trainer.export(Export(str(tmp_path / "state0"), str(tmp_path / "model0.safetensors"), {}))
    roles = {spec.name: (spec.dtype, spec.role) for spec in layout.specs}
    assert roles == {
        "first.weight": ("float32", "parameter"),
        "norm.weight": ("float32", "parameter"),
        "norm.bias": ("float32", "parameter"),
        "norm.running_mean": ("float32", "float_buffer"),
        "norm.running_var": ("float32", "float_buffer"),
        "norm.num_batches_tracked": ("int64", "integer_buffer"),
        "frozen.weight": ("float32", "frozen"),
        "frozen.bias": ("float32", "frozen"),
        "low.weight": ("bfloat16", "parameter"),
        "low.bias": ("bfloat16", "parameter"),
        "unused": ("bfloat16", "parameter"),
        "flag": ("bool", "integer_buffer"),
    }
    assert answer.has_frozen and answer.has_dataset
    assert (tmp_path / "dataset").read_bytes() == b"agreed"
    update = layout.tensor_views(octets(tmp_path / "contribution"))
    assert not update["unused"].any(), "what training did not move contributes exactly 0, cast or not"
    assert update["first.weight"].any() and update["low.weight"].any()
    assert int(update["norm.num_batches_tracked"]) == 3 * 7  # 50 samples are 6 batches of 8 and one of 2
    assert int(update["flag"]) == 1
    state = layout.tensor_views(octets(after))
    with safetensors.safe_open(tmp_path / "model.safetensors", framework="np") as file:
        assert set(file.keys()) == roles.keys() | {"tied.weight"}, (
            "all names of state_dict, so that it loads strictly"
        )
        assert np.array_equal(file.get_tensor("first.weight"), state["first.weight"])
        assert np.array_equal(file.get_tensor("tied.weight"), state["first.weight"])
        assert np.array_equal(file.get_tensor("norm.running_var"), state["norm.running_var"])
        assert bool(file.get_tensor("flag"))
        frozen = file.get_tensor("frozen.weight")
    with safetensors.safe_open(tmp_path / "model0.safetensors", framework="np") as file:
        assert np.array_equal(file.get_tensor("frozen.weight"), frozen)


async def test_a_joiner_with_other_frozen_values_is_told_and_the_founders_file_mends_it(
    tmp_path: Path,
) -> None:
    founder, joiner = tmp_path / "founder", tmp_path / "joiner"
    founder.mkdir()
    joiner.mkdir()
    async with trainer_of(founder, ZOO, "Zoo") as trainer:
        agreed = (await initialized(trainer, founder)).described.pins
    async with trainer_of(joiner, ZOO.replace("loss(self", "loss( self"), "Zoo", configured=False) as trainer:
        await trainer.configure(configuration(seed=8))
        told = compare_pins((await trainer.describe()).pins, agreed)
        await trainer.configure(
            configuration(seed=8, frozen=str(founder / "frozen"), dataset=str(founder / "dataset"))
        )
        mended = compare_pins((await trainer.describe()).pins, agreed)
    assert len(told.refused) == 1 and "'frozen.weight', 'frozen.bias'" in told.refused[0]
    assert mended.refused == ()
    assert len(mended.warned) == 1 and "source differs" in mended.warned[0]


async def test_killed_in_mid_training_it_comes_back_and_the_request_can_be_asked_again(
    tmp_path: Path,
) -> None:
    async with trainer_of(tmp_path, LINE, "Line") as trainer:
        await initialized(trainer, tmp_path)
        undisturbed = await trainer.train(training(tmp_path, "undisturbed"))
    (tmp_path / "data" / "inner" / "0.safetensors").unlink()
    async with trainer_of(tmp_path, LINE, "Line", local={"sleep": "0.1"}) as trainer:
        killed = trainer.pid
        assert killed is not None

        def kill(progress: Progress) -> None:
            if trainer.pid == killed and progress.local_step >= 2:
                os.kill(killed, signal.SIGKILL)

        with pytest.raises(TrainerDied, match="was killed by SIGKILL"):
            await trainer.train(training(tmp_path), kill)
        assert not (tmp_path / "contribution").exists()
        trained = await trainer.train(training(tmp_path), kill)
        assert trainer.deaths == 1 and trainer.pid != killed
    assert (trained.steps, trained.loss, trained.norm) == (
        undisturbed.steps,
        undisturbed.loss,
        undisturbed.norm,
    )
    assert (tmp_path / "contribution").read_bytes() == (tmp_path / "undisturbed").read_bytes()


async def test_a_cancelled_training_stops_at_the_next_batch_and_leaves_nothing(tmp_path: Path) -> None:
    async with trainer_of(tmp_path, LINE, "Line", local={"sleep": "0.05"}) as trainer:
        await initialized(trainer, tmp_path)
        with trio.CancelScope() as scope:
            await trainer.train(training(tmp_path, local_epochs=10_000), lambda _: scope.cancel())
        assert scope.cancelled_caught
        with trio.fail_after(5):
            trained = await trainer.train(training(tmp_path, "other", local_steps=2))
    assert trained.steps == 2
    assert not (tmp_path / "contribution").exists()


def broken(old: str, new: str) -> str:
    assert old in LINE
    return LINE.replace(old, new)


async def test_an_exception_in_the_users_code_shows_the_users_traceback_only(tmp_path: Path) -> None:
    async with trainer_of(
        tmp_path, broken("return ((model", "boom()\n            return ((model"), "Line"
    ) as trainer:
        await initialized(trainer, tmp_path)
        with pytest.raises(UserError) as caught:
            await trainer.train(training(tmp_path))
        assert trainer.deaths == 0 and await trainer.describe(), "the process goes on"
    told = str(caught.value)
    assert told.startswith("training of the workload failed:\nTraceback (most recent call last):\n")
    assert f'File "{tmp_path}/workload.py"' in told and "NameError: name 'boom' is not defined" in told
    assert told.count('File "') == 1, "only the user's frame"


async def test_an_exception_at_import_is_told_to_everybody_who_asks_and_nothing_restarts(
    tmp_path: Path,
) -> None:
    async with trainer_of(tmp_path, "import no_such_library\n", "Line", configured=False) as trainer:
        for _ in range(2):
            with pytest.raises(UserError, match="No module named 'no_such_library'") as caught:
                await trainer.ready()
            assert str(caught.value).count('File "') == 1
        assert trainer.deaths == 0


@pytest.mark.trio
async def test_what_was_loaded_says_where_it_trains_and_with_how_much_memory(tmp_path: Path) -> None:
    async with trainer_of(tmp_path, LINE, "Line", configured=False) as trainer:
        loaded = await trainer.ready()
        assert loaded.device == "cpu"
        assert loaded.memory_bytes == psutil.virtual_memory().total


async def test_a_device_that_is_not_there_is_a_usage_error_that_names_those_that_are(tmp_path: Path) -> None:
    async with trainer_of(tmp_path, LINE, "Line", configured=False, device="cuda:77") as trainer:
        with pytest.raises(
            UserError, match=r"--device cuda:77: no such device; this machine has .*cpu"
        ) as caught:
            await trainer.ready()
    assert caught.value.exit_code == 2


async def test_what_the_workload_prints_and_an_interrupt_disturb_nothing(tmp_path: Path) -> None:
    noisy = broken(
        "return ((model",
        "print('noise', flush=True)\n            return ((model",
    )
    lines: list[str] = []
    async with trainer_of(tmp_path, noisy, "Line") as trainer:
        trainer._output = lines.append
        await initialized(trainer, tmp_path)
        pid = trainer.pid
        assert pid is not None
        os.kill(pid, signal.SIGINT)
        assert (await trainer.train(training(tmp_path))).steps == 15
        assert trainer.pid == pid


async def test_the_process_and_what_it_started_end_with_the_task_even_when_it_is_busy(tmp_path: Path) -> None:
    forking = broken(
        "return ((model",
        "import os\n            if os.fork() == 0:\n                time.sleep(100)\n            return ((model",
    )
    with trio.fail_after(60):  # the training would take longer
        async with trainer_of(tmp_path, forking, "Line", local={"sleep": "0.3"}) as trainer:
            await initialized(trainer, tmp_path)
            group = trainer.pid
            assert group is not None
            with trio.move_on_after(1):
                await trainer.train(training(tmp_path))
    with trio.fail_after(5):  # the orphans are reaped by init, not by us
        while alive(group):  # noqa: ASYNC110  # nobody tells us of another process's death
            await trio.sleep(0.05)


def alive(group: int) -> list[str]:
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            members.append(stat.parent.name)
    return members


async def test_a_trainer_whose_node_is_killed_ends_by_itself(tmp_path: Path) -> None:
    (tmp_path / "workload.py").write_text(textwrap.dedent(LINE))
    script = f"""
import pathlib, sys, trio
from node.training.trainer_process import Trainer, TrainerSettings
from node.training.workload_loading import parse_spec
async def main():
    trainer = Trainer(TrainerSettings(parse_spec({str(tmp_path / "workload.py") + ":Line"!r}), pathlib.Path({str(tmp_path)!r})))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trainer.run)
        await trainer.ready()
        print(trainer.pid, flush=True)
trio.run(main)
"""
    with trio.fail_after(LIMIT_S):
        node = await trio.lowlevel.open_process([sys.executable, "-c", script], stdout=subprocess.PIPE)
        assert node.stdout is not None
        group = int(await node.stdout.receive_some())
        assert alive(group)
        node.kill()
        await node.wait()
        while alive(group):  # noqa: ASYNC110  # nobody tells us of another process's death
            await trio.sleep(0.05)


async def test_requests_before_configure_and_ranges_beyond_the_data_are_our_mistakes(tmp_path: Path) -> None:
    async with trainer_of(tmp_path, LINE, "Line", configured=False) as trainer:
        with pytest.raises(LocalError, match="before Configure"):
            await trainer.describe()
        await trainer.configure(configuration())
        await initialized(trainer, tmp_path)
        with pytest.raises(LocalError, match=r"range 0\.\.101 of 100 train samples"):
            await trainer.train(training(tmp_path, ranges=((0, 101),)))
        assert isinstance(await trainer.train(training(tmp_path)), Trained)


async def test_the_node_process_does_not_import_torch() -> None:
    imports = "import sys, node.training.trainer_process, p2pcoord; p2pcoord.Workload; p2pcoord.RunConfig"
    code = f"{imports}; assert 'torch' not in sys.modules"
    done = await trio.run_process(
        [sys.executable, "-c", code], check=False, capture_stdout=True, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout


async def test_a_process_that_dies_again_and_again_is_started_ever_more_seldom(
    autojump_clock: trio.testing.MockClock,
) -> None:
    lives = [1.0] * 9 + [STEADY_S + 1, 1.0]
    began: list[float] = []
    ended: list[float] = []
    all_lived = trio.Event()

    class Dying(Trainer):
        async def _run_once(self) -> str:
            began.append(trio.current_time())
            await trio.sleep(lives[len(ended)])
            ended.append(trio.current_time())
            if len(ended) == len(lives):
                all_lived.set()
            return "killed"

    reasons: list[str] = []
    trainer = Dying(TrainerSettings(parse_spec("text"), Path("nowhere"), {}, "cpu"), restarted=reasons.append)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trainer.run)
        await all_lived.wait()
        await trio.sleep(0.1)
        nursery.cancel_scope.cancel()
    waits = [after - before for before, after in zip(ended, began[1:], strict=False)]
    assert waits == pytest.approx([0.5, 1, 2, 4, 8, 16, 30, 30, 30, 0.5])
    assert len(reasons) == trainer.deaths == len(lives)

"""Training inside the process: what ends local work, what is summed, and what a workload may not be."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import nn
from torch.utils.data import TensorDataset

from node.training.inner_state import InnerState
from node.training.local_training import LocalTraining, TrainingStopped
from node.training.trainer_protocol import (
    Configure,
    Initialize,
    Initialized,
    Train,
    Trained,
    Validate,
    Validated,
)
from p2pcoord.errors import LocalError, UserError
from p2pcoord.run_config import LocalOptimizer
from p2pcoord.workload import Workload, compare_pins


class Line(Workload):
    batch_size = 10
    pause_s = 0.0

    def model(self) -> nn.Module:
        return nn.Linear(1, 1)

    def data(self, split: str) -> Any:
        x = torch.linspace(-1, 1, 100 if split == "train" else 21).unsqueeze(1)
        return TensorDataset(x, 3 * x + 1)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        time.sleep(self.pause_s)
        return ((model(batch[0]) - batch[1]) ** 2).mean()

    def metrics(self, model: nn.Module, batch: Any) -> Mapping[str, float | torch.Tensor]:
        return {"error": (model(batch[0]) - batch[1]).abs().mean()}


class OnDisk:
    """A workload's training whose files lie in one folder."""

    def __init__(self, folder: Path, workload: Workload, **changes: Any) -> None:
        said: dict[str, Any] = {"options": {}, "data_mode": "dealt", "batch_size": None, "seed": 7}
        said |= {"optimizer": LocalOptimizer(learning_rate=0.05), "slots": 1}
        configuration = Configure(**{**said, **changes})
        self.folder = folder
        self.training = LocalTraining(workload, bytes(32), torch.device("cpu"), folder, configuration)

    def initialize(self, init: str | None = None) -> Initialized:
        state, dataset, frozen = (str(self.folder / name) for name in ("state0", "dataset", "frozen"))
        return self.training.initialize(Initialize(init, state, dataset, frozen))

    def train(self, *, cancelled: bool = False, **changes: Any) -> Trained:
        said: dict[str, Any] = {
            "base": str(self.folder / "state0"),
            "base_version": 0,
            "slot": "a",
            "seed": 11,
        }
        said |= {"ranges": ((0, 50),), "local_epochs": 3, "local_steps": None, "sync_interval_s": None}
        request = Train(**{**said, "output": str(self.folder / "contribution"), **changes})
        return self.training.train(request, lambda progress: None, lambda: cancelled)

    def validate(self, ranges: tuple[tuple[int, int], ...] | None) -> Validated:
        return self.training.validate(Validate(str(self.folder / "state0"), ranges), lambda: False)


def test_shares_of_a_validation_add_up_to_the_whole(tmp_path: Path) -> None:
    line = OnDisk(tmp_path, Line())
    line.initialize()
    whole = line.validate(((0, 21),))
    parts = [line.validate(share) for share in (((0, 4), (10, 21)), ((4, 10),), ())]
    assert sum(part.samples for part in parts) == whole.samples == 21
    assert sum(part.loss_sum for part in parts) == pytest.approx(whole.loss_sum, rel=1e-5)
    assert sum(part.metric_sums.get("error", 0) for part in parts) == pytest.approx(
        whole.metric_sums["error"], rel=1e-5
    )


def test_local_work_ends_by_steps_by_epochs_or_by_time_whichever_is_said(tmp_path: Path) -> None:
    workload = Line()
    line = OnDisk(tmp_path, workload)
    line.initialize()
    workload.pause_s = 0.02
    by_steps = line.train(local_steps=12)
    by_epochs = line.train(local_epochs=2)
    by_time = line.train(local_epochs=10_000, sync_interval_s=0.3)
    assert (by_steps.steps, by_steps.samples) == (12, 120)
    assert (by_epochs.steps, by_epochs.samples) == (10, 100)
    assert 1 <= by_time.steps <= 15


def test_a_rest_of_one_sample_is_left_out_but_an_assignment_of_one_is_not(tmp_path: Path) -> None:
    line = OnDisk(tmp_path, Line())
    line.initialize()
    assert (line.train(ranges=((0, 21),), local_epochs=1).samples) == 20
    assert (line.train(ranges=((3, 4),), local_epochs=2).samples) == 2


def test_the_batch_size_is_the_run_files_before_the_workloads(tmp_path: Path) -> None:
    line = OnDisk(tmp_path, Line(), batch_size=25)
    line.initialize()
    assert line.train(local_epochs=1).steps == 2


def test_own_data_is_trained_on_whole_and_pinned_by_nothing(tmp_path: Path) -> None:
    line = OnDisk(tmp_path, Line(), data_mode="own")
    described = line.initialize().described
    trained, validated = line.train(ranges=None, local_epochs=1), line.validate(None)
    assert (described.pins.train, described.pins.validation) == (None, None)
    assert (described.train_samples, described.validation_samples) == (100, 21)
    assert (trained.samples, validated.samples) == (100, 21)


def test_a_machine_without_validation_data_of_its_own_adds_nothing_to_the_sums(tmp_path: Path) -> None:
    class Unvalidated(Line):
        def data(self, split: str) -> Any:
            return super().data(split) if split == "train" else []

    line = OnDisk(tmp_path, Unvalidated(), data_mode="own")
    line.initialize()
    validated = line.validate(None)
    assert (validated.samples, validated.loss_sum, validated.metric_sums) == (0, 0.0, {})


def test_a_training_that_diverges_says_that_it_is_not_finite(tmp_path: Path) -> None:
    class Diverging(Line):
        def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
            return super().loss(model, batch) * float("nan")

    line = OnDisk(tmp_path, Diverging())
    line.initialize()
    assert not line.train().finite
    assert not line.validate(((0, 21),)).finite


def test_a_float_buffer_that_is_infinite_makes_a_contribution_not_finite(tmp_path: Path) -> None:
    class Counting(Line):
        def model(self) -> nn.Module:
            model = nn.Linear(1, 1)
            model.register_buffer("seen", torch.tensor(float("inf")))
            return model

    line = OnDisk(tmp_path, Counting())
    line.initialize()
    assert not line.train().finite


def test_an_own_optimizer_replaces_that_of_the_run(tmp_path: Path) -> None:
    class Still(Line):
        def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
            return torch.optim.SGD(parameters, lr=0.0)

    line = OnDisk(tmp_path, Still())
    line.initialize()
    assert line.train().norm == 0


def test_a_warm_up_goes_on_where_the_round_before_ended(tmp_path: Path) -> None:
    line = OnDisk(tmp_path, Line(), optimizer=LocalOptimizer(kind="sgd", learning_rate=0.01, warmup_steps=20))
    line.initialize()
    norms = [line.train(base_version=version, local_steps=1, ranges=((0, 10),)).norm for version in range(3)]
    assert norms == pytest.approx([norms[0], 2 * norms[0], 3 * norms[0]], rel=1e-4)


def test_gradients_are_clipped_to_the_run_files_norm(tmp_path: Path) -> None:
    sgd = LocalOptimizer(kind="sgd", learning_rate=1.0, weight_decay=0.0, clip_norm=0.01)
    line = OnDisk(tmp_path, Line(), optimizer=sgd)
    line.initialize()
    assert line.train(local_steps=1).norm == pytest.approx(0.01, rel=1e-3)


def test_a_stopped_training_leaves_neither_a_contribution_nor_an_inner_state(tmp_path: Path) -> None:
    line = OnDisk(tmp_path, Line())
    line.initialize()
    with pytest.raises(TrainingStopped):
        line.train(cancelled=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state0"]


def test_a_second_assignment_of_a_round_does_not_replace_the_first_ones_inner_state(tmp_path: Path) -> None:
    line = OnDisk(tmp_path, Line())
    line.initialize()
    line.train(slot="own share")
    kept = (tmp_path / "inner" / "0.safetensors").read_bytes()
    line.train(slot="a failed member's", ranges=((50, 100),))
    assert (tmp_path / "inner" / "0.safetensors").read_bytes() == kept
    for version in (1, 2, 3):
        line.train(base_version=version)
    assert sorted(path.name for path in (tmp_path / "inner").iterdir()) == ["2.safetensors", "3.safetensors"]


def test_a_damaged_inner_state_is_set_aside_and_training_goes_on(tmp_path: Path) -> None:
    line = OnDisk(tmp_path, Line())
    line.initialize()
    line.train()
    fresh = (tmp_path / "contribution").read_bytes()
    path = tmp_path / "inner" / "0.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    line.train(base_version=1)
    assert (tmp_path / "contribution").read_bytes() == fresh, "as if there had been no state"
    assert (tmp_path / "inner" / "0.damaged").exists()


@pytest.mark.parametrize(
    "make", [torch.optim.Adam, torch.optim.Adagrad, torch.optim.LBFGS, torch.optim.RMSprop]
)
def test_the_state_of_any_of_torchs_optimizers_survives_a_restart(tmp_path: Path, make: Any) -> None:
    def trained(steps: int, restart_at: int | None = None) -> list[torch.Tensor]:
        parameters = [nn.Parameter(torch.tensor([1.0, -2.0])), nn.Parameter(torch.tensor([3.0]))]
        optimizer, inner = make(parameters, lr=0.1), InnerState(tmp_path / str(restart_at))

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = sum(((parameter - 5) ** 4).sum() for parameter in parameters)
            assert isinstance(loss, torch.Tensor)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        for step in range(steps):
            if step == restart_at:
                inner.save(optimizer, 0, ["a", "b"], "slot", step)
                optimizer = make(parameters, lr=0.1)
                assert inner.load(optimizer, 1, ["a", "b"]) == step
            optimizer.step(closure)
        return [parameter.detach() for parameter in parameters]

    for straight, restarted in zip(trained(6), trained(6, restart_at=3), strict=True):
        assert torch.equal(straight, restarted)


def test_an_optimizer_state_that_cannot_be_kept_is_named(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    optimizer.state[parameter]["rule"] = lambda: None
    with pytest.raises(UserError, match=r"holds a function \(state\.0\.rule\)"):
        InnerState(tmp_path).save(optimizer, 0, ["a"], "slot", 1)


def test_a_model_file_becomes_version_0_and_one_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    good, bad, none = (tmp_path / f"{name}.safetensors" for name in ("good", "bad", "none"))
    safetensors.numpy.save_file(
        {"weight": np.full((1, 1), 3.0, np.float32), "bias": np.ones(1, np.float32)}, good
    )
    safetensors.numpy.save_file({"weight": np.zeros((2, 1), np.float32)}, bad)
    none.write_bytes(b"x" * 100)
    line = OnDisk(tmp_path, Line())
    with pytest.raises(
        UserError, match=r"'bias' is missing; 'weight' has shape \[2, 1\], the model's has \[1, 1\]"
    ):
        line.initialize(str(bad))
    with pytest.raises(UserError, match="no safetensors file"):
        line.initialize(str(none))
    with pytest.raises(UserError, match="no such file"):
        line.initialize(str(tmp_path / "missing.safetensors"))
    line.initialize(str(good))
    assert line.validate(((0, 21),)).loss_sum == 0


def test_pins_name_the_split_and_the_samples_that_differ(tmp_path: Path) -> None:
    class Scaled(Line):
        def data(self, split: str) -> Any:
            x, y = super().data(split).tensors
            return TensorDataset(x, y if split == "train" else 2 * y)

    class Shorter(Line):
        def data(self, split: str) -> Any:
            x, y = super().data(split).tensors
            return TensorDataset(x[:-1], y[:-1]) if split == "train" else TensorDataset(x, y)

    agreed = OnDisk(tmp_path, Line()).training.describe().pins
    assert compare_pins(OnDisk(tmp_path, Line()).training.describe().pins, agreed).refused == ()
    [scaled] = compare_pins(OnDisk(tmp_path, Scaled()).training.describe().pins, agreed).refused
    assert scaled.startswith("validation data differs: of 16 samples compared, those at 0, 1, 2,")
    [shorter] = compare_pins(OnDisk(tmp_path, Shorter()).training.describe().pins, agreed).refused
    assert shorter == "train data has 99 samples here and 100 in the run"


def test_random_augmentation_does_not_make_equal_data_look_different(tmp_path: Path) -> None:
    class Noisy(Line):
        def data(self, split: str) -> Any:
            class Rows:
                def __len__(self) -> int:
                    return 20

                def __getitem__(self, index: int) -> dict[str, Any]:
                    return {"x": torch.rand(3) + index, "y": np.random.rand(2), "z": (index, "name", None)}

            return Rows()

    first, second = (OnDisk(tmp_path, Noisy()).training.describe().pins for _ in range(2))
    assert first == second
    assert first.train is not None and len(set(first.train.samples)) == 16


class Empty(Line):
    def data(self, split: str) -> Any:
        return []


class Complex(Line):
    def model(self) -> nn.Module:
        return nn.Linear(1, 1, dtype=torch.complex64)


class ComplexBuffer(Line):
    def model(self) -> nn.Module:
        model = nn.Linear(1, 1)
        model.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
        return model


class NothingToTrain(Line):
    def model(self) -> nn.Module:
        return nn.ReLU()


class NoModel(Line):
    def model(self) -> Any:
        return 3


class Streamed(Line):
    def data(self, split: str) -> Any:
        return iter([1])


class LossOfEach(Line):
    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return (model(batch[0]) - batch[1]).flatten()


class Detached(Line):
    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return super().loss(model, batch).detach()


class NoOptimizer(Line):
    def optimizer(self, parameters: Any) -> Any:
        return "adam"


class WordMetric(Line):
    def metrics(self, model: nn.Module, batch: Any) -> Any:
        return {"error": 0.5, "grade": "good"}


@pytest.mark.parametrize(
    ("workload", "told"),
    [
        (WordMetric, "metrics() of the workload: 'grade' is no number: could not convert"),
        (Empty, "data('train') of the workload is empty"),
        (Complex, "parameter 'weight' is complex64"),
        (ComplexBuffer, "buffer 'phase' is complex64"),
        (NothingToTrain, "no trainable parameter"),
        (NoModel, "model() of the workload returned a int, not a torch.nn.Module"),
        (Streamed, "it needs __len__ and __getitem__"),
        (LossOfEach, "loss() of the workload returned shape [10]"),
        (Detached, "without gradient"),
        (NoOptimizer, "optimizer() of the workload returned a str"),
    ],
)
def test_what_a_workload_may_not_be_is_said_in_one_sentence(
    tmp_path: Path, workload: type[Workload], told: str
) -> None:
    wrong = OnDisk(tmp_path, workload())

    def use() -> None:
        wrong.initialize()
        wrong.train()
        wrong.validate(((0, 21),))

    with pytest.raises(UserError) as caught:
        use()
    assert told in str(caught.value) and "Traceback" not in str(caught.value)


def test_ranges_beyond_the_data_and_files_that_are_no_state_are_our_mistakes(tmp_path: Path) -> None:
    line = OnDisk(tmp_path, Line())
    line.initialize()
    for ranges in (((0, 101),), ((-1, 5),), ((5, 4),), ()):
        with pytest.raises(LocalError):
            line.train(ranges=ranges)
    (tmp_path / "short").write_bytes(b"1234")
    with pytest.raises(LocalError, match="has 4 bytes, a state of this model 16"):
        line.train(base=str(tmp_path / "short"))


def test_a_state_of_another_model_is_not_taken_for_one_of_this(tmp_path: Path) -> None:
    """A narrower model's optimizer slots must not become a wider one's weights."""

    class Wide(Line):
        def model(self) -> nn.Module:
            return nn.Linear(1, 2)

    OnDisk(tmp_path, Line(), slots=2).initialize()
    size = (tmp_path / "state0").stat().st_size
    wide = OnDisk(tmp_path, Wide(), slots=1)
    with pytest.raises(LocalError, match=f"has {size} bytes, a state of this model 32"):
        wide.train()

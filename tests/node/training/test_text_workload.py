"""The built-in workload: its size, its data, and that it learns."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from node.training.text_workload import Text
from p2pcoord.errors import UserError
from p2pcoord.run_file import parse_run_file


def text(dataset: bytes | None = None, **options: object) -> Text:
    workload = Text()
    workload.dataset, workload.options = dataset, options
    return workload


def test_the_model_has_about_120_000_parameters_and_its_tied_embedding_counts_once() -> None:
    model = text().model()
    assert sum(parameter.numel() for parameter in model.parameters()) == 120_576
    assert model.get_parameter("output.weight") is model.get_parameter("embedding.weight")


def test_an_untrained_model_knows_nothing() -> None:
    torch.manual_seed(0)
    workload = text()
    data = workload.data("validation")
    batch = torch.stack([data[index] for index in range(8)])
    with torch.no_grad():
        bits = float(workload.metrics(workload.model(), batch)["bits_per_byte"])
    assert bits == pytest.approx(8, abs=0.3), "256 equally likely bytes"


def test_no_byte_is_predicted_from_a_later_one() -> None:
    torch.manual_seed(0)
    model = text().model()
    octets = torch.randint(0, 256, (1, 64))
    changed = octets.clone()
    changed[0, 40] = (changed[0, 40] + 1) % 256
    before, after = model(octets), model(changed)
    assert torch.equal(before[0, :40], after[0, :40])
    assert not torch.equal(before[0, 40:], after[0, 40:])


def test_training_and_validation_windows_share_no_byte_and_every_validation_byte_is_predicted_once() -> None:
    dataset = bytes(range(200)) * 20
    workload = text(dataset)
    train, validation = workload.data("train"), workload.data("validation")
    border = int(len(dataset) * 0.9)
    assert bytes(train[len(train) - 1].tolist()) == dataset[(len(train) - 1) * 8 :][:65]
    assert (len(train) - 1) * 8 + 65 <= border
    windows = [bytes(validation[index].tolist()) for index in range(len(validation))]
    assert b"".join(window[1:] for window in windows) == dataset[border + 1 :][: 64 * len(windows)]
    assert len(dataset) - border - 1 - 64 * len(windows) < 64
    with pytest.raises(IndexError):
        train[len(train)]


def test_the_founders_bytes_come_from_a_file_or_from_pythons_help(tmp_path: Path) -> None:
    workload = text()
    assert len(workload.dataset_bytes()) > 300_000
    (tmp_path / "a.txt").write_bytes(b"abc" * 100)
    workload.local = {"text": str(tmp_path / "a.txt")}
    assert workload.dataset_bytes() == b"abc" * 100
    workload.local = {"text": str(tmp_path / "none.txt")}
    with pytest.raises(UserError, match=r"--set text=.*none\.txt: .*No such file"):
        workload.dataset_bytes()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"width": 0}, r"\[workload\] width: a whole number from 1 to 4096, not 0"),
        ({"layers": "2"}, r"\[workload\] layers: a whole number"),
        ({"heads": 3}, r"\[workload\] width 64 is no multiple of heads 3"),
        ({"widht": 64}, r"\[workload\] widht: unknown option; did you mean 'width'\?"),
    ],
)
def test_an_option_that_cannot_be_is_named(options: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        text(**options).model()
    assert caught.value.exit_code == 2


def test_the_recommended_run_is_a_valid_run_file_and_can_be_overridden() -> None:
    settings = parse_run_file("", workload_defaults=Text.run_defaults())
    assert settings.strategy.local_steps == 50
    assert settings.local.optimizer.kind == "adamw"
    assert (
        parse_run_file(
            "[strategy]\nlocal_steps = 3", workload_defaults=Text.run_defaults()
        ).strategy.local_steps
        == 3
    )


def test_it_learns() -> None:
    torch.manual_seed(0)
    workload = text(b"the quick brown fox jumps over the lazy dog. " * 200, layers=1, width=32)
    model, data = workload.model(), workload.data("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(60):
        batch = torch.stack([data[(step * 16 + row) % len(data)] for row in range(16)])
        loss = workload.loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) / math.log(2) < 1.0

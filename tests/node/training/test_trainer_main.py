"""The trainer's choice of a device, and what it says of it."""

from types import SimpleNamespace

import psutil
import pytest
import torch

from node.training.trainer_main import choose_device, memory_of


def test_a_cuda_device_has_its_own_memory_and_any_other_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {0: 24 << 30, 1: 80 << 30}
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=sizes[device.index])
    )
    assert memory_of(torch.device("cuda:1")) == 80 << 30
    assert memory_of(torch.device("cuda:0")) == 24 << 30
    machine = psutil.virtual_memory().total
    assert memory_of(torch.device("cpu")) == memory_of(torch.device("mps")) == machine


def test_auto_is_the_first_accelerator_with_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU of {device}")
    for wanted, device in (("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1")):
        assert choose_device(wanted) == (torch.device(device), f"GPU of {device}")

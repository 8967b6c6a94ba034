"""Workloads of which the network is the expensive part."""

from __future__ import annotations

import time

import torch
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import p2pcoord


class _Regression(p2pcoord.Workload):
    """A line through noise. `pause_s` in [workload] is a local step's length in seconds."""

    inputs = 8
    outputs = 1

    def model(self) -> torch.nn.Module:
        return torch.nn.Linear(self.inputs, self.outputs)

    def data(self, split: str) -> TensorDataset:
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(64 if split == "train" else 16, self.inputs, generator=generator)
        return TensorDataset(x, x[:, :1].expand(-1, self.outputs) * 0.5)

    def loss(self, model: torch.nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
        if model.training:
            time.sleep(float(self.options.get("pause_s", 0.0)))
        return F.mse_loss(model(batch[0]), batch[1])


class Small(_Regression):
    """Nine parameters."""


class Wide(_Regression):
    """2.5 million parameters: updates of 10 MB, and hardly anything to compute."""

    inputs = 100
    outputs = 25_000

"""Handwritten digits of 8 x 8 pixels, from scikit-learn: the README's example.

p2pcoord cluster --nodes 4 --workload examples/digits.py:Digits
"""

import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import p2pcoord


class Digits(p2pcoord.Workload):
    @classmethod
    def run_defaults(cls):  # few samples: five passes over a member's share are a round's worth of work
        return {"strategy": {"local_epochs": 5, "aggregation_rounds": 30}}

    def model(self):
        return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))

    def data(self, split):
        x, y = load_digits(return_X_y=True)
        rows = slice(0, 1500) if split == "train" else slice(1500, None)
        return TensorDataset(torch.tensor(x[rows] / 16).float(), torch.tensor(y[rows]))

    def loss(self, model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    def metrics(self, model, batch):
        return {"accuracy": (model(batch[0]).argmax(1) == batch[1]).float().mean()}

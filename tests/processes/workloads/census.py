"""A model that counts who was counted: each member adds 1 to a parameter of its own, and nothing else.

With the outer optimizer's step of 1 and no momentum, a round adds to the parameter of each contributor exactly its weight. So
the model itself says which updates went into it, and can be compared with what the records claim.

    --set index=N             this member's parameter
    [workload] parameters     how many there are (those behind the first 64 are noise): 2,500,000 make updates of 10 MB
    [workload] pause_s        how long a step sleeps, so that local training can be met under way
"""

import time

import torch

import p2pcoord

COUNTED = 64


class Counts(torch.nn.Module):
    def __init__(self, parameters):
        super().__init__()
        values = torch.randn(parameters)
        values[:COUNTED] = 0
        self.values = torch.nn.Parameter(values)


class Census(p2pcoord.Workload):
    batch_size = 8

    def model(self):
        return Counts(self.options.get("parameters", 1000))

    def data(self, split):
        return torch.utils.data.TensorDataset(torch.zeros(8))

    def loss(self, model, batch):
        if model.training:
            time.sleep(float(self.options.get("pause_s", 0.0)))
        return -model.values[int(self.local["index"])]

    def optimizer(self, parameters):
        return torch.optim.SGD(parameters, lr=1.0)

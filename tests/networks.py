"""Networks of any structure, numbers to give them, and their weights, for tests."""

import torch
from torch import nn


class Network(nn.Module):
    """Layers by name, and a function of the network and its inputs that says what they compute."""

    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs):
        return self.run(self, *inputs)


class Scaled(nn.Linear):
    """Gives something else than its weight says."""

    def forward(self, x):
        return 0.3 * super().forward(x)


def draw(*shape, seed=0, dtype=None):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def weights_of(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

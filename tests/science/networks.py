"""Networks of any structure, for tests."""

from torch import nn


class Network(nn.Module):
    """Layers by name, and a function of the network and its inputs that says what they compute."""

    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.run(self, x)

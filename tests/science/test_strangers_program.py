"""The science on a network and data that are not the series': a head registered first, biases, 20 inputs, 3 classes."""

import torch
from torch import nn

from lowrank_helpers import lora
from lowrank_helpers.data import Dataset
from lowrank_helpers.layers import factorize, hidden_layers
from lowrank_helpers.rank import rank_table, weight_matrices
from lowrank_helpers.training import Recipe, evaluate, fit


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 3)
        self.trunk = nn.ModuleDict({"in": nn.Linear(20, 16), "mid": nn.Linear(16, 16)})

    def forward(self, x):
        x = self.trunk["in"](x).relu()
        return self.head(x + self.trunk["mid"](x).relu())


def test_it_is_trained_measured_factorised_and_adapted_to_other_classes():
    torch.manual_seed(0)
    model, images = Network(), torch.randn(600, 20)
    labels = images[:, :3].argmax(1)
    parts = [tensor[part] for part in (slice(400), slice(0), slice(400, 600)) for tensor in (images, labels)]
    data, recipe = Dataset("planes", *parts, mean=0.0, std=1.0), Recipe(30, 32, 1e-2, seed=0)
    fit(model, data, recipe)
    assert evaluate(model, data.test_images, data.test_labels).accuracy > 0.85
    assert rank_table(weight_matrices(model))["numerical rank"]["head"] == 3

    full = {name: min(layer.weight.shape) for name, layer in hidden_layers(model).items()}
    assert full == {"trunk.in": 16, "trunk.mid": 16}
    torch.testing.assert_close(factorize(model, full)(images), model(images), atol=1e-4, rtol=1e-4)

    turned = Dataset(**{**vars(data), "train_labels": (data.train_labels + 1) % 3})
    adapted = lora.adapt(model, {"head": 2, "trunk.mid": 2}, alpha=4, seed=0)
    fit(adapted, turned, recipe)
    assert evaluate(lora.merge(adapted), data.test_images, (data.test_labels + 1) % 3).accuracy > 0.8
    assert torch.equal(lora.remove(adapted)(images), model(images))

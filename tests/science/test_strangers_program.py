"""The science on a network and data that are not the series': a head registered first, biases, 20 inputs, 3 classes."""

import pytest
import torch
from torch import Tensor, nn

from lowrank_helpers import lora
from lowrank_helpers.data import Dataset
from lowrank_helpers.layers import factorize, hidden_layers
from lowrank_helpers.rank import rank_table, weight_matrices
from lowrank_helpers.training import Recipe, evaluate, fit


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 3)
        self.trunk = nn.ModuleDict({"in": nn.Linear(20, 16), "mid": nn.Linear(16, 16)})

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, 20) to logits (n, 3), with a connection that skips a layer."""
        x = self.trunk["in"](x).relu()
        return self.head(x + self.trunk["mid"](x).relu())


@pytest.fixture(scope="module")
def data() -> Dataset:
    """Three classes that a plane separates."""
    images = torch.randn(600, 20, generator=torch.Generator().manual_seed(0))
    labels = images[:, :3].argmax(1)
    train, none, test = slice(0, 400), slice(0, 0), slice(400, 600)
    parts = [tensor[part] for part in (train, none, test) for tensor in (images, labels)]
    return Dataset("planes", *parts, mean=0.0, std=1.0)


@pytest.fixture(scope="module")
def trained(data) -> nn.Module:
    torch.manual_seed(0)
    model = Network()
    fit(model, data, Recipe(30, 32, 1e-2, seed=0))
    return model


def test_it_trains_and_is_measured(trained, data):
    assert evaluate(trained, data.test_images, data.test_labels).accuracy > 0.85
    table = rank_table(weight_matrices(trained))
    assert set(table.index) == {"head", "trunk.in", "trunk.mid"}
    assert table.loc["head", "numerical rank"] == 3


def test_its_hidden_layers_are_factorised(trained, data):
    full = {name: min(layer.weight.shape) for name, layer in hidden_layers(trained).items()}
    assert full == {"trunk.in": 16, "trunk.mid": 16}
    assert torch.allclose(factorize(trained, full)(data.test_images), trained(data.test_images), atol=1e-4)


def test_it_is_adapted_to_other_classes_by_low_rank(trained, data):
    turned = Dataset(**{**vars(data), "train_labels": (data.train_labels + 1) % 3})
    adapted = lora.adapt(trained, {"head": 2, "trunk.mid": 2}, alpha=4, seed=0)
    fit(adapted, turned, Recipe(30, 32, 1e-2, seed=0))
    assert evaluate(lora.merge(adapted), data.test_images, (data.test_labels + 1) % 3).accuracy > 0.8
    assert torch.equal(lora.remove(adapted)(data.test_images), trained(data.test_images))

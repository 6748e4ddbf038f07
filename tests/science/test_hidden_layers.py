"""Hidden layers are found by the way of the tensors, in networks that are no MLP too; shared layers stay shared."""

from collections import OrderedDict

import pytest
import torch
import torchvision
from torch import Tensor, nn

from lowrank_helpers import lora
from lowrank_helpers.factorization import factorize, hidden_layers
from lowrank_helpers.models import mlp


class Residual(nn.Module):
    """Registers its head first, has a layer in two places, and adds what it skipped."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.body = nn.Sequential(OrderedDict(first=nn.Linear(4, 4), act=nn.ReLU()))
        self.again = self.body.first

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, 4) to log-probabilities (…, 3)."""
        return torch.log_softmax(self.head(x + self.again(self.body(x))), -1)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.trunk, self.right = nn.Linear(4, 1), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (…, 4) to (…, 1) and (…, 2)."""
        x = self.trunk(x).relu()
        return self.left(x), self.right(x)


class Wandering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Take a way that depends on the values."""
        return self.fc(x) if x.sum() > 0 else x


def test_of_an_mlp_all_but_the_last_are_hidden_factorised_or_not():
    model = mlp([784, 8, 8, 10], seed=0)
    assert list(hidden_layers(model)) == ["fc1", "fc2"]
    assert list(hidden_layers(factorize(model, {"fc2": 4}))) == ["fc1"]
    assert list(hidden_layers(factorize(model, {"fc3": 4}))) == ["fc1", "fc2"]


def test_the_order_of_registration_does_not_matter():
    assert list(hidden_layers(Residual())) == ["body.first"]
    assert list(hidden_layers(TwoHeads())) == ["trunk"]


def test_what_is_added_to_the_output_gives_it_too():
    class Sum(TwoHeads):
        def forward(self, x: Tensor) -> Tensor:
            return self.left(x) + self.right(self.trunk(x))

    assert list(hidden_layers(Sum())) == ["trunk"]


def test_a_layer_that_shares_the_output_layers_weight_is_no_hidden_one():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[0].weight = model[4].weight
    assert list(hidden_layers(model)) == ["2"]


def test_of_published_architectures_the_head_is_the_output_layer():
    with torch.device("meta"):  # no weights are drawn: only the structure counts
        assert hidden_layers(torchvision.models.resnet18()) == {}
        assert "classifier.6" not in hidden_layers(torchvision.models.alexnet())
        hidden = hidden_layers(torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32))
    assert "heads.head" not in hidden
    assert "encoder.layers.encoder_layer_0.mlp.0" in hidden


def test_a_model_that_cannot_be_traced_is_refused_with_its_layers():
    with pytest.raises(ValueError, match=r"cannot trace this Wandering .*name the layers yourself, out of fc"):
        hidden_layers(Wandering())


def test_a_layer_in_two_places_is_factorised_in_both():
    model = Residual()
    small = factorize(model, {"body.first": 2})
    assert small.again is small.body.first
    assert small.again.rank == 2
    whole = factorize(model, {"body.first": 4})
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(whole(x), model(x), atol=1e-5)


def test_a_layer_in_two_places_is_adapted_and_merged_in_both():
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    adapted = lora.adapt(Residual(), {"body.first": 2}, alpha=4, seed=0)
    assert adapted.again is adapted.body.first
    for factor in filter(lambda parameter: parameter.requires_grad, adapted.parameters()):
        nn.init.constant_(factor, 0.5)
    merged = lora.merge(adapted)
    assert merged.again is merged.body.first
    assert torch.allclose(merged(x), adapted(x), atol=1e-5)


def test_layers_that_only_share_a_weight_get_factors_of_their_own():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    small = factorize(model, {"0": 2})
    assert small[2].weight.equal(model[2].weight)
    assert small[0].rank == 2

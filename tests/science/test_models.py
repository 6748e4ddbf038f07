"""Networks: how they are built, and that a factorised layer is the product of its factors."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import draw
from torch import nn
from torch.nn import functional as F

from lowrank_helpers import models
from lowrank_helpers.models import LanguageModel, LowRankLayer, convnet, linear_layers, mlp, n_parameters

SIZE = st.integers(1, 12)


def test_an_mlp_is_matrices_with_activations_between():
    model, x = mlp([784, 32, 16, 10], "tanh", seed=0), torch.randn(3, 784)
    assert [name for name, _ in model.named_children()] == ["fc1", "act1", "fc2", "act2", "fc3"]
    w1, w2, w3 = model.parameters()
    assert (w1.shape, w2.shape, w3.shape) == ((32, 784), (16, 32), (10, 16))
    torch.testing.assert_close(model(x), torch.tanh(torch.tanh(x @ w1.T) @ w2.T) @ w3.T)


NETWORKS = {
    "mlp": lambda seed: mlp([784, 256, 10], seed=seed),
    "convnet": lambda seed: convnet([3, 5], 7, seed=seed),
    "language model": lambda seed: LanguageModel(10, width=8, n_blocks=1, n_heads=2, seed=seed),
}


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_networks_map_rows_to_logits_and_are_drawn_from_their_seed_alone(network):
    model, again, other = (network(seed=seed) for seed in (3, 3, 4))
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    assert not all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))
    x, shape = (torch.ones(4, 9).long(), (4, 9, 10)) if isinstance(model, LanguageModel) else (draw(4, 784), (4, 10))
    assert model(x).shape == shape
    assert not [name for name in model.state_dict() if "bias" in name]


def test_attention_is_pytorchs_causal_one_with_the_same_matrices():
    ours, reference = models.Attention(8, 2), nn.MultiheadAttention(8, 2, bias=False, batch_first=True)
    packed = torch.cat([layer.weight for layer in (ours.query, ours.key, ours.value)])
    reference.load_state_dict({"in_proj_weight": packed, "out_proj.weight": ours.out.weight})
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(ours(x), reference(x, x, x, attn_mask=torch.ones(5, 5).triu(1).bool())[0])


def test_a_later_character_changes_no_earlier_logits_and_its_place_counts():
    model = LanguageModel(10, context=6, width=8, n_blocks=2, seed=0)
    before, after = model(torch.tensor([[3, 3, 3, 3, 3, 3], [3, 3, 3, 3, 7, 3]]))
    changed = [not torch.equal(*logits) for logits in zip(before, after, strict=True)]
    assert changed == [False] * 4 + [True] * 2
    assert not torch.equal(before[0], before[1])


@pytest.mark.parametrize(
    ("build", "named"),
    [
        *((partial(mlp, widths), "widths") for widths in ([784], [784, 0, 10], [784, -5, 10], [])),
        (partial(mlp, [784, 10], "swish"), "'swish' is unknown; allowed: relu, tanh, sigmoid, gelu, identity"),
        (partial(LanguageModel, 10, width=10, n_heads=4), "width 10"),
        (partial(LanguageModel, 10, n_blocks=0), "at least 1"),
    ],
)
def test_impossible_networks_are_refused(build, named):
    with pytest.raises(ValueError, match=named):
        build(seed=0)


@given(n=SIZE, r=SIZE, m=SIZE, bias=st.booleans())
def test_a_low_rank_layer_is_the_layer_of_its_product_with_factors_of_its_own(n, r, m, bias):
    B, C, x = draw(n, r).double(), draw(r, m, seed=1).double(), draw(2, 3, m).double()
    dense = nn.Linear(m, n, bias=bias, dtype=torch.float64)
    layer = LowRankLayer.of(dense, B, C)
    torch.testing.assert_close(layer(x), F.linear(x, B @ C, dense.bias))
    torch.testing.assert_close(layer.weight, B @ C)
    assert n_parameters(layer) == r * (n + m) + (n if bias else 0)
    nn.init.zeros_(layer.B.weight)
    assert B.any()
    with pytest.raises(ValueError, match=rf"C \({r}, {m + 1}\) must be \({n}, r\) and \(r, {m}\)"):
        LowRankLayer.of(dense, B, torch.zeros(r, m + 1))


def test_linear_layers_are_found_in_order_and_frozen_parameters_count():
    model = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.Sequential(nn.Linear(4, 3), nn.ReLU()), nn.Linear(3, 2))
    assert list(linear_layers(model)) == ["1.0", "2"]
    model[1].requires_grad_(False)
    assert (n_parameters(model), models.n_trainable(model)) == (18 + 15 + 8, 18 + 8)

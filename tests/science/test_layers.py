"""Low-rank layers against PyTorch's dense ones, in networks of every kind; which layers are hidden."""

import json
from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import Network, Scaled, draw
from torch import nn
from torch.nn import functional as F

from lowrank_helpers import lora
from lowrank_helpers.calibration import output_moments
from lowrank_helpers.factorization import optimal_errors, truncated_svd
from lowrank_helpers.layers import decompose, factorize, factorize_standard, load, replaceable_layers, save
from lowrank_helpers.lora import LoRALinear
from lowrank_helpers.models import LowRankLayer, mlp


def _model():
    torch.manual_seed(0)
    end = nn.Conv2d(3, 5, 3, padding=1), nn.Flatten(), nn.Linear(80, 4)
    return nn.Sequential(mlp([20, 16, 48], "tanh", seed=0), nn.Unflatten(1, (3, 4, 4)), *end).double()


@given(st.dictionaries(st.sampled_from(["0.fc1", "0.fc2", "2", "4"]), st.integers(1, 4)))
def test_a_factorised_model_is_the_model_of_truncated_weights_and_leaves_that_alone(ranks):
    model, x = _model(), draw(7, 20).double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small, factorized = factorize(model, ranks), factorize(model, ranks, decompose(model))
    for parameter in small.parameters():
        parameter.data.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for name, layer in replaceable_layers(model).items():
        if name in ranks:
            assert factorized.get_submodule(name).rank == ranks[name]
            truncated = truncated_svd(layer.weight.flatten(1), ranks[name]).product.view_as(layer.weight)
            torch.testing.assert_close(factorized.get_submodule(name).weight, truncated)
            layer.weight.data = truncated
    torch.testing.assert_close(factorized(x), model(x))


@st.composite
def _convolutions(draw):
    """A convolution along one to three axes."""
    torch.manual_seed(draw(st.integers(0, 99)))
    axes = draw(st.integers(1, 3))
    kind, m, n = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1], draw(st.integers(1, 3)), draw(st.integers(3, 6))
    stride, dilation = (tuple(draw(st.integers(1, 2)) for _ in range(axes)) for _ in range(2))
    padding = draw(st.integers(0, 2)) if max(stride) > 1 else "same"
    options = {"padding_mode": draw(st.sampled_from(["zeros", "circular"])), "bias": draw(st.booleans())}
    return kind(m, n, (3, 1, 3)[:axes], stride, padding, dilation, dtype=torch.float64, **options)


@given(_convolutions(), st.data())
def test_a_convolution_of_low_rank_changes_its_outputs_least_and_of_full_rank_by_nothing(conv, data):
    model, x = nn.Sequential(conv), draw(8, conv.in_channels, *[7] * (conv.weight.dim() - 2)).double()
    rank, svds = data.draw(st.integers(1, 3)), decompose(model, output_moments(model, x, ["0"]))
    wanted, bias = conv(x).movedim(1, -1).detach(), 0 if conv.bias is None else conv.bias.detach()
    least = optimal_errors(torch.linalg.svdvals((wanted - bias).flatten(0, -2)))[rank]
    changed = factorize(model, {"0": rank}, svds)(x).movedim(1, -1)
    torch.testing.assert_close((changed - wanted).norm(), least)
    (full,) = factorize(model, {"0": min(conv.weight.flatten(1).shape)})
    torch.testing.assert_close(full(x), conv(x))
    torch.testing.assert_close(full.weight, conv.weight)
    assert (set(full.B.kernel_size), full.C.bias, full.bias is None) == ({1}, None, conv.bias is None)


def test_a_low_rank_layer_has_the_mode_and_dtype_of_the_layer_and_what_is_frozen():
    layer = nn.Linear(6, 5, dtype=torch.float16).eval()
    layer.weight.requires_grad_(False)
    small = factorize(nn.Sequential(layer), {"0": 2})[0]
    assert {p.dtype for p in small.parameters()} == {torch.float16}
    assert [p.requires_grad for p in small.parameters()] == [False, False, True]
    assert not any(module.training for module in small.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fitted", [False, True])
def test_factors_of_a_network_in_half_precision_are_those_of_float32_rounded(dtype, fitted):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype), torch.randn(64, 20)
    exact = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4))
    exact.load_state_dict(model.state_dict())
    moments = output_moments(exact, x, ["0", "2"]) if fitted else {}
    svds = decompose(model, moments)
    ranks = {"0": 5, "2": 2}
    cut, expected = factorize(model, ranks, svds), factorize(exact, ranks, decompose(exact, moments))
    assert {parameter.dtype for parameter in cut.parameters()} == {dtype}
    assert all(svd.s.dtype in (torch.float32, torch.float64) for svd in svds.values())
    for ours, wanted in ((cut[0], expected[0]), (cut[2], expected[2])):
        torch.testing.assert_close(ours.weight.float(), wanted.weight, rtol=0.02, atol=0.02)
    assert torch.equal(factorize(model, {"0": 5})[0].weight, factorize(model, {"0": 5}, decompose(model))[0].weight)


def test_standard_factors_start_as_stacked_layers_would_from_the_seed_alone():
    model, ranks = mlp([784, 500, 10], seed=0), {"fc1": 100, "fc2": 4}
    one, other = (factorize_standard(model, ranks, seed=seed) for seed in (1, 2))
    again = factorize_standard(model, dict(reversed(ranks.items())), seed=1)
    for ours, theirs in zip(one.fc1, (nn.Linear(784, 100), nn.Linear(100, 500)), strict=True):
        assert ours.weight.shape == theirs.weight.shape
        torch.testing.assert_close(ours.weight.std(), theirs.weight.std(), rtol=0.02, atol=0)
        torch.testing.assert_close(ours.weight.max(), theirs.weight.max(), rtol=0.01, atol=0)
    assert all(map(torch.equal, one.parameters(), again.parameters()))
    assert not torch.equal(one.fc1.weight, other.fc1.weight)


@pytest.mark.parametrize("make", [factorize, lambda model, ranks: factorize_standard(model, ranks, seed=0)])
def test_wrong_layers_and_ranks_of_a_model_are_refused(make):
    factorized = LowRankLayer.of(nn.Linear(3, 3), draw(3, 3), draw(3, 3))
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Linear(6, 5), factorized)
    for name in ("fc9", "0", "2", "2.B"):
        with pytest.raises(ValueError, match=f"{name}: no layer that can be replaced; allowed: 1$"):
            make(model, {name: 1})
    with pytest.raises(ValueError, match="rank 6 is impossible for a 5×6 matrix"):
        make(model, {"1": 6})


def _residual():
    """Register the head first, have a layer in two places, and add what it skipped."""
    body = nn.Sequential(OrderedDict(first=nn.Linear(4, 4), act=nn.ReLU()))
    layers = {"head": nn.Linear(4, 3), "body": body, "again": body.first}
    return Network(lambda net, x: torch.log_softmax(net.head(x + net.again(net.body(x))), -1), **layers)


def test_a_layer_in_two_places_is_factorised_adapted_and_merged_in_both():
    model, x = _residual(), draw(5, 4)
    small = factorize(model, {"body.first": 2})
    assert small.again is small.body.first and small.again.rank == 2
    torch.testing.assert_close(factorize(model, {"body.first": 4})(x), model(x))
    adapted = lora.adapt(model, {"body.first": 2}, alpha=4, seed=0)
    assert adapted.again is adapted.body.first
    for factor in filter(lambda parameter: parameter.requires_grad, adapted.parameters()):
        nn.init.constant_(factor, 0.5)
    merged = lora.merge(adapted)
    assert merged.again is merged.body.first
    torch.testing.assert_close(merged(x), adapted(x))


class Called(nn.Linear):
    def __call__(self, x):
        return 0.3 * super().__call__(x)


def patched(n, m):
    layer = nn.Linear(n, m)
    layer.forward = lambda x: 0.3 * F.linear(x, layer.weight, layer.bias)
    return layer


RANKS = {"1": 2}
REPLACING = {
    "factorize": lambda model: factorize(model, RANKS),
    "factorize_standard": lambda model: factorize_standard(model, RANKS, seed=0),
    "decompose": decompose,
    "adapt": lambda model: lora.adapt(model, RANKS, alpha=1, seed=0),
    "extract": lambda model: lora.extract(model, model, RANKS),
    "LoRALinear": lambda model: LoRALinear(model[1], torch.ones(1, 4), torch.ones(4, 1), 1),
}


@pytest.mark.parametrize("replaces", REPLACING.values(), ids=REPLACING)
@pytest.mark.parametrize("layer", [Scaled, Called, patched])
def test_a_layer_that_computes_more_than_its_weight_says_is_not_replaced(layer, replaces):
    with pytest.raises(ValueError, match=r"layer '(1|base)' is a \w+ with a forward of its own"):
        replaces(nn.Sequential(nn.ReLU(), layer(4, 4)))


def test_such_a_layer_gets_no_adapter_from_a_file(tmp_path):
    lora.save_adapter(lora.adapt(nn.Sequential(nn.ReLU(), nn.Linear(4, 4)), RANKS, alpha=1, seed=0), tmp_path)
    with pytest.raises(ValueError, match=r"for layer '1': .* is a Scaled with a forward of its own"):
        lora.load_adapter(nn.Sequential(nn.ReLU(), Scaled(4, 4)), tmp_path)


class Bare(nn.Linear):
    """A subclass that computes what nn.Linear does."""


@pytest.mark.parametrize(
    "layer",
    [
        Bare(4, 4),
        nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4),  # of nn.MultiheadAttention
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_subclasses_that_inherit_forward_are_layers_as_any_other(layer):
    model, x = nn.Sequential(nn.ReLU(), layer), torch.randn(3, 4)
    for replaced in (factorize(model, {"1": 4}), lora.merge(lora.adapt(model, RANKS, alpha=1, seed=0))):
        torch.testing.assert_close(replaced(x), model(x), rtol=1e-4, atol=1e-5)


def _sharing():
    """Two linear layers with one weight, one layer in two places, and a convolution without a bias."""
    torch.manual_seed(0)
    twice, tied = nn.Linear(12, 12), (nn.Linear(12, 12), nn.Linear(12, 12))
    tied[0].weight = tied[1].weight
    front = nn.Conv2d(3, 3, 2, bias=False), nn.Flatten(), nn.BatchNorm1d(12)
    return nn.Sequential(nn.Unflatten(1, (3, 3, 3)), *front, twice, nn.Tanh(), twice, *tied)


def test_a_saved_model_comes_back_with_its_ranks_and_what_it_shares(tmp_path):
    small, x = factorize(_sharing(), {"1": 2, "4": 3}).eval(), draw(5, 27)
    save(small, tmp_path / "new" / "folder")
    fresh = _sharing().eval()
    for parameter in fresh.parameters():
        nn.init.ones_(parameter)
    loaded = load(fresh, tmp_path / "new" / "folder")
    assert torch.equal(loaded(x), small(x))
    assert loaded[4] is loaded[6] and loaded[7].weight is loaded[8].weight
    assert json.loads((tmp_path / "new/folder/ranks.json").read_text()) == {"ranks": {"1": 2, "4": 3}}
    assert all((parameter == 1).all() for parameter in fresh.parameters())


@pytest.mark.parametrize(
    ("ranks", "widths", "named"),
    [
        ('{"ranks": {"fc9": 3}}', [20, 16, 4], "fc9: no layer that can be replaced; allowed: fc1, fc2"),
        ('{"ranks": {"fc1": 17}}', [20, 16, 4], "layer 'fc1': rank 17 is impossible for a 16×20 matrix"),
        ('{"ranks": {"fc1": "3"}}', [20, 16, 4], r"ranks.json must hold {\"ranks\": {layer: rank}} in JSON; TypeError"),
        ("[3]", [20, 16, 4], "ranks.json must hold"),
        ("{", [20, 16, 4], "ranks.json must hold"),
        ('{"ranks": {}}', [20, 16, 4], "does not fit this Sequential: .*fc1.weight"),
        ('{"ranks": {"fc1": 2}}', [20, 16, 4], "does not fit this Sequential: .*size mismatch for fc1.C.weight"),
        ('{"ranks": {"fc1": 3}}', [20, 16, 5], "does not fit this Sequential: .*size mismatch for fc2.weight"),
        ('{"ranks": {"fc1": 3}}', [20, 16, 4, 4], "does not fit this Sequential: .*fc3.weight"),
    ],
)
def test_a_folder_that_does_not_fit_the_model_is_refused_by_name(ranks, widths, named, tmp_path):
    save(factorize(mlp([20, 16, 4], seed=0), {"fc1": 3}), tmp_path)
    (tmp_path / "ranks.json").write_text(ranks)
    with pytest.raises(ValueError, match=named):
        load(mlp(widths, seed=0), tmp_path)

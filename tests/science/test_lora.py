"""LoRA against loralib with the same A, B and α, and what an adapter must survive."""

from functools import partial

import loralib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import weights_of
from torch import nn
from torch.nn import functional as F

from lowrank_helpers import lora
from lowrank_helpers.factorization import SVD, optimal_errors
from lowrank_helpers.lora import DoRALinear, LoRALinear
from lowrank_helpers.models import linear_layers, mlp, n_trainable
from lowrank_helpers.selection import allocate, layers_of

WIDTHS = [784, 12, 9, 10]
LAYERS = ["fc1", "fc2", "fc3"]


def adapted(seed=0, rank=4, trained=True, layers=LAYERS, dora=False):
    """An adapted MLP, with a B that is not zero and lengths that are not W's where it is to look trained."""
    model = lora.adapt(mlp(WIDTHS, seed=seed), dict.fromkeys(layers, rank), alpha=6.0, seed=seed, dora=dora)
    if trained:
        generator = torch.Generator().manual_seed(seed)
        for layer in lora.adapters(model).values():
            layer.lora_B.data.normal_(generator=generator, std=0.1)
            if dora:
                layer.lora_magnitude_vector.data *= 1 + torch.rand(len(layer.base.weight), generator=generator)
    return model


@st.composite
def layers_and_factors(draw):
    n, m = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    r, alpha = draw(st.integers(1, min(n, m))), draw(st.floats(0.1, 50))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    base = nn.Linear(m, n, bias=draw(st.booleans()), dtype=torch.float64)
    return base, torch.randn(r, m, dtype=torch.float64), torch.randn(n, r, dtype=torch.float64), alpha


@settings(deadline=None)
@given(layers_and_factors(), st.integers(1, 5))
def test_forward_gradients_and_merge_are_loralibs(drawn, batch):
    base, A, B, alpha = drawn
    reference = loralib.Linear(base.in_features, base.out_features, r=len(A), bias=base.bias is not None).double()
    reference.scaling = alpha / len(A)
    reference.load_state_dict(base.state_dict() | {"lora_A": A, "lora_B": B})
    ours = LoRALinear(base.requires_grad_(False), A, B, alpha)
    x = torch.randn(batch, base.in_features, dtype=torch.float64, requires_grad=True)
    x_reference = x.detach().clone().requires_grad_()

    output, expected = ours(x), reference(x_reference)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
    output.square().sum().backward()
    expected.square().sum().backward()
    for found, wanted in ((x, x_reference), (ours.lora_A, reference.lora_A), (ours.lora_B, reference.lora_B)):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-6, atol=1e-6)
    assert base.weight.grad is None

    merged = lora.merge(nn.Sequential(ours))[0]
    reference.eval()  # loralib merges into its weight here
    assert type(merged) is nn.Linear
    torch.testing.assert_close(merged.weight, reference.weight, rtol=1e-6, atol=1e-6, check_stride=False)
    torch.testing.assert_close(merged(x), output, rtol=1e-6, atol=1e-6)


@settings(deadline=None)
@given(layers_and_factors(), st.booleans())
def test_dora_brings_each_row_to_its_length_and_sees_the_norms_as_constants(drawn, dead):
    base, A, B, alpha = drawn
    base.requires_grad_(False)
    x, lengths = torch.randn(3, base.in_features, dtype=torch.float64), torch.rand(len(B), dtype=torch.float64) + 0.5
    if dead:  # an output without weights, without an update and of no length
        base.weight[0] = B[0] = lengths[0] = 0
    torch.testing.assert_close(DoRALinear(base, A, B, alpha)(x), LoRALinear(base, A, B, alpha)(x))
    assert torch.equal(DoRALinear(base, A, torch.zeros_like(B), alpha)(x), base(x)), "it starts from the base"

    ours = DoRALinear(base, A, B, alpha, lengths)
    parameters = [parameter.detach().clone().requires_grad_() for parameter in (A, B, lengths)]
    rows = base.weight + alpha / len(A) * parameters[1] @ parameters[0]
    norms = [max(row.square().sum().item() ** 0.5, 1e-300) for row in rows]
    weight = parameters[2][:, None] * rows / torch.tensor(norms, dtype=torch.float64)[:, None]
    expected = F.linear(x, weight, base.bias)
    torch.testing.assert_close(ours(x), expected)
    ours(x).square().sum().backward()
    expected.square().sum().backward()
    for found, wanted in zip((ours.lora_A, ours.lora_B, ours.lora_magnitude_vector), parameters, strict=True):
        torch.testing.assert_close(found.grad, wanted.grad)
    merged = lora.merge(nn.Sequential(ours))[0]
    assert type(merged) is nn.Linear and torch.equal(merged(x), ours(x))


@pytest.mark.parametrize("ratio", [16.0, 8**0.5])
def test_under_adam_a_faster_b_is_a_larger_alpha(ratio):
    """LoRA+ (arXiv 2402.12354) and, as α√r in place of α, rsLoRA (arXiv 2312.03732) are LoRA at another α."""
    base, x, y = mlp([20, 16, 4], seed=0).double(), torch.randn(64, 20).double(), torch.randint(4, (64,))
    plus, scaled = (lora.adapt(base, {"fc1": 3, "fc2": 2}, alpha=a, seed=0) for a in (6.0, 6.0 * ratio))
    groups = [{"params": [p for n, p in plus.named_parameters() if f"lora_{f}" in n]} for f in "AB"]
    groups[1]["lr"] = 1e-3 * ratio
    adam = partial(torch.optim.Adam, lr=1e-3, eps=1e-30)
    optimisers = {plus: adam(groups), scaled: adam(scaled.parameters())}
    for _ in range(10):
        for model, optimiser in optimisers.items():
            optimiser.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimiser.step()
    assert not torch.allclose(plus(x), base(x), atol=0.1)
    torch.testing.assert_close(plus(x), scaled(x), rtol=1e-9, atol=1e-9)


def test_a_starts_with_a_spread_of_one_over_the_root_of_its_inputs_and_b_at_zero():
    base, x = mlp([784, 400, 100], seed=0), torch.randn(7, 784)
    model, other = (lora.adapt(base, {"fc1": 99, "fc2": 99}, alpha=1, seed=seed) for seed in (0, 1))
    for layer in lora.adapters(model).values():
        assert layer.lora_A.std().item() == pytest.approx(layer.base.in_features**-0.5, rel=0.02)
    assert torch.equal(model(x), base(x)) and not torch.equal(other.fc1.lora_A, model.fc1.lora_A)


def test_each_layer_has_its_rank_and_the_same_factors_in_whatever_order_they_are_named():
    base = mlp(WIDTHS, seed=0)
    model = lora.adapt(base, {"fc1": 2, "fc3": 5}, alpha=1, seed=3)
    swapped = lora.adapt(base, {"fc3": 5, "fc1": 2}, alpha=1, seed=3)
    trained = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"fc1.lora_A": (2, 784), "fc1.lora_B": (12, 2), "fc3.lora_A": (5, 9), "fc3.lora_B": (10, 5)}
    assert all(map(torch.equal, model.parameters(), swapped.parameters()))
    assert all(parameter.requires_grad for parameter in base.parameters()), "the model that is given stays as it was"


@pytest.mark.parametrize("dora", [False, True])
def test_removing_gives_the_model_back(dora):
    base = mlp(WIDTHS, seed=0)
    removed = lora.remove(adapted(dora=dora))
    assert str(removed) == str(base) and not lora.adapters(lora.merge(adapted(dora=dora)))
    assert all(map(torch.equal, removed.parameters(), base.parameters()))
    assert all(parameter.requires_grad for parameter in removed.parameters())


def test_adapts_the_linear_layers_of_a_transformer():
    torch.manual_seed(0)
    base = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    model = lora.adapt(base, dict.fromkeys(linear_layers(base), 2), alpha=4, seed=0)
    assert lora.adapters(model).keys() == {"self_attn.out_proj", "linear1", "linear2"}
    torch.testing.assert_close(model(x), base(x))
    for layer in lora.adapters(model).values():
        layer.lora_B.data.normal_()
    torch.testing.assert_close(lora.merge(model)(x), model(x), rtol=1e-5, atol=1e-5)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 40), st.integers(1, 8), st.integers(0, 9))
def test_a_rehearsal_set_has_few_kept_images_of_the_other_classes_as_often_as_wanted(labels, size, n_kept, seed):
    labels = torch.tensor(labels)
    index = lora.rehearsal(labels, labels[0].item(), size=size, n_kept=n_kept, share=0.5, seed=seed)
    for label, count in zip(*labels.unique(return_counts=True), strict=True):
        chosen = index[labels[index] == label]
        shown, available = (size, count) if label == labels[0] else (size // 2, min(count, n_kept))
        assert len(chosen) == shown
        assert len(chosen.unique()) == min(shown, available)
    again, other = (
        lora.rehearsal(torch.arange(1000) % 10, 7, size=100, n_kept=5, share=0.5, seed=s) for s in (seed, seed + 1)
    )
    assert not torch.equal(again, other), "the seed draws it"


def test_extracted_adapters_are_as_close_to_an_update_as_their_rank_allows():
    base, tuned = mlp(WIDTHS, seed=0), mlp(WIDTHS, seed=1)
    ranks = {"fc1": 3, "fc2": 9}
    model = lora.extract(base, tuned, ranks)
    for name, r in ranks.items():
        update = (tuned.get_submodule(name).weight - base.get_submodule(name).weight).detach().double()
        best = np.sqrt((np.linalg.svd(update.numpy(), compute_uv=False)[r:] ** 2).sum())
        found = lora.adapters(model)[name].weight - base.get_submodule(name).weight
        assert (update - found).norm().item() == pytest.approx(best, rel=1e-4, abs=1e-5)
    merged = lora.merge(model)
    torch.testing.assert_close(merged.fc2.weight, tuned.fc2.weight, atol=1e-5, rtol=1e-5)
    assert torch.equal(merged.fc3.weight, base.fc3.weight)
    with pytest.raises(ValueError, match="no layer 'fc1' of 12×784"):
        lora.extract(base, mlp([784, 11, 10], seed=0), {"fc1": 2})


@given(layers_and_factors(), st.data())
def test_resized_adapters_are_as_close_as_their_new_rank_allows(drawn, data):
    base, A, B, alpha = drawn
    model, rank = nn.Sequential(LoRALinear(base, A, B, alpha)), data.draw(st.integers(1, min(base.weight.shape)))
    resized = lora.extract(lora.remove(model), lora.merge(model), {"0": rank})[0]
    update, found = (layer.weight - base.weight for layer in (model[0], resized))
    least = optimal_errors(torch.linalg.svdvals(alpha / len(A) * B @ A))[rank]
    torch.testing.assert_close((update - found).norm(), least)


def test_ranks_for_a_budget_bring_adapters_closer_to_an_uneven_update_than_one_rank_does():
    base, tuned = (mlp([60, 40, 20, 10], seed=seed) for seed in (0, 1))
    tuned.fc1.weight.data = base.fc1.weight + 0.1 * tuned.fc1.weight
    svds = {n: SVD.of(layer.weight - base.get_submodule(n).weight) for n, layer in linear_layers(tuned).items()}
    layers = layers_of(svds, svds)
    equal = lora.extract(base, tuned, dict.fromkeys(layers, 3))
    ranks = {n: layer.largest_rank for n, layer in layers.items()} | allocate(layers, n_trainable(equal))
    chosen = lora.extract(base, tuned, ranks)
    assert n_trainable(chosen) <= n_trainable(equal)
    near, far = (torch.dist(weights_of(lora.merge(model)), weights_of(tuned)) for model in (chosen, equal))
    assert near < 0.9 * far


@pytest.mark.parametrize(
    ("ranks", "alpha", "error", "named"),
    [
        ({"fc9": 2}, 1, ValueError, r"fc9.*allowed: fc1, fc2, fc3"),
        ({"fc2": 10}, 1, ValueError, r"rank 10 .*allowed: 1 to 9"),
        *(({"fc1": 2}, alpha, ValueError, f"alpha {alpha} must be") for alpha in (0, -4, np.nan, np.float32(0))),
        *(({"fc1": r}, alpha, TypeError, None) for r, alpha in ((2.0, 1), ("2", 1), (2, "1"), (2, None), (2, 1j))),
    ],
)
def test_impossible_adapters_are_refused_by_name(ranks, alpha, error, named):
    with pytest.raises(error, match=named):
        lora.adapt(mlp(WIDTHS, seed=0), ranks, alpha=alpha, seed=0)


def test_what_cannot_be_adapted_is_refused():
    with pytest.raises(ValueError, match="already"):
        lora.adapt(adapted(), {"fc1.base": 2}, alpha=1, seed=0)
    with pytest.raises(ValueError, match="do not fit"):
        LoRALinear(nn.Linear(4, 4), torch.zeros(2, 3), torch.zeros(4, 2), 1.0)
    with pytest.raises(ValueError, match="the model itself is the layer"):
        lora.adapt(nn.Linear(4, 4), {"": 2}, alpha=1, seed=0)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 2, (torch.float16, torch.float32)])
def test_adapters_are_extracted_in_half_precision(dtypes):
    base, tuned = (mlp(WIDTHS, seed=seed).to(dtype) for seed, dtype in enumerate(dtypes))
    merged = lora.merge(lora.extract(base, tuned, {"fc2": 9})).fc2.weight
    assert merged.dtype == base.fc2.weight.dtype
    torch.testing.assert_close(merged.float(), tuned.fc2.weight.float(), rtol=0.02, atol=0.01)

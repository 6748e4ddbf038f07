"""LoRA against loralib with the same A, B and α, and what an adapter must survive."""

from copy import deepcopy

import loralib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lowrank_helpers import layers, lora, rank
from lowrank_helpers.data import Dataset
from lowrank_helpers.lora import LoRALinear
from lowrank_helpers.models import linear_layers, mlp, n_trainable
from lowrank_helpers.series import store
from lowrank_helpers.training import Recipe

WIDTHS = [784, 12, 9, 10]
LAYERS = ["fc1", "fc2", "fc3"]


def adapted(seed=0, rank=4, trained=True, layers=LAYERS):
    """An adapted MLP, with a B that is not zero where it is to look trained."""
    model = lora.adapt(mlp(WIDTHS, seed=seed), dict.fromkeys(layers, rank), alpha=6.0, seed=seed)
    if trained:
        generator = torch.Generator().manual_seed(seed)
        for layer in lora.adapters(model).values():
            layer.lora_B.data.normal_(generator=generator, std=0.1)
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


def test_untrained_adapters_change_nothing():
    base, x = mlp(WIDTHS, seed=1), torch.randn(7, 784)
    assert torch.equal(lora.adapt(base, dict.fromkeys(LAYERS, 3), alpha=8, seed=0)(x), base(x))


def test_a_starts_with_a_spread_of_one_over_the_root_of_its_inputs():
    model = lora.adapt(mlp([784, 400, 100], seed=0), {"fc1": 99, "fc2": 99}, alpha=1, seed=0)
    for layer in lora.adapters(model).values():
        assert layer.lora_A.std().item() == pytest.approx(layer.base.in_features**-0.5, rel=0.02)
        assert not layer.lora_B.any()
    other = lora.adapt(mlp([784, 400, 100], seed=0), {"fc1": 99}, alpha=1, seed=1)
    assert not torch.equal(other.fc1.lora_A, model.fc1.lora_A)


def test_each_layer_has_its_rank_and_the_same_factors_in_whatever_order_they_are_named():
    base = mlp(WIDTHS, seed=0)
    model = lora.adapt(base, {"fc1": 2, "fc3": 5}, alpha=1, seed=3)
    assert {name: layer.rank for name, layer in lora.adapters(model).items()} == {"fc1": 2, "fc3": 5}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["fc1.lora_A", "fc1.lora_B", "fc3.lora_A", "fc3.lora_B"]
    assert n_trainable(model) == 2 * (784 + 12) + 5 * (9 + 10)
    swapped = lora.adapt(base, {"fc3": 5, "fc1": 2}, alpha=1, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), swapped.parameters(), strict=True))


def test_adapting_leaves_the_given_model_alone_and_removing_gives_it_back():
    base = mlp(WIDTHS, seed=0)
    model = lora.adapt(base, dict.fromkeys(LAYERS, 2), alpha=4, seed=0)
    assert n_trainable(base) == sum(weight.numel() for weight in base.state_dict().values())
    removed = lora.remove(model)
    assert str(removed) == str(base)
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in removed.state_dict().items())
    assert all(parameter.requires_grad for parameter in removed.parameters())


def test_merging_gives_plain_layers_with_the_same_outputs_and_an_update_of_that_rank():
    model, base, x = adapted(rank=3), mlp(WIDTHS, seed=0), torch.randn(50, 784)
    merged = lora.merge(model)
    assert {type(layer) for layer in linear_layers(merged).values()} == {nn.Linear}
    assert linear_layers(merged).keys() == set(LAYERS)
    torch.testing.assert_close(merged(x), model(x), rtol=1e-5, atol=1e-5)
    assert all(parameter.requires_grad for parameter in merged.parameters())
    after, before = rank.weight_matrices(merged), rank.weight_matrices(base)
    for name in LAYERS:
        assert torch.linalg.matrix_rank((after[name] - before[name]).double(), rtol=1e-4) == 3


def test_state_dict_deepcopy_and_another_dtype_or_device():
    model, x = adapted(), torch.randn(3, 784)
    fresh = adapted(trained=False)
    assert not torch.equal(fresh(x), model(x))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
    double = deepcopy(model).to(torch.float64)
    assert {tensor.dtype for tensor in double.state_dict().values()} == {torch.float64}
    torch.testing.assert_close(double(x.double()).float(), model(x), rtol=1e-5, atol=1e-5)
    assert {tensor.device.type for tensor in deepcopy(model).to("meta").state_dict().values()} == {"meta"}


def test_a_rank_above_what_the_layer_has_is_of_use_to_pefts_adapters_alone():
    layer = LoRALinear(nn.Linear(3, 2), torch.ones(5, 3), torch.ones(2, 5), 10)
    torch.testing.assert_close(layer.delta, torch.full((2, 3), 10.0))
    assert layer.base.weight.requires_grad, "the layer that is given stays as it was"


def test_autocast_computes_in_bfloat16_and_trains_in_float32():
    model, x = adapted(), torch.randn(64, 784)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), model(x), rtol=0.05, atol=0.05)
    output.float().square().sum().backward()
    assert {layer.lora_A.grad.dtype for layer in lora.adapters(model).values()} == {torch.float32}


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


def test_an_adapter_stays_on_a_base_that_is_factorized():
    model, x = adapted(), torch.randn(4, 784)
    factorized = layers.factorize(model, {"fc2.base": 9})
    torch.testing.assert_close(factorized(x), model(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lora.merge(factorized)(x), model(x), rtol=1e-4, atol=1e-4)


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
        assert (update - lora.adapters(model)[name].delta).norm().item() == pytest.approx(best, rel=1e-4, abs=1e-5)
    merged = lora.merge(model)
    torch.testing.assert_close(merged.fc2.weight, tuned.fc2.weight, atol=1e-5, rtol=1e-5)
    assert torch.equal(merged.fc3.weight, base.fc3.weight)
    with pytest.raises(ValueError, match="no layer 'fc1' of 12×784"):
        lora.extract(base, mlp([784, 11, 10], seed=0), {"fc1": 2})


def test_impossible_adapters_are_refused_by_name():
    base = mlp(WIDTHS, seed=0)
    with pytest.raises(ValueError, match=r"fc9.*allowed: fc1, fc2, fc3"):
        lora.adapt(base, {"fc9": 2}, alpha=1, seed=0)
    with pytest.raises(ValueError, match=r"rank 10 .*allowed: 1 to 9"):
        lora.adapt(base, {"fc2": 10}, alpha=1, seed=0)
    with pytest.raises(ValueError, match="already"):
        lora.adapt(adapted(), {"fc1.base": 2}, alpha=1, seed=0)
    with pytest.raises(ValueError, match="do not fit"):
        LoRALinear(nn.Linear(4, 4), torch.zeros(2, 3), torch.zeros(4, 2), 1.0)
    with pytest.raises(ValueError, match="the model itself is the layer"):
        lora.adapt(nn.Linear(4, 4), {"": 2}, alpha=1, seed=0)


@pytest.mark.parametrize("alpha", [0, -4, float("nan"), float("inf"), np.float32(0)])
def test_an_alpha_that_is_not_above_zero_is_refused(alpha):
    with pytest.raises(ValueError, match=rf"alpha {alpha} must be finite and above 0"):
        lora.adapt(mlp(WIDTHS, seed=0), {"fc1": 2}, alpha=alpha, seed=0)


@pytest.mark.parametrize(("rank", "alpha"), [(2.0, 1), ("2", 1), (2, "1"), (2, None), (2, 1j)])
def test_what_are_no_numbers_are_type_errors(rank, alpha):
    with pytest.raises(TypeError):
        lora.adapt(mlp(WIDTHS, seed=0), {"fc1": rank}, alpha=alpha, seed=0)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.float16, torch.float32)])
def test_adapters_are_extracted_in_half_precision(dtypes):
    base, tuned = (mlp(WIDTHS, seed=seed).to(dtype) for seed, dtype in enumerate(dtypes))
    model = lora.extract(base, tuned, {"fc2": 9})
    assert {parameter.dtype for parameter in model.parameters()} == {base.fc2.weight.dtype}
    torch.testing.assert_close(lora.merge(model).fc2.weight.float(), tuned.fc2.weight.float(), rtol=0.02, atol=0.01)


def test_the_store_keys_adapters_by_rank_and_alpha(tmp_path):
    torch.manual_seed(0)
    images, labels = torch.randn(20, 784), torch.arange(20) % 10
    data = Dataset("digits", images, labels, images[:0], labels[:0], images, labels, mean=0.0, std=1.0)
    for alpha in (1.0, 2.0, 2.0):
        model = lora.adapt(mlp(WIDTHS, seed=0), dict.fromkeys(LAYERS, 2), alpha=alpha, seed=0)
        store.trained(tmp_path, model, data, Recipe(1, 10, 1e-3))
    assert len(list(tmp_path.glob("*.safetensors"))) == 2

"""An adapter's folder: that PEFT and we read each other's, and the networks and files that are refused."""

import json
from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_lora import WIDTHS, adapted
from torch import nn

from lowrank_helpers import lora
from lowrank_helpers.lora import AdapterError
from lowrank_helpers.models import linear_layers, mlp

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    lora.save_adapter(adapted(), tmp_path / "new" / "adapter")
    return tmp_path / "new" / "adapter"


@pytest.fixture
def edit(folder):
    """Return a function that changes the config of the saved adapter."""

    def change(**values):
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | values))
        return folder

    return change


def from_peft(base, folder, **config):
    """Save an adapter of PEFT's that is not zero, and return the model that it made."""
    model = get_peft_model(base, LoraConfig(target_modules=list(linear_layers(base)), **config))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    return model.eval()


def test_a_saved_adapter_comes_back_as_it_was(folder):
    x = torch.randn(5, 784)
    restored = lora.load_adapter(mlp(WIDTHS, seed=0), folder)
    assert torch.equal(restored(x), adapted()(x))
    assert str(restored) == str(adapted())
    assert [name for name, parameter in restored.named_parameters() if parameter.requires_grad] == [
        f"fc{i}.lora_{factor}" for i in (1, 2, 3) for factor in "AB"
    ]


def test_the_folder_holds_the_factors_and_nothing_else_of_the_network(folder):
    assert {file.name for file in folder.iterdir()} == {CONFIG, WEIGHTS}
    assert load_file(folder / WEIGHTS).keys() == {
        f"base_model.model.fc{i}.lora_{factor}.weight" for i in (1, 2, 3) for factor in "AB"
    }


def test_peft_loads_ours(folder):
    x = torch.randn(5, 784)
    theirs = PeftModel.from_pretrained(mlp(WIDTHS, seed=0), folder)
    torch.testing.assert_close(theirs(x), adapted()(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(theirs(x), mlp(WIDTHS, seed=0)(x), atol=0.1)


@given(st.lists(st.integers(1, 3), min_size=4, max_size=4))
def test_peft_loads_each_layers_rank_though_names_end_alike(tmp_path_factory, ranks):
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4), nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)))
    model = lora.adapt(base, dict(zip(("0", "1", "2.0", "2.1"), ranks, strict=True)), alpha=4, seed=0)
    for i, layer in enumerate(lora.adapters(model).values(), start=1):
        layer.lora_B.data.normal_()
        layer.alpha = float(i)
        layer.scaling = layer.alpha / layer.rank
    lora.save_adapter(model, folder)
    x = torch.randn(7, 4)
    torch.testing.assert_close(PeftModel.from_pretrained(base, folder)(x), model(x), rtol=1e-5, atol=1e-5)


def test_an_adapter_of_one_layer_is_of_that_layer_alone_in_peft(tmp_path):
    base = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))  # 0 and 1.0
    lora.save_adapter(lora.adapt(base, {"0": 2}, alpha=4, seed=0), tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert {name for name, _ in loaded.named_modules() if name.endswith(".lora_A")} == {"base_model.model.0.lora_A"}


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 6},
        {"r": 4, "lora_alpha": 6, "use_rslora": True},
        {"r": 4, "lora_alpha": 6, "init_lora_weights": "gaussian", "lora_dropout": 0.1},
        {"r": 3, "rank_pattern": {"fc2": 2, "^fc3": 1}, "alpha_pattern": {"fc[12]": 5}},
    ],
)
def test_we_load_pefts(tmp_path, config):
    theirs, x = from_peft(mlp(WIDTHS, seed=0), tmp_path, **config), torch.randn(5, 784)
    torch.testing.assert_close(lora.load_adapter(mlp(WIDTHS, seed=0), tmp_path)(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_we_load_pefts_of_a_transformer(tmp_path):
    # Not in its evaluation mode: then it reads its layers' weights, and PEFT's there are those without the adapter.
    base = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["linear1", "linear2"], init_lora_weights=False)
    theirs, x = get_peft_model(deepcopy(base), config), torch.randn(2, 5, 16)
    theirs.save_pretrained(tmp_path)
    ours = lora.load_adapter(base, tmp_path)
    assert lora.adapters(ours).keys() == {"linear1", "linear2"}
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"use_dora": True}, "use_dora = True"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"modules_to_save": ["fc3"], "target_modules": ["fc1"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"invented_later": 1}, "invented_later = 1"),
    ],
)
def test_what_is_not_done_here_is_refused_by_name(edit, config, named):
    with pytest.raises(AdapterError, match=f"{named}.*not done here"):
        lora.load_adapter(mlp(WIDTHS, seed=0), edit(**config))


def test_dora_of_pefts_is_refused(tmp_path):
    from_peft(mlp(WIDTHS, seed=0), tmp_path, r=2, use_dora=True)
    with pytest.raises(AdapterError, match="use_dora"):
        lora.load_adapter(mlp(WIDTHS, seed=0), tmp_path)


def test_a_network_with_other_weights_is_refused(folder):
    with pytest.raises(AdapterError, match="other weights"):
        lora.load_adapter(mlp(WIDTHS, seed=1), folder)


def test_weights_beside_the_adapted_layers_count_too(tmp_path):
    base = mlp(WIDTHS, seed=0)
    lora.save_adapter(adapted(layers=["fc3"]), tmp_path)
    base.fc1.weight.data[0, 0] += 1
    with pytest.raises(AdapterError, match="other weights"):
        lora.load_adapter(base, tmp_path)


@pytest.mark.parametrize(
    ("widths", "message"),
    [([784, 12, 8, 10], "'fc2' of 9×12; the model's is 8×12"), ([784, 12, 9], "adapts 'fc2' of 9×12|layer 'fc3'")],
)
def test_a_network_of_another_shape_is_refused(folder, widths, message):
    with pytest.raises(AdapterError, match=message):
        lora.load_adapter(mlp(widths, seed=0), folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "no config of a LoRA adapter"),
        ({"r": 3}, r"rank 3 for 'fc1', with factors of 4 and 4"),
        ({"r": None}, "impossible ranks"),
        ({"lora_alpha": "much"}, "impossible ranks"),
        ({"lora_alpha": -1}, "impossible ranks"),
        ({"alpha_pattern": {"fc1": -1}}, "impossible ranks"),
        ({"rank_pattern": ["fc1"]}, "impossible ranks"),
        ({"rank_pattern": {"(": 4}}, "impossible ranks"),
    ],
)
def test_a_config_that_cannot_be_is_refused(edit, config, message):
    with pytest.raises(AdapterError, match=message):
        lora.load_adapter(mlp(WIDTHS, seed=0), edit(**config))


def test_folders_that_hold_no_adapter_are_refused(tmp_path, folder):
    base = mlp(WIDTHS, seed=0)
    with pytest.raises(AdapterError, match="cannot be read as an adapter's config"):
        lora.load_adapter(base, tmp_path / "missing")
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-10])
    with pytest.raises(AdapterError, match="cannot be read"):
        lora.load_adapter(base, folder)
    save_file(base.state_dict(), folder / WEIGHTS)
    with pytest.raises(AdapterError, match=r"it holds fc1\.weight \(12, 784\)"):
        lora.load_adapter(base, folder)
    (folder / WEIGHTS).write_bytes(whole)
    factors = load_file(folder / WEIGHTS)
    del factors["base_model.model.fc2.lora_B.weight"]
    save_file(factors, folder / WEIGHTS)
    with pytest.raises(AdapterError, match="factors of fc2 is missing"):
        lora.load_adapter(base, folder)
    (folder / CONFIG).write_text("[1, 2")
    with pytest.raises(AdapterError, match="cannot be read"):
        lora.load_adapter(base, folder)


def test_a_model_without_adapters_has_nothing_to_save(tmp_path):
    with pytest.raises(ValueError, match="no adapters"):
        lora.save_adapter(mlp(WIDTHS, seed=0), tmp_path / "none")

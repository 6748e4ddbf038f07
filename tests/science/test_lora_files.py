"""An adapter's folder: that PEFT and we read each other's, and the networks and files that are refused."""

import json
from copy import deepcopy
from functools import partial

import numpy as np
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
    lora.save_adapter(adapted(), tmp_path)
    return tmp_path


def edit_config(folder, **values):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | values))


@pytest.mark.parametrize("dora", [False, True])
def test_a_saved_adapter_comes_back_here_and_in_peft(tmp_path, dora):
    model, x, folder = adapted(dora=dora), torch.randn(5, 784), tmp_path / "new" / "adapter"
    lora.save_adapter(model, folder)
    restored, theirs = (load(mlp(WIDTHS, seed=0), folder) for load in (lora.load_adapter, PeftModel.from_pretrained))
    assert torch.equal(restored(x), model(x)) and str(restored) == str(model)
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(theirs(x), mlp(WIDTHS, seed=0)(x), atol=0.1)
    ends = {"lora_A": ".weight", "lora_B": ".weight"} | ({"lora_magnitude_vector": ""} if dora else {})
    trained = [name for name, parameter in restored.named_parameters() if parameter.requires_grad]
    assert trained == [f"fc{i}.{part}" for i in (1, 2, 3) for part in ends]
    saved = {f"base_model.model.fc{i}.{part}{end}" for i in (1, 2, 3) for part, end in ends.items()}
    assert load_file(folder / WEIGHTS).keys() == saved
    assert {file.name for file in folder.iterdir()} == {CONFIG, WEIGHTS}


class Normed(nn.Sequential):
    """With BatchNorm, whose statistics a training moves, and something in its state_dict that is no tensor."""

    def __init__(self):
        super().__init__(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
        self.register_buffer("window", torch.ones(1).expand(16), persistent=False)

    def get_extra_state(self):
        return {"version": 3}

    def set_extra_state(self, state):
        pass


def normed():
    """Return a network, and an adapted copy of it that was trained in its training mode."""
    torch.manual_seed(0)
    base = Normed()
    model = lora.adapt(base, {"0": 2, "2": 2}, alpha=4, seed=0)
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        model(3 * torch.randn(64, 12) + 1).square().mean().backward()
        optimiser.step()
    return base.eval(), model.eval()


def test_buffers_that_a_training_moves_are_saved_with_the_adapter(tmp_path):
    (base, model), x = normed(), torch.randn(5, 12)
    lora.save_adapter(model, tmp_path)
    assert torch.equal(lora.load_adapter(base, tmp_path)(x), model(x))
    torch.testing.assert_close(PeftModel.from_pretrained(deepcopy(base), tmp_path)(x), model(x))
    base[1] = nn.BatchNorm1d(1)
    with pytest.raises(AdapterError, match=r"of other layers: it holds 1\.running_mean \(16,\)"):
        lora.load_adapter(base, tmp_path)


def test_parameters_trained_beside_the_adapters_are_refused_before_anything_is_written(tmp_path):
    _, model = normed()
    model[1].requires_grad_(True)
    with pytest.raises(ValueError, match=r"1\.weight, 1\.bias can be trained beside the adapters"):
        lora.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="none of them, or both"):
        lora.save_adapter(mlp(WIDTHS, seed=0), tmp_path / "adapter")
    with pytest.raises(ValueError, match="of one kind, LoRA or DoRA"):
        lora.save_adapter(nn.Sequential(adapted(), adapted(dora=True)), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_adapter_is_loaded_onto_its_base_alone_in_the_precision_that_it_had(tmp_path, dtype):
    base, other = (mlp([20, 12, 10], seed=seed).to(dtype) for seed in (0, 1))
    base.fc2.half()
    other.fc2 = base.fc2
    model = lora.adapt(base, {"fc1": np.int64(3)}, alpha=np.float32(1.5), seed=0)  # which JSON does not know
    nn.init.normal_(model.fc1.lora_B, std=0.1)
    lora.save_adapter(model, str(tmp_path))
    restored = lora.load_adapter(base, str(tmp_path))
    assert all(map(torch.equal, restored.parameters(), model.parameters()))
    for wrong in (other, deepcopy(base).float()):
        with pytest.raises(AdapterError, match="with other weights, or on this one in another precision"):
            lora.load_adapter(wrong, tmp_path)


def test_a_base_is_known_again_without_the_tie_of_its_weights(tmp_path):
    tied, untied = (nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)) for _ in range(2))
    tied[1].weight = tied[0].weight
    lora.save_adapter(lora.adapt(tied, {"1": 2}, alpha=4, seed=0), tmp_path)
    untied.load_state_dict(tied.state_dict())
    assert lora.adapters(lora.load_adapter(untied, tmp_path)).keys() == {"1"}


@pytest.mark.parametrize("around", [partial(torch.compile, backend="eager"), nn.DataParallel])
def test_a_wrapped_model_is_not_saved_as_the_names_of_its_layers_are_others(tmp_path, around):
    model = nn.Sequential(around(adapted()))
    with pytest.raises(ValueError, match=r"names of layers in \w+ are not the model's: save the model without it"):
        lora.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@given(st.dictionaries(st.sampled_from(["0", "1", "2.0", "2.1"]), st.integers(1, 3), min_size=1))
def test_peft_loads_each_layers_rank_though_names_end_alike(tmp_path_factory, ranks):
    folder = tmp_path_factory.mktemp("adapter")
    base = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4), nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)))
    model = lora.adapt(base, ranks, alpha=4, seed=0)
    for i, layer in enumerate(lora.adapters(model).values(), start=1):
        layer.lora_B.data.normal_()
        layer.alpha = float(i)
    lora.save_adapter(model, folder)
    x = torch.randn(7, 4)
    torch.testing.assert_close(PeftModel.from_pretrained(base, folder)(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 6},
        {"r": 3, "lora_alpha": 6, "use_rslora": True},
        {"r": 16, "lora_alpha": 6},  # above the outputs of every layer
        {"r": 4, "lora_alpha": 6, "init_lora_weights": "gaussian", "lora_dropout": 0.1},
        {"r": 4, "lora_alpha": 6, "init_lora_weights": "orthogonal"},
        {"r": 3, "rank_pattern": {"fc2": 2, "^fc3": 1}, "alpha_pattern": {"fc[12]": 5}},
        {"r": 4, "lora_alpha": 6, "use_dora": True},
    ],
)
def test_we_load_pefts(tmp_path, config):
    base, x = mlp(WIDTHS, seed=0), torch.randn(5, 784)
    theirs = get_peft_model(base, LoraConfig(target_modules=list(linear_layers(base)), **config))
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name or "magnitude" in name:  # or the adapter would change nothing
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    theirs.eval().save_pretrained(tmp_path)
    torch.testing.assert_close(lora.load_adapter(mlp(WIDTHS, seed=0), tmp_path)(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, r"damaged.* it holds fc1\.lora_A\.weight"),
        ({"use_qalora": True}, "use_qalora = True, which is not supported"),
        ({"bias": "all"}, "bias = 'all', which is not supported"),
        ({"modules_to_save": ["fc3"], "target_modules": ["fc1"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"invented_later": 1}, "invented_later = 1"),
        ({"peft_type": "LOHA"}, "no config of a LoRA adapter"),
        ({"r": 3}, "'fc1': rank 3, with factors of rank 4"),
        ({"r": None}, "impossible adapter"),
        *(({"lora_alpha": alpha}, "impossible adapter") for alpha in ("much", -1, 0, float("inf"))),
        ({"alpha_pattern": {"fc1": -1}}, "impossible adapter"),
        ({"rank_pattern": ["fc1"]}, "impossible adapter"),
        ({"rank_pattern": {"(": 4}}, "impossible adapter"),
    ],
)
def test_a_config_that_cannot_be_or_is_not_supported_is_refused(folder, config, message):
    edit_config(folder, **{"rank_pattern": {}, "alpha_pattern": {}} | config)
    with pytest.raises(AdapterError, match=message):
        lora.load_adapter(mlp(WIDTHS, seed=0), folder)


def test_what_says_nothing_of_the_computation_is_taken_as_it_is(folder):
    edit_config(
        folder,
        **dict.fromkeys(["auto_mapping", "base_model_name_or_path", "exclude_modules", "layers_pattern"], "some"),
        **dict.fromkeys(["megatron_core", "peft_version", "revision", "task_type"], "some"),
        **{"layers_to_transform": [0], "qalora_group_size": 16, "lora_dropout": 0.1},
    )
    x = torch.randn(5, 784)
    assert torch.equal(lora.load_adapter(mlp(WIDTHS, seed=0), folder)(x), adapted()(x))


def test_another_network_is_refused(folder):
    beside = mlp(WIDTHS, seed=0)
    beside.fc2.weight.data[0, 0] += 1
    with pytest.raises(AdapterError, match="other weights"):
        lora.load_adapter(beside, folder)
    with pytest.raises(AdapterError, match=r"'fc2': A \(4, 12\) and B \(9, 4\) do not fit Linear\(in_features=12, out"):
        lora.load_adapter(mlp([784, 12, 8, 10], seed=0), folder)
    with pytest.raises(AdapterError, match=r"of other layers: it holds fc3.lora_A.weight \(4, 9\)"):
        lora.load_adapter(mlp([784, 12, 9], seed=0), folder)


LENGTHS = "fc2.lora_magnitude_vector"


def _without(part):
    return lambda _, weights: save_file({n: t for n, t in load_file(weights).items() if part not in n}, weights)


def _of_one_length(_, weights):
    save_file(load_file(weights) | {lora.PREFIX + LENGTHS: torch.ones(1)}, weights)


@pytest.mark.parametrize(
    ("dora", "damage", "named"),
    [
        (False, lambda config, _: config.unlink(), f"can be read: .*No such file.*{CONFIG}"),
        (False, lambda config, _: config.write_text("[1, 2"), "can be read: Expecting"),
        (False, lambda _, weights: weights.write_bytes(weights.read_bytes()[:-10]), "can be read: .*[Ii]ncomplete"),
        (
            False,
            lambda _, weights: save_file(mlp(WIDTHS, seed=0).state_dict(), weights),
            r"it holds fc1\.weight \(12, 784\)",
        ),
        (False, _without("fc2.lora_B"), r"damaged.* it holds fc2\.lora_A\.weight \(4, 12\)"),
        (True, _without(LENGTHS), r"damaged.* it holds fc2\.lora_A\.weight \(4, 12\)"),
        (True, _of_one_length, r"'fc2': shape '\[9\]' is invalid"),
    ],
)
def test_folders_that_hold_no_adapter_are_refused(tmp_path, dora, damage, named):
    lora.save_adapter(adapted(dora=dora), tmp_path)
    damage(tmp_path / CONFIG, tmp_path / WEIGHTS)
    with pytest.raises(AdapterError, match=named):
        lora.load_adapter(mlp(WIDTHS, seed=0), tmp_path)

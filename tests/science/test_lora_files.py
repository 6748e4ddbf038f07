"""An adapter's file: what it holds, and the networks and files that are refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_lora import WIDTHS, adapted

from lowrank_helpers import lora
from lowrank_helpers.lora import AdapterError
from lowrank_helpers.models import mlp


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "adapter.safetensors"
    lora.save_adapter(adapted(), path)
    return path


def test_a_saved_adapter_comes_back_as_it_was(file):
    x = torch.randn(5, 784)
    restored = lora.load_adapter(mlp(WIDTHS, seed=0), file)
    assert torch.equal(restored(x), adapted()(x))
    assert str(restored) == str(adapted())
    assert [name for name, parameter in restored.named_parameters() if parameter.requires_grad] == [
        f"fc{i}.lora_{factor}" for i in (1, 2, 3) for factor in "AB"
    ]


def test_the_file_holds_the_factors_and_nothing_else(file):
    assert load_file(file).keys() == {f"fc{i}.lora_{factor}" for i in (1, 2, 3) for factor in "AB"}


def test_a_network_with_other_weights_is_refused(file):
    with pytest.raises(AdapterError, match="other weights"):
        lora.load_adapter(mlp(WIDTHS, seed=1), file)


def test_weights_beside_the_adapted_layers_count_too(tmp_path):
    file, base = tmp_path / "last.safetensors", mlp(WIDTHS, seed=0)
    lora.save_adapter(adapted(layers=["fc3"]), file)
    base.fc1.weight.data[0, 0] += 1
    with pytest.raises(AdapterError, match="other weights"):
        lora.load_adapter(base, file)


@pytest.mark.parametrize(
    ("widths", "message"),
    [([784, 12, 8, 10], "'fc2' of 9×12; the model's is 8×12"), ([784, 12, 9], "adapts 'fc2' of 9×12|layer 'fc3'")],
)
def test_a_network_of_another_shape_is_refused(file, widths, message):
    with pytest.raises(AdapterError, match=message):
        lora.load_adapter(mlp(widths, seed=0), file)


def test_files_that_are_no_adapter_are_refused(tmp_path, file):
    base = mlp(WIDTHS, seed=0)
    with pytest.raises(AdapterError, match="cannot be read"):
        lora.load_adapter(base, tmp_path / "missing.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(AdapterError, match="cannot be read"):
        lora.load_adapter(base, cut)
    weights = tmp_path / "weights.safetensors"
    save_file(base.state_dict(), weights)
    with pytest.raises(AdapterError, match="no adapter"):
        lora.load_adapter(base, weights)


def test_a_model_without_adapters_has_nothing_to_save(tmp_path):
    with pytest.raises(ValueError, match="no adapters"):
        lora.save_adapter(mlp(WIDTHS, seed=0), tmp_path / "none.safetensors")

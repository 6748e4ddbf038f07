"""Half precision: when it is taken for training, and what is decomposed in float32 because of it."""

import pytest
import torch
from torch import nn

from lowrank_helpers import training
from lowrank_helpers.calibration import output_moments
from lowrank_helpers.layers import decompose, factorize
from lowrank_helpers.training import pick_precision


@pytest.mark.parametrize(
    ("ratio", "picked"), [(0.2, "float32"), (1.2, "float32"), (1.4, "bfloat16"), (3.0, "bfloat16")]
)
def test_bfloat16_is_picked_where_its_products_are_clearly_faster(ratio, picked, monkeypatch):
    seconds = {torch.float32: ratio, torch.bfloat16: 1.0}
    monkeypatch.setattr(training, "_product_seconds", lambda dtype, device: seconds[dtype])
    assert pick_precision("auto", torch.device("cpu")) == picked
    assert pick_precision("bfloat16", torch.device("cpu")) == "bfloat16"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fitted", [False, True])
def test_factors_of_a_network_in_half_precision_are_those_of_float32_rounded(dtype, fitted):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype), torch.randn(64, 20)
    exact = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4))
    exact.load_state_dict(model.state_dict())
    moments = output_moments(exact, x, ["0", "2"]) if fitted else {}
    svds = decompose(model, moments)
    cut, expected = (
        factorize(model, {"0": 5, "2": 2}, svds),
        factorize(exact, {"0": 5, "2": 2}, decompose(exact, moments)),
    )
    assert {parameter.dtype for parameter in cut.parameters()} == {dtype}
    assert all(svd.s.dtype in (torch.float32, torch.float64) for svd in svds.values())
    for name, layer in (("0", cut[0]), ("2", cut[2])):
        wanted = expected.get_submodule(name).weight
        torch.testing.assert_close(layer.weight.float(), wanted, rtol=0.02, atol=0.02)
    assert torch.equal(factorize(model, {"0": 5})[0].weight, factorize(model, {"0": 5}, decompose(model))[0].weight)

"""How the layers of a network become matrices, against what PyTorch's layers compute."""

import numpy as np
import pytest
import torch
from torch import nn

from lowrank_helpers.unfold import unfold, weight_matrices


def _shapes(model):
    return {name: tuple(matrix.shape) for name, matrix in weight_matrices(model).items()}


def test_layers_of_every_kind_are_unfolded_by_the_stated_rules():
    layers = {
        "conv": nn.Conv2d(6, 8, 3, groups=2),
        "up": nn.ConvTranspose2d(6, 8, 3, groups=2),
        "words": nn.Embedding(11, 4),
        "same": nn.MultiheadAttention(4, 2),
        "other": nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
        "norm": nn.LayerNorm([3, 4]),
        "rnn": nn.RNN(12, 4),
        "lstm": nn.LSTM(5, 3, proj_size=2),
    }
    gates = {f"lstm.weight_{kind}_l0.{gate}": (3, n) for kind, n in (("ih", 5), ("hh", 2)) for gate in "ifgo"}
    assert _shapes(nn.ModuleDict(layers)) == {
        **{"conv": (8, 27), "up": (8, 27), "words": (11, 4)},
        **{"same.q": (4, 4), "same.k": (4, 4), "same.v": (4, 4), "same.out_proj": (4, 4)},
        **{"other.q_proj_weight": (4, 4), "other.k_proj_weight": (4, 3), "other.v_proj_weight": (4, 5)},
        **{"other.out_proj": (4, 4), "rnn.weight_ih_l0": (4, 12), "rnn.weight_hh_l0": (4, 4)},
        **{**gates, "lstm.weight_hr_l0": (2, 3)},
    }
    packed = [matrix for name, matrix in weight_matrices(layers["same"]).items() if name in ("q", "k", "v")]
    assert torch.equal(torch.cat(packed), layers["same"].in_proj_weight)


def test_a_transposed_convolutions_row_makes_its_output_channel():
    layer = nn.ConvTranspose2d(6, 8, 3, groups=2, bias=False)
    matrix = unfold("up.weight", layer.weight.detach(), layer)["up"].matrix
    answers = layer(torch.eye(6).reshape(6, 6, 1, 1))  # to each input channel alone
    np.testing.assert_allclose(answers.detach().transpose(0, 1).flatten(1).norm(dim=1), matrix.norm(dim=1), rtol=1e-5)


PACKED = "packed q, k, v, split by"


@pytest.mark.parametrize(
    ("name", "shape", "layer", "parts", "told", "remark"),
    [
        ("attn.c_attn.weight", (4, 12), None, "attn.c_attn.{q,k,v}", "4×4", f"{PACKED} columns"),  # as GPT-2's
        ("attn.qkv.weight", (12, 4), None, "attn.qkv.{q,k,v}", "4×4", f"{PACKED} rows"),
        ("in_proj_weight", (12, 4), None, "{q,k,v}", "4×4", f"{PACKED} rows"),
        ("qkv_proj.weight", (8, 4), None, "qkv_proj", "8×4", ""),  # grouped queries: not three equal parts
        ("query_key_value.weight", (12, 4), None, "query_key_value", "12×4", ""),  # they alternate head by head
        ("it.weight", (3, 4), None, "it", "3×4", ""),
        ("it.weight", (1, 5, 4), None, "it", "5×4", "axes of size 1 dropped"),
        ("it.weight", (1, 5, 4), nn.Conv1d(5, 1, 4), "it", "1×5·4", ""),
        ("it.weight", (6, 5, 4), None, "it", "6×5·4", ""),
        ("it.weight", (3, 4, 5, 6, 7), None, "it", "3×4·5·6·7", ""),
        ("it.weight", (8, 3, 3, 3), nn.Conv2d(6, 8, 3, groups=2), "it", "8×3·3·3", "2 groups, below each other"),
        ("it.weight", (6, 4, 3), nn.ConvTranspose1d(6, 4, 3), "it", "4×6·3", "transposed"),
        ("mlp.weight", (3, 16, 8), None, "mlp.{0,1,2}", "16×8", "of a stack of 3"),  # no convolution: too few filters
        ("experts", (4, 3, 2), None, "experts.{0,1,2,3}", "3×2", "of a stack of 4"),
        ("grid", (1, 2, 8, 8), None, "grid.{0,1}", "8×8", "of a stack of 2"),
        ("stacks", (2, 2, 5, 4), None, "stacks.{0.0,0.1,1.0,1.1}", "5×4", "of a stack of 2×2"),
    ],
)
def test_how_a_tensor_became_matrices_is_told(name, shape, layer, parts, told, remark):
    weight = torch.arange(1.0, 1 + np.prod(shape)).reshape(shape)
    unfolded = unfold(name, weight, layer)
    stem, _, ends = parts.partition("{")
    assert list(unfolded) == [stem + end for end in ends.rstrip("}").split(",")]
    assert {(part.shape, part.remark) for part in unfolded.values()} == {(told, remark)}
    rows, *columns = (int(n) for n in told.replace("·", "×").split("×"))
    assert {part.matrix.shape for part in unfolded.values()} == {(rows, np.prod(columns))}
    entries = torch.cat([part.matrix.flatten() for part in unfolded.values()])
    assert torch.equal(entries.sort().values, weight.flatten()), "each entry has one place"
    if "stack" in remark:
        assert torch.equal(entries, weight.flatten()), "in the stack's order"


def test_shared_weights_appear_once_and_computed_ones_each_time():
    shared = nn.Linear(4, 4)
    tied = nn.Linear(4, 4)
    tied.weight = shared.weight
    normed = [nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)) for _ in range(20)]
    matrices = weight_matrices(nn.Sequential(shared, tied, *normed))
    assert list(matrices) == ["0", *(f"{i}" for i in range(2, 22))]
    assert torch.equal(matrices["2"], normed[0].weight)

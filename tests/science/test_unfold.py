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


@pytest.mark.parametrize(
    ("name", "shape", "parts", "remark"),
    [
        # Stored as (in, out), as GPT-2's.
        ("attn.c_attn.weight", (4, 12), ["attn.c_attn.q", "attn.c_attn.k", "attn.c_attn.v"], "columns"),
        ("attn.qkv.weight", (12, 4), ["attn.qkv.q", "attn.qkv.k", "attn.qkv.v"], "rows"),
        ("in_proj_weight", (12, 4), ["q", "k", "v"], "rows"),
        ("qkv_proj.weight", (8, 4), ["qkv_proj"], ""),  # grouped queries: not three equal parts
        ("query_key_value.weight", (12, 4), ["query_key_value"], ""),  # q, k and v alternate head by head
    ],
)
def test_packed_projections_are_split_where_their_parts_are_known(name, shape, parts, remark):
    unfolded = unfold(name, torch.randn(shape))
    assert list(unfolded) == parts
    assert {part.remark for part in unfolded.values()} == {f"packed q, k, v, split by {remark}" if remark else ""}
    assert all(part.matrix.shape == (4, 4) for part in unfolded.values()) or len(parts) == 1


@pytest.mark.parametrize(
    ("shape", "layer", "told", "remark"),
    [
        ((3, 4), None, "3×4", ""),
        ((1, 5, 4), None, "5×4", "axes of size 1 dropped"),
        ((1, 5, 4), nn.Conv1d(5, 1, 4), "1×5·4", ""),
        ((6, 5, 4), None, "6×5·4", ""),
        ((8, 3, 3, 3), nn.Conv2d(6, 8, 3, groups=2), "8×3·3·3", "2 groups, below each other"),
        ((6, 4, 3), nn.ConvTranspose1d(6, 4, 3), "4×6·3", "transposed"),
    ],
)
def test_how_a_tensor_became_a_matrix_is_told(shape, layer, told, remark):
    weight = torch.randn(shape)
    ((name, unfolded),) = unfold("it.weight", weight, layer).items()
    assert (name, unfolded.shape, unfolded.remark) == ("it", told, remark)
    rows, *columns = (int(n) for n in told.replace("·", "×").split("×"))
    assert unfolded.matrix.shape == (rows, np.prod(columns))
    np.testing.assert_allclose(unfolded.matrix.norm(), weight.norm(), rtol=1e-6)


def test_a_stack_of_stacks_has_a_matrix_for_each_index():
    stack = torch.randn(2, 3, 5, 4)
    unfolded = unfold("experts", stack)
    assert list(unfolded) == [f"experts.{i}.{j}" for i in range(2) for j in range(3)]
    assert torch.equal(unfolded["experts.1.2"].matrix, stack[1, 2])
    assert unfolded["experts.1.2"].remark == "of a stack of 2×3"


def test_shared_weights_appear_once_and_computed_ones_each_time():
    shared = nn.Linear(4, 4)
    tied = nn.Linear(4, 4)
    tied.weight = shared.weight
    normed = [nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)) for _ in range(20)]
    matrices = weight_matrices(nn.Sequential(shared, tied, *normed))
    assert list(matrices) == ["0", *(f"{i}" for i in range(2, 22))]
    assert torch.equal(matrices["2"], normed[0].weight)

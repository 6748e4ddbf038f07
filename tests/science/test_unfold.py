"""How the layers of a network become matrices, against what PyTorch's layers compute."""

import numpy as np
import pytest
import torch
from torch import nn

from lowrank_helpers.unfold import unfold, weight_matrices


def test_layers_of_every_kind_are_unfolded_by_the_stated_rules():
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(6, 8, 3, groups=2),
            "up": nn.ConvTranspose2d(6, 8, 3, groups=2),
            "words": nn.Embedding(11, 4),
            "same": nn.MultiheadAttention(4, 2),
            "other": nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
            "norm": nn.LayerNorm([3, 4]),
            "fc": nn.Linear(4, 3),
        }
    )
    matrices = weight_matrices(model)
    assert {name: tuple(matrix.shape) for name, matrix in matrices.items()} == {
        "conv": (8, 27),
        "up": (8, 27),
        "words": (11, 4),
        "same.q": (4, 4),
        "same.k": (4, 4),
        "same.v": (4, 4),
        "same.out_proj": (4, 4),
        "other.q_proj_weight": (4, 4),
        "other.k_proj_weight": (4, 3),
        "other.v_proj_weight": (4, 5),
        "other.out_proj": (4, 4),
        "fc": (3, 4),
    }
    assert torch.equal(torch.cat([matrices[f"same.{part}"] for part in "qkv"]), model["same"].in_proj_weight)


def test_a_transposed_convolutions_row_makes_its_output_channel():
    layer = nn.ConvTranspose2d(6, 8, 3, groups=2, bias=False)
    matrix = unfold("up.weight", layer.weight.detach(), layer)["up"].matrix
    answers = layer(torch.eye(6).reshape(6, 6, 1, 1))  # to each input channel alone
    np.testing.assert_allclose(answers.detach().transpose(0, 1).flatten(1).norm(dim=1), matrix.norm(dim=1), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "shape", "parts"),
    [
        ("h.0.attn.c_attn.weight", (4, 12), {"h.0.attn.c_attn.q": (4, 4)}),  # stored as (in, out), as GPT-2's
        ("blocks.0.attn.qkv.weight", (12, 4), {"blocks.0.attn.qkv.v": (4, 4)}),
        ("in_proj_weight", (12, 4), {"k": (4, 4)}),
        ("layers.0.qkv_proj.weight", (12, 4), {"layers.0.qkv_proj.k": (4, 4)}),
        ("layers.0.Wqkv.weight", (12, 4), {"layers.0.Wqkv.q": (4, 4)}),
        ("layers.0.qkv_proj.weight", (8, 4), {"layers.0.qkv_proj": (8, 4)}),  # grouped queries: not three equal parts
        ("gpt_neox.layers.0.attention.query_key_value.weight", (12, 4), {}),  # q, k and v alternate head by head
    ],
)
def test_packed_projections_are_split_where_their_parts_are_known(name, shape, parts):
    weight = torch.randn(shape)
    unfolded = unfold(name, weight)
    assert parts.items() <= {key: tuple(part.matrix.shape) for key, part in unfolded.items()}.items()
    assert len(unfolded) == (3 if 12 in shape and "query_key_value" not in name else 1)
    assert sum(part.matrix.numel() for part in unfolded.values()) == weight.numel()


@pytest.mark.parametrize(
    ("weight", "layer", "shape", "remark"),
    [
        (torch.randn(3, 4), None, "3×4", ""),
        (torch.randn(1, 5, 4), None, "5×4", "first axis, of size 1, dropped"),
        (torch.randn(1, 5, 4), nn.Conv1d(5, 1, 4), "1×5·4", ""),
        (torch.randn(2, 5, 4), None, "2×5·4", ""),
        (torch.randn(8, 3, 3, 3), nn.Conv2d(6, 8, 3, groups=2), "8×3·3·3", "2 groups, below each other"),
        (torch.randn(6, 4, 3), nn.ConvTranspose1d(6, 4, 3), "4×6·3", "transposed"),
    ],
)
def test_how_a_tensor_became_a_matrix_is_told(weight, layer, shape, remark):
    ((name, unfolded),) = unfold("it.weight", weight, layer).items()
    assert (name, unfolded.shape, unfolded.remark) == ("it", shape, remark)
    rows, *columns = (int(n) for n in shape.replace("·", "×").split("×"))
    assert unfolded.matrix.shape == (rows, np.prod(columns))
    np.testing.assert_allclose(unfolded.matrix.norm(), weight.norm(), rtol=1e-6)


def test_gates_are_split_where_their_number_is_known_by_name_and_hidden_size():
    weight = torch.randn(12, 5)
    assert list(unfold("rnn.weight_ih_l0", weight, hidden_size=3)) == [f"rnn.weight_ih_l0.{gate}" for gate in "ifgo"]
    assert unfold("rnn.weight_ih_l0", weight, hidden_size=4)["rnn.weight_ih_l0.n"].remark == (
        "packed gates r, z, n, split by rows"
    )
    for unsplit in (unfold("rnn.weight_ih_l0", weight), unfold("fc.weight", weight, hidden_size=3)):
        assert len(unsplit) == 1
    assert unfold("c_attn.weight", weight.T.reshape(4, 15)[:, :12])["c_attn.q"].remark == (
        "packed q, k, v, split by columns"
    )


def test_shared_weights_appear_once_and_computed_ones_each_time():
    shared = nn.Linear(4, 4)
    tied = nn.Linear(4, 4)
    tied.weight = shared.weight
    normed = [nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)) for _ in range(20)]
    assert list(weight_matrices(nn.Sequential(shared, tied, *normed))) == ["0", *(f"{i}" for i in range(2, 22))]


def test_a_vector_is_not_unfolded():
    with pytest.raises(ValueError, match=r"fc\.bias has 1 axes"):
        unfold("fc.bias", torch.ones(3))


def test_gates_of_recurrent_layers_are_split_as_pytorch_packs_them():
    torch.manual_seed(0)
    lstm = nn.LSTM(5, 3, num_layers=2, bidirectional=True, proj_size=2)
    matrices = weight_matrices(lstm)
    assert tuple(matrices["weight_ih_l1_reverse.g"].shape) == (3, 4)  # inputs: both directions' two projections
    assert tuple(matrices["weight_hh_l0.o"].shape) == (3, 2)
    assert tuple(matrices["weight_hr_l0"].shape) == (2, 3)
    assert len(matrices) == 4 * (4 + 4 + 1)
    x, h, c = torch.randn(1, 5), torch.randn(1, 3), torch.randn(1, 3)
    cell = nn.LSTMCell(5, 3, bias=False)
    W = weight_matrices(cell)
    i, f, g, o = (x @ W[f"weight_ih.{gate}"].T + h @ W[f"weight_hh.{gate}"].T for gate in "ifgo")
    after = f.sigmoid() * c + i.sigmoid() * g.tanh()
    torch.testing.assert_close((o.sigmoid() * after.tanh(), after), cell(x, (h, c)))
    cell = nn.GRUCell(5, 3, bias=False)
    W = weight_matrices(cell)
    ir, iz, i_n = (x @ W[f"weight_ih.{gate}"].T for gate in "rzn")
    hr, hz, hn = (h @ W[f"weight_hh.{gate}"].T for gate in "rzn")
    z = (iz + hz).sigmoid()
    torch.testing.assert_close((1 - z) * (i_n + (ir + hr).sigmoid() * hn).tanh() + z * h, cell(x, h))


def test_a_recurrent_layer_without_gates_is_not_split():
    shapes = {name: tuple(matrix.shape) for name, matrix in weight_matrices(nn.RNN(12, 4)).items()}
    assert shapes == {"weight_ih_l0": (4, 12), "weight_hh_l0": (4, 4)}


def test_computed_weights_are_measured_as_they_work():
    for norm in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm):
        layer = norm(nn.Linear(4, 3)).eval()
        assert torch.equal(weight_matrices(nn.Sequential(layer))["0"], layer.weight)

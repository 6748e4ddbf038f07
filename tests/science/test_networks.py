"""The networks beyond MLPs: their shapes, their rules, and what they refuse."""

import pytest
import torch
from torch import nn

from lowrank_helpers.networks import Attention, VisionTransformer, convnet

NETWORKS = {
    "convnet": lambda seed: convnet([3, 5], 7, seed=seed),
    "transformer": lambda seed: VisionTransformer(patch=14, width=8, n_blocks=1, n_heads=2, seed=seed),
}


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_networks_map_rows_of_pixels_to_logits_and_keep_the_series_rules(network):
    model = network(seed=0)
    assert model(torch.randn(4, 784)).shape == (4, 10)
    assert not [name for name, _ in model.named_parameters() if "bias" in name]
    assert not [
        m for m in model.modules() if isinstance(m, (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd))
    ]


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_a_seed_draws_the_same_weights_whatever_was_drawn_before(network):
    first = network(seed=3).state_dict()
    torch.rand(7)
    again, other = network(seed=3).state_dict(), network(seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_attention_is_pytorchs_with_the_same_matrices():
    ours, reference = Attention(8, 2), nn.MultiheadAttention(8, 2, bias=False, batch_first=True)
    packed = torch.cat([layer.weight for layer in (ours.query, ours.key, ours.value)])
    reference.load_state_dict({"in_proj_weight": packed, "out_proj.weight": ours.out.weight})
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(ours(x), reference(x, x, x)[0])


def test_each_patch_becomes_the_token_of_its_place():
    model = VisionTransformer(patch=14, width=8, n_blocks=1, n_heads=2, seed=0)
    seen = []
    model.embed.register_forward_pre_hook(lambda layer, arguments: seen.append(arguments[0]))
    image = torch.arange(784.0)
    model(image[None])
    torch.testing.assert_close(seen[0][0, 1], image.view(28, 28)[:14, 14:].flatten())


@pytest.mark.parametrize(
    ("options", "named"),
    [({"patch": 5}, "patch 5"), ({"width": 10, "n_heads": 4}, "width 10"), ({"n_blocks": 0}, "n_blocks 0")],
)
def test_an_impossible_transformer_is_refused(options, named):
    with pytest.raises(ValueError, match=named):
        VisionTransformer(seed=0, **options)


@pytest.mark.parametrize("channels", [[], [8, 0]])
def test_an_impossible_convolutional_network_is_refused(channels):
    with pytest.raises(ValueError, match="at least 1"):
        convnet(channels, 8, seed=0)

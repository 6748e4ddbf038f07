"""Networks beyond multilayer perceptrons: one of convolutions, and a transformer with patches as tokens.

Both are without biases, Dropout or BatchNorm, and take images as rows, as all of the series.
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_helpers.data import IMAGE_SIDE, N_CLASSES


def convnet(channels: Sequence[int], width: int, *, seed: int) -> nn.Sequential:
    """Build a convolutional network: each convolution halves the image, then follow two linear layers.

    Parameters
    ----------
    channels : sequence of int
        Output channels of the convolutions ``conv1``, ``conv2``, …, each 3×3 with stride 2 and ReLU.
    width : int
        Outputs of ``fc1``, which sees all that the last convolution puts out; ``fc2`` gives the logits.
    seed : int
        Draws PyTorch's standard initialisation, as :func:`lowrank_helpers.models.mlp` does.

    Returns
    -------
    nn.Sequential
        Maps (n, 784) to logits (n, 10), float32, on the CPU.

    Raises
    ------
    ValueError
        There is no convolution, or a number is below 1.
    """
    if not channels or min(*channels, width) < 1:
        raise ValueError(f"channels {list(channels)} and width {width} must be numbers of at least 1")
    layers: OrderedDict[str, nn.Module] = OrderedDict(image=nn.Unflatten(1, (1, IMAGE_SIDE, IMAGE_SIDE)))
    for i, (before, after) in enumerate(pairwise([1, *channels]), start=1):
        layers[f"conv{i}"] = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
        layers[f"act{i}"] = nn.ReLU()
    side = IMAGE_SIDE
    for _ in channels:
        side = (side + 1) // 2
    layers["flatten"] = nn.Flatten()
    layers["fc1"] = nn.Linear(channels[-1] * side**2, width, bias=False)
    layers["act"] = nn.ReLU()
    layers["fc2"] = nn.Linear(width, N_CLASSES, bias=False)
    network = nn.Sequential(layers)
    _draw(network, seed)
    return network


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, arXiv 1706.03762) of four linear layers without biases.

    The four are layers of their own, and not one packed matrix, so that each has a rank of its own.
    """

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (n, n_tokens, width) to the same shape."""
        query, key, value = (
            layer(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        # Not F.scaled_dot_product_attention, which takes 2.5 times as long on a CPU in bfloat16 for a few tokens.
        weights = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(dim=-1)
        return self.out((weights @ value).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then two linear layers with GELU between, each after a LayerNorm and beside a residual connection."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, bias=False) for _ in range(2))
        self.attention = Attention(width, n_heads)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (n, n_tokens, width) to the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """A transformer whose tokens are patches of the image (Dosovitskiy et al. 2021, arXiv 2010.11929), small.

    The logits come from the mean of all tokens; LayerNorm scales each token by itself, and has no bias either.

    Parameters
    ----------
    patch : int
        Side of the square patches; divides 28.
    width : int
        Length of a token; a multiple of ``n_heads``.
    n_blocks, n_heads : int
    seed : int
        Draws PyTorch's standard initialisation.

    Raises
    ------
    ValueError
        The patches do not tile the image, the heads do not share the width evenly, or a number is below 1.
    """

    def __init__(self, *, patch: int = 7, width: int = 64, n_blocks: int = 2, n_heads: int = 4, seed: int) -> None:
        super().__init__()
        if min(patch, width, n_blocks, n_heads) < 1 or IMAGE_SIDE % patch or width % n_heads:
            raise ValueError(
                f"patch {patch} must divide {IMAGE_SIDE}, and width {width} be a multiple of n_heads {n_heads}; "
                f"all, with n_blocks {n_blocks}, at least 1"
            )
        self.patch = patch
        self.embed = nn.Linear(patch**2, width, bias=False)
        self.positions = nn.Parameter(torch.empty((IMAGE_SIDE // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, n_heads) for _ in range(n_blocks)))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, N_CLASSES, bias=False)
        _draw(self, seed)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (n, 784) to logits (n, 10)."""
        # Not F.unfold, which a GPU does image by image.
        patches = images.unflatten(1, (IMAGE_SIDE // self.patch, self.patch, IMAGE_SIDE // self.patch, self.patch))
        tokens = self.blocks(self.embed(patches.transpose(2, 3).flatten(3).flatten(1, 2)) + self.positions)
        return self.head(self.norm(tokens).mean(dim=1))


def _draw(model: nn.Module, seed: int) -> None:
    """Draw every matrix of a model, its convolutions' too, uniformly on ±1/√(inputs of one output)."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            bound = parameter[0].numel() ** -0.5
            nn.init.uniform_(parameter, -bound, bound, generator=generator)

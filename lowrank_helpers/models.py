"""The series' networks: multilayer perceptrons, a convolutional network, and a language model.

All are without biases, Dropout or BatchNorm, take images or sequences as rows, and draw PyTorch's standard
initialisation from a seed: uniform on ±1/√(inputs of one output) (He et al. 2015 with a = √5).
"""

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_helpers.data import IMAGE_SIDE, N_CLASSES

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "identity": nn.Identity,
}


def mlp(widths: Sequence[int], activation: str = "relu", *, seed: int) -> nn.Sequential:
    """Build a multilayer perceptron that maps (n, widths[0]) to logits (n, widths[-1]), float32, on the CPU.

    Parameters
    ----------
    widths : sequence of int
        Inputs, hidden units layer by layer, outputs: ``[784, 512, 512, 10]`` has three weight matrices,
        ``fc1`` to ``fc3``.
    activation : str
        One of ``ACTIVATIONS``, after every layer but the last.

    Raises
    ------
    ValueError
        Fewer than two widths, a width below 1, or an unknown activation.

    Examples
    --------
    >>> mlp([784, 512, 10], seed=0)
    Sequential(
      (fc1): Linear(in_features=784, out_features=512, bias=False)
      (act1): ReLU()
      (fc2): Linear(in_features=512, out_features=10, bias=False)
    )
    """
    if len(widths) < 2 or any(width < 1 for width in widths):
        raise ValueError(f"widths {list(widths)} must be at least two numbers, each at least 1")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is unknown; allowed: {', '.join(ACTIVATIONS)}")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (in_features, out_features) in enumerate(pairwise(widths), start=1):
        layers[f"fc{i}"] = nn.utils.skip_init(nn.Linear, in_features, out_features, bias=False)
        if i < len(widths) - 1:
            layers[f"act{i}"] = ACTIVATIONS[activation]()
    model = nn.Sequential(layers)
    draw_(model.parameters(), torch.Generator().manual_seed(seed))
    return model


def convnet(channels: Sequence[int], width: int, *, seed: int) -> nn.Sequential:
    """Build a convolutional network that maps (n, 784) to logits (n, 10), float32, on the CPU.

    Parameters
    ----------
    channels : sequence of int
        Output channels of the convolutions ``conv1``, ``conv2``, …, each 3×3 with ReLU. A stride of 2 halves the image.
    width : int
        Outputs of ``fc1``, which sees all that the last convolution puts out; ``fc2`` gives the logits.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(image=nn.Unflatten(1, (1, IMAGE_SIDE, IMAGE_SIDE)))
    for i, (before, after) in enumerate(pairwise([1, *channels]), start=1):
        layers[f"conv{i}"] = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
        layers[f"act{i}"] = nn.ReLU()
    side = math.ceil(IMAGE_SIDE / 2 ** len(channels))
    layers["flatten"] = nn.Flatten()
    layers["fc1"] = nn.Linear(channels[-1] * side**2, width, bias=False)
    layers["act"] = nn.ReLU()
    layers["fc2"] = nn.Linear(width, N_CLASSES, bias=False)
    model = nn.Sequential(layers)
    draw_(model.parameters(), torch.Generator().manual_seed(seed))
    return model


class Attention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017, arXiv 1706.03762) of four layers."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (n, n_tokens, width) to the same shape."""
        query, key, value = (
            layer(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        # Not F.scaled_dot_product_attention, which takes five times as long on a CPU in bfloat16 for a few tokens.
        future = x.new_full((x.shape[1], x.shape[1]), -torch.inf).triu(1)  # no token sees those after it
        weights = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5 + future).softmax(dim=-1)
        outputs: Tensor = self.out((weights @ value).transpose(1, 2).flatten(2))
        return outputs


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
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return x


class LanguageModel(nn.Module):
    """A small causal transformer that predicts the next character from those before, as GPT-2 (Radford et al. 2019).

    Parameters
    ----------
    context : int
        The most characters of a sequence.
    width : int
        Length of the vector that stands for a character; a multiple of ``n_heads``.

    Raises
    ------
    ValueError
        The heads do not share the width evenly, or a number is below 1.
    """

    def __init__(
        self, n_characters: int, *, context: int = 64, width: int = 64, n_blocks: int = 4, n_heads: int = 4, seed: int
    ) -> None:
        super().__init__()
        if min(n_characters, context, width, n_blocks, n_heads) < 1 or width % n_heads:
            raise ValueError(f"width {width} must be a multiple of n_heads {n_heads}, and all numbers at least 1")
        self.embed = nn.Embedding(n_characters, width)
        self.positions = nn.Parameter(torch.empty(context, width))
        self.blocks = nn.Sequential(*(Block(width, n_heads) for _ in range(n_blocks)))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, n_characters, bias=False)
        draw_(self.parameters(), torch.Generator().manual_seed(seed))

    def forward(self, characters: Tensor) -> Tensor:
        """Map int64 characters (n, n_tokens) to logits (n, n_tokens, n_characters)."""
        tokens = self.blocks(self.embed(characters) + self.positions[: characters.shape[1]])
        logits: Tensor = self.head(self.norm(tokens))
        return logits


def draw_(weights: Iterable[Tensor], generator: torch.Generator) -> None:
    """Fill matrices, a convolution's too, as PyTorch does: uniform on ±1/√(inputs of one output); vectors stay."""
    for weight in weights:
        if weight.dim() > 1:
            bound = weight[0].numel() ** -0.5
            nn.init.uniform_(weight, -bound, bound, generator=generator)


Replaceable = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d  # convolutions of one group


def kind_of(layer: Replaceable) -> type[Replaceable]:
    """Return PyTorch's own class of a layer, which may be of a subclass."""
    kinds: tuple[type[Replaceable], ...] = get_args(Replaceable)
    return next(kind for kind in kinds if isinstance(layer, kind))


class LowRankLayer(nn.Sequential):
    """A linear layer or convolution of low rank, made of two of PyTorch's own: ``C`` to r outputs, then ``B``.

    y = x·Cᵀ·Bᵀ + bias. Of a convolution, C has its window, stride, padding and dilation, and B has a window of size 1
    (Zhang et al. 2016, arXiv 1505.06798, section 2.1).

    Attributes
    ----------
    C : nn.Linear, nn.Conv1d, nn.Conv2d or nn.Conv3d
        Its weight is (r, in_features) or (r, in_channels, …); without a bias.
    B : of the same class
        Its weight is (out_features, r) or (out_channels, r, 1, …); with the bias, if there is one.

    Examples
    --------
    >>> layer = LowRankLayer.of(nn.Linear(3, 5, bias=False), torch.ones(5, 2), torch.ones(2, 3))
    >>> layer(torch.ones(3)).tolist()
    [6.0, 6.0, 6.0, 6.0, 6.0]
    """

    B: Replaceable
    C: Replaceable

    @classmethod
    def of(cls, layer: Replaceable, B: Tensor, C: Tensor) -> "LowRankLayer":
        """Return the low-rank layer that takes a layer's place: copies of B (n, r) and C (r, m) for its weight (n, m).

        The weight is unfolded. Dtype, device, mode, bias, and what is frozen, are the layer's.
        """
        (n, m), rank = layer.weight.flatten(1).shape, len(C)
        if (B.shape, C.shape) != ((n, rank), (rank, m)):
            raise ValueError(f"B {tuple(B.shape)} and C {tuple(C.shape)} must be ({n}, r) and (r, {m})")
        kind, options = kind_of(layer), ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        window: dict[str, Any] = {} if kind is nn.Linear else {name: getattr(layer, name) for name in options}
        first = kind(layer.weight.shape[1], rank, bias=False, device="meta", **window)
        second = kind(rank, n, bias=False, device="meta", **(window and {"kernel_size": 1}))
        for new, factor in ((first, C), (second, B)):
            weight = factor.detach().reshape(new.weight.shape).to(layer.weight)
            weight = weight.clone(memory_format=torch.contiguous_format)
            new.weight = nn.Parameter(weight, layer.weight.requires_grad)
        if layer.bias is not None:
            second.bias = nn.Parameter(layer.bias.detach().clone(), layer.bias.requires_grad)
        return cls(OrderedDict(C=first, B=second)).train(layer.training)

    @property
    def weight(self) -> Tensor:
        """The weight that the factors stand for, in the shape that the whole layer's would have."""
        return self.product(self.B.weight, self.C.weight)

    @staticmethod
    def product(B: Tensor, C: Tensor) -> Tensor:
        """Return the weight that two factors stand for, in their layers' shapes."""
        return (B.flatten(1) @ C.flatten(1)).view(len(B), *C.shape[1:])

    @property
    def bias(self) -> Tensor | None:
        """The bias, (out_features,)."""
        return self.B.bias

    @property
    def rank(self) -> int:
        """The rank r of the factors."""
        return len(self.C.weight)


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return all modules of a model by dotted name, but not the two in a low-rank layer: it counts as one."""
    low_rank = [module for module in model.modules() if isinstance(module, LowRankLayer)]
    inside = {part for layer in low_rank for factor in layer for part in factor.modules()}
    return {name: module for name, module in model.named_modules() if module not in inside}


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return every ``nn.Linear`` of a model by its dotted name, in order of registration."""
    return {name: module for name, module in named_layers(model).items() if isinstance(module, nn.Linear)}


def n_parameters(model: nn.Module) -> int:
    """Count a model's parameters, frozen ones included."""
    return sum(parameter.numel() for parameter in model.parameters())


def n_trainable(model: nn.Module) -> int:
    """Count the parameters that training would change."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def squared_norm(model: nn.Module) -> Tensor:
    """Sum ‖W‖_F² over all linear layers; for one of low rank that of the product, ‖B·C‖_F² = ⟨BᵀB, C·Cᵀ⟩."""
    total = torch.zeros(())
    for module in named_layers(model).values():
        if isinstance(module, LowRankLayer) and module.B.weight.dim() == 2:
            B, C = module.B.weight, module.C.weight
            total = total + ((B.T @ B) * (C @ C.T)).sum()
        elif isinstance(module, nn.Linear):
            total = total + module.weight.square().sum()
    return total

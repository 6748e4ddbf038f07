"""The series' networks: multilayer perceptrons without biases, Dropout or BatchNorm."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "identity": nn.Identity,
}


def mlp(widths: Sequence[int], activation: str = "relu", *, seed: int) -> nn.Sequential:
    """Build a multilayer perceptron without biases.

    Parameters
    ----------
    widths : sequence of int
        Inputs, hidden units layer by layer, outputs: ``[784, 512, 512, 10]`` has three weight matrices,
        ``fc1`` to ``fc3``.
    activation : str
        One of ``ACTIVATIONS``, after every layer but the last.
    seed : int
        Draws PyTorch's standard initialisation, uniform on ±1/√in_features (He et al. 2015 with a = √5).

    Returns
    -------
    nn.Sequential
        Maps (n, widths[0]) to logits (n, widths[-1]), float32, on the CPU.

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
    generator = torch.Generator().manual_seed(seed)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (in_features, out_features) in enumerate(pairwise(widths), start=1):
        layer = nn.utils.skip_init(nn.Linear, in_features, out_features, bias=False)
        bound = in_features**-0.5
        nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
        layers[f"fc{i}"] = layer
        if i < len(widths) - 1:
            layers[f"act{i}"] = ACTIVATIONS[activation]()
    return nn.Sequential(layers)


class FactorizedLinear(nn.Module):
    """A linear layer whose weight is the product of two thin factors, y = x·Cᵀ·Bᵀ (+ bias), copied from those given.

    Attributes
    ----------
    B : Parameter of shape (out_features, rank)
    C : Parameter of shape (rank, in_features)
    bias : Parameter of shape (out_features,) or None

    Examples
    --------
    >>> FactorizedLinear(torch.ones(5, 2), torch.ones(2, 3))(torch.ones(3)).tolist()
    [6.0, 6.0, 6.0, 6.0, 6.0]
    """

    def __init__(self, B: Tensor, C: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        if B.dim() != 2 or C.dim() != 2 or B.shape[1] != C.shape[0]:
            raise ValueError(f"B {tuple(B.shape)} and C {tuple(C.shape)} must be (n, r) and (r, m)")
        self.B = nn.Parameter(B.detach().clone())
        self.C = nn.Parameter(C.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.out_features, self.rank = B.shape
        self.in_features = C.shape[1]

    @property
    def weight(self) -> Tensor:
        """The matrix that the factors stand for, (out_features, in_features)."""
        return self.B @ self.C

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, in_features) to (…, out_features) through the rank-sized middle, never forming the product."""
        return F.linear(F.linear(x, self.C), self.B, self.bias)

    def extra_repr(self) -> str:
        """Show the shape in ``print(model)`` as ``nn.Linear`` does."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return every ``nn.Linear`` of a model by its dotted name, in order of registration.

    Examples
    --------
    >>> list(linear_layers(mlp([784, 512, 10], seed=0)))
    ['fc1', 'fc2']
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def check_plain(layers: Mapping[str, nn.Module]) -> None:
    """Raise ``ValueError`` if an ``nn.Linear`` among named layers has a ``forward`` of its own.

    Its weight then does not say what it computes, so that no layer made of the weight can take its place. Subclasses
    that inherit ``forward``, such as PyTorch's in ``nn.MultiheadAttention``, are plain.
    """
    for name, layer in layers.items():
        if isinstance(layer, nn.Linear) and (
            getattr(layer.forward, "__func__", None) is not nn.Linear.forward
            or type(layer).__call__ is not nn.Linear.__call__
        ):
            raise ValueError(
                f"layer {name!r} is a {type(layer).__name__} with a forward of its own, which its weight does not "
                "describe: leave it out, or make it an nn.Linear first"
            )


def n_parameters(model: nn.Module) -> int:
    """Count a model's parameters, frozen ones included.

    Examples
    --------
    >>> n_parameters(FactorizedLinear(torch.ones(5, 2), torch.ones(2, 3)))
    16
    """
    return sum(parameter.numel() for parameter in model.parameters())


def n_trainable(model: nn.Module) -> int:
    """Count the parameters that training would change.

    Examples
    --------
    >>> n_trainable(nn.Linear(4, 3).requires_grad_(False))
    0
    """
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def squared_norm(model: nn.Module) -> Tensor:
    """Sum ‖W‖_F² over all linear layers; for a factorised one that of the product, ‖B·C‖_F² = ⟨BᵀB, C·Cᵀ⟩.

    Examples
    --------
    >>> squared_norm(FactorizedLinear(torch.ones(5, 2), torch.ones(2, 3))).item()  # 15 entries, each 2
    60.0
    """
    total = torch.zeros(())
    for module in model.modules():
        if isinstance(module, FactorizedLinear):
            total = total + ((module.B.T @ module.B) * (module.C @ module.C.T)).sum()
        elif isinstance(module, nn.Linear):
            total = total + module.weight.square().sum()
    return total

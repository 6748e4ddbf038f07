"""Low-rank adaptation of a trained network: W is frozen, and beside it ΔW = (α/r)·B·A is learnt.

After Hu et al. 2021, *LoRA*, arXiv 2106.09685; the names are the paper's. Works on the ``nn.Linear`` layers of
any model. Every function leaves the model it is given as it was and returns a copy.
"""

import json
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_helpers.data import checksum
from lowrank_helpers.factorization import check_rank, substitute
from lowrank_helpers.models import linear_layers

FORMAT = "lora-1"


class AdapterError(ValueError):
    """A file is no adapter, or is the adapter of another network; the message says which."""


class LoRALinear(nn.Module):
    """A frozen linear layer with a low-rank update beside it, y = base(x) + (α/r)·x·Aᵀ·Bᵀ.

    Parameters
    ----------
    base : nn.Linear
        Frozen from here on.
    A : Tensor, shape (r, in_features)
    B : Tensor, shape (out_features, r)
    alpha : float
        α. At a fixed α the best learning rate hardly depends on the rank (section 4.1).

    Attributes
    ----------
    lora_A, lora_B : Parameter
        The factors, of the base's dtype and on its device.
    scaling : float
        α/r.

    Raises
    ------
    ValueError
        The factors do not fit the base, or r is above min(out_features, in_features).
    """

    def __init__(self, base: nn.Linear, A: Tensor, B: Tensor, alpha: float) -> None:
        super().__init__()
        self.rank = len(A)
        check_rank(self.rank, base.weight.shape)
        if (A.shape, B.shape) != ((self.rank, base.in_features), (base.out_features, self.rank)):
            raise ValueError(f"A {tuple(A.shape)} and B {tuple(B.shape)} do not fit {base}")
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(A.to(base.weight))
        self.lora_B = nn.Parameter(B.to(base.weight))
        self.alpha = alpha
        self.scaling = alpha / self.rank

    @property
    def delta(self) -> Tensor:
        """The update ΔW = (α/r)·B·A, (out_features, in_features)."""
        return self.scaling * (self.lora_B @ self.lora_A)

    @property
    def weight(self) -> Tensor:
        """The matrix that the layer applies, W + ΔW: for ``merge``, and for models that read their layers' weights."""
        return self.base.weight + self.delta

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, in_features) to (…, out_features) without forming ΔW."""
        # Scaled in the middle, where a sample has `rank` numbers and not out_features.
        return self.base(x) + F.linear(self.scaling * F.linear(x, self.lora_A), self.lora_B)

    def extra_repr(self) -> str:
        """Show rank and α in ``print(model)``."""
        return f"rank={self.rank}, alpha={self.alpha}"


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the adapted layers of a model by their dotted names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def adapt(model: nn.Module, layers: Iterable[str], *, rank: int, alpha: float, seed: int) -> nn.Module:
    """Return a copy of a model with an adapter on each named layer, and everything else frozen.

    A is drawn from a Gaussian of standard deviation 1/√in_features and B is zero, so the copy computes exactly
    what the model does until it is trained.

    Parameters
    ----------
    model : nn.Module
    layers : iterable of str
        Names as in ``linear_layers(model)``.
    rank : int
        r of every adapter, from 1 to min(out_features, in_features) of its layer.
    alpha : float
        α of every adapter.
    seed : int
        Draws the factors A.

    Raises
    ------
    ValueError
        The model has adapters already, a name is no linear layer of it, or the rank is impossible for a layer.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> list(adapters(adapt(model, {"0": 2}, alpha=4, seed=0)))
    ['0']
    """
    if adapters(model):
        raise ValueError(f"layers {', '.join(adapters(model))} have adapters already; merge or remove them first")
    known, chosen = linear_layers(model), list(layers)
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"{', '.join(unknown)}: no linear layer of the model; allowed: {', '.join(known)}")
    copy = deepcopy(model).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, layer in linear_layers(copy).items():
        if name in chosen:
            check_rank(rank, layer.weight.shape)
            A = torch.randn(rank, layer.in_features, generator=generator) * layer.in_features**-0.5
            substitute(copy, name, LoRALinear(layer, A, torch.zeros(layer.out_features, rank), alpha))
    return copy


def remove(model: nn.Module) -> nn.Module:
    """Return a copy of a model without its adapters: the network that was adapted, all of it trainable."""
    copy = deepcopy(model)
    for name, layer in adapters(copy).items():
        substitute(copy, name, layer.base)
    return copy.requires_grad_(True)


def merge(model: nn.Module) -> nn.Module:
    """Return a copy of a model with W + ΔW in a plain ``nn.Linear`` for each adapted layer, all of it trainable.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> merge(adapt(model, {"0": 2}, alpha=4, seed=0))[0]
    Linear(in_features=20, out_features=16, bias=True)
    """
    copy = deepcopy(model)
    for name, layer in adapters(copy).items():
        merged = nn.utils.skip_init(nn.Linear, layer.base.in_features, layer.base.out_features)
        merged.weight = nn.Parameter(layer.weight.detach())
        merged.register_parameter("bias", layer.base.bias)
        substitute(copy, name, merged)
    return copy.requires_grad_(True)


def save_adapter(model: nn.Module, file: Path) -> None:
    """Write a model's adapters, and nothing else of it, as safetensors.

    The header holds each layer's α and a checksum of the network below the adapters.

    Raises
    ------
    ValueError
        The model has no adapters.
    """
    layers = adapters(model)
    if not layers:
        raise ValueError("the model has no adapters to save")
    tensors = {
        f"{name}.{factor}": getattr(layer, factor).detach().cpu().contiguous()
        for name, layer in layers.items()
        for factor in ("lora_A", "lora_B")
    }
    header = {
        "format": FORMAT,
        "alpha": json.dumps({name: layer.alpha for name, layer in layers.items()}),
        "base": checksum(remove(model).state_dict()),
    }
    save_file(tensors, file, metadata=header)


def load_adapter(model: nn.Module, file: Path) -> nn.Module:
    """Return a copy of a model with the adapters of a file that :func:`save_adapter` wrote.

    Parameters
    ----------
    model : nn.Module
        The network that was adapted, without adapters, on any device.

    Raises
    ------
    AdapterError
        The file is no adapter; the model lacks a layer of it, or has it in another shape; or the model's
        weights are not those that the adapter was trained on.
    """
    header, tensors = _read(file)
    copy = deepcopy(model).requires_grad_(False)
    layers = linear_layers(copy)
    for name, alpha in json.loads(header["alpha"]).items():
        A, B = tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]
        if name not in layers:
            raise AdapterError(f"{file} adapts layer {name!r}; the model's linear layers are {', '.join(layers)}")
        if layers[name].weight.shape != (len(B), A.shape[1]):
            found = "×".join(map(str, layers[name].weight.shape))
            raise AdapterError(f"{file} adapts {name!r} of {len(B)}×{A.shape[1]}; the model's is {found}")
        substitute(copy, name, LoRALinear(layers[name], A, B, alpha))
    if checksum(model.state_dict()) != header["base"]:
        raise AdapterError(
            f"{file} was trained on a network of the same shapes with other weights; "
            "load the weights that it was trained on first"
        )
    return copy


def _read(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as stored:
            header = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file} cannot be read as an adapter: {error}") from error
    if header.get("format") != FORMAT:
        raise AdapterError(f"{file} is no adapter: its format is {header.get('format')!r}, not {FORMAT!r}")
    return header, tensors

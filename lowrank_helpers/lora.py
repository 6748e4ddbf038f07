"""Low-rank adaptation of a trained network: W is frozen, and beside it ΔW = (α/r)·B·A is learnt.

After Hu et al. 2021, *LoRA*, arXiv 2106.09685; the names are the paper's. Works on the ``nn.Linear`` layers of
any model. Every function leaves the model it is given as it was and returns a copy. On disk an adapter is what
Hugging Face's PEFT (https://huggingface.co/docs/peft) makes of it, so each loads the other's.
"""

import json
import math
import re
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_helpers.data import checksum
from lowrank_helpers.factorization import check_names, check_rank, substitute, truncated_svd
from lowrank_helpers.models import linear_layers

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
TENSOR = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<factor>[AB])\.weight")
BASE = "base_sha256"  # in the header of the weights, where PEFT does not look

# A config's keys by what becomes of them. First, what the factors say too, or what matters to a training alone.
BESIDE_THE_POINT = {
    *("auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern"),
    *("layers_to_transform", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "revision"),
    *("target_modules", "task_type"),
}
PER_LAYER = {"r", "lora_alpha", "rank_pattern", "alpha_pattern"}
DONE = {  # what else may be said; of any other key only that it is not used
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian"),  # others change the base's weights, or may
    "use_rslora": (True,),
}


class AdapterError(ValueError):
    """A folder holds no adapter, that of another network, or a kind that is not done here; the message says which."""


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


def adapt(model: nn.Module, ranks: Mapping[str, int], *, alpha: float, seed: int) -> nn.Module:
    """Return a copy of a model with an adapter on each named layer, and everything else frozen.

    A is drawn from a Gaussian of standard deviation 1/√in_features and B is zero, so the copy computes exactly
    what the model does until it is trained.

    Parameters
    ----------
    model : nn.Module
    ranks : mapping of str to int
        r by layer name, as in ``linear_layers(model)``; from 1 to min(out_features, in_features).
    alpha : float
        α of every adapter.
    seed : int
        Draws the factors A.

    Raises
    ------
    ValueError
        The model has adapters already, a name is no linear layer of it, or a rank is impossible for its layer.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> list(adapters(adapt(model, {"0": 2}, alpha=4, seed=0)))
    ['0']
    """
    if adapters(model):
        raise ValueError(f"layers {', '.join(adapters(model))} have adapters already; merge or remove them first")
    copy = deepcopy(model).requires_grad_(False)
    layers = linear_layers(copy)
    check_names(ranks, layers, "linear layer of the model")
    generator = torch.Generator().manual_seed(seed)
    for name in [name for name in layers if name in ranks]:  # in the model's order, whatever that of ranks
        layer = layers[name]
        check_rank(ranks[name], layer.weight.shape)
        A = torch.randn(ranks[name], layer.in_features, generator=generator) * layer.in_features**-0.5
        substitute(copy, name, LoRALinear(layer, A, torch.zeros(layer.out_features, ranks[name]), alpha))
    return copy


def extract(base: nn.Module, tuned: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
    """Return a copy of a model with the adapters that come closest to what a full fine-tuning has changed.

    Of each named layer, B·A is the best approximation of its update W_tuned − W at that rank (Eckart & Young 1936), at
    α = r; what changed in other layers and in biases is left out.

    Parameters
    ----------
    base : nn.Module
        Before the fine-tuning.
    tuned : nn.Module
        The same network after it.
    ranks : mapping of str to int
        As in :func:`adapt`.

    Raises
    ------
    ValueError
        As :func:`adapt` does; or the networks differ in a layer.
    """
    copy, after = adapt(base, ranks, alpha=1.0, seed=0), linear_layers(tuned)
    for name, layer in adapters(copy).items():
        before = layer.base.weight
        if name not in after or after[name].weight.shape != before.shape:
            raise ValueError(f"the tuned network has no layer {name!r} of {'×'.join(map(str, before.shape))}")
        factors = truncated_svd(after[name].weight.detach() - before, layer.rank)
        substitute(copy, name, LoRALinear(layer.base, A=factors.C, B=factors.B, alpha=layer.rank))
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


def rehearsal(labels: Tensor, new: int, *, size: int, n_kept: int, share: float, seed: int) -> Tensor:
    """Return the indices of a set to learn a new class from and rehearse the others.

    After Robins 1995, *Catastrophic forgetting, rehearsal and pseudorehearsal*, Connection Science 7(2).

    Parameters
    ----------
    labels : Tensor of int64, shape (n,)
        Classes of the images to choose from.
    new : int
        The new class.
    size : int
        How many images of the new class are in the set; all there are, repeated or cut to this number.
    n_kept : int
        How many images of each other class have been kept, at most; drawn at random.
    share : float
        How often an other class is shown for each image of the new one; its images are repeated to this number.
    seed : int
        Draws which images are kept.

    Returns
    -------
    Tensor of int64, shape (size + (n_classes - 1)·⌊share·size⌋,)
        On the labels' device.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    chosen = []
    for label in labels.unique():
        distinct = order[labels[order] == label][: None if label == new else n_kept]
        shown = size if label == new else int(share * size)
        chosen.append(distinct.repeat(math.ceil(shown / len(distinct)))[:shown])
    return torch.cat(chosen)


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Write a model's adapters, and nothing else of it, into a folder as PEFT does.

    ``adapter_config.json`` names the layers with their ranks and α, ``adapter_model.safetensors`` has the factors; its
    header also has a checksum of the network below the adapters. ``PeftModel.from_pretrained(base, folder)`` loads it.

    Parameters
    ----------
    folder : Path
        Made if it is not there.

    Raises
    ------
    ValueError
        The model has no adapters.
    """
    layers = adapters(model)
    if not layers:
        raise ValueError("the model has no adapters to save")
    first = next(iter(layers.values()))
    exactly = {name: f"^{re.escape(name)}" for name in layers}  # PEFT takes names as patterns of their ends
    config = {
        "peft_type": "LORA",
        "target_modules": "|".join(map(re.escape, layers)),
        "r": first.rank,
        "lora_alpha": first.alpha,
        "rank_pattern": {exactly[name]: layer.rank for name, layer in layers.items() if layer.rank != first.rank},
        "alpha_pattern": {exactly[name]: layer.alpha for name, layer in layers.items() if layer.alpha != first.alpha},
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {
        f"base_model.model.{name}.lora_{factor}.weight": getattr(layer, f"lora_{factor}").detach().cpu().contiguous()
        for name, layer in layers.items()
        for factor in "AB"
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", BASE: checksum(remove(model).state_dict())})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """Return a copy of a model with the adapters of a folder that :func:`save_adapter` or PEFT wrote.

    Whether the model's weights are those that the adapter was trained on is known only of our own; of PEFT's, names
    and shapes are compared.

    Parameters
    ----------
    model : nn.Module
        The network that was adapted, without adapters, on any device.

    Raises
    ------
    AdapterError
        The folder holds no adapter or a damaged one; it uses more of PEFT than plain LoRA of linear layers, which the
        message names; the model lacks a layer of it, or has it in another shape; or the model's weights are not those
        that the adapter was trained on.
    """
    config, (header, factors) = _read_config(folder / CONFIG), _read_factors(folder / WEIGHTS)
    copy = deepcopy(model).requires_grad_(False)
    layers = linear_layers(copy)
    for name, (A, B) in factors.items():
        if name not in layers:
            raise AdapterError(f"{folder} adapts layer {name!r}; the model's linear layers are {', '.join(layers)}")
        if layers[name].weight.shape != (len(B), A.shape[1]):
            found = "×".join(map(str, layers[name].weight.shape))
            raise AdapterError(f"{folder} adapts {name!r} of {len(B)}×{A.shape[1]}; the model's is {found}")
        rank = _of_layer(config, name, "rank_pattern", "r")
        if not rank == len(A) == B.shape[1] <= min(layers[name].weight.shape):
            raise AdapterError(f"{folder} has rank {rank} for {name!r}, with factors of {len(A)} and {B.shape[1]}")
        alpha = _of_layer(config, name, "alpha_pattern", "lora_alpha")
        if config.get("use_rslora"):  # a scale of α/√r (Kalajdzievski 2023, arXiv 2312.03732)
            alpha *= rank**0.5
        substitute(copy, name, LoRALinear(layers[name], A, B, alpha))
    if BASE in header and header[BASE] != checksum(model.state_dict()):
        raise AdapterError(
            f"{folder} was trained on a network of the same shapes with other weights; "
            "load the weights that it was trained on first"
        )
    return copy


def _read_config(file: Path) -> dict[str, Any]:
    """Read a config of PEFT's, and refuse by name what changes the computation and is not done here."""
    try:
        read = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file} cannot be read as an adapter's config: {error}") from error
    if not isinstance(read, dict) or read.get("peft_type") != "LORA":
        raise AdapterError(f"{file} is no config of a LoRA adapter: it has no peft_type 'LORA'")
    config: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}} | read
    try:
        numbers = [config["r"], config["lora_alpha"]]
        for name in ("rank_pattern", "alpha_pattern"):
            numbers += config[name].values()
            for pattern in config[name]:
                re.compile(pattern)
        if not all(number > 0 for number in numbers):
            raise ValueError(f"{numbers} must all be above 0")
    except (LookupError, AttributeError, TypeError, ValueError, re.error) as error:
        raise AdapterError(f"{file} has impossible ranks or α: {error!r}") from error
    for key, value in config.items():
        if value and key not in BESIDE_THE_POINT | PER_LAYER and value not in DONE.get(key, ()):
            raise AdapterError(f"{file} has {key} = {value!r}, which is not done here: merge it with PEFT instead")
    return config


def _read_factors(file: Path) -> tuple[dict[str, str], dict[str, tuple[Tensor, Tensor]]]:
    """Return the header of a file of PEFT's, and A and B by layer."""
    try:
        with safe_open(file, framework="pt") as stored:
            header = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file} cannot be read as an adapter: {error}") from error
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = TENSOR.fullmatch(key)
        if not found or tensor.dim() != 2:
            raise AdapterError(f"{file} is no adapter of linear layers: it holds {key} {tuple(tensor.shape)}")
        layers.setdefault(found["layer"], {})[found["factor"]] = tensor
    if halves := [name for name, factors in layers.items() if len(factors) < 2]:
        raise AdapterError(f"{file} is damaged: one of the factors of {', '.join(halves)} is missing")
    return header, {name: (factors["A"], factors["B"]) for name, factors in layers.items()}


def _of_layer(config: Mapping[str, Any], layer: str, patterns: str, default: str) -> Any:
    """Return a layer's number as PEFT does, of the first pattern that the end of its name matches, or the default."""
    matching = (value for key, value in config[patterns].items() if re.match(rf"(.*\.)?({key})$", layer))
    return next(matching, config[default])

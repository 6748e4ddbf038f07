"""Low-rank adaptation of a trained network: W is frozen, and beside it ΔW = (α/r)·B·A is learnt.

After Hu et al. 2021, *LoRA*, arXiv 2106.09685; the names are the paper's. Works on the ``nn.Linear`` layers of any
model. Every function that returns a model returns a copy. Adapters are stored as Hugging Face's PEFT
(https://huggingface.co/docs/peft) stores them, so each loads the other's.
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
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn import functional as F

from lowrank_helpers.factorization import check_rank, precise, truncated_svd
from lowrank_helpers.hashing import checksum
from lowrank_helpers.layers import plain_layers, substitute_
from lowrank_helpers.models import linear_layers

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
PREFIX = "base_model.model."  # PEFT's, of every name
FACTORS = (".lora_A.weight", ".lora_B.weight")  # how the names of both end
LENGTHS = ".lora_magnitude_vector"  # and of DoRA's lengths
BASE = "base_sha256"  # in the header of the weights, where PEFT does not look
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, OptimizedModule)  # their layers have other names

# Keys of PEFT's config that may have any value: the factors say the same, they are read, or only training needs them.
# Of another key, the supported values; one without any must be false or empty.
ANY_VALUE = {
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "auto_mapping", "base_model_name_or_path", "exclude_modules"),
    *("inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "peft_type"),
    *("peft_version", "qalora_group_size", "revision", "target_modules", "task_type", "use_dora", "use_rslora"),
}
SUPPORTED = {"bias": ("none",), "init_lora_weights": (True, "gaussian", "orthogonal")}  # others may change the base


class AdapterError(ValueError):
    """A folder holds no adapter, that of another network, or an unsupported kind; the message says which."""


class LoRALinear(nn.Module):
    """A linear layer with a low-rank update beside it, y = base(x) + (α/r)·x·Aᵀ·Bᵀ.

    Parameters
    ----------
    base : nn.Linear
        Left as it is: :func:`adapt` freezes it.
    A : Tensor, shape (r, in_features)
        A rank r above min(out_features, in_features) is of no use, but allowed: PEFT makes such adapters.
    B : Tensor, shape (out_features, r)
        The parameters ``lora_A`` and ``lora_B`` are A and B in the base's dtype and on its device.
    alpha : float
        α, above 0. At a fixed α the best learning rate hardly depends on the rank (section 4.1).

    Raises
    ------
    TypeError
        α is no number.
    ValueError
        The factors do not fit the base, it has a ``forward`` of its own, or α is not finite and above 0.
    """

    def __init__(self, base: nn.Linear, A: Tensor, B: Tensor, alpha: float) -> None:
        super().__init__()
        if not (math.isfinite(alpha) and alpha > 0):
            raise ValueError(f"alpha {alpha} must be finite and above 0")
        plain_layers({"base": base}, ["base"])
        self.rank = len(A)
        if (A.shape, B.shape) != ((self.rank, base.in_features), (base.out_features, self.rank)):
            raise ValueError(f"A {tuple(A.shape)} and B {tuple(B.shape)} do not fit {base}")
        self.base = base
        self.lora_A = nn.Parameter(A.to(base.weight))
        self.lora_B = nn.Parameter(B.to(base.weight))
        self.alpha = float(alpha)

    @property
    def scaling(self) -> float:
        """The factor α/r of the update."""
        return self.alpha / self.rank

    @property
    def weight(self) -> Tensor:
        """The matrix that the layer applies, W + ΔW: for ``merge``, and for models that read their layers' weights."""
        return self.base.weight + self.scaling * (self.lora_B @ self.lora_A)

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, in_features) to (…, out_features) without forming ΔW."""
        # Scaled in the middle, where a sample has `rank` numbers and not out_features.
        outputs: Tensor = self.base(x) + F.linear(self.scaling * F.linear(x, self.lora_A), self.lora_B)
        return outputs

    def extra_repr(self) -> str:
        """Show rank and α in ``print(model)``."""
        return f"rank={self.rank}, alpha={self.alpha}"


class DoRALinear(LoRALinear):
    """LoRA of directions: each row of W + ΔW, an output's weights, is brought to a length of its own, also learnt.

    After Liu et al. 2024, *DoRA*, arXiv 2402.09353; no gradient passes through the norms, as in section 4.3.
    Parameters are those of :class:`LoRALinear`, and the lengths (out_features,), by default those of W + ΔW.
    """

    def __init__(self, base: nn.Linear, A: Tensor, B: Tensor, alpha: float, lengths: Tensor | None = None) -> None:
        super().__init__(base, A, B, alpha)
        norms = super().weight.detach().norm(dim=1)
        self.lora_magnitude_vector = nn.Parameter(norms if lengths is None else lengths.to(norms).view_as(norms))

    @property
    def weight(self) -> Tensor:
        """The matrix that the layer applies, W + ΔW with rows of those lengths."""
        rows = super().weight
        norms: Tensor = rows.detach().norm(dim=1).clamp_min(torch.finfo(rows.dtype).tiny)  # of zeros, not 0/0
        return (self.lora_magnitude_vector / norms)[:, None] * rows

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, in_features) to (…, out_features)."""
        return F.linear(x, self.weight, self.bias)


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the adapted layers of a model by their dotted names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def adapt(model: nn.Module, ranks: Mapping[str, int], *, alpha: float, seed: int, dora: bool = False) -> nn.Module:
    """Return a copy of a model with an adapter on each named layer, and everything else frozen.

    ``seed`` draws A from a Gaussian of standard deviation 1/√in_features, and B is zero. So the copy computes exactly
    what the model does until it is trained. With ``dora`` the adapters are :class:`DoRALinear`.

    Parameters
    ----------
    ranks : mapping of str to int
        Rank r by layer name, as in ``linear_layers(model)``; from 1 to min(out_features, in_features).
    alpha : float
        α of every adapter, as of :class:`LoRALinear`.

    Raises
    ------
    TypeError
        α is no number, or a rank no whole number.
    ValueError
        The model has adapters already, a name is no linear layer of it or of one with its own ``forward``, a rank is
        impossible for its layer, or α is not finite and above 0.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> list(adapters(adapt(model, {"0": 2}, alpha=4, seed=0)))
    ['0']
    """
    if adapters(model):
        raise ValueError(f"layers {', '.join(adapters(model))} have adapters already; merge or remove them first")
    copy, kind = deepcopy(model).requires_grad_(False), DoRALinear if dora else LoRALinear
    generator = torch.Generator().manual_seed(seed)
    for name, layer in plain_layers(linear_layers(copy), ranks).items():
        check_rank(ranks[name], layer.weight.shape)
        A = torch.randn(ranks[name], layer.in_features, generator=generator) * layer.in_features**-0.5
        substitute_(copy, name, kind(layer, A, torch.zeros(layer.out_features, ranks[name]), alpha))
    return copy


def extract(base: nn.Module, tuned: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
    """Return a copy of a model with the adapters that come closest to what a full fine-tuning has changed.

    For each layer in ``ranks``, which are as in :func:`adapt`, B·A is the best approximation of the update W_tuned − W
    at that rank (Eckart & Young 1936), at α = r. What changed in other layers and in biases is left out.

    ``extract(remove(model), merge(model), ranks)`` resizes adapters. With W + ΔW₁ ± ΔW₂ in place of the merged weights
    it adds or subtracts them. Both need float32, as ``merge`` rounds to the base's precision. The example chooses ranks
    for a budget of trained parameters; layers that ``allocate`` leaves dense take the largest rank that saves any.

    Raises
    ------
    ValueError
        As :func:`adapt` does; or the networks differ in the shape of a layer.

    Examples
    --------
    >>> from lowrank_helpers.factorization import SVD
    >>> from lowrank_helpers.models import n_trainable
    >>> from lowrank_helpers.selection import allocate, layers_of
    >>> base, tuned = (nn.Sequential(nn.Linear(60, 40), nn.ReLU(), nn.Linear(40, 20)) for _ in range(2))
    >>> before, after = linear_layers(base), linear_layers(tuned)
    >>> svds = {name: SVD.of(after[name].weight - before[name].weight) for name in before}
    >>> layers = layers_of(svds, svds)
    >>> ranks = {name: layer.largest_rank for name, layer in layers.items()} | allocate(layers, budget=800)
    >>> n_trainable(extract(base, tuned, ranks)) <= 800
    True
    """
    copy, after = adapt(base, ranks, alpha=1.0, seed=0), linear_layers(tuned)
    for name, layer in adapters(copy).items():
        before = layer.base.weight.detach()
        if name not in after or after[name].weight.shape != before.shape:
            raise ValueError(f"the tuned network has no layer {name!r} of {'×'.join(map(str, before.shape))}")
        # The difference of two numbers in half precision needs more digits than they have.
        update = after[name].weight.detach().to(before.device, precise(before)) - before
        factors = truncated_svd(update, layer.rank)
        substitute_(copy, name, LoRALinear(layer.base, A=factors.C, B=factors.B, alpha=layer.rank))
    return copy


def remove(model: nn.Module) -> nn.Module:
    """Return a copy of a model without its adapters: the network that was adapted, all of it trainable."""
    copy = deepcopy(model)
    for name, layer in adapters(copy).items():
        substitute_(copy, name, layer.base)
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
        merged = nn.Linear(layer.base.in_features, layer.base.out_features, bias=False, device="meta")
        merged.weight = nn.Parameter(layer.weight.detach())
        merged.register_parameter("bias", layer.base.bias)
        substitute_(copy, name, merged)
    return copy.requires_grad_(True)


def rehearsal(labels: Tensor, new: int, *, size: int, n_kept: int, share: float, seed: int) -> Tensor:
    """Return the indices of a set to learn a new class from and rehearse the others.

    After Robins 1995, *Catastrophic forgetting, rehearsal and pseudorehearsal*, Connection Science 7(2).

    Parameters
    ----------
    labels : Tensor of int64, shape (n,)
        Classes of the images to choose from.
    new, size : int
        The new class, and how many of its images are in the set: all there are, repeated or cut to this number.
    n_kept, seed : int
        How many images of each other class have been kept, at most, and what draws them.
    share : float
        How often an other class is shown for each image of the new one; its images are repeated to this number.

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


def save_adapter(model: nn.Module, folder: Path | str) -> None:
    """Write a model's adapters and its buffers into a folder, made where it is missing, as PEFT does.

    ``adapter_config.json`` names the layers with their ranks and α. ``adapter_model.safetensors`` has the factors, and
    the buffers, such as BatchNorm's statistics, which a training moves too. Its header has the checksum of the
    parameters below the adapters. ``PeftModel.from_pretrained(base, folder)`` loads it.

    Raises
    ------
    ValueError
        The model has no adapters, both kinds, or parameters beside them that are not frozen: what trained them would
        be lost. Or ``torch.compile`` or data parallelism is around a module and changes the names in it.
    """
    layers = adapters(model)
    if len({type(layer) for layer in layers.values()}) != 1:
        raise ValueError("a folder holds adapters of one kind, LoRA or DoRA; the model has none of them, or both")
    if wrappers := [type(module).__name__ for module in model.modules() if isinstance(module, WRAPPERS)]:
        raise ValueError(f"the names of layers in {wrappers[0]} are not the model's: save the model without it")
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if beside := [name for name in trainable if name.rpartition(".")[0] not in layers]:
        raise ValueError(
            f"{', '.join(beside)} can be trained beside the adapters, and an adapter does not hold them: "
            "freeze them if they are as they were, or merge and save the whole network"
        )
    first = next(iter(layers.values()))
    exactly = {f"^{re.escape(name)}": layer for name, layer in layers.items()}  # PEFT takes names as their ends
    config = {
        "peft_type": "LORA",
        "target_modules": "|".join(map(re.escape, layers)),
        "r": first.rank,
        "lora_alpha": first.alpha,
        "rank_pattern": {pattern: layer.rank for pattern, layer in exactly.items()},
        "alpha_pattern": {pattern: layer.alpha for pattern, layer in exactly.items()},
        "bias": "none",
        "use_dora": isinstance(first, DoRALinear),
        "inference_mode": True,
    }
    own = {name: zip((*FACTORS, LENGTHS), layer.parameters(False), strict=False) for name, layer in layers.items()}
    tensors = {name + end: parameter for name, pairs in own.items() for end, parameter in pairs}
    base = remove(model)
    stored = {
        PREFIX + name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in (tensors | _buffers(base)).items()
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt", BASE: _checksum(base)})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load_adapter(model: nn.Module, folder: Path | str) -> nn.Module:
    """Return a copy of a model with the adapters and buffers of a folder that :func:`save_adapter` or PEFT wrote.

    ``model`` is the network that was adapted, without adapters, on any device. A folder of :func:`save_adapter`'s knows
    the parameters below its adapters, and their precision; for PEFT's, only names and shapes are compared.

    Raises
    ------
    AdapterError
        The folder holds no adapter or a damaged one; it uses more of PEFT than LoRA and DoRA of linear layers, which
        the message names; the model lacks a layer of it, or has it in another shape or with a ``forward`` of its own;
        or the model's parameters are not those that the adapter was trained on.
    """
    folder = Path(folder)
    config, header, tensors = _read(folder)
    copy = deepcopy(model).requires_grad_(False)
    layers, buffers = linear_layers(copy), _buffers(copy)
    kind, ends = (DoRALinear, (*FACTORS, LENGTHS)) if config.get("use_dora") else (LoRALinear, FACTORS)
    for name in [name for name in layers if all(name + end in tensors for end in ends)]:
        A, B, *lengths = (tensors.pop(name + end) for end in ends)
        try:
            adapter = kind(layers[name], A, B, _alpha(config, name, len(A)), *lengths)
        except (LookupError, AttributeError, TypeError, ValueError, RuntimeError, re.error) as error:
            raise AdapterError(f"{folder} has an impossible adapter for layer {name!r}: {error}") from error
        substitute_(copy, name, adapter)
    for name, tensor in tensors.items():
        if name not in buffers or buffers[name].shape != tensor.shape:
            raise AdapterError(f"{folder} is damaged or of other layers: it holds {name} {tuple(tensor.shape)}")
        buffers[name].copy_(tensor)
    if header.get(BASE, own := _checksum(model)) != own:
        raise AdapterError(
            f"{folder} was trained on a network with other weights, or on this one in another precision: "
            "load the adapter onto that, and convert the result"
        )
    return copy


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that a model's ``state_dict`` has."""
    stored = model.state_dict()
    return {name: buffer for name, buffer in model.named_buffers() if name in stored}


def _checksum(model: nn.Module) -> str:
    """Return the checksum of a model's parameters; a weight may be shared here and not there."""
    return checksum(dict(model.named_parameters(remove_duplicate=False)))


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, str], dict[str, Tensor]]:
    """Return what a folder of PEFT's holds: config, header of the weights, and tensors by names without ``PREFIX``.

    What changes the computation and is not supported is refused by name.
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
        with safe_open(folder / WEIGHTS, framework="pt") as stored:
            header = stored.metadata() or {}
            tensors = {name.removeprefix(PREFIX): stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{folder} has no {CONFIG} and {WEIGHTS} that can be read: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterError(f"{folder / CONFIG} is no config of a LoRA adapter: it has no peft_type 'LORA'")
    for key, value in config.items():
        if value and key not in ANY_VALUE and value not in SUPPORTED.get(key, ()):
            raise AdapterError(f"{folder} has {key} = {value!r}, which is not supported: merge it with PEFT instead")
    return config, header, tensors


def _alpha(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """Return the α of a layer whose factors have that rank; refuse a config that gives it another rank."""

    def given(patterns: str, default: str) -> Any:
        """Return, as PEFT does, the number of the first pattern that the end of the name matches, or the default."""
        matching = (value for key, value in config.get(patterns, {}).items() if re.match(rf"(.*\.)?({key})$", layer))
        return next(matching, config[default])

    if given("rank_pattern", "r") != rank:
        raise ValueError(f"rank {given('rank_pattern', 'r')}, with factors of rank {rank}")
    scale = rank**0.5 if config.get("use_rslora") else 1  # a scale of α/√r (Kalajdzievski 2023, arXiv 2312.03732)
    alpha: float = given("alpha_pattern", "lora_alpha") * scale
    return alpha

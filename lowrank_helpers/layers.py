"""Networks with layers of low rank: which layers there are, their decompositions, copies with factors, and files."""

import json
import operator
from collections.abc import Collection, Mapping
from copy import deepcopy
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from lowrank_helpers.factorization import SVD, ActivationAwareSVD, Decomposition, Factors, check_rank
from lowrank_helpers.models import LowRankLayer, Replaceable, draw_, kind_of, named_layers

Kind = TypeVar("Kind", bound=Replaceable)
WEIGHTS, RANKS = "model.safetensors", "ranks.json"  # the files of a saved model


def replaceable_layers(model: nn.Module) -> dict[str, Replaceable]:
    """Return a model's linear layers, and its convolutions of one group, by dotted name."""
    return {
        name: layer
        for name, layer in named_layers(model).items()
        if isinstance(layer, Replaceable) and getattr(layer, "groups", 1) == 1
    }


def plain_layers(layers: Mapping[str, Kind], names: Collection[str]) -> dict[str, Kind]:
    """Return the named ones of some layers, in the order of these, if their weights say what they compute.

    Raises
    ------
    ValueError
        A name is not among the layers, or a layer has a ``forward`` of its own: no layer that is made of its weight
        can take its place. Subclasses that inherit ``forward``, as in ``nn.MultiheadAttention``, are plain.
    """
    if unknown := set(names) - layers.keys():
        raise ValueError(f"{', '.join(sorted(unknown))}: no layer that can be replaced; allowed: {', '.join(layers)}")
    found = {name: layer for name, layer in layers.items() if name in names}
    for name, layer in found.items():
        kind, forward = kind_of(layer), getattr(layer.forward, "__func__", None)
        if (forward, type(layer).__call__) != (kind.forward, kind.__call__):
            raise ValueError(
                f"layer {name!r} is a {type(layer).__name__} with a forward of its own, which its weight does not "
                f"describe: leave it out, or make it an nn.{kind.__name__} first"
            )
    return found


def decompose(
    model: nn.Module, moments: Mapping[str, Tensor] | None = None, fisher: Mapping[str, Tensor] | None = None
) -> dict[str, Decomposition]:
    """Decompose each linear layer and convolution of a model: its unfolded weight or, with a moment, its outputs.

    Half precision is decomposed in float32.

    Parameters
    ----------
    moments : mapping of str to Tensor, optional
        By layer name, as of :func:`~lowrank_helpers.calibration.output_moments`: an activation-aware SVD.
    fisher : mapping of str to Tensor, optional
        For layers with a moment, as of :func:`~lowrank_helpers.calibration.output_fisher`: a Fisher-weighted SVD.

    Raises
    ------
    ValueError
        A layer has a ``forward`` of its own.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> {name: len(svd.s) for name, svd in decompose(model).items()}
    {'0': 16, '2': 4}
    """
    moments, fisher = moments or {}, fisher or {}
    layers = replaceable_layers(model)
    matrices = {name: layer.weight.flatten(1) for name, layer in plain_layers(layers, layers).items()}
    return {
        name: ActivationAwareSVD.of(A, moments[name], fisher.get(name)) if name in moments else SVD.of(A)
        for name, A in matrices.items()
    }


def factorize(model: nn.Module, ranks: Mapping[str, int], svds: Mapping[str, Decomposition] | None = None) -> nn.Module:
    """Return a copy of a model with the named layers replaced by their best factors.

    On a trained model this is truncation; on a fresh one it is spectral initialisation
    (Khodak et al. 2021, arXiv 2105.01029; Kamalakara et al. 2022, arXiv 2209.13569, section 3).

    Parameters
    ----------
    ranks : mapping of str to int
        Rank by name of a linear layer or convolution; layers not named stay dense.
    svds : mapping of str to Decomposition, optional
        ``decompose(model)``, where many ranks of one model are wanted, or ``decompose(model, moments)`` for factors
        that fit the layers' outputs.

    Raises
    ------
    ValueError
        A name is no such layer of the model or one with a ``forward`` of its own, or a rank is impossible for it.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> factorize(model, {"0": 3})[0]
    LowRankLayer(
      (C): Linear(in_features=20, out_features=3, bias=False)
      (B): Linear(in_features=3, out_features=16, bias=True)
    )
    """
    layers = plain_layers(replaceable_layers(model), ranks)
    svds = svds or {name: SVD.of(layer.weight.flatten(1)) for name, layer in layers.items()}
    return with_factors(model, {name: svds[name].factors(ranks[name]) for name in layers})


def factorize_standard(model: nn.Module, ranks: Mapping[str, int], *, seed: int) -> nn.Module:
    """Return a copy of a model with the named layers replaced by freshly drawn factors.

    Each factor gets PyTorch's standard initialisation for a layer of its shape: uniform on ±1/√r for B and on
    ±1/√in_features, of a convolution ±1/√(in_channels·window), for C.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> factorize_standard(model, {"0": 3}, seed=0)[0].rank
    3
    """
    generator = torch.Generator().manual_seed(seed)
    factors = _empty_factors(model, ranks)
    for pair in factors.values():
        draw_([pair.B, pair.C], generator)
    return with_factors(model, factors)


def _empty_factors(model: nn.Module, ranks: Mapping[str, int]) -> dict[str, Factors]:
    """Return factors without values for the named layers."""
    factors = {}
    for name, layer in plain_layers(replaceable_layers(model), ranks).items():
        n, m = layer.weight.flatten(1).shape
        try:
            check_rank(ranks[name], (n, m))
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
        factors[name] = Factors(torch.empty(n, ranks[name]), torch.empty(ranks[name], m))
    return factors


def with_factors(model: nn.Module, factors: Mapping[str, Factors]) -> nn.Module:
    """Return a copy of a model with the named layers replaced by factors of their weights, unfolded to (n, m).

    A layer that the model uses in several places is replaced in all of them. Layers that share a weight, but are not
    the same module, are replaced one by one.
    """
    copy = deepcopy(model)
    layers = replaceable_layers(copy)
    for name, pair in factors.items():
        substitute_(copy, name, LowRankLayer.of(layers[name], pair.B, pair.C))
    if factors:
        _use_no_fused_code(copy)
    return copy


def save(model: nn.Module, folder: str | Path) -> None:
    """Write a model with low-rank layers into a folder, which is made where it is missing.

    ``model.safetensors`` has the weights; shared ones once. ``ranks.json`` has the rank of each low-rank layer by
    dotted name, as ``{"ranks": {"fc1": 3}}``. Neither holds code.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ranks = {name: layer.rank for name, layer in model.named_modules() if isinstance(layer, LowRankLayer)}
    save_model(model, str(folder / WEIGHTS))
    (folder / RANKS).write_text(json.dumps({"ranks": ranks}, indent=2) + "\n")


def load(model: nn.Module, folder: str | Path) -> nn.Module:
    """Return a copy of a model with the low-rank layers and the weights that :func:`save` wrote.

    ``model`` is made as the one that was compressed, with any weights: it gives the layers, their dtype and device.

    Raises
    ------
    FileNotFoundError
        A file is missing.
    ValueError
        The file of ranks is damaged, or a layer or a weight does not fit the model (the message names it).

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> small = factorize(nn.Sequential(nn.Linear(20, 16), nn.ReLU()), {"0": 3})
    >>> with TemporaryDirectory() as folder:
    ...     save(small, folder)
    ...     loaded = load(nn.Sequential(nn.Linear(20, 16), nn.ReLU()), folder)
    >>> loaded[0].rank, torch.equal(loaded[0].weight, small[0].weight)
    (3, True)
    """
    file = Path(folder) / RANKS
    try:
        ranks = {name: operator.index(rank) for name, rank in json.loads(file.read_text())["ranks"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{file} must hold {{"ranks": {{layer: rank}}}} in JSON; {error!r}') from error
    copy = with_factors(model, _empty_factors(model, ranks))
    try:
        load_model(copy, Path(folder) / WEIGHTS)
    except (RuntimeError, SafetensorError) as error:  # PyTorch lists, line by line, what does not fit
        said = " ".join(str(error).split())
        raise ValueError(f"{folder} does not fit this {type(model).__name__}: {said}") from error
    return copy


def substitute_(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer into a model where the named one is, and wherever else the model uses that same module.

    Examples
    --------
    >>> layer = nn.Linear(4, 4)
    >>> model = nn.Sequential(layer, nn.ReLU(), layer)
    >>> substitute_(model, "0", nn.Identity())
    >>> [type(module).__name__ for module in model]
    ['Identity', 'ReLU', 'Identity']
    """
    if not name:
        raise ValueError(f"the model itself is the layer, a {type(model).__name__}: put it into an nn.Sequential")
    old = model.get_submodule(name)
    for place in [place for place, module in model.named_modules(remove_duplicate=False) if module is old]:
        model.set_submodule(place, layer)


def _use_no_fused_code(model: nn.Module) -> None:
    """Keep PyTorch's transformer from its fused code, which reads weights itself and would multiply the factors."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # one of the conditions of the fused code
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False

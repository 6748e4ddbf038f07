"""How the tensors of a network become matrices: convolutions, stacks, packed projections of attention, packed gates."""

import re
from itertools import product
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lowrank_helpers.models import LowRankLayer, named_layers

# Names of layers whose rows, or columns, are those of an attention's q, k and v one after the other.
PACKED = ("in_proj_weight", "qkv.weight", "qkv_proj.weight", "Wqkv.weight", "c_attn.weight")
# Recurrent layers' gates by their number, in PyTorch's order: input, forget, cell and output gate of an LSTM; reset,
# update and new gate of a GRU.
GATES = {4: "ifgo", 3: "rzn"}
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
LAYERS = (nn.Linear, LowRankLayer, _ConvNd, nn.Embedding, nn.EmbeddingBag, nn.Bilinear, nn.MultiheadAttention)
LAYER_WEIGHTS = re.compile(r"weight|in_proj_weight|[qkv]_proj_weight|weight_(ih|hh|hr)(_l\d+(_reverse)?)?")


class Unfolded(NamedTuple):
    """A matrix (n, m) of a network, a view of the tensor that it is part of."""

    matrix: Tensor
    shape: str  # how the axes of that tensor became rows and columns: 64×3·7·7 of a convolution with 64 filters
    remark: str = ""  # what else was done to it


def unfold(name: str, weight: Tensor, layer: nn.Module | None = None) -> dict[str, Unfolded]:
    """Return the matrices that a weight stands for, by name.

    - Two axes are rows and columns: a linear layer's (out_features, in_features), an embedding's (entries, dimension).
    - A convolution's (out, in/groups, kh, kw) becomes (out, in/groups·kh·kw), as two convolutions, the first to r
      channels and the second of size 1, would factorise it; the filters of all groups lie below each other.
    - A transposed convolution's (in, out/groups, kh, kw) becomes (out, in/groups·kh·kw) too, if the layer is known:
      the tensor alone looks like any convolution's, and is unfolded as such.
    - Other tensors of more than two axes are stacks, such as experts: one matrix for each index of the first axes.
    - Packed projections of attention, told by their name (``PACKED``) and a ratio of 3 between their sides, are split
      into q, k and v.
    - Packed gates of a known recurrent layer are split (``GATES``): ``weight_hh_l0.f`` is what an LSTM forgets by.

    Parameters
    ----------
    name : str
        Of the weight, such as ``encoder.fc1.weight``; the matrix is called ``encoder.fc1``.
    weight : Tensor
        With two axes at least.
    layer : nn.Module, optional
        Whose weight it is, where that is known.
    """
    short = name.removesuffix(".weight")
    if isinstance(layer, _ConvTransposeNd):
        grouped = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)
        return {short: _filters(grouped, layer.groups, "transposed")}
    if _is_convolution(name, weight, layer):
        return {short: _filters(weight, getattr(layer, "groups", 1))}
    if weight.dim() > 2:
        return _stacked(short, weight)
    if name.endswith(PACKED) and max(weight.shape) == 3 * min(weight.shape):
        axis = weight.shape.index(max(weight.shape))
        return _split(short.removesuffix("in_proj_weight").removesuffix("."), weight, "qkv", axis)
    if isinstance(layer, RECURRENT) and (gates := GATES.get(len(weight) // layer.hidden_size)):
        return _split(short, weight, gates, kind="gates ")
    return {short: Unfolded(weight, format_shape(weight.shape))}


def _is_convolution(name: str, weight: Tensor, layer: nn.Module | None) -> bool:
    """Return whether a tensor of three axes or more is a convolution's or bilinear layer's weight, and no stack.

    The layer decides, if it is known. Otherwise a convolution's weight is called ``weight``, and one with three axes
    has more filters than a filter has rows or columns.
    """
    if weight.dim() > 2 and (isinstance(layer, nn.Bilinear) or hasattr(layer, "kernel_size")):
        return True
    several = weight.dim() > 3 or (weight.dim() == 3 and layer is None and len(weight) >= min(weight.shape[1:]))
    return several and name.rpartition(".")[2] == "weight"


def _filters(weight: Tensor, groups: int, *remarks: str) -> Unfolded:
    """Unfold (out, in/groups, …) into (out, in/groups·…)."""
    shape = f"{len(weight)}×{'·'.join(map(str, weight.shape[1:]))}"
    below = [f"{groups} groups, below each other"] if groups > 1 else []
    return Unfolded(weight.flatten(1), shape, ", ".join([*remarks, *below]))


def _stacked(short: str, weight: Tensor) -> dict[str, Unfolded]:
    """Return each matrix of a stack, without first axes of size 1."""
    while weight.dim() > 2 and len(weight) == 1:
        weight = weight[0]
    stack, shape = weight.shape[:-2], format_shape(weight.shape[-2:])
    remark = f"of a stack of {format_shape(stack)}" if stack else "axes of size 1 dropped"
    indices = product(*map(range, stack))
    return {".".join([short, *map(str, index)]): Unfolded(weight[index], shape, remark) for index in indices}


def _split(stem: str, packed: Tensor, parts: str, axis: int = 0, kind: str = "") -> dict[str, Unfolded]:
    """Split a matrix into parts of one letter each."""
    remark = f"packed {kind}{', '.join(parts)}, split by {('rows', 'columns')[axis]}"
    return {
        f"{stem}.{part}".removeprefix("."): Unfolded(matrix, format_shape(matrix.shape), remark)
        for part, matrix in zip(parts, packed.chunk(len(parts), axis), strict=True)
    }


def format_shape(shape: tuple[int, ...]) -> str:
    """Write a shape as ``3×4``."""
    return "×".join(map(str, shape))


def weight_matrices(model: nn.Module) -> dict[str, Tensor]:
    """Return the weight matrices of a model's layers by dotted names, unfolded as :func:`unfold` says.

    A low-rank layer has the product of its factors. Of a weight that several layers share, only the first is returned.
    """
    found: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}  # kept, as the id of one that is computed anew, by weight_norm, would be given again
    for name, layer in named_layers(model).items():
        stored, computed = dict(layer.named_parameters(recurse=False)), getattr(layer, "parametrizations", {})
        parts = ["weight", *stored, *computed] if isinstance(layer, (*LAYERS, *RECURRENT)) else []
        for part in filter(LAYER_WEIGHTS.fullmatch, dict.fromkeys(parts)):
            weight = getattr(layer, part, None)
            if weight is not None and id(weight) not in seen:
                seen[id(weight)] = weight
                matrices = unfold(f"{name}.{part}".removeprefix("."), weight.detach(), layer)
                found |= {key: unfolded.matrix for key, unfolded in matrices.items()}
    return found

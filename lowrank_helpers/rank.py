"""Measures of rank. Each takes singular values, as an array, a tensor or a list, so that one SVD serves them all.

Exact rank says nothing of a trained network: noise makes almost every matrix full-rank. The measures here say
how many directions carry the matrix, each with its own idea of "carry".
"""

import re
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from scipy.special import entr
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lowrank_helpers.models import FactorizedLinear

Array = npt.NDArray[np.float64]
Numbers = Tensor | npt.ArrayLike
Shape = tuple[int, int]
P = ParamSpec("P")
Result = TypeVar("Result")

IN_BLOCKS_FROM = 2**24  # entries; from 128 MiB in float64 on, a thin matrix is decomposed a block at a time
ROWS_AT_ONCE = 1024  # where all entries are gone through, so that no temporary is as large as the matrix
# Names of layers whose rows, or columns, are those of an attention's q, k and v one after the other.
PACKED = ("in_proj_weight", "qkv.weight", "qkv_proj.weight", "Wqkv.weight", "c_attn.weight")
# Recurrent layers' weights, whose rows are those of the gates one after the other: input, forget, cell and output gate
# of an LSTM; reset, update and new gate of a GRU.
RECURRENT = re.compile(r"weight_(ih|hh)(_l\d+(_reverse)?)?$")
GATES = ("ifgo", "rzn")
LAYERS = (
    nn.Linear,
    _ConvNd,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.Bilinear,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
)
LAYER_WEIGHTS = re.compile(r"weight|in_proj_weight|[qkv]_proj_weight|weight_(ih|hh|hr)(_l\d+(_reverse)?)?")


def singular_values(matrix: Numbers) -> Array:
    """Return the singular values of a real or complex matrix (n, m), largest first, min(n, m) of them, in float64.

    Raises
    ------
    TypeError
        The argument holds something other than numbers.
    ValueError
        The argument is no matrix, is empty, holds NaN or infinity, or has a norm beyond float64.

    Examples
    --------
    >>> singular_values([[3.0, 0.0], [0.0, 4.0]]).round(6)
    array([4., 3.])
    """
    array = _tensor(matrix)
    if array.dim() != 2 or array.numel() == 0:
        raise ValueError(f"a matrix is needed, not an array of shape {tuple(array.shape)}")
    if not all(block.isfinite().all() for block in array.split(ROWS_AT_ONCE)):
        raise ValueError("the matrix holds NaN or infinite entries")
    tall = array if array.shape[0] >= array.shape[1] else array.T
    if tall.numel() >= IN_BLOCKS_FROM and tall.shape[0] >= 4 * tall.shape[1]:
        s = torch.linalg.svdvals(_triangle(tall))
    else:
        s = torch.linalg.svdvals(array.to(_exact(array)))
    if not s.isfinite().all():
        raise ValueError("the matrix is too large in norm for float64")
    return s.numpy()


def _tensor(numbers: Numbers) -> Tensor:
    """Return numbers as a tensor on the CPU; copied from NumPy, whose arrays may be read-only or step backwards."""
    return numbers.detach().cpu() if isinstance(numbers, Tensor) else torch.as_tensor(np.array(numbers))


def _exact(array: Tensor) -> torch.dtype:
    """Return the type to decompose in."""
    return torch.complex128 if array.is_complex() else torch.float64


def _triangle(tall: Tensor) -> Tensor:
    """Return R of the QR decomposition of a tall matrix, which has its singular values, in double precision.

    One block of rows after the other goes through a QR with the R so far, so that a few times m² numbers are held at
    once rather than several copies of the matrix (Demmel et al. 2008, arXiv 0809.2407, *sequential TSQR*).
    """
    m = tall.shape[1]
    R = torch.zeros(0, m, dtype=_exact(tall))
    for block in tall.split(4 * m):
        R = torch.linalg.qr(torch.cat([R, block.to(R.dtype)]), mode="r").R
    return R


def _of_singular_values(measure: Callable[Concatenate[Array, P], Result]) -> Callable[Concatenate[Numbers, P], Result]:
    """Let a measure take singular values as a tensor, an array or a list, and refuse what is none: a matrix above all.

    Raises
    ------
    TypeError
        The first argument holds something other than numbers.
    ValueError
        It is no vector, is empty, or is not finite, at least 0 and sorted with the largest first.
    """

    @wraps(measure)
    def checked(s: Numbers, *args: P.args, **kwargs: P.kwargs) -> Result:
        array = _tensor(s).double().numpy()
        if array.ndim != 1 or not len(array):
            raise ValueError(f"singular values are a vector, not an array of shape {array.shape}: see singular_values")
        if not (np.isfinite(array).all() and array[-1] >= 0 and (np.diff(array) <= 0).all()):
            raise ValueError(f"singular values must be finite, at least 0 and the largest first, not {array}")
        return measure(array, *args, **kwargs)

    return checked


@_of_singular_values
def numerical_rank(s: Array, tolerance: float) -> int:
    """Count singular values above ``tolerance``·σ₁ (Golub & Van Loan, *Matrix Computations*, section 5.4.1).

    Examples
    --------
    >>> numerical_rank(np.array([1.0, 0.5, 1e-9]), tolerance=1e-6)
    2
    """
    return int((s > tolerance * s[0]).sum())


def default_tolerance(shape: Shape, dtype: torch.dtype = torch.float32) -> float:
    """Return max(n, m)·ε, relative to σ₁: NumPy's and MATLAB's tolerance, for entries stored in ``dtype``.

    Examples
    --------
    >>> default_tolerance((784, 512)) == 784 * 2**-23
    True
    """
    return max(shape) * torch.finfo(dtype).eps


@_of_singular_values
def rounding_tolerance(s: Array, dtype: torch.dtype) -> float:
    """Return ε/2·‖A‖_F / σ₁: no rounding of the entries to ``dtype`` moves a singular value by more than that times σ₁.

    Rounding is a matrix E with |Eᵢⱼ| ≤ ε/2·|Aᵢⱼ|, so ‖E‖₂ ≤ ‖E‖_F ≤ ε/2·‖A‖_F, and Weyl's inequality does the rest
    (Golub & Van Loan, corollary 8.6.2). In half precision max(n, m)·ε passes 1, and would leave a rank of 0.
    """
    return torch.finfo(dtype).eps / 2 * stable_rank(s) ** 0.5


def _tolerance(s: Array, shape: Shape, dtype: torch.dtype) -> float:
    """Return the tolerance for a matrix stored in ``dtype``; integers are exact, so that of float64 is theirs."""
    if dtype in (torch.float16, torch.bfloat16):
        return rounding_tolerance(s, dtype)
    return default_tolerance(shape, dtype if dtype.is_floating_point or dtype.is_complex else torch.float64)


@_of_singular_values
def stable_rank(s: Array) -> float:
    """Return ‖A‖_F² / σ₁² (Rudelson & Vershynin 2007, arXiv math/0503442); 0 for the zero matrix.

    Examples
    --------
    >>> stable_rank(np.array([2.0, 2.0, 1.0]))
    2.25
    """
    return float(((s / s[0]) ** 2).sum()) if s[0] > 0 else 0.0


@_of_singular_values
def effective_rank(s: Array) -> float:
    """Return exp(H) of the distribution σᵢ / Σσ (Roy & Vetterli 2007, definition 1); 0 for the zero matrix.

    Examples
    --------
    >>> round(effective_rank(np.array([1.0, 1.0, 0.0])), 6)
    2.0
    """
    if s[0] == 0:
        return 0.0
    return float(np.exp(entr(s / s.sum()).sum()))


@_of_singular_values
def energy_rank(s: Array, share: float) -> int:
    """Return the smallest r whose first r squared singular values reach ``share`` of their sum.

    By Eckart–Young (1936) it is the smallest r with a relative Frobenius error of at most √(1 − share).

    Examples
    --------
    >>> energy_rank(np.array([3.0, 1.0, 1.0]), share=0.9)  # of 9 + 1 + 1
    2
    """
    if not 0 < share <= 1:
        raise ValueError(f"share {share} must be above 0 and at most 1")
    if s[0] == 0:
        return 0
    energy = np.cumsum((s / s[0]) ** 2)
    # Relative slack: the sum of shares may fall short of 1 by rounding.
    return int(np.searchsorted(energy, share * energy[-1] * (1 - 1e-12))) + 1


@_of_singular_values
def gavish_donoho_rank(s: Array, shape: Shape) -> int:
    """Count singular values above the optimal hard threshold for unknown noise (Gavish & Donoho 2014).

    Examples
    --------
    >>> gavish_donoho_rank(np.array([9.0, 1.0, 1.0, 1.0]), (4, 4))  # the median is the noise
    1
    """
    return int((s > gavish_donoho_threshold(s, shape)).sum())


@_of_singular_values
def gavish_donoho_threshold(s: Array, shape: Shape) -> float:
    """Return the optimal hard threshold for singular values under noise of unknown strength.

    ω(β)·median(σ), with ω(β) ≈ 0.56β³ − 0.95β² + 1.82β + 1.43 and β = min(n, m)/max(n, m)
    (Gavish & Donoho 2014, arXiv 1305.5870, equations 4 and 5).
    """
    beta = min(shape) / max(shape)
    omega = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    return float(omega * np.median(s))


def marchenko_pastur_density(x: Numbers, shape: Shape, std: float) -> Array:
    """Return the limiting density of the singular values of a random matrix, at ``x``.

    Parameters
    ----------
    x : array
        Singular values at which to evaluate.
    shape : (int, int)
        Of the matrix; the law is the limit of large n and m at fixed ratio.
    std : float
        Standard deviation of its independent, centred entries.

    Returns
    -------
    array
        The density over singular values, integrating to 1. It lives on std·(√max ± √min)
        (Marchenko & Pastur 1967, for the eigenvalues σ², here changed to the variable σ).
    """
    lower, upper = marchenko_pastur_edges(shape, std)
    # The density of a square matrix has a limit at 0, not a value.
    at = np.maximum(_tensor(x).double().numpy(), 1e-12 * upper)
    square = np.clip((upper**2 - at**2) * (at**2 - lower**2), 0, None)
    return np.sqrt(square) / (np.pi * min(shape) * std**2 * at)


def marchenko_pastur_edges(shape: Shape, std: float) -> tuple[float, float]:
    """Return the limits between which the singular values of a random matrix fall, std·(√max ∓ √min).

    Examples
    --------
    >>> marchenko_pastur_edges((100, 400), std=0.5)
    (5.0, 15.0)
    """
    small, large = sorted(shape)
    return std * (large**0.5 - small**0.5), std * (large**0.5 + small**0.5)


@_of_singular_values
def rank_beyond_edge(s: Array, shape: Shape, std: float) -> int:
    """Count singular values beyond the Marchenko–Pastur edge of a random matrix with entries of this ``std``.

    Of a large random matrix none or one is beyond, as its largest one scatters about the edge.
    """
    return int((s > marchenko_pastur_edges(shape, std)[1]).sum())


MEASURES: dict[str, Callable[[Array, Shape, torch.dtype], float]] = {
    "numerical rank": lambda s, shape, dtype: numerical_rank(s, _tolerance(s, shape, dtype)),
    "effective rank": lambda s, shape, dtype: effective_rank(s),
    "stable rank": lambda s, shape, dtype: stable_rank(s),
    "energy rank 90 %": lambda s, shape, dtype: energy_rank(s, 0.90),
    "energy rank 95 %": lambda s, shape, dtype: energy_rank(s, 0.95),
    "energy rank 99 %": lambda s, shape, dtype: energy_rank(s, 0.99),
    "Gavish–Donoho rank": lambda s, shape, dtype: gavish_donoho_rank(s, shape),
}


class Unfolded(NamedTuple):
    """A matrix of a network.

    Attributes
    ----------
    matrix : Tensor, shape (n, m)
        A view of the tensor that it is part of.
    shape : str
        How the axes of that tensor became rows and columns: ``64×3·7·7`` of a convolution with 64 filters.
    remark : str
        What else was done to it, or must be known of it; empty for most.
    """

    matrix: Tensor
    shape: str
    remark: str = ""


def unfold(
    name: str, weight: Tensor, layer: nn.Module | None = None, hidden_size: int | None = None
) -> dict[str, Unfolded]:
    """Return the matrices that a weight stands for, by name.

    - Two axes are rows and columns: a linear layer's (out_features, in_features), an embedding's (entries, dimension).
    - A convolution's (out, in/groups, kh, kw) becomes (out, in/groups·kh·kw), as two convolutions, the first to r
      channels and the second of size 1, would factorise it; the filters of all groups lie below each other.
    - A transposed convolution's (in, out/groups, kh, kw) becomes (out, in/groups·kh·kw) too, if the layer is known:
      the tensor alone looks like any convolution's, and is unfolded as such.
    - Of three axes, a first one of size 1 is dropped, as of position embeddings, unless the layer is a convolution.
    - Packed projections of attention, told by their name (``PACKED``) and a ratio of 3 between their sides, are split
      into q, k and v.
    - Packed gates of a recurrent layer, told by their name (``RECURRENT``) and the layer's hidden size, are split into
      the gates, ``GATES``: ``weight_hh_l0.f`` is what an LSTM forgets by.

    Parameters
    ----------
    name : str
        Of the weight, such as ``encoder.fc1.weight``; the matrix is called ``encoder.fc1``.
    weight : Tensor
        With two axes at least.
    layer : nn.Module, optional
        Whose weight it is, where that is known.
    hidden_size : int, optional
        Of the recurrent layer whose weight it is, where that is known though the layer is not.

    Raises
    ------
    ValueError
        The weight has fewer than two axes.
    """
    if weight.dim() < 2:
        raise ValueError(f"{name} has {weight.dim()} axes; a matrix needs at least two")
    short = name.removesuffix(".weight")
    if isinstance(layer, _ConvTransposeNd):
        grouped = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)
        return {short: _filters(grouped, layer.groups, "transposed")}
    if weight.dim() == 3 and len(weight) == 1 and not isinstance(layer, _ConvNd):
        return {short: Unfolded(weight[0], times(weight[0].shape), "first axis, of size 1, dropped")}
    if weight.dim() > 2:
        return {short: _filters(weight, layer.groups if isinstance(layer, _ConvNd) else 1)}
    if name.endswith(PACKED) and max(weight.shape) == 3 * min(weight.shape):
        axis = weight.shape.index(max(weight.shape))
        return _split(short.removesuffix("in_proj_weight").removesuffix("."), weight, "qkv", axis)
    if isinstance(layer, (nn.RNNBase, nn.RNNCellBase)):
        hidden_size = layer.hidden_size
    if hidden_size and RECURRENT.search(name):
        for gates in GATES:
            if len(weight) == len(gates) * hidden_size:
                return _split(short, weight, gates, kind="gates ")
    return {short: Unfolded(weight, times(weight.shape))}


def _split(stem: str, packed: Tensor, parts: str, axis: int = 0, kind: str = "") -> dict[str, Unfolded]:
    """Split a matrix into parts of one letter each."""
    remark = f"packed {kind}{', '.join(parts)}, split by {('rows', 'columns')[axis]}"
    return {
        f"{stem}.{part}".removeprefix("."): Unfolded(matrix, times(matrix.shape), remark)
        for part, matrix in zip(parts, packed.chunk(len(parts), axis), strict=True)
    }


def _filters(weight: Tensor, groups: int, *remarks: str) -> Unfolded:
    """Unfold (out, in/groups, …) into (out, in/groups·…)."""
    shape = f"{len(weight)}×{'·'.join(map(str, weight.shape[1:]))}"
    stacked = [f"{groups} groups, below each other"] if groups > 1 else []
    return Unfolded(weight.flatten(1), shape, ", ".join([*remarks, *stacked]))


def times(shape: tuple[int, ...]) -> str:
    """Write a shape as ``3×4``."""
    return "×".join(map(str, shape))


def weight_matrices(model: nn.Module) -> dict[str, Tensor]:
    """Return the weight matrices of a model's layers by dotted names, unfolded as :func:`unfold` says.

    Layers are ``nn.Linear``, ``FactorizedLinear`` (its product), convolutions, ``nn.Embedding``, ``nn.EmbeddingBag``,
    ``nn.Bilinear``, ``nn.MultiheadAttention`` and recurrent ones. Of a weight that several layers share, only the first
    is returned.
    """
    found: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}  # kept, as the id of one that is computed anew, by weight_norm, would be given again
    for name, layer in model.named_modules():
        if isinstance(layer, FactorizedLinear):
            found[name] = layer.weight.detach()
        elif isinstance(layer, LAYERS):
            for part, weight in _weights(layer).items():
                if id(weight) not in seen:
                    seen[id(weight)] = weight
                    parts = unfold(f"{name}.{part}".removeprefix("."), weight.detach(), layer)
                    found |= {key: unfolded.matrix for key, unfolded in parts.items()}
    return found


def _weights(layer: nn.Module) -> dict[str, Tensor]:
    """Return a layer's weights by attribute, as they come out of weight_norm and other parametrizations."""
    stored = dict(layer.named_parameters(recurse=False))
    computed = getattr(layer, "parametrizations", {})
    names = filter(LAYER_WEIGHTS.fullmatch, dict.fromkeys(["weight", *stored, *computed]))
    return {name: getattr(layer, name) for name in names if hasattr(layer, name)}


def rank_table(matrices: Mapping[str, Numbers]) -> pd.DataFrame:
    """Measure every matrix with every measure; the tolerance of the numerical rank is that of the matrix's type.

    Returns
    -------
    DataFrame
        One row a matrix (index ``layer``); columns ``rows``, ``columns`` and the names of ``MEASURES``.

    Raises
    ------
    TypeError
        The argument is no mapping of names to matrices.
    ValueError
        As :func:`singular_values` does.

    Examples
    --------
    >>> rank_table({"fc1": torch.eye(4)})[["rows", "columns", "stable rank"]]
           rows  columns  stable rank
    layer
    fc1       4        4          4.0
    """
    if not isinstance(matrices, Mapping):
        raise TypeError(f"matrices by name are needed, as of weight_matrices(model), not a {type(matrices).__name__}")
    rows = {}
    for name, numbers in matrices.items():
        matrix = _tensor(numbers)
        s = singular_values(matrix)
        shape = (matrix.shape[0], matrix.shape[1])
        measured = {measure: of(s, shape, matrix.dtype) for measure, of in MEASURES.items()}
        rows[name] = {"rows": shape[0], "columns": shape[1]} | measured
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("layer")

"""Measures of rank. Each takes singular values, so that one SVD serves them all.

Exact rank says nothing of a trained network: noise makes almost every matrix full-rank. The measures here say
how many directions carry the matrix, each with its own idea of "carry".
"""

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from scipy.special import entr
from torch import Tensor, nn

from lowrank_helpers.models import FactorizedLinear

Array = npt.NDArray[np.float64]


def singular_values(matrix: Tensor | npt.ArrayLike) -> Array:
    """Return the singular values of a matrix (n, m), largest first, min(n, m) of them, in float64.

    Raises
    ------
    ValueError
        The argument is no matrix, is empty, or holds NaN or infinity.

    Examples
    --------
    >>> singular_values([[3.0, 0.0], [0.0, 4.0]]).round(6)
    array([4., 3.])
    """
    array = matrix.detach().cpu() if isinstance(matrix, Tensor) else torch.as_tensor(np.asarray(matrix))
    if array.dim() != 2 or array.numel() == 0:
        raise ValueError(f"a matrix is needed, not an array of shape {tuple(array.shape)}")
    if not array.isfinite().all():
        raise ValueError("the matrix holds NaN or infinite entries")
    return torch.linalg.svdvals(array.double()).numpy()


def numerical_rank(s: Array, tolerance: float) -> int:
    """Count singular values above ``tolerance``·σ₁ (Golub & Van Loan, *Matrix Computations*, section 5.4.1).

    Examples
    --------
    >>> numerical_rank(np.array([1.0, 0.5, 1e-9]), tolerance=1e-6)
    2
    """
    return int((s > tolerance * s[0]).sum())


def default_tolerance(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> float:
    """Return max(n, m)·ε, relative to σ₁: NumPy's and MATLAB's tolerance, for entries stored in ``dtype``.

    Examples
    --------
    >>> default_tolerance((784, 512)) == 784 * 2**-23
    True
    """
    return max(shape) * torch.finfo(dtype).eps


def stable_rank(s: Array) -> float:
    """Return ‖A‖_F² / σ₁² (Rudelson & Vershynin 2007, arXiv math/0503442); 0 for the zero matrix.

    Examples
    --------
    >>> stable_rank(np.array([2.0, 2.0, 1.0]))
    2.25
    """
    return float(((s / s[0]) ** 2).sum()) if s[0] > 0 else 0.0


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


def gavish_donoho_rank(s: Array, shape: tuple[int, int]) -> int:
    """Count singular values above the optimal hard threshold for unknown noise (Gavish & Donoho 2014).

    Examples
    --------
    >>> gavish_donoho_rank(np.array([9.0, 1.0, 1.0, 1.0]), (4, 4))  # the median is the noise
    1
    """
    return int((s > gavish_donoho_threshold(s, shape)).sum())


def gavish_donoho_threshold(s: Array, shape: tuple[int, int]) -> float:
    """Return the optimal hard threshold for singular values under noise of unknown strength.

    ω(β)·median(σ), with ω(β) ≈ 0.56β³ − 0.95β² + 1.82β + 1.43 and β = min(n, m)/max(n, m)
    (Gavish & Donoho 2014, arXiv 1305.5870, equations 4 and 5).
    """
    beta = min(shape) / max(shape)
    omega = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    return float(omega * np.median(s))


def marchenko_pastur_density(x: Array, shape: tuple[int, int], std: float) -> Array:
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
    x = np.maximum(x, 1e-12 * upper)  # the density of a square matrix has a limit at 0, not a value
    square = np.clip((upper**2 - x**2) * (x**2 - lower**2), 0, None)
    return np.sqrt(square) / (np.pi * min(shape) * std**2 * x)


def marchenko_pastur_edges(shape: tuple[int, int], std: float) -> tuple[float, float]:
    """Return the limits between which the singular values of a random matrix fall, std·(√max ∓ √min).

    Examples
    --------
    >>> marchenko_pastur_edges((100, 400), std=0.5)
    (5.0, 15.0)
    """
    small, large = sorted(shape)
    return std * (large**0.5 - small**0.5), std * (large**0.5 + small**0.5)


MEASURES: dict[str, Callable[[Array, tuple[int, int]], float]] = {
    "numerical rank": lambda s, shape: numerical_rank(s, default_tolerance(shape)),
    "effective rank": lambda s, shape: effective_rank(s),
    "stable rank": lambda s, shape: stable_rank(s),
    "energy rank 90 %": lambda s, shape: energy_rank(s, 0.90),
    "energy rank 95 %": lambda s, shape: energy_rank(s, 0.95),
    "energy rank 99 %": lambda s, shape: energy_rank(s, 0.99),
    "Gavish–Donoho rank": gavish_donoho_rank,
}


def weight_matrices(model: nn.Module) -> dict[str, Tensor]:
    """Return the weight of every linear layer of a model by its dotted name, (out_features, in_features)."""
    return {
        name: module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, FactorizedLinear))
    }


def rank_table(matrices: Mapping[str, Tensor]) -> pd.DataFrame:
    """Measure every matrix with every measure.

    Returns
    -------
    DataFrame
        One row a matrix (index ``layer``); columns ``rows``, ``columns`` and the names of ``MEASURES``.

    Examples
    --------
    >>> rank_table({"fc1": torch.eye(4)})[["rows", "columns", "stable rank"]]
           rows  columns  stable rank
    layer
    fc1       4        4          4.0
    """
    rows = {}
    for name, matrix in matrices.items():
        shape = (matrix.shape[0], matrix.shape[1])
        s = singular_values(matrix)
        rows[name] = {"rows": shape[0], "columns": shape[1]} | {k: measure(s, shape) for k, measure in MEASURES.items()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("layer")

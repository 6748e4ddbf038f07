"""Measures of rank. Each takes singular values as an array, a tensor or a list, so that one SVD serves them all."""

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from scipy.special import entr
from torch import Tensor

from lowrank_helpers.unfold import weight_matrices as weight_matrices  # measures and matrices by one import

Array = npt.NDArray[np.float64]
Numbers = Tensor | npt.ArrayLike
Shape = tuple[int, int]

ROWS_AT_ONCE = 1024  # at least, of a tall matrix


def singular_values(matrix: Numbers) -> Array:
    """Return the singular values of a real or complex matrix (n, m), largest first, min(n, m) of them, in float64.

    Raises
    ------
    TypeError
        The argument holds something other than numbers.
    ValueError
        The argument is no matrix, is empty, or holds NaN or infinity.

    Examples
    --------
    >>> singular_values([[3.0, 0.0], [0.0, 4.0]]).round(6)
    array([4., 3.])
    """
    array = _tensor(matrix)
    if array.dim() != 2 or array.numel() == 0:
        raise ValueError(f"a matrix is needed, not an array of shape {tuple(array.shape)}")
    if not array.isfinite().all():
        raise ValueError("the matrix holds NaN or infinite entries")
    s: Array = torch.linalg.svdvals(_triangle(array if array.shape[0] >= array.shape[1] else array.T)).numpy()
    return s


def _tensor(numbers: Numbers) -> Tensor:
    """Return numbers as a tensor on the CPU; copied from NumPy, whose arrays may be read-only or step backwards."""
    return numbers.detach().cpu() if isinstance(numbers, Tensor) else torch.as_tensor(np.array(numbers))


def _triangle(matrix: Tensor) -> Tensor:
    """Return a matrix in double precision, or a smaller one with its singular values if it is tall.

    That is R of the QR decomposition. One block of rows after the other goes through a QR with the R so far, so that no
    copy of a tall matrix is held (Demmel et al. 2008, arXiv 0809.2407, *sequential TSQR*).
    """
    first, *others = matrix.split(max(ROWS_AT_ONCE, 4 * matrix.shape[1]))
    R: Tensor = first.to(torch.complex128 if matrix.is_complex() else torch.float64)
    for block in others:
        R = torch.linalg.qr(torch.cat([R, block.to(R.dtype)]), mode="r").R
    return R


def _spectrum(s: Numbers) -> Array:
    """Return singular values as an array; raise ``ValueError`` for what cannot be any, such as a matrix."""
    array: Array = _tensor(s).double().numpy()
    if array.ndim != 1 or not len(array):
        raise ValueError(f"singular values are a vector, not an array of shape {array.shape}: see singular_values")
    if not (np.isfinite(array).all() and array[-1] >= 0 and (np.diff(array) <= 0).all()):
        raise ValueError(f"singular values must be finite, at least 0 and the largest first, not {array}")
    return array


def numerical_rank(s: Numbers, tolerance: float) -> int:
    """Count singular values above ``tolerance``·σ₁ (Golub & Van Loan, *Matrix Computations*, section 5.4.1).

    Examples
    --------
    >>> numerical_rank(np.array([1.0, 0.5, 1e-9]), tolerance=1e-6)
    2
    """
    s = _spectrum(s)
    return int((s > tolerance * s[0]).sum())


def tolerance(s: Numbers, shape: Shape, dtype: torch.dtype) -> float:
    """Return the tolerance, relative to σ₁, for the singular values of a matrix by the type that it is stored in.

    It is max(n, m)·ε, as NumPy's and MATLAB's; integers are exact, and get that of float64. In half precision it can
    pass 1 and leave a rank of 0: there it is ε/2·‖A‖_F / σ₁. Rounding is a matrix E with |Eᵢⱼ| ≤ ε/2·|Aᵢⱼ|, so
    ‖E‖₂ ≤ ‖E‖_F ≤ ε/2·‖A‖_F, and no singular value moves by more (Weyl; Golub & Van Loan, corollary 8.6.2).

    Examples
    --------
    >>> tolerance([2.0, 1.0], (784, 512), torch.float32) == 784 * 2**-23
    True
    """
    if dtype in (torch.float16, torch.bfloat16):
        return float(torch.finfo(dtype).eps / 2 * stable_rank(s) ** 0.5)
    return max(shape) * torch.finfo(dtype if dtype.is_floating_point or dtype.is_complex else torch.float64).eps


def stable_rank(s: Numbers) -> float:
    """Return ‖A‖_F² / σ₁² (Rudelson & Vershynin 2007, arXiv math/0503442); 0 for the zero matrix.

    Examples
    --------
    >>> stable_rank(np.array([2.0, 2.0, 1.0]))
    2.25
    """
    s = _spectrum(s)
    return float(((s / s[0]) ** 2).sum()) if s[0] > 0 else 0.0


def effective_rank(s: Numbers) -> float:
    """Return exp(H) of the distribution σᵢ / Σσ (Roy & Vetterli 2007, definition 1); 0 for the zero matrix.

    Examples
    --------
    >>> round(effective_rank(np.array([1.0, 1.0, 0.0])), 6)
    2.0
    """
    s = _spectrum(s)
    return float(np.exp(entr(s / s.sum()).sum())) if s[0] > 0 else 0.0


def energy_rank(s: Numbers, share: float) -> int:
    """Return the smallest r whose first r squared singular values reach ``share`` of their sum.

    By Eckart–Young (1936) it is the smallest r with a relative Frobenius error of at most √(1 − share).

    Examples
    --------
    >>> energy_rank(np.array([3.0, 1.0, 1.0]), share=0.9)  # of 9 + 1 + 1
    2
    """
    if not 0 < share <= 1:
        raise ValueError(f"share {share} must be above 0 and at most 1")
    s = _spectrum(s)
    if s[0] == 0:
        return 0
    energy = np.cumsum((s / s[0]) ** 2)
    # Relative slack: the sum of shares may fall short of 1 by rounding.
    return int(np.searchsorted(energy, share * energy[-1] * (1 - 1e-12))) + 1


def gavish_donoho_threshold(s: Numbers, shape: Shape) -> float:
    """Return the optimal hard threshold for singular values under noise of unknown strength.

    ω(β)·median(σ), with ω(β) ≈ 0.56β³ − 0.95β² + 1.82β + 1.43 and β = min(n, m)/max(n, m)
    (Gavish & Donoho 2014, arXiv 1305.5870, equations 4 and 5).
    """
    beta = min(shape) / max(shape)
    omega = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    return float(omega * np.median(_spectrum(s)))


def marchenko_pastur_density(x: Numbers, shape: Shape, std: float) -> Array:
    """Return the limiting density of the singular values of a random matrix at the singular values ``x``.

    The limit is that of large n and m at a fixed ratio. ``std`` is the standard deviation of the independent, centred
    entries. The density integrates to 1 between :func:`marchenko_pastur_edges` (Marchenko & Pastur 1967, for the
    eigenvalues σ², here changed to the variable σ).
    """
    lower, upper = marchenko_pastur_edges(shape, std)
    # The density of a square matrix has a limit at 0, not a value.
    at: Array = np.maximum(_tensor(x).double().numpy(), 1e-12 * upper)
    square = np.clip((upper**2 - at**2) * (at**2 - lower**2), 0, None)
    density: Array = np.sqrt(square) / (np.pi * min(shape) * std**2 * at)
    return density


def marchenko_pastur_edges(shape: Shape, std: float) -> tuple[float, float]:
    """Return the limits between which the singular values of a random matrix fall, std·(√max ∓ √min).

    Examples
    --------
    >>> marchenko_pastur_edges((100, 400), std=0.5)
    (5.0, 15.0)
    """
    small, large = sorted(shape)
    return std * (large**0.5 - small**0.5), std * (large**0.5 + small**0.5)


MEASURES: dict[str, Callable[[Array, Shape, torch.dtype], float]] = {
    "numerical rank": lambda s, shape, dtype: numerical_rank(s, tolerance(s, shape, dtype)),
    "effective rank": lambda s, shape, dtype: effective_rank(s),
    "stable rank": lambda s, shape, dtype: stable_rank(s),
    "energy rank 90 %": lambda s, shape, dtype: energy_rank(s, 0.90),
    "energy rank 95 %": lambda s, shape, dtype: energy_rank(s, 0.95),
    "energy rank 99 %": lambda s, shape, dtype: energy_rank(s, 0.99),
    "Gavish–Donoho rank": lambda s, shape, dtype: int((s > gavish_donoho_threshold(s, shape)).sum()),
}


def rank_table(matrices: Mapping[str, Numbers]) -> pd.DataFrame:
    """Measure every matrix with every measure; the tolerance of the numerical rank is that of the matrix's type.

    The table has a row a matrix (index ``layer``), and columns ``rows``, ``columns`` and the names of ``MEASURES``.

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

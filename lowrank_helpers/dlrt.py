"""Ranks found while training: rank-adaptive dynamical low-rank training, DLRT.

After Schotthöfer, Zangrando, Kusch, Ceruti & Tudisco 2022, *Low-rank lottery tickets*, NeurIPS 2022, arXiv 2205.13571;
the names are the paper's, and G is the gradient of the loss for the matrix W = U·S·Vᵀ, which is never formed.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_helpers.factorization import optimal_errors, substitute
from lowrank_helpers.models import FactorizedLinear, SelfTrained

T = TypeVar("T", bound=nn.Module)

MOMENTUM = 0.9
RATE = 0.2  # of Adam's rate, times √max(n, m): so large are the entries of Adam's steps (Liu et al. 2025, section 2.2)


class DLRTLinear(SelfTrained):
    """A linear layer y = x·V·Sᵀ·Uᵀ (+ bias) of orthonormal bases U and V and a small S, whose rank is trained too.

    A step is one of the paper's Algorithm 1. The K- and L-step add the columns of G·V to U and of Gᵀ·U to V, S is
    carried into the bases of twice the rank and moved there, and the singular values of S that are small enough are
    cut off. Nothing is divided by a singular value, so that small ones do no harm. A recipe's penalties do not reach
    these layers.

    In exact arithmetic two things are the paper's and cheaper. The bases of [K − λ·∇K | U], for K = U·S, are those of
    [U | ∇K] whatever the rate λ. And W has not moved when S is in its new bases, so that one pass through the network
    gives all three gradients: G·V, Gᵀ·U and, in the new bases, ŨᵀGṼ.

    The steps of K, L and S have momentum. An exponential mean D of the gradients is carried to each new W by projection
    on the tangent space of matrices of its rank, where it is known from D·V and Dᵀ·U. S moves by the orthogonal factor
    of ŨᵀDṼ, as in *Muon* (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon), times a rate that suits Adam
    as well (Liu et al. 2025, arXiv 2502.16982). Adam's own step is out of place here, as it depends on the bases.

    Parameters
    ----------
    B : Tensor, shape (out_features, rank)
    C : Tensor, shape (rank, in_features)
        Factors of W at the start.
    tolerance : float
        τ, from 0 to below 1: a step cuts off as many singular values σ of S as keep ‖σ_cut‖ ≤ τ·‖σ‖, though not the
        largest one. The paper's ϑ is τ·‖σ‖.
    bias : Tensor, shape (out_features,), optional

    Attributes
    ----------
    U : Parameter of shape (out_features, rank)
    S : Parameter of shape (rank, rank)
        Diagonal, the largest first.
    V : Parameter of shape (in_features, rank)
    bias : Parameter of shape (out_features,) or None
        Trained by Adam.

    Raises
    ------
    ValueError
        The tolerance is out of its range.

    Examples
    --------
    >>> DLRTLinear(torch.ones(5, 2), torch.ones(2, 3), tolerance=0.1)
    DLRTLinear(in_features=3, out_features=5, rank=2, tolerance=0.1)
    """

    def __init__(self, B: Tensor, C: Tensor, tolerance: float, bias: Tensor | None = None) -> None:
        super().__init__()
        if not 0 <= tolerance < 1:
            raise ValueError(f"tolerance {tolerance} must be at least 0 and below 1")
        self.out_features, self.in_features = len(B), C.shape[1]
        self.tolerance = tolerance
        of_columns, of_rows = torch.linalg.qr(B.detach()), torch.linalg.qr(C.detach().T)
        P, s, Qh = torch.linalg.svd(of_columns.R @ of_rows.R.T, full_matrices=False)
        self.U = nn.Parameter(of_columns.Q @ P)
        self.S = nn.Parameter(s.diag())
        self.V = nn.Parameter(of_rows.Q @ Qh.T)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self._passes: list[tuple[Tensor, Tensor]] = []

    @property
    def rank(self) -> int:
        """How many singular values there are at present."""
        return len(self.S)

    @property
    def weight(self) -> Tensor:
        """The matrix that the factors stand for, (out_features, in_features)."""
        return self.U @ self.S @ self.V.T

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, in_features) to (…, out_features) through the rank-sized middle."""
        # Autograd need not differentiate for the bases: what a step wants to know of G it takes from the passes.
        inner = F.linear(F.linear(x, self.V.detach().T), self.S)
        y = F.linear(inner, self.U.detach(), self.bias)
        if y.requires_grad:
            y.register_hook(lambda gradient: self._passes.append((x.detach(), gradient)))
        return y

    @torch.no_grad()
    def step(self, optimiser: torch.optim.Optimizer) -> None:
        """Move W once, against the gradient that has come in since the last step, and let the rank follow."""
        if not self._passes:
            return
        g = torch.cat([gradient.flatten(0, -2) for _, gradient in self._passes])
        x = torch.cat([inputs.flatten(0, -2) for inputs, _ in self._passes]).to(g)
        self._passes.clear()
        self.S.grad = None  # Adam passes over what has no gradient
        velocity = optimiser.state[self.S]  # empty when a training begins
        r, U, V = self.rank, self.U, self.V
        K = _mean(velocity.get("K"), (g.T @ (x @ V.to(g))).to(V))
        L = _mean(velocity.get("L"), (x.T @ (g @ U.to(g))).to(U))
        # Householder's QR: the first r columns are those of U and V but for signs, and the rest is orthogonal to them
        # even where K or L add nothing new.
        new_U, R_U = torch.linalg.qr(torch.cat([U, K], dim=1))
        new_V, R_V = torch.linalg.qr(torch.cat([V, L], dim=1))
        G = (g @ new_U[:, r:].to(g)).T @ (x @ new_V[:, r:].to(g))
        # What has 2r rows and columns is computed on the processor: a GPU takes many times as long for its SVD.
        S, R_U, R_V, KU, G = (small.cpu() for small in (self.S, R_U, R_V, K.T @ U, G.to(U)))
        M, N = R_U[:, :r], R_V[:, :r]
        D = R_U[:, r:] @ N.T + M @ (R_V[:, r:] - N @ KU).T
        D[r:, r:] = _mean(None, G)
        rate = RATE * max(self.out_features, self.in_features) ** 0.5 * optimiser.param_groups[0]["lr"]
        P, s, Qh = torch.linalg.svd(M @ S @ N.T - rate * orthogonal_factor(D), full_matrices=False)
        rank = kept(s, self.tolerance)
        P, Q = P[:, :rank], Qh[:rank].T
        P, s, Q, DQ, DP = (small.to(U) for small in (P, s[:rank], Q, D @ Q, D.T @ P))
        self.U.data, self.S.data, self.V.data = new_U @ P, s.diag(), new_V @ Q
        velocity.update(K=new_U @ DQ, L=new_V @ DP)

    def extra_repr(self) -> str:
        """Show the present shape and the tolerance in ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"tolerance={self.tolerance}"
        )

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        """Take the rank of what is loaded."""
        if (S := state_dict.get(f"{prefix}S")) is not None:
            for matrix, n_rows in ((self.U, self.out_features), (self.S, len(S)), (self.V, self.in_features)):
                matrix.data = matrix.new_empty(n_rows, len(S))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _mean(past: Tensor | None, present: Tensor) -> Tensor:
    """Return the next value of an exponential mean that began at zero."""
    return (1 - MOMENTUM) * present + (0 if past is None else MOMENTUM * past)


def orthogonal_factor(D: Tensor) -> Tensor:
    """Return D with all its singular values at 1, but for those that are zero up to rounding.

    Examples
    --------
    >>> orthogonal_factor(torch.tensor([[0.0, -5.0], [0.0, 0.0]]))
    tensor([[ 0., -1.],
            [ 0.,  0.]])
    """
    P, s, Qh = torch.linalg.svd(D, full_matrices=False)
    return (P * (s > s[0] * max(D.shape) * torch.finfo(D.dtype).eps)) @ Qh


def kept(s: Tensor, tolerance: float) -> int:
    """Return how many singular values remain when as many are cut off as keep ‖cut‖ ≤ tolerance·‖s‖; at least one.

    Examples
    --------
    >>> kept(torch.tensor([4.0, 3.0, 0.0]), 0.5), kept(torch.tensor([4.0, 3.0, 0.0]), 0.6)
    (2, 1)
    """
    errors = optimal_errors(s)
    return max(1, int((errors > tolerance * errors[0]).sum()))


def rank_adaptive(model: nn.Module, tolerance: float) -> nn.Module:
    """Return a copy of a model whose factorised layers find their ranks while ``training.fit`` runs.

    They start from the factors: from scratch those of ``factorize(mlp(…), ranks)``, or a trained network's. Start with
    more ranks than are wanted, as they hardly grow: a new direction lasts if one step makes it more than may be cut.

    Parameters
    ----------
    model : nn.Module
        With layers of :class:`~lowrank_helpers.models.FactorizedLinear`; others are trained as usual.
    tolerance : float
        τ of :class:`DLRTLinear`, of every layer: it decides how large the network becomes.

    Raises
    ------
    ValueError
        The tolerance is out of its range.
    """
    return _exchange(model, FactorizedLinear, lambda layer: DLRTLinear(layer.B, layer.C, tolerance, layer.bias))


def factorized(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose layers of rank found in training are plain factors, B = U·S and C = Vᵀ.

    Examples
    --------
    >>> model = nn.Sequential(FactorizedLinear(torch.ones(5, 2), torch.ones(2, 3)))
    >>> factorized(rank_adaptive(model, 0.1))
    Sequential(
      (0): FactorizedLinear(in_features=3, out_features=5, rank=2)
    )
    """
    return _exchange(model, DLRTLinear, lambda layer: FactorizedLinear(layer.U @ layer.S, layer.V.T, layer.bias))


def _exchange(model: nn.Module, kind: type[T], exchange: Callable[[T], nn.Module]) -> nn.Module:
    """Return a copy of a model with every layer of a kind exchanged for another."""
    copy = deepcopy(model)
    for name, layer in [(name, layer) for name, layer in copy.named_modules() if isinstance(layer, kind)]:
        substitute(copy, name, exchange(layer))
    return copy

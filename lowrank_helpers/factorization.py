"""Low-rank factors of a matrix, A ≈ B·C, and networks made of them.

Two ways to the factors: the truncated SVD, which is the optimum (Eckart & Young 1936), and alternating least squares,
which solves for each factor exactly in turn.

Three errors to be least: that of the matrix, ‖A − B·C‖_F; that of what a layer puts out, ‖(A − B·C)·X‖_F over its
inputs X, of which it is enough to know the second moment X·Xᵀ/N; and that of the network's answers, to first order.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, fx, nn

from lowrank_helpers.calibration import check_names, precise
from lowrank_helpers.calibration import input_moments as input_moments
from lowrank_helpers.calibration import sensitivities as sensitivities
from lowrank_helpers.models import FactorizedLinear, check_plain, linear_layers
from lowrank_helpers.timing import spending

DAMPING = 1e-3  # of the mean eigenvalue of G; 1e-2 does the same to a percent


@dataclass(frozen=True)
class Factors:
    """Factors B (n, r) and C (r, m) of a matrix.

    Attributes
    ----------
    errors : list of float
        ‖A − B·C‖_F after each sweep of an iterative method, the start first; empty for a direct one.
    """

    B: Tensor
    C: Tensor
    errors: list[float]

    @property
    def product(self) -> Tensor:
        """The matrix that the factors stand for."""
        return self.B @ self.C


def check_rank(rank: int, shape: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless 1 ≤ rank ≤ min(n, m), and ``TypeError`` unless it is a whole number."""
    if not 1 <= operator.index(rank) <= min(shape):
        raise ValueError(f"rank {rank} is impossible for a {shape[0]}×{shape[1]} matrix; allowed: 1 to {min(shape)}")


def optimal_errors(s: Tensor) -> Tensor:
    """Return the least ‖A − B·C‖_F at ranks 0 … len(s), √(Σ_{i>r} σᵢ²) (Eckart & Young 1936).

    Parameters
    ----------
    s : Tensor, shape (k,)
        The singular values of A, largest first.

    Examples
    --------
    >>> optimal_errors(torch.tensor([4.0, 3.0]))
    tensor([5., 3., 0.])
    """
    tails = s.square().flip(0).cumsum(0).flip(0).sqrt()
    return torch.cat([tails, tails.new_zeros(1)])


def random_factors(A: Tensor, rank: int, *, seed: int) -> Factors:
    """Draw Gaussian factors whose product has the expected squared norm of A."""
    check_rank(rank, A.shape)
    generator = torch.Generator().manual_seed(seed)
    n, m = A.shape
    scale = (A.norm().item() / (n * m * rank) ** 0.5) ** 0.5
    B = torch.randn(n, rank, generator=generator) * scale
    C = torch.randn(rank, m, generator=generator) * scale
    return Factors(B.to(A), C.to(A), [])


@spending("factorising")
@torch.no_grad()
def alternating_least_squares(A: Tensor, rank: int, *, sweeps: int, seed: int = 0) -> Factors:
    """Minimise ‖A − B·C‖_F by solving for B with C fixed, then for C with B fixed.

    Each solution depends on the other factor only through the space it spans, so that factor is
    orthonormalised first (QR) and least squares becomes one product: B = A·Qᵀ for C's row space Q, then
    C = Pᵀ·A for B's column space P. This is subspace iteration on AᵀA: the error falls like (σ_{r+1}/σ_r)^{4k}
    towards the optimum (Golub & Van Loan, section 8.2.4).

    Parameters
    ----------
    A : Tensor, shape (n, m)
    rank : int
        From 1 to min(n, m).
    sweeps : int
        Each solves for B and for C once.
    seed : int
        Draws the starting factors.

    Examples
    --------
    >>> A = torch.tensor([[1.0, 2.0], [2.0, 4.0]])  # of rank 1
    >>> alternating_least_squares(A, 1, sweeps=1).errors[-1] < 1e-4
    True
    """
    start = random_factors(A, rank, seed=seed)
    B, C = start.B, start.C
    errors = [torch.dist(A, B @ C).item()]
    for _ in range(sweeps):
        row_space = torch.linalg.qr(C.T).Q.T
        B = torch.linalg.qr(A @ row_space.T).Q
        C = B.T @ A
        errors.append(torch.dist(A, B @ C).item())
    return Factors(B, C, errors)


class Decomposition(Protocol):
    """What factors of any rank can be cut from; ``s[r]`` is the root of what rank r + 1 takes off the squared error."""

    @property
    def s(self) -> Tensor:
        """Shape (k,), largest first; ``optimal_errors(s)`` are the errors at ranks 0 … k."""

    def factors(self, rank: int) -> Factors:
        """Return the best factors of that rank."""


class SVD(NamedTuple):
    """A matrix's thin singular value decomposition, U·diag(s)·Vh, from which factors of any rank are cut."""

    U: Tensor
    s: Tensor
    Vh: Tensor

    @classmethod
    @spending("factorising")
    def of(cls, A: Tensor) -> "SVD":
        """Decompose A (n, m) into U (n, k), s (k,), Vh (k, m), k = min(n, m), in float32 at least."""
        return cls(*torch.linalg.svd(A.detach().to(precise(A)), full_matrices=False))

    def factors(self, rank: int) -> Factors:
        """Return the best factors of that rank, B = U·√S and C = √S·Vᵀ: balanced, ‖B‖_F = ‖C‖_F."""
        check_rank(rank, (len(self.U), self.Vh.shape[1]))
        root = self.s[:rank].sqrt()
        left = torch.where(root > 0, root, 1)  # with both factors at zero, no gradient would ever reach them
        return Factors(self.U[:, :rank] * left, root[:, None] * self.Vh[:rank], [])


def truncated_svd(A: Tensor, rank: int) -> Factors:
    """Return the best factors of A at that rank (Eckart & Young 1936).

    Examples
    --------
    >>> factors = truncated_svd(torch.eye(6), 4)
    >>> factors.B.shape, factors.C.shape
    (torch.Size([6, 4]), torch.Size([4, 6]))
    """
    return SVD.of(A).factors(rank)


def _output_moment(A: Tensor, moment: Tensor) -> Tensor:
    """Return the second moment (n, n), float64, of A·X for inputs of second moment (m, m), if that can be one."""
    if moment.shape != (A.shape[1], A.shape[1]):
        raise ValueError(
            f"the moment of inputs of a {A.shape[0]}×{A.shape[1]} matrix must be {A.shape[1]}×{A.shape[1]}, "
            f"not {tuple(moment.shape)}"
        )
    if not moment.isfinite().all():
        raise ValueError("the moment holds NaN or infinite entries")
    return A.double() @ moment.double() @ A.double().T


class ActivationAwareSVD(NamedTuple):
    """The directions of a layer's outputs, by their size over its inputs or by what they do to the model's outputs.

    The least ‖(A − B·C)·X‖_F at rank r has B·C·X equal to the best rank-r approximation of A·X (Eckart & Young 1936),
    which is P·Pᵀ·A·X for the first r left singular vectors P of A·X. So B = P and C = Pᵀ·A, and X need not be
    inverted: pixels that never change make its moment singular and do no harm. P are the eigenvectors of A·M·Aᵀ, the
    second moment of the outputs. To whiten by the root of M, cut and unwhiten (as in Chen et al. 2021, *DRONE*,
    NeurIPS 2021) gives the same outputs.

    Fisher-weighted: a change Δ of a layer's outputs changes the model's outputs by J·Δ to first order, J being their
    derivative. Taken as independent of each other, the two make a mean square of tr(G·E[Δ·Δᵀ]) with G = E[Jᵀ·J]: the
    approximation of K-FAC (Martens & Grosse 2015, arXiv 1503.05671, section 3). With a root W of G, Wᵀ·W = G, that is
    the mean square of W·Δ, so W·A takes the place of A: B = W⁻¹·P and C = Pᵀ·W·A.

    Attributes
    ----------
    back : Tensor, shape (n, k), float64
        W⁻¹·P, k = min(n, m).
    s : Tensor, shape (k,), float64
        The root mean square of the outputs, or of what they do to the model's outputs, along each direction, the
        largest first.
    forth : Tensor, shape (k, n), float64
        Pᵀ·W.
    A : Tensor, shape (n, m)
        The matrix.
    """

    back: Tensor
    s: Tensor
    forth: Tensor
    A: Tensor

    @classmethod
    def of(cls, A: Tensor, moment: Tensor) -> "ActivationAwareSVD":
        """Decompose the outputs of A (n, m) for inputs of second moment X·Xᵀ/N (m, m).

        Raises
        ------
        ValueError
            The moment is not (m, m), or holds NaN or infinity.
        """
        A = A.detach()
        return cls.of_outputs(A, _output_moment(A, moment))

    @classmethod
    @spending("factorising")
    def of_outputs(
        cls, A: Tensor, moment: Tensor, sensitivity: Tensor | None = None, basis: Tensor | None = None
    ) -> "ActivationAwareSVD":
        """Decompose the outputs of A (n, m), given their own second moment.

        Parameters
        ----------
        A : Tensor, shape (n, m)
        moment : Tensor, shape (n, n), float64
            Where it is zero, all inputs count alike.
        sensitivity : Tensor, shape (n, n), float64, optional
            G = E[Jᵀ·J]. ``DAMPING`` of its mean eigenvalue is added to all of them, as in K-FAC (section 6.3): a change
            that is large where G is small leaves the first order. Where G is zero, all outputs count alike.
        basis : Tensor, shape (n, k), optional
            Orthonormal columns that span those of A: ``moment`` and ``sensitivity`` are then (k, k), of the
            coordinates along them.
        """
        if not moment.any():
            rows = (A if basis is None else basis.T @ A).double()
            moment = rows @ rows.T
        root, inverse = _damped_roots(sensitivity) if sensitivity is not None and sensitivity.any() else (None, None)
        squares, P = torch.linalg.eigh(moment if root is None else root @ moment @ root.T)
        P = P.flip(1)[:, : min(A.shape)]
        s = squares.flip(0)[: P.shape[1]].clamp_min(0).sqrt()
        back, forth = (P, P.T) if root is None else (inverse @ P, P.T @ root)
        if basis is not None:
            back, forth = basis.double() @ back, forth @ basis.double().T
        return cls(back, s, forth, A)

    def unweighted(self) -> "ActivationAwareSVD":
        """Return the same without G: fitted to the layer's outputs, whose second moment is back·diag(s²)·backᵀ."""
        U, s, _ = torch.linalg.svd(self.back * self.s, full_matrices=False)
        return ActivationAwareSVD(U, s, U.T, self.A)

    def relative(self) -> "ActivationAwareSVD":
        """Return the same with s as a share of the whole."""
        return self._replace(s=self.s / self.s.norm().clamp_min(torch.finfo(self.s.dtype).tiny))

    def factors(self, rank: int) -> Factors:
        """Return the factors of that rank with the least error, balanced: BᵀB = C·Cᵀ."""
        check_rank(rank, self.A.shape)
        Q, R = torch.linalg.qr(self.back[:, :rank])
        balanced = SVD.of(R @ self.forth[:rank] @ self.A.double()).factors(rank)
        return Factors((Q @ balanced.B).to(self.A), balanced.C.to(self.A), [])


def _damped_roots(G: Tensor) -> tuple[Tensor, Tensor]:
    """Return W with Wᵀ·W = G + ``DAMPING``·tr(G)/n·I, and its inverse."""
    values, vectors = torch.linalg.eigh(G)
    root = (values.clamp_min(0) + DAMPING * values.mean()).sqrt()
    return root[:, None] * vectors.T, vectors / root


def fitted_factors(A: Tensor, moment: Tensor, rank: int) -> Factors:
    """Return the factors of A (n, m) with the least ‖(A − B·C)·X‖_F, for inputs of second moment X·Xᵀ/N (m, m).

    Examples
    --------
    >>> moment = torch.diag(torch.tensor([1.0, 9.0]))  # the second input is the larger one: rank 1 goes to it
    >>> fitted_factors(torch.eye(2), moment, 1).product.abs().round()
    tensor([[0., 0.],
            [0., 1.]])
    """
    return ActivationAwareSVD.of(A, moment).factors(rank)


def decompose(
    model: nn.Module,
    moments: Mapping[str, Tensor] | None = None,
    sensitive: Mapping[str, Tensor] | None = None,
) -> dict[str, Decomposition]:
    """Decompose every ``nn.Linear`` of a model: its weight or, for a layer whose moment is given, its outputs.

    For a layer whose sensitivity is given too, as of :func:`sensitivities`, its outputs are weighed by it. Half
    precision is decomposed in float32.

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
    moments, sensitive = moments or {}, sensitive or {}

    def decomposed(name: str, A: Tensor) -> Decomposition:
        if name in sensitive:
            return ActivationAwareSVD.of_outputs(A, _output_moment(A, moments[name]), sensitive[name])
        return ActivationAwareSVD.of(A, moments[name]) if name in moments else SVD.of(A)

    layers = linear_layers(model)
    check_plain(layers)
    return {name: decomposed(name, layer.weight.detach()) for name, layer in layers.items()}


def factorize(model: nn.Module, ranks: Mapping[str, int], svds: Mapping[str, Decomposition] | None = None) -> nn.Module:
    """Return a copy of a model with the named linear layers replaced by their best factors.

    A layer that the model uses in several places is replaced in all of them. Layers that share a weight, but are not
    the same module, get factors of their own.

    On a trained model this is truncation; on a fresh one it is spectral initialisation
    (Khodak et al. 2021, arXiv 2105.01029; Kamalakara et al. 2022, arXiv 2209.13569, section 3).

    Parameters
    ----------
    model : nn.Module
    ranks : mapping of str to int
        Rank by layer name, as in ``linear_layers(model)``; layers not named stay dense.
    svds : mapping of str to Decomposition, optional
        ``decompose(model)``, where many ranks of one model are wanted, or ``decompose(model, moments)`` for factors
        that fit the layers' outputs.

    Raises
    ------
    ValueError
        A name is no linear layer of the model or one with a ``forward`` of its own, or a rank is impossible for it.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> factorize(model, {"0": 3})[0]
    FactorizedLinear(in_features=20, out_features=16, rank=3)
    """
    return _replace(
        model, ranks, lambda name, layer, rank: (svds[name] if svds else SVD.of(layer.weight)).factors(rank)
    )


def factorize_standard(model: nn.Module, ranks: Mapping[str, int], *, seed: int) -> nn.Module:
    """Return a copy of a model with the named linear layers replaced by freshly drawn factors.

    Each factor gets PyTorch's standard initialisation for a layer of its shape, as two stacked ``nn.Linear``
    would: uniform on ±1/√r for B and on ±1/√in_features for C.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> factorize_standard(model, {"0": 3}, seed=0)[0]
    FactorizedLinear(in_features=20, out_features=16, rank=3)
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, layer: nn.Linear, rank: int) -> Factors:
        B, C = torch.empty(layer.out_features, rank), torch.empty(rank, layer.in_features)
        for factor in (B, C):
            bound = factor.shape[1] ** -0.5
            nn.init.uniform_(factor, -bound, bound, generator=generator)
        return Factors(B, C, [])

    return _replace(model, ranks, draw)


def _replace(
    model: nn.Module, ranks: Mapping[str, int], factors_of: Callable[[str, nn.Linear, int], Factors]
) -> nn.Module:
    layers = linear_layers(model)
    check_names(ranks, layers, "linear layer of the model")
    check_plain({name: layers[name] for name in ranks})
    copy = deepcopy(model)
    for name in [name for name in layers if name in ranks]:  # in the model's order, whatever that of ranks
        check_rank(ranks[name], layers[name].weight.shape)
        factors, weight = factors_of(name, layers[name], ranks[name]), layers[name].weight
        substitute(copy, name, FactorizedLinear(factors.B.to(weight), factors.C.to(weight), layers[name].bias))
    return copy


def substitute(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer into a model where the named one is, and wherever else the model uses that same module.

    Examples
    --------
    >>> layer = nn.Linear(4, 4)
    >>> model = nn.Sequential(layer, nn.ReLU(), layer)
    >>> substitute(model, "0", nn.Identity())
    >>> model
    Sequential(
      (0): Identity()
      (1): ReLU()
      (2): Identity()
    )
    """
    if not name:
        raise ValueError(f"the model itself is the layer, a {type(model).__name__}: put it into an nn.Sequential")
    old = model.get_submodule(name)
    for place in [place for place, module in model.named_modules(remove_duplicate=False) if module is old]:
        model.set_submodule(place, layer)


def hidden_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return every ``nn.Linear`` of a model but those that give its output, such as the logits, by dotted name.

    A module with parameters gives the output if its result reaches what the model returns through no other such
    module: activations or sums may lie between, and with several heads each gives one. Every layer in it, and every
    layer that shares a weight with it, is an output layer. The way is that of the tensors, traced by ``torch.fx``,
    not the order of registration. A layer under several names has the first of them, as in ``linear_layers``.

    Raises
    ------
    ValueError
        ``torch.fx`` cannot trace the model: what it computes depends on its inputs' values.

    Examples
    --------
    >>> list(hidden_layers(nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4))))
    ['0']
    """
    try:
        pending = [node for node in _LayerTracer().trace(model).nodes if node.op == "output"]
    except Exception as error:  # whatever a model's own code raises when it meets a stand-in for a tensor
        raise ValueError(
            f"torch.fx cannot trace this {type(model).__name__} ({error}): name the layers yourself, out of "
            f"{', '.join(linear_layers(model))}"
        ) from error
    seen: set[fx.Node] = set()
    given: set[nn.Parameter] = set()
    while pending:
        node = pending.pop()
        seen.add(node)
        weights = set(model.get_submodule(str(node.target)).parameters()) if node.op == "call_module" else set()
        given |= weights
        pending += [] if weights else [source for source in node.all_input_nodes if source not in seen]
    return {name: layer for name, layer in linear_layers(model).items() if layer.weight not in given}


class _LayerTracer(fx.Tracer):
    """Looks into no module that has parameters of its own, so that factorised layers count as layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return any(True for _ in m.parameters(recurse=False)) or super().is_leaf_module(m, module_qualified_name)


def smallest_rank(score: Callable[[int], float], grid: Sequence[int], target: float) -> int:
    """Return the smallest rank from which on a score stays at or above a target.

    Walks down the grid while the target holds, then tries every rank of the gap below, so that the answer is
    exact although the score is computed few times.

    Parameters
    ----------
    score : callable
        Of a rank; rises with it but for noise.
    grid : sequence of int
        Ranks in any order; the largest must reach the target.
    target : float

    Raises
    ------
    ValueError
        The largest rank of the grid misses the target.

    Examples
    --------
    >>> smallest_rank(lambda rank: 1 - 1 / rank, [1, 8, 64], target=0.895)
    10
    """
    ranks = sorted(grid, reverse=True)
    if score(ranks[0]) < target:
        raise ValueError(f"even rank {ranks[0]} stays below the target {target}")
    holds = ranks[0]
    for rank in ranks[1:]:
        if score(rank) < target:
            return next(r for r in range(rank + 1, holds + 1) if score(r) >= target)
        holds = rank
    return holds

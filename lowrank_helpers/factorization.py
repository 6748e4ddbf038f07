"""Low-rank factors of a matrix, A ≈ B·C; ``layers`` applies them to networks.

The truncated SVD has the least error of the matrix, ‖A − B·C‖_F. The activation-aware SVD minimises that of a layer's
outputs, ‖(A − B·C)·X‖_F over its inputs X, and the Fisher-weighted one that of the model's outputs to first order.
"""

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DAMPING = 1e-3  # of the mean eigenvalue of G; 1e-2 does the same to a percent


class Factors(NamedTuple):
    """Factors B (n, r) and C (r, m) of a matrix; ``errors`` are ‖A − B·C‖_F after each sweep, the start first."""

    B: Tensor
    C: Tensor
    errors: Sequence[float] = ()

    @property
    def product(self) -> Tensor:
        """The matrix that the factors stand for."""
        return self.B @ self.C


def check_rank(rank: int, shape: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless 1 ≤ rank ≤ min(n, m), and ``TypeError`` unless it is a whole number."""
    if not 1 <= operator.index(rank) <= min(shape):
        raise ValueError(f"rank {rank} is impossible for a {shape[0]}×{shape[1]} matrix; allowed: 1 to {min(shape)}")


def optimal_errors(s: Tensor) -> Tensor:
    """Return the least ‖A − B·C‖_F at ranks 0 … k, √(Σ_{i>r} σᵢ²) (Eckart & Young 1936).

    ``s`` are the singular values (k,) of A, largest first.

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
    return Factors(B.to(A), C.to(A))


@torch.no_grad()
def alternating_least_squares(A: Tensor, rank: int, *, sweeps: int, seed: int = 0) -> Factors:
    """Minimise ‖A − B·C‖_F over factors of A (n, m): in each sweep solve for B with C fixed, then for C with B fixed.

    Each solution depends only on the space that the other factor spans. So that factor is orthonormalised first (QR),
    and least squares becomes one product: B = A·Qᵀ for C's row space Q, then C = Pᵀ·A for B's column space P. This is
    subspace iteration on AᵀA: the error falls like (σ_{r+1}/σ_r)^{4k} towards the optimum (Golub & Van Loan,
    section 8.2.4). ``seed`` draws the starting factors.

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


class SVD(NamedTuple):
    """A matrix's thin singular value decomposition, U·diag(s)·Vh, from which factors of any rank are cut."""

    U: Tensor
    s: Tensor
    Vh: Tensor

    @classmethod
    def of(cls, A: Tensor) -> "SVD":
        """Decompose A (n, m) into U (n, k), s (k,), Vh (k, m), k = min(n, m), in float32 at least."""
        return cls(*torch.linalg.svd(A.detach().to(precise(A)), full_matrices=False))

    def factors(self, rank: int) -> Factors:
        """Return the best factors of that rank, B = U·√S and C = √S·Vᵀ: balanced, ‖B‖_F = ‖C‖_F."""
        check_rank(rank, (len(self.U), self.Vh.shape[1]))
        root = self.s[:rank].sqrt()
        left = torch.where(root > 0, root, 1)  # with both factors at zero, no gradient would ever reach them
        return Factors(self.U[:, :rank] * left, root[:, None] * self.Vh[:rank])


def truncated_svd(A: Tensor, rank: int) -> Factors:
    """Return the best factors of A at that rank (Eckart & Young 1936).

    Examples
    --------
    >>> factors = truncated_svd(torch.eye(6), 4)
    >>> factors.B.shape, factors.C.shape
    (torch.Size([6, 4]), torch.Size([4, 6]))
    """
    return SVD.of(A).factors(rank)


class ActivationAwareSVD(NamedTuple):
    """The directions of a layer's outputs, by their size over its inputs or by what they do to the model's outputs.

    The least ‖(A − B·C)·X‖_F at rank r has B·C·X equal to the best rank-r approximation of A·X (Eckart & Young 1936),
    which is P·Pᵀ·A·X for the first r left singular vectors P of A·X. So B = P and C = Pᵀ·A, and X need not be
    inverted: pixels that never change make its second moment singular and do no harm. P are the eigenvectors of the
    second moment of the outputs. To whiten by the root of the inputs' moment, cut and unwhiten (as in Chen et al. 2021,
    *DRONE*, NeurIPS 2021) gives the same outputs.

    Fisher-weighted: a change Δ of a layer's outputs changes the model's outputs by J·Δ to first order, J being their
    derivative. Taken as independent of each other, the two make a mean square of tr(G·E[Δ·Δᵀ]) with G = E[Jᵀ·J]: the
    approximation of K-FAC (Martens & Grosse 2015, arXiv 1503.05671, section 3). With a root W of G, Wᵀ·W = G, that is
    the mean square of W·Δ, so W·A takes the place of A: B = W⁻¹·P and C = Pᵀ·W·A.

    Attributes
    ----------
    expand : Tensor, shape (n, k), float64
        W⁻¹·P, k = min(n, m).
    s : Tensor, shape (k,), float64
        The root mean square of the outputs, or of what they do to the model's outputs, along each direction, the
        largest first.
    project : Tensor, shape (k, n), float64
        Pᵀ·W.
    A : Tensor, shape (n, m)
        The matrix.
    """

    expand: Tensor
    s: Tensor
    project: Tensor
    A: Tensor

    @classmethod
    def of(cls, A: Tensor, moment: Tensor, fisher: Tensor | None = None) -> "ActivationAwareSVD":
        """Decompose the outputs of A (n, m), given their own second moment.

        Parameters
        ----------
        A : Tensor, shape (n, m)
        moment : Tensor, shape (n, n)
            E[y·yᵀ] of the outputs y = A·x: A·M·Aᵀ for inputs of second moment M. Where it is zero, all inputs count
            alike. Of a tall matrix also (m, m), in the coordinates of :func:`column_basis`.
        fisher : Tensor, shape as ``moment``, optional
            G = E[Jᵀ·J]. ``DAMPING`` of its mean eigenvalue is added to all of them, as in K-FAC (section 6.3): a change
            that is large where G is small leaves the first order. Where G is zero, all outputs count alike.

        Raises
        ------
        ValueError
            A moment has another shape, or holds NaN or infinity.
        """
        A = A.detach()
        k = len(A) if len(moment) == len(A) else min(A.shape)
        for given in (moment,) if fisher is None else (moment, fisher):
            if given.shape != (k, k) or not given.isfinite().all():
                raise ValueError(
                    f"a moment of outputs of a {A.shape[0]}×{A.shape[1]} matrix must be finite and "
                    f"{len(A)}×{len(A)}; given: {tuple(given.shape)}"
                )
        basis = column_basis(A) if k < len(A) else None
        if not moment.any():
            rows = (A if basis is None else basis.T @ A).double()
            moment = rows @ rows.T
        root, inverse = _damped_roots(fisher.double()) if fisher is not None and fisher.any() else (None, None)
        moment = moment.double()
        squares, P = torch.linalg.eigh(moment if root is None else root @ moment @ root.T)
        P = P.flip(1)[:, : min(A.shape)]
        s = squares.flip(0)[: P.shape[1]].clamp_min(0).sqrt()
        expand, project = (P, P.T) if root is None else (inverse @ P, P.T @ root)
        if basis is not None:
            expand, project = basis.double() @ expand, project @ basis.double().T
        return cls(expand, s, project, A)

    def unweighted(self) -> "ActivationAwareSVD":
        """Return the same without G: fitted to the layer's outputs, whose second moment is expand·diag(s²)·expandᵀ."""
        U, s, _ = torch.linalg.svd(self.expand * self.s, full_matrices=False)
        return ActivationAwareSVD(U, s, U.T, self.A)

    def relative(self) -> "ActivationAwareSVD":
        """Return the same with s as a share of the whole."""
        return self._replace(s=self.s / self.s.norm().clamp_min(torch.finfo(self.s.dtype).tiny))

    def factors(self, rank: int) -> Factors:
        """Return the factors of that rank with the least error, balanced: BᵀB = C·Cᵀ."""
        check_rank(rank, self.A.shape)
        Q, R = torch.linalg.qr(self.expand[:, :rank])
        balanced = SVD.of(R @ self.project[:rank] @ self.A.double()).factors(rank)
        return Factors((Q @ balanced.B).to(self.A), balanced.C.to(self.A))


Decomposition = SVD | ActivationAwareSVD  # ``optimal_errors(s)`` are the errors of the factors of rank 0 to len(s)


def column_basis(A: Tensor) -> Tensor | None:
    """Return orthonormal columns (n, m) that span those of a tall matrix (n, m), in which all its outputs lie.

    The moments of a head of 30,000 classes take gigabytes; in this basis they are as small as its inputs'.
    """
    return torch.linalg.qr(A.detach().to(precise(A))).Q if len(A) > A.shape[1] else None


def precise(tensor: Tensor) -> torch.dtype:
    """Return the precision to sum and to decompose in: float32 at least."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _damped_roots(G: Tensor) -> tuple[Tensor, Tensor]:
    """Return W with Wᵀ·W = G + ``DAMPING``·tr(G)/n·I, and its inverse."""
    values, vectors = torch.linalg.eigh(G)
    root = (values.clamp_min(0) + DAMPING * values.mean()).sqrt()
    return root[:, None] * vectors.T, vectors / root

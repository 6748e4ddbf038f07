"""Factors of a matrix against Eckart & Young's optimum, by SciPy and NumPy."""

from functools import partial

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import draw
from torch import nn

from lowrank_helpers import factorization
from lowrank_helpers.factorization import SVD, ActivationAwareSVD, alternating_least_squares, truncated_svd

SIZE = st.integers(1, 10)
_matrix = partial(draw, dtype=torch.float64)


def _least_error(A, r):
    return np.sqrt((scipy.linalg.svdvals(A.numpy())[r:] ** 2).sum())


@st.composite
def _matrix_inputs_and_rank(draw):
    n, m = draw(SIZE), draw(SIZE)
    seed = draw(st.integers(0, 99))
    samples = draw(st.integers(1, 15))  # fewer than m: a singular moment
    return _matrix(n, m, seed=seed), _matrix(m, samples, seed=seed + 1000), draw(st.integers(1, min(n, m)))


@given(_matrix_inputs_and_rank())
def test_truncation_reaches_the_optimum_with_balanced_factors(case):
    A, _, r = case
    factors = truncated_svd(A, r)
    assert factors.B.shape == (len(A), r) and factors.C.shape == (r, A.shape[1])
    error = (A - factors.product).norm().item()
    assert error == pytest.approx(_least_error(A, r), abs=1e-10)
    errors = factorization.optimal_errors(SVD.of(A).s)
    assert errors[r].item() == pytest.approx(error, abs=1e-10)
    assert len(errors) == min(A.shape) + 1 and errors[0].item() == pytest.approx(A.norm().item()) and errors[-1] == 0
    torch.testing.assert_close(factors.B.T @ factors.B, factors.C @ factors.C.T, atol=1e-10, rtol=0)


@given(_matrix_inputs_and_rank())
def test_alternating_never_raises_the_error_nor_beats_the_optimum(case):
    A, _, r = case
    factors = alternating_least_squares(A, r, sweeps=8)
    errors = np.array(factors.errors)
    assert len(errors) == 9
    slack = 1e-12 * A.norm().item()
    assert (np.diff(errors) <= slack).all()
    assert (errors >= _least_error(A, r) - slack).all()
    assert errors[-1] == pytest.approx((A - factors.product).norm().item(), abs=1e-10)


def test_alternating_least_squares_solves_each_factor_exactly_and_reaches_the_optimum():
    A = _matrix(30, 20)
    C = factorization.random_factors(A, 7, seed=0).C
    B = scipy.linalg.lstsq(C.T.numpy(), A.T.numpy())[0].T
    C = scipy.linalg.lstsq(B, A.numpy())[0]
    np.testing.assert_allclose(alternating_least_squares(A, 7, sweeps=1, seed=0).product, B @ C, atol=1e-10)
    for r in (1, 7, 20):
        error = alternating_least_squares(A, r, sweeps=200).errors[-1]
        assert error == pytest.approx(_least_error(A, r), rel=1e-3, abs=1e-9)
    assert alternating_least_squares(0 * A, 2, sweeps=2).errors == [0, 0, 0]


def test_random_factors_have_the_norm_of_the_matrix_on_average():
    A = 7 * _matrix(40, 30)
    squares = [factorization.random_factors(A, 5, seed=seed).product.norm().item() ** 2 for seed in range(100)]
    assert np.mean(squares) == pytest.approx(A.norm().item() ** 2, rel=0.1)


@pytest.mark.parametrize("make", [truncated_svd, lambda A, rank: alternating_least_squares(A, rank, sweeps=1)])
def test_impossible_ranks_are_refused_and_factors_keep_no_graph(make):
    for rank in (0, -1, 4):
        with pytest.raises(ValueError, match=f"rank {rank} is impossible for a 3×5 matrix; allowed: 1 to 3"):
            make(torch.ones(3, 5), rank)
    factors = make(nn.Linear(6, 5).weight, 2)
    assert not factors.B.requires_grad and not factors.C.requires_grad


def _moment(X):
    return X @ X.T / X.shape[1]


@given(_matrix_inputs_and_rank())
def test_activation_aware_factors_reach_eckart_and_youngs_error_of_the_outputs(case):
    A, X, r = case
    svd = ActivationAwareSVD.of(A, _moment(A @ X))
    factors = svd.factors(r)
    assert factors.B.shape == (len(A), r) and factors.C.shape == (r, A.shape[1])
    error = ((A - factors.product) @ X).norm().item()
    scale = (A @ X).norm().item()
    assert error == pytest.approx(_least_error(A @ X, r), abs=1e-6 * scale)
    assert factorization.optimal_errors(svd.s)[r].item() * X.shape[1] ** 0.5 == pytest.approx(error, abs=1e-6 * scale)
    torch.testing.assert_close(factors.B.T @ factors.B, factors.C @ factors.C.T, atol=1e-10, rtol=0)


@given(_matrix_inputs_and_rank(), st.integers(0, 12), st.booleans())
def test_fisher_weighted_factors_reach_eckart_and_youngs_error_of_the_damped_outputs(case, n_outputs, by_basis):
    A, X, r = case
    J = _matrix(n_outputs, len(A), seed=7)  # fewer outputs than the layer has: only damping sees some directions
    basis = factorization.column_basis(A) if by_basis and len(A) > A.shape[1] else torch.eye(len(A)).double()
    Y, G = basis.T @ A @ X, basis.T @ J.T @ J @ basis
    damping = factorization.DAMPING * G.trace() / len(G) if n_outputs else 1
    svd = ActivationAwareSVD.of(A, _moment(Y), G)
    factors = svd.factors(r)
    W = scipy.linalg.sqrtm((G + damping * torch.eye(len(G))).numpy()).real @ basis.numpy().T
    s = scipy.linalg.svdvals(W @ (A @ X).numpy()) / X.shape[1] ** 0.5
    best, scale = np.linalg.norm(s[r:]), np.linalg.norm(s)
    error = np.linalg.norm(W @ ((A - factors.product) @ X).numpy()) / X.shape[1] ** 0.5
    assert error == pytest.approx(best, abs=1e-5 * scale)
    assert factorization.optimal_errors(svd.s)[r].item() == pytest.approx(best, abs=1e-5 * scale)
    torch.testing.assert_close(factors.B.T @ factors.B, factors.C @ factors.C.T, atol=1e-6 * scale, rtol=1e-6)
    fitted = ActivationAwareSVD.of(A, _moment(Y)).factors(r).product
    assert ((svd.unweighted().factors(r).product - fitted) @ X).norm() <= 1e-5 * (A @ X).norm()


def test_with_white_inputs_and_outputs_that_matter_alike_all_factors_are_the_truncated_svds():
    A = _matrix(12, 9)
    svd = ActivationAwareSVD.of(A, A @ A.T, 4 * torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close(svd.factors(4).product, truncated_svd(A, 4).product)
    torch.testing.assert_close(svd.s, 2 * (1 + factorization.DAMPING) ** 0.5 * SVD.of(A).s)
    torch.testing.assert_close(svd.relative().s, SVD.of(A).s / A.norm())


@pytest.mark.parametrize("A", [torch.zeros(4, 3), torch.ones(4, 3)])
@pytest.mark.parametrize("shape", [(4, 4), (3, 3)])
def test_whatever_is_zero_never_are_both_factors(A, shape):
    zero = torch.zeros(shape, dtype=torch.float64)
    for fisher in (None, zero):
        factors = ActivationAwareSVD.of(A, zero, fisher).factors(1)
        assert factors.B.any() and factors.C.any() == A.any()
        torch.testing.assert_close(factors.product, A)


@pytest.mark.parametrize(
    "moments", [(torch.eye(2),), (torch.full((4, 4), torch.nan),), (torch.eye(4), torch.eye(3)), (torch.ones(4),)]
)
def test_moments_that_are_none_of_the_outputs_are_refused(moments):
    with pytest.raises(ValueError, match="outputs of a 4×3 matrix must be finite and 4×4; given"):
        ActivationAwareSVD.of(torch.ones(4, 3), *moments)

"""Factors against Eckart & Young's optimum, and networks made of factors against their dense originals."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowrank_helpers import factorization
from lowrank_helpers.factorization import (
    SVD,
    alternating_gradient_descent,
    alternating_least_squares,
    decompose,
    factorize,
    factorize_standard,
    optimal_errors,
    truncated_svd,
)
from lowrank_helpers.models import FactorizedLinear, linear_layers, mlp, n_parameters

SIZE = st.integers(1, 10)


def _matrix(n, m, seed=0, dtype=torch.float64):
    return torch.randn(n, m, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _optimum(A, r):
    """Return the least error by SciPy."""
    return np.sqrt((scipy.linalg.svdvals(A.numpy())[r:] ** 2).sum())


@st.composite
def _matrix_and_rank(draw):
    n, m = draw(SIZE), draw(SIZE)
    return _matrix(n, m, draw(st.integers(0, 99))), draw(st.integers(1, min(n, m)))


@given(_matrix_and_rank())
def test_truncation_reaches_the_optimum_with_balanced_factors(case):
    A, r = case
    factors = truncated_svd(A, r)
    assert factors.B.shape == (len(A), r) and factors.C.shape == (r, A.shape[1])
    error = (A - factors.product).norm().item()
    assert error == pytest.approx(_optimum(A, r), abs=1e-10)
    assert optimal_errors(SVD.of(A).s)[r].item() == pytest.approx(error, abs=1e-10)
    torch.testing.assert_close(factors.B.T @ factors.B, factors.C @ factors.C.T, atol=1e-10, rtol=0)


def test_optimal_errors_go_from_the_norm_to_zero():
    A = _matrix(6, 4)
    errors = optimal_errors(SVD.of(A).s)
    assert len(errors) == 5
    assert errors[0].item() == pytest.approx(A.norm().item()) and errors[-1] == 0
    assert (errors.diff() < 0).all()


@given(_matrix_and_rank(), st.sampled_from([alternating_least_squares, alternating_gradient_descent]))
def test_alternating_never_raises_the_error_nor_beats_the_optimum(case, method):
    A, r = case
    count = {"sweeps" if method is alternating_least_squares else "steps": 8}
    factors = method(A, r, **count)
    errors = np.array(factors.errors)
    assert len(errors) == 9
    slack = 1e-12 * A.norm().item()
    assert (np.diff(errors) <= slack).all()
    assert (errors >= _optimum(A, r) - slack).all()
    assert errors[-1] == pytest.approx((A - factors.product).norm().item(), abs=1e-10)


def test_both_descents_reach_the_optimum():
    A = _matrix(30, 20)
    for r in (1, 7, 20):
        optimum = _optimum(A, r)
        exact = alternating_least_squares(A, r, sweeps=200).errors[-1]
        stepped = alternating_gradient_descent(A, r, steps=4000).errors[-1]
        assert exact == pytest.approx(optimum, rel=1e-3, abs=1e-9)
        assert stepped == pytest.approx(optimum, rel=1e-2, abs=1e-2)


def test_least_squares_solves_each_factor_exactly():
    A = _matrix(12, 9)
    C = factorization.random_factors(A, 3, seed=0).C
    B = scipy.linalg.lstsq(C.T.numpy(), A.T.numpy())[0].T
    C = scipy.linalg.lstsq(B, A.numpy())[0]
    factors = alternating_least_squares(A, 3, sweeps=1, seed=0)
    np.testing.assert_allclose(factors.product.numpy(), B @ C, atol=1e-10)


def test_random_factors_have_the_norm_of_the_matrix_on_average():
    A = 7 * _matrix(40, 30)
    squares = [factorization.random_factors(A, 5, seed=seed).product.norm().item() ** 2 for seed in range(100)]
    assert np.mean(squares) == pytest.approx(A.norm().item() ** 2, rel=0.1)


@pytest.mark.parametrize("method", [alternating_least_squares, alternating_gradient_descent])
def test_descents_of_a_zero_matrix_stay_at_zero(method):
    count = {"sweeps" if method is alternating_least_squares else "steps": 2}
    assert method(torch.zeros(4, 3), 2, **count).errors == [0, 0, 0]


def test_descents_keep_no_graph_of_a_trainable_weight():
    weight = nn.Linear(6, 5).weight
    for factors in (alternating_least_squares(weight, 2, sweeps=2), alternating_gradient_descent(weight, 2, steps=2)):
        assert not factors.B.requires_grad and not factors.C.requires_grad


@pytest.mark.parametrize("rank", [0, -1, 4])
@pytest.mark.parametrize(
    "make",
    [
        truncated_svd,
        lambda A, rank: alternating_least_squares(A, rank, sweeps=1),
        lambda A, rank: alternating_gradient_descent(A, rank, steps=1),
    ],
)
def test_impossible_ranks_are_refused_with_those_allowed(make, rank):
    with pytest.raises(ValueError, match=f"rank {rank} is impossible for a 3×5 matrix; allowed: 1 to 3"):
        make(torch.ones(3, 5), rank)


def _model():
    return nn.Sequential(mlp([20, 16, 12, 10], "tanh", seed=0), nn.Linear(10, 4)).double()


@given(st.dictionaries(st.sampled_from(["0.fc1", "0.fc2", "0.fc3", "1"]), st.integers(1, 4)))
def test_a_factorised_model_is_the_model_of_truncated_weights(ranks):
    model = _model()
    factorized = factorize(model, ranks, decompose(model))
    x = _matrix(7, 20)
    for name, layer in linear_layers(model).items():
        if name in ranks:
            assert isinstance(factorized.get_submodule(name), FactorizedLinear)
            layer.weight.data = truncated_svd(layer.weight, ranks[name]).product
    torch.testing.assert_close(factorized(x), model(x))


def test_at_full_rank_a_factorised_model_is_the_model():
    model = _model()
    full = {name: min(layer.weight.shape) for name, layer in linear_layers(model).items()}
    x = _matrix(7, 20)
    torch.testing.assert_close(factorize(model, full)(x), model(x))


def test_factorising_leaves_the_model_alone():
    model = _model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    factorized = factorize(model, {"1": 2})
    for parameter in factorized.parameters():
        parameter.data.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_standard_factors_start_as_stacked_layers_would():
    model = mlp([784, 500, 10], seed=0)
    factorized = factorize_standard(model, {"fc1": 100}, seed=1)
    stacked = nn.Sequential(nn.Linear(784, 100, bias=False), nn.Linear(100, 500, bias=False))
    for ours, theirs in ((factorized.fc1.C, stacked[0].weight), (factorized.fc1.B, stacked[1].weight)):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours.std(), theirs.std(), rtol=0.02, atol=0)
        torch.testing.assert_close(ours.max(), theirs.max(), rtol=0.01, atol=0)
    assert n_parameters(factorized) == 100 * (784 + 500) + 5000


def test_standard_factors_are_drawn_from_the_seed_whatever_the_order_of_ranks():
    model = mlp([20, 16, 12, 10], seed=0)
    one = factorize_standard(model, {"fc1": 3, "fc2": 4}, seed=1)
    again = factorize_standard(model, {"fc2": 4, "fc1": 3}, seed=1)
    other = factorize_standard(model, {"fc1": 3, "fc2": 4}, seed=2)
    assert torch.equal(one.fc1.B, again.fc1.B) and torch.equal(one.fc2.C, again.fc2.C)
    assert not torch.equal(one.fc1.B, other.fc1.B)


def test_wrong_layers_and_ranks_of_a_model_are_refused():
    with pytest.raises(ValueError, match=r"fc9: no linear layer of the model; allowed: fc1, fc2"):
        factorize(mlp([6, 5, 4], seed=0), {"fc9": 1})
    with pytest.raises(ValueError, match="rank 6 is impossible for a 5×6 matrix"):
        factorize(mlp([6, 5, 4], seed=0), {"fc1": 6})

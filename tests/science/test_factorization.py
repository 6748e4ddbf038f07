"""Factors against Eckart & Young's optimum, and networks made of factors against their dense originals."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowrank_helpers import calibration, factorization
from lowrank_helpers.factorization import (
    SVD,
    ActivationAwareSVD,
    alternating_least_squares,
    decompose,
    factorize,
    factorize_standard,
    fitted_factors,
    input_moments,
    optimal_errors,
    sensitivities,
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


@given(_matrix_and_rank())
def test_alternating_never_raises_the_error_nor_beats_the_optimum(case):
    A, r = case
    factors = alternating_least_squares(A, r, sweeps=8)
    errors = np.array(factors.errors)
    assert len(errors) == 9
    slack = 1e-12 * A.norm().item()
    assert (np.diff(errors) <= slack).all()
    assert (errors >= _optimum(A, r) - slack).all()
    assert errors[-1] == pytest.approx((A - factors.product).norm().item(), abs=1e-10)


def test_alternating_least_squares_reaches_the_optimum():
    A = _matrix(30, 20)
    for r in (1, 7, 20):
        error = alternating_least_squares(A, r, sweeps=200).errors[-1]
        assert error == pytest.approx(_optimum(A, r), rel=1e-3, abs=1e-9)


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


def test_factors_of_a_zero_matrix_stay_at_zero():
    assert alternating_least_squares(torch.zeros(4, 3), 2, sweeps=2).errors == [0, 0, 0]


def test_factors_keep_no_graph_of_a_trainable_weight():
    factors = alternating_least_squares(nn.Linear(6, 5).weight, 2, sweeps=2)
    assert not factors.B.requires_grad and not factors.C.requires_grad


@pytest.mark.parametrize("rank", [0, -1, 4])
@pytest.mark.parametrize("make", [truncated_svd, lambda A, rank: alternating_least_squares(A, rank, sweeps=1)])
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


@st.composite
def _matrix_inputs_and_rank(draw):
    n, m = draw(SIZE), draw(SIZE)
    seed = draw(st.integers(0, 99))
    samples = draw(st.integers(1, 15))  # fewer than m: a singular moment
    return _matrix(n, m, seed), _matrix(m, samples, seed + 1000), draw(st.integers(1, min(n, m)))


def _moment(X):
    return X @ X.T / X.shape[1]


def _optimum_over(A, X, r):
    """Return the least √(mean ‖(A − B·C)·x‖²) by whitening, cutting and unwhitening in NumPy and SciPy."""
    A, X = A.numpy(), X.numpy()
    values, vectors = scipy.linalg.eigh(X @ X.T / X.shape[1])
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    U, s, Vh = scipy.linalg.svd(A @ root, full_matrices=False)
    cut = (U[:, :r] * s[:r]) @ Vh[:r] @ np.linalg.pinv(root, rcond=1e-6)
    return np.linalg.norm((A - cut) @ X) / np.sqrt(X.shape[1])


@given(_matrix_inputs_and_rank())
def test_fitted_factors_reach_the_least_output_error_with_balanced_factors(case):
    A, X, r = case
    factors = fitted_factors(A, _moment(X), r)
    assert factors.B.shape == (len(A), r) and factors.C.shape == (r, A.shape[1])
    error = ((A - factors.product) @ X).norm().item() / X.shape[1] ** 0.5
    scale = (A @ X).norm().item()
    assert error == pytest.approx(_optimum_over(A, X, r), abs=1e-6 * scale)
    assert optimal_errors(ActivationAwareSVD.of(A, _moment(X)).s)[r].item() == pytest.approx(error, abs=1e-6 * scale)
    torch.testing.assert_close(factors.B.T @ factors.B, factors.C @ factors.C.T, atol=1e-10, rtol=0)


@given(_matrix_inputs_and_rank(), st.integers(0, 12), st.booleans())
def test_fisher_weighted_factors_reach_eckart_and_youngs_error_of_the_damped_outputs(case, n_outputs, by_basis):
    A, X, r = case
    J = _matrix(n_outputs, len(A), seed=7)  # fewer outputs than the layer has: only damping sees some directions
    basis = torch.linalg.qr(A).Q if by_basis else torch.eye(len(A), dtype=torch.float64)
    Y, G = basis.T @ A @ X, basis.T @ J.T @ J @ basis
    damping = factorization.DAMPING * G.trace() / len(G) if n_outputs else 1
    svd = ActivationAwareSVD.of_outputs(A, _moment(Y), G, basis if by_basis else None)
    factors = svd.factors(r)
    W = scipy.linalg.sqrtm((G + damping * torch.eye(len(G))).numpy()).real @ basis.numpy().T
    s = scipy.linalg.svdvals(W @ (A @ X).numpy()) / X.shape[1] ** 0.5
    best, scale = np.linalg.norm(s[r:]), np.linalg.norm(s)
    error = np.linalg.norm(W @ ((A - factors.product) @ X).numpy()) / X.shape[1] ** 0.5
    assert error == pytest.approx(best, abs=1e-5 * scale)
    assert optimal_errors(svd.s)[r].item() == pytest.approx(best, abs=1e-5 * scale)
    assert factors.B.shape == (len(A), r) and factors.C.shape == (r, A.shape[1])
    torch.testing.assert_close(factors.B.T @ factors.B, factors.C @ factors.C.T, atol=1e-6 * scale, rtol=1e-6)
    fitted = fitted_factors(A, _moment(X), r).product
    assert ((svd.unweighted().factors(r).product - fitted) @ X).norm() <= 1e-5 * (A @ X).norm()


def test_where_all_outputs_matter_alike_fisher_weighted_factors_are_those_by_outputs():
    A, X = _matrix(12, 9), _matrix(9, 20, seed=1)
    svd = ActivationAwareSVD.of_outputs(A, A @ _moment(X) @ A.T, 4 * torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close(svd.factors(4).product, fitted_factors(A, _moment(X), 4).product)
    torch.testing.assert_close(svd.s, 2 * (1 + factorization.DAMPING) ** 0.5 * ActivationAwareSVD.of(A, _moment(X)).s)


@pytest.mark.parametrize("A", [torch.zeros(4, 3), torch.ones(4, 3)])
def test_whatever_is_zero_never_are_both_factors(A):
    zero = torch.zeros(4, 4, dtype=torch.float64)
    for sensitivity in (None, zero):
        factors = ActivationAwareSVD.of_outputs(A, zero, sensitivity).factors(1)
        assert factors.B.any() and factors.C.any() == A.any()
        torch.testing.assert_close(factors.product, A)


def _convolutional(inplace):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 3, 2), nn.ReLU(inplace=inplace), nn.Flatten(), nn.Linear(27, 5),
        nn.ReLU(inplace=inplace), nn.Linear(5, 4),
    ).double()  # fmt: skip


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("inplace", "task"), [(False, None), (True, "classification"), (False, "classification")])
def test_sensitivities_are_the_squared_jacobians_of_logits_without_their_mean_where_asked(inplace, frozen, task):
    model = _convolutional(inplace).requires_grad_(not frozen)
    x = _matrix(3, 16)
    after = {"1": _convolutional(False)[2:], "4": _convolutional(False)[5:], "6": nn.Identity()}
    found = sensitivities(model, x.repeat(4000, 1), ["6", "1", "4"], task=task, batch_size=700)
    assert list(found) == ["6", "1", "4"]
    for name, rest in after.items():
        outputs = _convolutional(False)[: int(name) + 1](x).detach()
        expected = 0
        for output in outputs:
            J = torch.func.jacrev(lambda one, rest=rest: rest(one[None])[0])(output)
            J = (J - J.mean(dim=0) if task else J).reshape(4, len(output), -1)
            expected = expected + torch.einsum("kip,kjp->ij", J, J) / len(x)
        torch.testing.assert_close(found[name], expected.double(), rtol=0, atol=0.06 * expected.abs().max().item())
    assert not any(layer._forward_hooks for layer in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_sensitivities_of_wrong_layers_are_refused():
    model = _convolutional(False)
    with pytest.raises(ValueError, match="fc9: no linear layer or convolution; allowed: 1, 4, 6"):
        sensitivities(model, _matrix(3, 16), ["fc9"])


@pytest.mark.parametrize("classes", [4, 1])
def test_classes_are_the_second_axis_of_images_and_else_the_last(classes):
    for shape, axis in (((5, classes), 1), ((5, 7, classes), 2), ((5, classes, 2, 3), 1)):
        logits = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        centred = calibration.without_mean(logits)
        torch.testing.assert_close(centred.softmax(axis), logits.softmax(axis))
        assert classes == 1 or centred.sum(axis).abs().max() < 1e-5


@pytest.mark.parametrize("stop", [torch.Tensor.detach, torch.round, torch.no_grad()(lambda x: x.clone()), torch.sign])
def test_where_the_outputs_have_no_derivative_sensitivities_are_zero(stop):
    model = nn.Sequential(nn.Linear(3, 5), nn.Identity(), nn.Linear(5, 2))
    model[1].register_forward_hook(lambda layer, arguments, output: stop(output))
    found = sensitivities(model, _matrix(9, 3).float(), ["0", "2"])
    assert not found["0"].any() and found["2"].diag().all()


def test_outputs_without_a_finite_derivative_are_refused():
    steep = nn.Sequential(nn.Linear(3, 2), nn.Identity())
    nn.utils.vector_to_parameters(torch.zeros(8), steep.parameters())
    steep[1].register_forward_hook(lambda layer, arguments, output: output.sqrt())
    with pytest.raises(ValueError, match="0: the derivative of the outputs is NaN or infinite there"):
        sensitivities(steep, torch.randn(20, 3), ["0"])
    with pytest.raises(ValueError, match="task 'regression' is unknown; allowed: None, 'classification'"):
        sensitivities(steep, torch.randn(20, 3), ["0"], task="regression")


def test_with_white_inputs_the_fit_is_the_truncated_svd():
    A = _matrix(12, 9)
    white = torch.eye(9, dtype=torch.float64)
    torch.testing.assert_close(fitted_factors(A, white, 4).product, truncated_svd(A, 4).product)


def test_a_zero_matrix_and_zero_inputs_are_fitted():
    for A, moment in ((torch.zeros(4, 3), torch.eye(3)), (torch.ones(4, 3), torch.zeros(3, 3))):
        factors = fitted_factors(A, moment, 2)
        assert factors.product.isfinite().all()
        assert ((A - factors.product) @ moment == 0).all()


def test_impossible_moments_and_ranks_are_refused():
    A = torch.ones(3, 5)
    with pytest.raises(ValueError, match=r"moment of inputs of a 3×5 matrix must be 5×5, not \(3, 3\)"):
        fitted_factors(A, torch.eye(3), 1)
    with pytest.raises(ValueError, match="NaN or infinite"):
        fitted_factors(A, torch.full((5, 5), torch.nan), 1)
    with pytest.raises(ValueError, match="rank 4 is impossible for a 3×5 matrix; allowed: 1 to 3"):
        fitted_factors(A, torch.eye(5), 4)


def test_moments_are_those_of_what_enters_each_layer(monkeypatch):
    monkeypatch.setattr(calibration, "MOMENT_BATCH", 3)
    model, x = _model(), _matrix(7, 20)
    moments = input_moments(model, x, ["1", "0.fc2", "0.fc1"])
    assert list(moments) == ["1", "0.fc2", "0.fc1"]
    hidden = model[0].act1(model[0].fc1(x)).detach().numpy()
    last = model[0](x).detach().numpy()
    np.testing.assert_allclose(moments["0.fc1"].numpy(), x.numpy().T @ x.numpy() / 7)
    np.testing.assert_allclose(moments["0.fc2"].numpy(), hidden.T @ hidden / 7)
    np.testing.assert_allclose(moments["1"].numpy(), last.T @ last / 7)
    assert not any(layer._forward_pre_hooks for layer in model.modules())


def test_moments_count_every_position_of_a_sequence_and_sum_in_double():
    layer, tokens = nn.Sequential(nn.Linear(4, 2)), _matrix(6, 5 * 4).float().reshape(6, 5, 4)
    moment = input_moments(layer, tokens, ["0"])["0"]
    rows = tokens.reshape(30, 4).double()
    assert moment.dtype == torch.float64
    torch.testing.assert_close(moment, rows.T @ rows / 30, atol=1e-6, rtol=1e-6)


def test_moments_of_wrong_layers_are_refused():
    model = _model()
    with pytest.raises(ValueError, match=r"fc9: no linear layer of the model; allowed: 0.fc1, 0.fc2, 0.fc3, 1"):
        input_moments(model, _matrix(7, 20), ["fc9"])


@pytest.mark.parametrize("measure", [input_moments, sensitivities])
def test_measuring_without_inputs_or_at_a_layer_that_is_not_called_is_refused(measure):
    with pytest.raises(ValueError, match="at least one input"):
        measure(_model(), _matrix(7, 20)[:0], ["1"])
    idle = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    idle.forward = idle["a"].forward
    with pytest.raises(ValueError, match="b: the model does not call this layer"):
        measure(idle, torch.ones(2, 3), ["a", "b"])


def test_factors_that_know_the_data_lose_less_of_the_outputs_than_those_that_do_not():
    model = _model()
    x = _matrix(300, 20) * torch.logspace(-2, 0, 20, dtype=torch.float64)
    ranks = {"0.fc1": 3, "0.fc2": 3}
    whole = model[0].fc1(x)
    losses = {}
    for name, svds in (("plain", decompose(model)), ("data", decompose(model, input_moments(model, x, ranks)))):
        losses[name] = (factorize(model, ranks, svds)[0].fc1(x) - whole).norm().item()
    assert losses["data"] < 0.9 * losses["plain"]

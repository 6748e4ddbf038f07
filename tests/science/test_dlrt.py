"""DLRT: its step against one of whole matrices in NumPy, what holds whatever the weights, and the ranks it finds."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_helpers.data import Dataset
from lowrank_helpers.dlrt import MOMENTUM, RATE, DLRTLinear, factorized, kept, rank_adaptive
from lowrank_helpers.factorization import SVD, factorize
from lowrank_helpers.models import FactorizedLinear, mlp, n_parameters
from lowrank_helpers.series.store import Store
from lowrank_helpers.training import Recipe, evaluate, fit

N, M, LEARNING_RATE = 14, 9, 0.01
STEP = LEARNING_RATE * RATE * N**0.5  # the spectral norm of a step


def _layer(singular_values, tolerance, seed=0):
    """Return a layer (14, 9) in float64 with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    r = len(singular_values)
    U, V = (torch.linalg.qr(torch.randn(n, r, generator=generator, dtype=torch.float64)).Q for n in (N, M))
    return DLRTLinear(U * torch.tensor(singular_values, dtype=torch.float64), V.T, tolerance)


def _take_steps(layer, targets, x):
    """Step once for each target, downhill on half the squared distance of the outputs; return each W and its G."""
    optimiser = torch.optim.Adam(layer.parameters(), lr=LEARNING_RATE)
    met = []
    for target in targets:
        before = layer.weight.detach().numpy()
        optimiser.zero_grad()
        (0.5 * (layer(x) - target).square().sum()).backward()
        layer.step(optimiser)
        optimiser.step()
        G = (x.numpy() @ before.T - target.numpy()).T @ x.numpy()
        met.append((before, G))
    return met


def _batches(n_steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(30, M, generator=generator, dtype=torch.float64)
    return [torch.randn(30, N, generator=generator, dtype=torch.float64) for _ in range(n_steps)], x


def _onto(columns):
    """Return the projector onto the space of a matrix's columns."""
    P, s, _ = np.linalg.svd(columns, full_matrices=False)
    P = P[:, s > 1e-10 * s[0]]
    return P @ P.T


def _step_of_whole_matrices(W, D, G, rank, tolerance):
    """Do Algorithm 1 with projectors on whole matrices: return W, its mean gradient D and its rank after the step."""
    P, _, Qh = np.linalg.svd(W)
    on_columns, on_rows = P[:, :rank] @ P[:, :rank].T, Qh[:rank].T @ Qh[:rank]
    tangent = D - (np.eye(N) - on_columns) @ D @ (np.eye(M) - on_rows)
    mean = MOMENTUM * tangent + (1 - MOMENTUM) * G
    columns = _onto(np.hstack([P[:, :rank], mean @ on_rows]))
    rows = _onto(np.hstack([Qh[:rank].T, mean.T @ on_columns]))
    D = columns @ mean @ rows
    P, s, Qh = np.linalg.svd(D, full_matrices=False)
    directions = s > 1e-10 * s[0]
    P, s, Qh = np.linalg.svd(W - STEP * P[:, directions] @ Qh[directions])
    rank = next(r for r in range(1, len(s) + 1) if np.linalg.norm(s[r:]) <= tolerance * np.linalg.norm(s))
    return (P[:, :rank] * s[:rank]) @ Qh[:rank], D, rank


@pytest.mark.parametrize("tolerance", [1e-6, 0.02, 0.3])
def test_steps_are_those_of_whole_matrices(tolerance):
    layer = _layer([3.0, 1.0, 0.2], tolerance)
    targets, x = _batches(4)
    W, D, rank = layer.weight.detach().numpy(), np.zeros((N, M)), 3
    for _, G in _take_steps(copy.deepcopy(layer), targets, x):
        W, D, rank = _step_of_whole_matrices(W, D, G, rank, tolerance)
    _take_steps(layer, targets, x)
    np.testing.assert_allclose(layer.weight.detach().numpy(), W, atol=1e-9)
    assert layer.rank == rank


@pytest.mark.parametrize("smallest", [1e-3, 1e-9, 0.0])
def test_small_singular_values_do_not_blow_up_a_step(smallest):
    layer = _layer([3.0, 1.0, smallest], tolerance=0.0)
    before = layer.weight.detach()
    _take_steps(layer, *_batches(1))
    assert torch.linalg.matrix_norm(layer.weight - before, 2).item() == pytest.approx(STEP)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=6), st.floats(0, 0.9))
def test_bases_stay_orthonormal_and_what_is_cut_is_within_the_tolerance(singular_values, tolerance):
    whole, cut = (_layer(singular_values, t) for t in (0.0, tolerance))
    for layer in (whole, cut):
        _take_steps(layer, *_batches(1))
        for basis in (layer.U, layer.V):
            torch.testing.assert_close(basis.T @ basis, torch.eye(layer.rank, dtype=torch.float64))
    assert (whole.weight - cut.weight).norm() <= tolerance * whole.weight.norm() + 1e-9
    assert 1 <= cut.rank <= whole.rank <= 2 * len(singular_values)


def test_bases_are_orthonormal_after_many_steps_in_float32():
    layer = DLRTLinear(torch.randn(40, 8), torch.randn(8, 30), 0.1)
    optimiser = torch.optim.Adam(layer.parameters(), lr=LEARNING_RATE)
    x = torch.randn(64, 30)
    for _ in range(300):
        layer(x).square().sum().backward()
        layer.step(optimiser)
    torch.testing.assert_close(layer.U.T @ layer.U, torch.eye(layer.rank), atol=1e-5, rtol=0)
    torch.testing.assert_close(layer.V.T @ layer.V, torch.eye(layer.rank), atol=1e-5, rtol=0)


def test_without_a_gradient_nothing_moves():
    layer = _layer([3.0, 1.0, 0.2], tolerance=0.0)
    before = layer.weight.detach()
    x = torch.ones(5, M, dtype=torch.float64)
    optimiser = torch.optim.Adam(layer.parameters())
    (0 * layer(x)).sum().backward()
    layer.step(optimiser)
    torch.testing.assert_close(layer.weight.detach(), before)
    layer.step(optimiser)  # nor where no batch has come by
    torch.testing.assert_close(layer.weight.detach(), before)


def test_layer_used_twice_follows_the_sum_of_its_gradients():
    one, two = (_layer([3.0, 1.0], tolerance=0.0) for _ in range(2))
    (target,), x = _batches(1)
    _take_steps(one, [target], x)
    outputs = torch.cat([two(half) for half in x.split(12)])
    (0.5 * (outputs - target).square().sum()).backward()
    two.step(torch.optim.Adam(two.parameters(), lr=LEARNING_RATE))
    torch.testing.assert_close(one.weight, two.weight)


def test_kept_is_the_least_rank_within_the_tolerance():
    s = SVD.of(torch.randn(20, 20, generator=torch.Generator().manual_seed(0))).s
    for tolerance in np.linspace(0, 0.99, 12):
        within = [r for r in range(1, 21) if s[r:].norm() <= tolerance * s.norm()]
        assert kept(s, tolerance) == within[0]


@pytest.fixture(scope="module")
def of_rank_three() -> Dataset:
    """Ten classes that a map of rank 3 from 30 inputs decides."""
    return _of_rank(3)


def _of_rank(rank):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4000, 30, generator=generator)
    directions = torch.linalg.qr(torch.randn(30, rank, generator=generator)).Q
    labels = (images @ directions @ torch.randn(rank, 10, generator=generator)).argmax(dim=1)
    return Dataset("made", images[:3000], labels[:3000], images[:0], labels[:0], images[3000:], labels[3000:], 0.0, 1.0)


def _network(tolerance=0.1):
    """Return a network whose first layer starts at rank 12, small: at once the gradients decide its directions."""
    start = mlp([30, 20, 10], "identity", seed=0)
    start.fc1.weight.data *= 0.1
    return rank_adaptive(factorize(start, {"fc1": 12}), tolerance)


@pytest.mark.parametrize("rank", [3, 4])
def test_rank_of_what_is_learnt_is_found(rank):
    """Steps move idle directions too, to about 0.4 of the others: the tolerance is above 0.4/√rank."""
    network = _network(tolerance=0.25)
    history = fit(network, _of_rank(rank), Recipe(epochs=8, batch_size=128, learning_rate=0.03))
    assert network.fc1.rank == rank
    assert history.final("test").accuracy > 0.9


def test_factors_answer_as_the_network_does_and_cost_what_factors_cost(of_rank_three):
    network = _network()
    fit(network, of_rank_three, Recipe(epochs=1, batch_size=128, learning_rate=0.03, precision="bfloat16"))
    assert network.fc1.U.dtype == torch.float32
    plain = factorized(network)
    assert isinstance(plain.fc1, FactorizedLinear)
    torch.testing.assert_close(plain(of_rank_three.test_images), network(of_rank_three.test_images))
    assert n_parameters(plain) == network.fc1.rank * (30 + 20) + 200


def test_start_is_the_factorised_network_with_its_bias():
    start = factorize(torch.nn.Sequential(torch.nn.Linear(30, 20)), {"0": 4})
    x = torch.randn(5, 30)
    torch.testing.assert_close(rank_adaptive(start, 0.1)(x), start(x))
    torch.testing.assert_close(factorized(rank_adaptive(start, 0.1))(x), start(x))


def test_second_training_begins_without_the_first_ones_velocity(of_rank_three):
    recipe = Recipe(epochs=1, batch_size=512, learning_rate=0.01)
    network = _network()
    fit(network, of_rank_three, recipe)
    fresh = _network()
    fresh.load_state_dict(network.state_dict())
    for trained in (network, fresh):
        fit(trained, of_rank_three, recipe)
    assert torch.equal(network.fc1.weight, fresh.fc1.weight)
    assert not torch.equal(network.fc1.weight, _network().fc1.weight)


def test_store_gives_back_a_network_whose_rank_has_changed(of_rank_three, tmp_path):
    recipe = Recipe(epochs=1, batch_size=128, learning_rate=0.03)
    trained, loaded, other = _network(), _network(), _network(tolerance=0.5)
    for network in (trained, loaded, other):
        history = Store(tmp_path).trained(network, of_rank_three, recipe)
        assert history.final("test") == evaluate(network, of_rank_three.test_images, of_rank_three.test_labels)
    assert trained.fc1.rank != 12, "or nothing is tested"
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), loaded.parameters(), strict=True))
    assert len(list(tmp_path.iterdir())) == 2, "one for each tolerance"


def test_weights_of_another_shape_are_refused():
    with pytest.raises(RuntimeError, match="size mismatch"):
        _network().load_state_dict(rank_adaptive(factorize(mlp([31, 20, 10], seed=0), {"fc1": 5}), 0.1).state_dict())


@pytest.mark.parametrize("tolerance", [-0.1, 1.0, float("nan")])
def test_impossible_tolerances_are_refused(tolerance):
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        _layer([1.0], tolerance)

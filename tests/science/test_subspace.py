"""The random subspace is what Li et al. ask for: orthonormal, fixed, and trained through z alone."""

import numpy as np
import pytest
import torch
from torch import nn

from lowrank_helpers.models import mlp, n_parameters
from lowrank_helpers.subspace import SubspaceModel, intrinsic_dimension


def projection(model: SubspaceModel) -> torch.Tensor:
    """Write P out as a matrix, column by column: the weights at unit vectors z, less those at zero."""

    def flat(z: torch.Tensor) -> torch.Tensor:
        model.z.data = z
        return torch.cat([weight.flatten() for weight in model.weights().values()])

    origin = flat(torch.zeros_like(model.z))
    return torch.stack([flat(unit) - origin for unit in torch.eye(len(model.z))], dim=1)


def test_projection_is_orthonormal() -> None:
    P = projection(SubspaceModel(mlp([12, 8, 4], seed=0), 10, seed=1))
    torch.testing.assert_close(P.T @ P, torch.eye(10), atol=1e-6, rtol=0)


def test_starts_from_the_network_and_trains_only_z() -> None:
    network = mlp([12, 8, 4], seed=0)
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    expected = network(x)
    model = SubspaceModel(network, 10, seed=1)
    torch.testing.assert_close(model(x), expected)
    nn.functional.mse_loss(model(x), torch.ones(5, 4)).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == ["z"]


def test_gradient_of_z_is_the_projected_gradient() -> None:
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    model = SubspaceModel(mlp([12, 8, 4], seed=0), 10, seed=1)
    P = projection(model)
    model.z.data = torch.zeros(10)
    model(x).square().sum().backward()
    free = mlp([12, 8, 4], seed=0)
    free(x).square().sum().backward()
    full = torch.cat([weight.grad.flatten() for weight in free.parameters()])
    torch.testing.assert_close(model.z.grad, P.T @ full, atol=1e-5, rtol=1e-4)


def test_the_network_that_is_given_stays_as_it_was() -> None:
    network = mlp([12, 8, 4], seed=0)
    before = network.fc1.weight.clone()
    SubspaceModel(network, 10, seed=1).model.fc1.weight.data.zero_()
    assert torch.equal(network.fc1.weight, before)
    assert network.fc1.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_network_in_any_precision_is_trained_in_its_own(dtype: torch.dtype) -> None:
    network, x = mlp([12, 8, 4], seed=0).to(dtype), torch.randn(5, 12, dtype=dtype)
    model = SubspaceModel(network, 10, seed=1)
    assert torch.equal(model(x), network(x))
    model(x).square().sum().backward()
    assert model.z.grad.dtype == torch.float32 and model.z.grad.abs().sum() > 0


def test_all_of_it_is_where_the_network_is() -> None:
    model = SubspaceModel(mlp([12, 8, 4], seed=0).to("meta"), 10, seed=1)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    assert model(torch.empty(5, 12, device="meta")).shape == (5, 4)


@pytest.mark.parametrize("dimension", [0, n_parameters(mlp([12, 8, 4], seed=0)) + 1])
def test_impossible_dimensions_are_refused(dimension: int) -> None:
    with pytest.raises(ValueError, match="allowed: 1 to that"):
        SubspaceModel(mlp([12, 8, 4], seed=0), dimension, seed=0)


def test_intrinsic_dimension_is_found_on_a_curve_that_is_straight_in_log_d() -> None:
    dimensions = [100, 200, 400, 800]
    scores = 0.2 * np.log(dimensions) - 0.5
    assert intrinsic_dimension(dimensions, scores, 0.2 * np.log(300) - 0.5) == pytest.approx(300)
    assert intrinsic_dimension(dimensions, scores, scores[2]) == pytest.approx(400)


def test_intrinsic_dimension_is_where_the_score_crosses_first() -> None:
    assert 100 < intrinsic_dimension([100, 200, 400, 800], [0.5, 0.92, 0.85, 0.95], 0.9) < 200


@pytest.mark.parametrize("scores", [[0.9, 0.95], [0.5, 0.8]], ids=["reached by the first", "reached by none"])
def test_intrinsic_dimension_outside_the_grid_is_unknown(scores: list[float]) -> None:
    assert np.isnan(intrinsic_dimension([100, 200], scores, 0.9))


@pytest.mark.parametrize(("dimensions", "scores"), [([200, 100], [0.8, 0.9]), ([100, 200], [0.8, 0.9, 0.95])])
def test_intrinsic_dimension_refuses_a_curve_that_is_none(dimensions: list[int], scores: list[float]) -> None:
    with pytest.raises(ValueError, match="must rise, with a score each"):
        intrinsic_dimension(dimensions, scores, 0.9)

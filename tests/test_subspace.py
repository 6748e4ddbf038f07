"""The random subspace is what Li et al. ask for: orthonormal, fixed, and trained through z alone."""

import pytest
import torch
from torch import nn

from lowrank_helpers.models import mlp, n_parameters
from lowrank_helpers.subspace import SubspaceModel


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


@pytest.mark.parametrize("dimension", [0, n_parameters(mlp([12, 8, 4], seed=0)) + 1])
def test_impossible_dimensions_are_refused(dimension: int) -> None:
    with pytest.raises(ValueError, match="allowed: 1 to that"):
        SubspaceModel(mlp([12, 8, 4], seed=0), dimension, seed=0)

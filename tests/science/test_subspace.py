"""The random subspace is what Li et al. ask for: orthonormal, fixed, and trained through z alone."""

import numpy as np
import pytest
import torch
from torch.nn.utils import parameters_to_vector as flat

from lowrank_helpers.models import mlp, n_parameters
from lowrank_helpers.subspace import SubspaceModel, intrinsic_dimension


def _projection(model):
    """Write P out as a matrix, column by column: the weights at unit vectors z, less those at zero."""
    columns = []
    for unit in torch.eye(len(model.z)):
        model.z.data = unit
        columns.append(flat(model.weights().values()) - flat(model.model.parameters()))
    model.z.data = torch.zeros(len(model.z))
    return torch.stack(columns, dim=1)


def test_the_projection_is_orthonormal_and_z_alone_is_trained_from_the_network():
    network, x = mlp([12, 8, 4], seed=0), torch.randn(5, 12)
    model = SubspaceModel(network, 10, seed=1)
    P = _projection(model)
    torch.testing.assert_close(P.T @ P, torch.eye(10), atol=1e-6, rtol=0)
    torch.testing.assert_close(model(x), network(x))
    for of in (model, network):
        of(x).square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == ["z"]
    full = flat(weight.grad for weight in network.parameters())
    torch.testing.assert_close(model.z.grad, P.T @ full, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_network_in_any_precision_is_trained_in_its_own(dtype):
    network, x = mlp([12, 8, 4], seed=0).to(dtype), torch.randn(5, 12, dtype=dtype)
    model = SubspaceModel(network, 10, seed=1)
    assert torch.equal(model(x), network(x))
    model(x).square().sum().backward()
    assert model.z.grad.dtype == torch.float32 and model.z.grad.any()


def test_all_of_it_is_where_the_network_is():
    model = SubspaceModel(mlp([12, 8, 4], seed=0).to("meta"), 10, seed=1)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    assert model(torch.empty(5, 12, device="meta")).shape == (5, 4)


@pytest.mark.parametrize("dimension", [0, n_parameters(mlp([12, 8, 4], seed=0)) + 1])
def test_impossible_dimensions_are_refused(dimension):
    with pytest.raises(ValueError, match="allowed: 1 to that"):
        SubspaceModel(mlp([12, 8, 4], seed=0), dimension, seed=0)


def test_intrinsic_dimension_is_where_a_curve_straight_in_log_d_crosses_first():
    dimensions = [100, 200, 400, 800]
    scores = 0.2 * np.log(dimensions) - 0.5
    assert intrinsic_dimension(dimensions, scores, 0.2 * np.log(300) - 0.5) == pytest.approx(300)
    assert 100 < intrinsic_dimension(dimensions, [0.5, 0.92, 0.85, 0.95], 0.9) < 200
    for outside in ([0.9, 0.95], [0.5, 0.8]):
        assert np.isnan(intrinsic_dimension([100, 200], outside, 0.9))
    for wrong in ([200, 100], [0.8, 0.9]), ([100, 200], [0.8, 0.9, 0.95]):
        with pytest.raises(ValueError, match="must rise, with a score each"):
            intrinsic_dimension(*wrong, 0.9)

"""Second moments of layers' outputs and derivatives, against what NumPy and PyTorch's Jacobians say."""

import numpy as np
import pytest
import torch
from networks import draw
from torch import nn
from torch.nn import functional as F

from lowrank_helpers.calibration import output_fisher, output_moments, without_mean
from lowrank_helpers.factorization import column_basis


def _convolutional(inplace):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 3, 2), nn.ReLU(inplace=inplace), nn.Flatten(), nn.Linear(27, 5),
        nn.ReLU(inplace=inplace), nn.Linear(5, 4),
    ).double()  # fmt: skip


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("inplace", "logits"), [(False, False), (True, True), (False, True)])
def test_output_fisher_are_the_squared_jacobians_of_logits_without_their_mean_where_asked(inplace, frozen, logits):
    model = _convolutional(inplace).requires_grad_(not frozen)
    x = draw(3, 16).double()
    after = {"1": _convolutional(False)[2:], "4": _convolutional(False)[5:], "6": nn.Identity()}
    found = output_fisher(model, x.repeat(4000, 1).split(700), ["6", "1", "4"], logits=logits)
    assert list(found) == ["1", "4", "6"]
    for name, rest in after.items():
        outputs = _convolutional(False)[: int(name) + 1](x).detach()
        expected = 0
        for output in outputs:
            J = torch.func.jacrev(lambda one, rest=rest: rest(one[None])[0])(output)
            J = (J - J.mean(dim=0) if logits else J).reshape(4, len(output), -1)
            expected = expected + torch.einsum("kip,kjp->ij", J, J) / len(x)
        torch.testing.assert_close(found[name], expected.double(), rtol=0, atol=0.06 * expected.abs().max().item())
    assert not any(layer._forward_hooks for layer in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("classes", [4, 1])
def test_classes_are_the_second_axis_of_images_and_else_the_last(classes):
    for shape, axis in (((5, classes), 1), ((5, 7, classes), 2), ((5, classes, 2, 3), 1)):
        logits = draw(*shape)
        centred = without_mean(logits)
        torch.testing.assert_close(centred.softmax(axis), logits.softmax(axis))
        assert classes == 1 or centred.sum(axis).abs().max() < 1e-5


@pytest.mark.parametrize("stop", [torch.Tensor.detach, torch.round, torch.no_grad()(lambda x: x.clone())])
def test_where_the_outputs_have_no_derivative_output_fisher_are_zero(stop):
    model = nn.Sequential(nn.Linear(3, 5), nn.Identity(), nn.Linear(5, 2))
    model[1].register_forward_hook(lambda layer, arguments, output: stop(output))
    found = output_fisher(model, torch.randn(9, 3), ["0", "2"])
    assert not found["0"].any() and found["2"].diag().all()


def test_outputs_without_a_finite_derivative_are_refused():
    steep = nn.Linear(3, 2, bias=False)
    nn.init.zeros_(steep.weight)
    model = nn.Sequential(steep, nn.Identity())
    model[1].register_forward_hook(lambda layer, arguments, output: output.sqrt())
    with pytest.raises(ValueError, match="0: the derivative of the outputs is NaN or infinite there"):
        output_fisher(model, torch.randn(20, 3), ["0"])


def test_moments_are_those_of_what_each_layer_puts_out_less_its_bias():
    model, x = _convolutional(True), draw(7, 16).double()
    batches = [{"x": batch} for batch in x.split(3)]
    moments = output_moments(model, batches, ["6", "1", "4"], forward=lambda m, b: m(b["x"]))
    assert list(moments) == ["1", "4", "6"] and {moment.dtype for moment in moments.values()} == {torch.float64}
    patches = F.unfold(x.view(7, 1, 4, 4), 2).transpose(1, 2).flatten(0, 1)
    hidden = _convolutional(False)[:4](x)
    inputs = {"1": patches, "4": hidden, "6": _convolutional(False)[4:6](hidden)}
    for name, X in inputs.items():
        outputs = (X @ model[int(name)].weight.flatten(1).T).detach().numpy()
        np.testing.assert_allclose(moments[name], outputs.T @ outputs / len(outputs), atol=1e-12)
    assert not any(layer._forward_hooks for layer in model.modules())


def test_moments_of_a_tall_layer_are_in_as_many_coordinates_as_it_has_inputs_at_every_position():
    layer, tokens = nn.Sequential(nn.Linear(4, 30_000)), draw(6, 5, 4)
    outputs = (tokens.reshape(30, 4) @ layer[0].weight.T @ column_basis(layer[0].weight)).detach()
    moment = output_moments(layer, tokens, ["0"])["0"]
    torch.testing.assert_close(moment, (outputs.T @ outputs / 30).double(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("measure", [output_moments, output_fisher])
def test_wrong_layers_and_measuring_without_inputs_are_refused(measure):
    model = _convolutional(False)
    with pytest.raises(ValueError, match="fc9: no layer that can be replaced; allowed: 1, 4, 6"):
        measure(model, draw(7, 16).double(), ["fc9"])
    with pytest.raises(ValueError, match="at least one input"):
        measure(model, draw(0, 16).double(), ["1"])
    idle = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    idle.forward = idle["a"].forward
    with pytest.raises(ValueError, match="b: the model does not call this layer"):
        measure(idle, torch.ones(2, 3), ["a", "b"])

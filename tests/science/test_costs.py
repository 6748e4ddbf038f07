"""Memory costs against what arithmetic says they are."""

import torch
from torch import nn

from lowrank_helpers import costs

CPU = torch.device("cpu")


def test_the_peak_counts_what_is_held_at_once():
    def work():
        first, second = torch.empty(1000, 1000), torch.empty(1000, 1000)
        del first
        third = torch.empty(500, 1000)
        del second, third

    assert costs.peak_bytes(work, CPU) == 8_000_000


def test_the_peak_leaves_out_what_was_held_before():
    held = torch.empty(1000, 1000)
    assert costs.peak_bytes(lambda: held.add_(1), CPU) < 1000


def test_adam_keeps_two_moments_for_each_trained_parameter():
    model = nn.Sequential(nn.Linear(30, 20, bias=False), nn.Linear(20, 10, bias=False))
    model[0].requires_grad_(False)
    optimiser = torch.optim.Adam(model[1].parameters())
    model(torch.randn(4, 30)).sum().backward()
    optimiser.step()
    assert costs.n_bytes(parameter.grad for parameter in model.parameters()) == 4 * 200
    assert costs.state_bytes(optimiser) == 2 * 4 * 200 + 4  # and a step count

"""Memory costs against what arithmetic says they are."""

import torch

from lowrank_helpers import costs, lora
from lowrank_helpers.models import mlp

CPU = torch.device("cpu")


def test_the_peak_counts_what_is_held_at_once_and_not_what_was_held_before():
    def work():
        first, second = torch.empty(1000, 1000), torch.empty(1000, 1000)
        del first
        third = torch.empty(500, 1000)
        del second, third

    assert costs.peak_bytes(work, CPU) == 8_000_000

    held = torch.empty(1000, 1000)
    assert costs.peak_bytes(lambda: held.add_(1), CPU) < 1000


def step_of(model):
    return costs.step_costs(model, torch.randn(32, 784), torch.arange(32) % 10)


def test_a_steps_costs_are_those_of_the_arithmetic():
    found, weights = step_of(mlp([784, 20, 10], seed=0)), 784 * 20 + 20 * 10
    assert found.trained == weights
    assert found.kept_bytes == 3 * 4 * weights + 2 * 4  # and a step count for each matrix
    assert found.operations == 2 * 32 * (3 * weights - 784 * 20)  # the images need no gradient
    assert 4 * weights <= found.peak_bytes
    assert found.seconds > 0


def test_a_step_of_lora_leaves_out_the_gradients_of_the_frozen_weights():
    base = mlp([784, 20, 10], seed=0)
    found, factors = step_of(lora.adapt(base, {"fc2": 3}, alpha=1.0, seed=0)), 3 * (20 + 10)
    assert found.trained == factors
    assert found.kept_bytes == 3 * 4 * factors + 2 * 4
    # Forward through both layers; fc2's adapter forward, its factors' gradients, and that of what lies between them.
    assert found.operations == 2 * 32 * (784 * 20 + 20 * 10 + 2 * factors + 3 * 10)

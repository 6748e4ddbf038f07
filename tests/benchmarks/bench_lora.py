"""Benchmark 5: a training step of LoRA against one of the whole network."""

from collections.abc import Callable
from functools import partial

import torch
from harness import NETWORKS, interleave, medians
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn
from torch.nn import functional as F

from lowrank_helpers import lora
from lowrank_helpers.costs import median_seconds, n_bytes, peak_bytes, state_bytes
from lowrank_helpers.data import Dataset
from lowrank_helpers.models import linear_layers, mlp, n_trainable
from lowrank_helpers.training import products_in

BATCH_SIZE = 512  # the notebook's, as are rank and α
RANK, ALPHA = 8, 16.0


def test_step(benchmark: BenchmarkFixture, images: Dataset, device: torch.device, precision: str) -> None:
    benchmark.group = "5. A training step of LoRA"
    base = mlp(NETWORKS["small"], seed=0).to(device)
    models = {"full": base, "LoRA": lora.adapt(base, list(linear_layers(base)), rank=RANK, alpha=ALPHA, seed=0)}
    batch = images.train_images[:BATCH_SIZE].to(getattr(torch, precision)), images.train_labels[:BATCH_SIZE]
    prepared = {name: _step_of(model, *batch, precision) for name, model in models.items()}
    contestants = {name: partial(median_seconds, step, device) for name, (step, _) in prepared.items()}
    times = medians(interleave(benchmark, contestants, rounds=9))
    benchmark.extra_info["rows"] = [
        {
            "training": name,
            "parameters trained": n_trainable(models[name]),
            "time a step (ms)": 1e3 * times[name],
            "time, full = 1": times[name] / times["full"],
            "gradients and Adam's state (kB)": (_gradient_bytes(models[name]) + state_bytes(optimiser)) / 1e3,
            "peak of a step (MB)": peak_bytes(step, device) / 1e6,
        }
        for name, (step, optimiser) in prepared.items()
    ]


def _step_of(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, precision: str
) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    """Return one training step as a function, and its optimiser."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.Adam(trained, lr=1e-6, fused=images.device.type != "mps")

    def step() -> None:
        with products_in(precision, images.device):
            logits = model(images)
        optimiser.zero_grad()
        F.cross_entropy(logits.float(), labels).backward()
        optimiser.step()

    return step, optimiser


def _gradient_bytes(model: nn.Module) -> int:
    return n_bytes(parameter.grad for parameter in model.parameters())

"""Benchmark 5: a training step of LoRA against one of the whole network."""

from functools import partial

import torch
from harness import NETWORKS, interleave, medians
from pytest_benchmark.fixture import BenchmarkFixture

from lowrank_helpers import lora
from lowrank_helpers.costs import median_seconds, step_costs, training_step
from lowrank_helpers.data import Dataset
from lowrank_helpers.models import linear_layers, mlp

BATCH_SIZE = 512  # the notebook's, as are rank and α
RANK, ALPHA = 8, 16.0


def test_step(benchmark: BenchmarkFixture, images: Dataset, device: torch.device, precision: str) -> None:
    benchmark.group = "5. A training step of LoRA"
    base = mlp(NETWORKS["small"], seed=0).to(device)
    models = {"full": base, "LoRA": lora.adapt(base, dict.fromkeys(linear_layers(base), RANK), alpha=ALPHA, seed=0)}
    batch = images.train_images[:BATCH_SIZE].to(getattr(torch, precision)), images.train_labels[:BATCH_SIZE]
    measured = {name: step_costs(model, *batch, precision) for name, model in models.items()}
    contestants = {
        name: partial(median_seconds, training_step(model, *batch, precision)[0], device)
        for name, model in models.items()
    }
    times = medians(interleave(benchmark, contestants, rounds=9))
    benchmark.extra_info["rows"] = [
        {
            "training": name,
            "parameters trained": measured[name].trained,
            "time a step (ms)": 1e3 * times[name],
            "time, full = 1": times[name] / times["full"],
            "gradients and Adam's state (kB)": measured[name].kept_bytes / 1e3,
            "peak of a step (MB)": measured[name].peak_bytes / 1e6,
        }
        for name in models
    ]

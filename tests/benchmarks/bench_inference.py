"""Benchmark 4: inference, the dense big network against the same one made of factors."""

from functools import partial
from itertools import product

import pytest
import torch
from harness import NETWORKS, RANKS, interleave, medians, verdict
from pytest_benchmark.fixture import BenchmarkFixture

from lowrank_helpers.costs import median_seconds
from lowrank_helpers.data import Dataset
from lowrank_helpers.layers import factorize
from lowrank_helpers.models import mlp, n_parameters
from lowrank_helpers.training import predict

# Products in bfloat16 come in blocks of 32 columns: rank 32 does not take longer than 30.
CUTS = {"ranks 150, 150, 150, 80": RANKS} | {f"rank {r}": dict.fromkeys(RANKS, r) for r in (30, 32)}
BATCHES = (1, 32, 256, 1024, 2048, 10_000)


@pytest.mark.parametrize("used", ["float32", "bfloat16"])
def test_inference(
    used: str, benchmark: BenchmarkFixture, images: Dataset, device: torch.device, precision: str
) -> None:
    if used not in ("float32", precision):
        pytest.skip(f"{used} is not native here")
    benchmark.group = "4. Inference"
    dense = mlp(NETWORKS["big"], seed=0).to(device)  # untrained: the weights' values do not change the time
    networks = {"dense": dense} | {cut: factorize(dense, ranks) for cut, ranks in CUTS.items()}
    inputs = images.train_images.to(getattr(torch, used))
    contestants = {
        (batch, name): partial(median_seconds, partial(predict, network, inputs[:batch], used), device, at_least=0.05)
        for batch, (name, network) in product(BATCHES, networks.items())
    }
    times = medians(interleave(benchmark, contestants, rounds=5))

    speed_up = {(batch, cut): times[batch, "dense"] / times[batch, cut] for batch, cut in product(BATCHES, CUTS)}
    arithmetic = {cut: n_parameters(dense) / n_parameters(networks[cut]) for cut in CUTS}
    benchmark.extra_info["rows"] = [
        {
            "precision": used,
            "network": cut,
            "batch": batch,
            "dense (ms)": 1e3 * times[batch, "dense"],
            "factorised (ms)": 1e3 * times[batch, cut],
            "speed-up": speed_up[batch, cut],
            "arithmetic's": arithmetic[cut],
            "share of it (%)": 100 * speed_up[batch, cut] / arithmetic[cut],
        }
        for cut, batch in product(CUTS, BATCHES)
    ]
    least = {cut: min(speed_up[batch, cut] for batch in BATCHES if batch >= 256) / arithmetic[cut] for cut in CUTS}
    benchmark.extra_info["targets"] = [
        verdict(
            f"(4) {cut} in {used}, batch ≥ 256: ≥ 85 % of the arithmetic's speed-up",
            f"{100 * share:.0f} %",
            share >= 0.85,
        )
        for cut, share in least.items()
    ]

"""How near training comes to the machine's matrix products: ``python tests/benchmarks/throughput.py``.

Both are measured in one run, as timings on a shared machine drift. A training step is counted as 6 floating-point
operations a parameter and sample: 2 forward, 4 backward.
"""

import itertools
import statistics

import torch

from lowrank_helpers import data
from lowrank_helpers.costs import median_seconds
from lowrank_helpers.models import mlp, n_parameters
from lowrank_helpers.training import Recipe, fit, pick_device, pick_precision

NETWORKS = {"small": [784, 512, 512, 10], "big": [784, 1024, 1024, 512, 256, 10]}
BATCHES = (256, 512)
REPEATS = 3


def product_rate(device: torch.device, size: int = 2048) -> float:
    """Return the float32 rate of a product of two size×size matrices, in floating-point operations a second."""
    a, b = torch.randn(2, size, size, device=device)
    return 2 * size**3 / median_seconds(lambda: torch.mm(a, b), device, at_least=0.5)


def training_rate(images: data.Dataset, widths: list[int], batch_size: int, precision: str) -> float:
    """Return the rate of one epoch of training, evaluation excluded, in floating-point operations a second."""
    model = mlp(widths, seed=0).to(images.train_images.device)
    history = fit(model, images, Recipe(1, batch_size, 1e-3, precision=precision))
    return 6 * n_parameters(model) * len(images.train_labels) / history.seconds[-1]


def main() -> None:
    """Print a table: one row a network, batch size and precision."""
    device = pick_device()
    images = data.load().to(device)
    precisions = sorted({"float32", pick_precision("auto", device)}, reverse=True)
    print(f"{images.name} on {device.type}, {torch.get_num_threads()} threads; medians of {REPEATS}")
    print(f"{'network':8}{'batch':>6}  {'precision':10}{'training':>12}{'products':>12}{'share':>8}")
    for (name, widths), batch_size, precision in itertools.product(NETWORKS.items(), BATCHES, precisions):
        pairs = [(training_rate(images, widths, batch_size, precision), product_rate(device)) for _ in range(REPEATS)]
        trained, multiplied = (statistics.median(measured) / 1e9 for measured in zip(*pairs, strict=True))
        rates = f"{trained:7.0f} GF/s{multiplied:7.0f} GF/s{trained / multiplied:8.0%}"
        print(f"{name:8}{batch_size:6}  {precision:10}{rates}")


if __name__ == "__main__":
    main()

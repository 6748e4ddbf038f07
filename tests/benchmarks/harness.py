"""What the benchmarks share: contestants that take turns, the clock and the matrix products."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import TypeVar

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from lowrank_helpers.timing import median_seconds, synchronise

Key = TypeVar("Key", bound=Hashable)


def medians(
    benchmark: BenchmarkFixture, contestants: Mapping[Key, Callable[[], float]], *, rounds: int
) -> dict[Key, float]:
    """Let contestants, each of which returns a time or a rate, take turns, and return each one's median.

    A shared machine's speed drifts by up to a factor of two within an hour: only times from the same minute
    make a ratio. All results are kept in the benchmark's JSON.
    """
    results: dict[Key, list[float]] = {key: [] for key in contestants}

    def take_turns() -> None:
        for key, contestant in contestants.items():
            results[key].append(contestant())

    benchmark.pedantic(take_turns, rounds=rounds)
    benchmark.extra_info["results"] = {str(key): result for key, result in results.items()}
    return {key: statistics.median(result) for key, result in results.items()}


def verdict(target: str, measured: str, met: bool) -> dict[str, str | bool]:
    """Return a row of the table of targets; one that is missed is shown, and fails nothing."""
    return {"target": target, "measured": measured, "met": bool(met)}  # NumPy has truth values of its own


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the time of one call, for work too long to be repeated by ``median_seconds``."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def product_rate(precision: str, device: torch.device) -> float:
    """Return the best rate of square matrix products in that precision, in floating-point operations a second."""
    rates = []
    for size in (1024, 2048):
        a, b = torch.randn(2, size, size, device=device, dtype=getattr(torch, precision))
        rates.append(2 * size**3 / median_seconds(partial(torch.mm, a, b), device))
    return max(rates)

"""What the benchmarks share: the networks, contestants that take turns, the clock and the matrix products."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from lowrank_helpers.costs import median_seconds
from lowrank_helpers.series.run import recipes
from lowrank_helpers.timing import synchronise
from lowrank_helpers.training import History, Recipe

NETWORKS = {"small": [784, 512, 512, 10], "big": [784, 1024, 1024, 512, 256, 10]}
BIG_RECIPE = Recipe(**recipes()["big"])
RANKS = {"fc1": 150, "fc2": 150, "fc3": 150, "fc4": 80}  # the published solution's, of the big network

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result", bound=float | tuple)


def interleave(
    benchmark: BenchmarkFixture, contestants: Mapping[Key, Callable[[], Result]], *, rounds: int
) -> dict[Key, list[Result]]:
    """Let contestants take turns, and return what each of them returned, round by round.

    A shared machine's speed drifts by up to a factor of two within an hour: only times from the same minute
    make a ratio. The results are kept in the benchmark's JSON.

    Parameters
    ----------
    benchmark : BenchmarkFixture
        Times whole rounds; what a contestant measures is its own affair.
    contestants : mapping to callables
        Each returns a time, a rate, or a tuple that starts with one.
    rounds : int
    """
    results: dict[Key, list[Result]] = {key: [] for key in contestants}

    def take_turns() -> None:
        for key, contestant in contestants.items():
            results[key].append(contestant())

    benchmark.pedantic(take_turns, rounds=rounds)
    benchmark.extra_info["results"] = {str(key): result for key, result in results.items()}
    return results


def medians(results: Mapping[Key, Sequence[Result]]) -> dict[Key, Result]:
    """Return the median of each contestant's results, the lower of two in the middle."""
    return {key: statistics.median_low(result) for key, result in results.items()}


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


class Reached(NamedTuple):
    """The end of the first epoch that reached an accuracy; of the last one, if none did."""

    seconds: float
    with_evaluation: float
    epochs: int
    accuracy: float
    yes: bool

    @classmethod
    def of(cls, history: History, split: str, target: float) -> "Reached":
        """Find it; the time for evaluation is counted as the same after every epoch."""
        accuracy = history.accuracy[split]  # one score an epoch
        last = len(accuracy) - 1
        epoch = next((epoch for epoch, score in enumerate(accuracy) if score >= target), last)
        evaluation = history.evaluation_seconds * epoch / last
        time = history.seconds[epoch]
        return cls(time, time + evaluation, epoch, accuracy[epoch], accuracy[epoch] >= target)

    def row(self) -> dict[str, str | float]:
        """Return the cells of a table; a time at which the accuracy was not yet reached is marked as a bound."""
        bound = "" if self.yes else "> "
        return {
            "training (s)": f"{bound}{self.seconds:.2f}",
            "with evaluation (s)": f"{bound}{self.with_evaluation:.2f}",
            "epochs": self.epochs,
            "accuracy then (%)": f"{100 * self.accuracy:.2f}",
        }

"""What a piece of work costs: time, the memory it holds at once, and the bytes that training keeps between steps."""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lowrank_helpers.quiet import quiet
from lowrank_helpers.training import spending, synchronise


def n_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Sum the bytes of tensors; ``None``, as a gradient that was never computed, has none.

    Examples
    --------
    >>> n_bytes([torch.zeros(3), None])
    12
    """
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def state_bytes(optimiser: torch.optim.Optimizer) -> int:
    """Sum the bytes that an optimiser keeps between steps: for Adam two moments a parameter, and a step count.

    Examples
    --------
    >>> layer = torch.nn.Linear(4, 2, bias=False)
    >>> adam = torch.optim.Adam(layer.parameters())
    >>> layer(torch.ones(4)).sum().backward()
    >>> adam.step()
    >>> state_bytes(adam)  # two float32 for each of 8 weights, and the count of steps
    68
    """
    return n_bytes(value for state in optimiser.state.values() for value in state.values())


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes that work holds at once, above what was held before it.

    On CUDA the allocator counts them. Elsewhere PyTorch's profiler lists every allocation and release on the
    CPU, and their running sum is followed; on Apple's MPS it sees the CPU's share alone.

    Examples
    --------
    >>> peak_bytes(lambda: torch.zeros(1000), torch.device("cpu"))
    4000
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with _silence(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    memory = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    held = peak = 0
    for _, change in memory:
        held += change
        peak = max(peak, held)
    return peak


def median_seconds(work: Callable[[], object], device: torch.device, *, at_least: float = 0.1) -> float:
    """Return the median time of a call, from repeated calls that together take ``at_least`` seconds.

    A first call warms up and is not counted, and other processes that train pause meanwhile. (PyTorch's own ``Timer``
    looks for a CUDA compiler and warns on machines that have one and no GPU.)

    Examples
    --------
    >>> median_seconds(lambda: torch.ones(100).sum(), torch.device("cpu"), at_least=0.001) > 0
    True
    """
    times: list[float] = []
    with quiet(), spending("timing"):
        work()
        synchronise(device)
        while len(times) < 3 or sum(times) < at_least:
            start = time.perf_counter()
            work()
            synchronise(device)
            times.append(time.perf_counter() - start)
    return statistics.median(times)


@contextmanager
def _silence() -> Iterator[None]:
    """Drop what is written to file descriptor 2: the profiler's C++ reports every start and stop there."""
    saved = os.dup(2)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)

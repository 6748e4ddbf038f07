"""Clocks: processor seconds by kind of work, and queued work that must end before a clock is read."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch

spent: Counter[str] = Counter()  # processor seconds of this process by kind of work

_spent_lock = threading.Lock()


@contextmanager
def spending(kind: str) -> Iterator[None]:
    """Count the processor seconds that this thread takes meanwhile as ``spent`` on a kind of work."""
    start = time.thread_time()
    try:
        yield
    finally:
        add_spent(kind, time.thread_time() - start)


def add_spent(kind: str, seconds: float) -> None:
    """Add processor seconds to a kind of work."""
    with _spent_lock:
        spent[kind] += seconds  # type: ignore[assignment]  # counts of a Counter may be fractions


def synchronise(device: torch.device) -> None:
    """Wait for queued work, so that a clock read next tells the truth."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()

"""Exclusive timing: while one process times something, the trainings of all others pause.

Notebooks run side by side. Whoever times a piece of work holds one lock of the machine exclusively; whoever trains or
evaluates looks at it between two steps, which takes a microsecond. A process that dies gives the lock back. Where there
is no ``flock`` (Windows) nobody waits.
"""

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import IO

import numpy as np
import torch

try:
    import fcntl
except ModuleNotFoundError:
    fcntl = None  # type: ignore[assignment]

SETTLING = 0.02  # seconds in which those at work come to the end of their step

_this_thread = threading.local()
_timing = ContextVar("_timing", default=False)  # in the context that times, and in threads that run in a copy of it


def synchronise(device: torch.device) -> None:
    """Wait for queued work, so that a clock read next tells the truth."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


@contextmanager
def exclusive_timing() -> Iterator[None]:
    """Hold the machine's lock, so that others that call :func:`wait_for_timing` pause; may be nested."""
    if fcntl is None or _timing.get():
        yield
        return
    with _open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        time.sleep(SETTLING)
        before = _timing.set(True)
        try:
            yield
        finally:
            _timing.reset(before)
            fcntl.flock(file, fcntl.LOCK_UN)  # to close the file is not enough: a process forked meanwhile has it too


def wait_for_timing() -> None:
    """Wait while another thread or process times something."""
    if fcntl is None or _timing.get():
        return
    # A lock belongs to an opened file: each thread opens its own, and a forked process not its parent's.
    if getattr(_this_thread, "process", None) != os.getpid():
        _this_thread.process, _this_thread.file = os.getpid(), _open()
    fcntl.flock(_this_thread.file, fcntl.LOCK_SH)
    fcntl.flock(_this_thread.file, fcntl.LOCK_UN)


def median_seconds(work: Callable[[], object], device: torch.device, *, at_least: float = 0.1) -> float:
    """Return the median time of a call, from repeated calls that together take ``at_least`` seconds.

    A first call warms up and is not counted. Other processes that train pause meanwhile. (PyTorch's own ``Timer`` warns
    on machines that have a CUDA compiler and no GPU.)

    Examples
    --------
    >>> median_seconds(lambda: torch.ones(100).sum(), torch.device("cpu"), at_least=0.001) > 0
    True
    """
    times: list[float] = []
    with exclusive_timing():
        work()
        synchronise(device)
        while len(times) < 3 or sum(times) < at_least:
            start = time.perf_counter()
            work()
            synchronise(device)
            times.append(time.perf_counter() - start)
    return float(np.median(times))


def _open() -> IO[str]:
    user = os.getuid() if hasattr(os, "getuid") else ""
    return (Path(tempfile.gettempdir()) / f"lowrank-timing-{user}.lock").open("a")

"""Trainings side by side: one thread each, as networks of this size keep one core busy and several poorly."""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextvars import copy_context
from threading import Event
from typing import TypeVar

import torch

T = TypeVar("T")

_n_side_by_side = 1


def take_one_thread_each() -> None:
    """Let this process train as many networks side by side as PyTorch has threads, each in one thread.

    So no number depends on how many cores there are. PyTorch's threads are ``OMP_NUM_THREADS``, or all cores. A program
    calls this once, where it begins; without it, networks train one after the other.
    """
    global _n_side_by_side
    _n_side_by_side = max(_n_side_by_side, torch.get_num_threads())
    _prepare_thread()


def n_side_by_side() -> int:
    """Return how many networks train at once in this process, on the CPU."""
    return _n_side_by_side


def side_by_side(trainings: Sequence[Callable[[Event], T]], device: torch.device) -> list[T]:
    """Do several trainings, and return what they return, in their order.

    On the CPU :func:`n_side_by_side` run at the same time, elsewhere one after the other (docs/gpu.md says why). Each
    gets the event to pass on to :func:`lowrank_helpers.training.fit`. The first failure, or an interruption, sets it,
    and is raised when all trainings under way have ended.
    """
    stop = Event()
    n_workers = min(_n_side_by_side if device.type == "cpu" else 1, len(trainings))
    if n_workers <= 1:
        return [training(stop) for training in trainings]
    pool = ThreadPoolExecutor(n_workers, initializer=_prepare_thread)
    try:
        # In copies of this context: what it times must not wait for its own lock.
        futures = [pool.submit(copy_context().run, training, stop) for training in trainings]
        for future in wait(futures, return_when=FIRST_EXCEPTION).done:
            future.result()  # raises what it raised
        return [future.result() for future in futures]
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _prepare_thread() -> None:
    torch.set_num_threads(1)
    # Late in training most gradients underflow; arithmetic on denormal numbers is many times slower.
    torch.set_flush_denormal(True)

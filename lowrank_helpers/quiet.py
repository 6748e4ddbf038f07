"""One lock for the machine: while one process times something, the trainings of all others pause.

Notebooks run side by side. Whoever times a piece of work holds the lock exclusively; who trains or evaluates looks at
it between two steps, which takes a microsecond. A process that dies gives the lock back. Where there is no ``flock``
(Windows) nobody waits.
"""

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

try:
    import fcntl
except ModuleNotFoundError:
    fcntl = None  # type: ignore[assignment]

SETTLING = 0.02  # seconds in which those at work come to the end of their step

_this_thread = threading.local()


@contextmanager
def quiet() -> Iterator[None]:
    """Hold the machine's lock, so that other threads and processes which call :func:`give_way` pause; may be nested."""
    if fcntl is None or _holds():
        yield
        return
    with _open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # closing the file gives it back
        time.sleep(SETTLING)
        _this_thread.holds = True
        try:
            yield
        finally:
            _this_thread.holds = False


def give_way() -> None:
    """Wait while another thread or process times something."""
    if fcntl is None or _holds():
        return
    # A lock belongs to an opened file: each thread opens its own, and a forked process not its parent's.
    if getattr(_this_thread, "process", None) != os.getpid():
        _this_thread.process, _this_thread.file = os.getpid(), _open()
    fcntl.flock(_this_thread.file, fcntl.LOCK_SH)
    fcntl.flock(_this_thread.file, fcntl.LOCK_UN)


def _holds() -> bool:
    """Say whether this thread is the one that times: it must not wait for itself."""
    return getattr(_this_thread, "holds", False)


def _open() -> IO[str]:
    user = os.getuid() if hasattr(os, "getuid") else ""
    return (Path(tempfile.gettempdir()) / f"lowrank-quiet-{user}.lock").open("a")

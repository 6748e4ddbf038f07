"""What the tests that interrupt and kill need of processes."""

import os
import signal
from contextlib import suppress

import psutil


def heed_interrupts() -> None:
    """Undo, before a process starts, that programs in the background of a script ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def kernels(pid: int) -> list[psutil.Process]:
    """Return the kernels of a process and its workers: what their servers forked; others, such as git, come and go."""
    kernels = []
    for child in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if "lowrank_helpers.series.run" in " ".join(child.cmdline()):  # a fork server, by what it is told to import
                kernels += [kernel for kernel in child.children() if os.getsid(kernel.pid) == kernel.pid]
    return kernels

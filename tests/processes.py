"""What the tests that interrupt and kill need of processes."""

import signal
from contextlib import suppress

import psutil


def heed_interrupts() -> None:
    """Undo, before a process starts, that programs in the background of a script ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def kernels(pid: int) -> list[psutil.Process]:
    """Return the kernels that a process has: the children of its nursery."""
    nurseries = filter(_is_nursery, psutil.Process(pid).children())
    return [kernel for nursery in nurseries for kernel in nursery.children()]


def _is_nursery(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):  # children such as git come and go
        return "lowrank_helpers.kernels" in process.cmdline()
    return False

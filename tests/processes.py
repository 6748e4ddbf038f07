"""What the tests that interrupt and kill need of processes."""

import signal

import psutil


def heed_interrupts() -> None:
    """Undo, before a process starts, that programs in the background of a script ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def kernels(pid: int) -> list[psutil.Process]:
    """Return the kernels that a process has: the children of its nursery."""
    commands = {child: child.as_dict(["cmdline"])["cmdline"] or [] for child in psutil.Process(pid).children()}
    nurseries = [child for child, command in commands.items() if "lowrank_helpers.kernels" in command]
    return [kernel for nursery in nurseries for kernel in nursery.children()]

"""Kernels that start at once: forked from a process that has imported what notebooks import.

PyTorch and Matplotlib take a fresh kernel seconds to import, ten times in a series. Here Python's *fork server*
(https://docs.python.org/3/library/multiprocessing.html#contexts-and-start-methods) imports them once, and each
kernel is a fork of it: a process of its own, as separate from the others as usual.

To Jupyter this module is a kernel provisioner, which only the runs of this package choose
(https://jupyter-client.readthedocs.io/en/stable/provisioning.html); JupyterLab starts its kernels as it always does.
"""

import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.provisioning.factory import KernelProvisionerFactory
from jupyter_client.provisioning.local_provisioner import LocalProvisioner

from lowrank_helpers.series.settings import unchanged_environment

PROVISIONER = "lowrank-forked"  # as pyproject.toml registers it
IMPORTED = (
    "ipykernel.kernelapp",
    "ipykernel.zmqshell",
    "lowrank_helpers.plots",
    "lowrank_helpers.series.run",
    "sklearn.datasets",
    "torch._dynamo",  # which PyTorch imports with the first optimiser
)
PLOTTING = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}  # as a kernel sets it before it imports
# Let malloc keep what is freed, since the next step asks for as much again. A worker of Dask is told to give it back at
# once, and its kernels would be too: then a third of their time goes into fresh pages of memory.
MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)}

_starting = threading.Lock()


@contextmanager
def forked() -> Iterator[None]:
    """Let this process fork the kernels that it starts meanwhile.

    Only Linux forks such a process safely, and a daemon of ``multiprocessing``, as ``dask worker`` starts them, may
    have no processes: elsewhere kernels start as always. A script must come here under ``if __name__ == "__main__"``.
    """
    factory = KernelProvisionerFactory.instance()
    usual = factory.default_provisioner_name
    if sys.platform == "linux" and not multiprocessing.current_process().daemon:
        factory.default_provisioner_name = PROVISIONER
    try:
        yield
    finally:
        factory.default_provisioner_name = usual


def start_server() -> None:
    """Start this process's fork server if there is none or it has died."""
    from multiprocessing import forkserver  # here, as Windows has none

    with _starting, unchanged_environment():
        forkserver.set_forkserver_preload([*IMPORTED])
        os.environ |= {**PLOTTING, **os.environ, **MEMORY}
        forkserver.ensure_running()


class Provisioner(LocalProvisioner):
    """Forks a kernel instead of starting one."""

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        """Start a kernel; ``cmd`` is ``python -m ipykernel_launcher`` with its arguments."""
        start_server()
        self.cwd = str(kwargs.get("cwd") or Path.cwd())
        given = cmd[cmd.index("-m") + 2 :], dict(kwargs.get("env") or os.environ), self.cwd
        kernel = multiprocessing.get_context("forkserver").Process(target=_be_kernel, args=given, daemon=True)
        kernel.start()
        self.process = _Popen(kernel)  # type: ignore[assignment]
        self.pid = self.pgid = kernel.pid
        return self.connection_info


class _Popen:
    """What Jupyter needs of ``subprocess.Popen``, for a kernel that the server forks."""

    stdin = stdout = stderr = None

    def __init__(self, kernel: BaseProcess) -> None:
        self._kernel = kernel

    def poll(self) -> int | None:
        return self._kernel.exitcode

    def wait(self) -> int | None:
        self._kernel.join()
        return self._kernel.exitcode

    def send_signal(self, number: int) -> None:
        if (pid := self._kernel.pid) and self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def _be_kernel(arguments: list[str], environment: dict[str, str], folder: str) -> None:
    import pandas
    from ipykernel import kernelapp

    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ |= environment
    os.dup2(2, 1)  # what the command prints is its own
    # In a process that is no kernel pandas would cut tables to the width of a terminal; this is what a kernel has.
    pandas.set_option("display.max_columns", 20)
    # It may have processes of its own, and starts them as any kernel does.
    multiprocessing.current_process().daemon = False
    multiprocessing.set_start_method(None, force=True)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.argv = ["ipykernel_launcher", *arguments, f"--IPKernelApp.parent_handle={os.getppid()}"]
    kernelapp.launch_new_instance()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)

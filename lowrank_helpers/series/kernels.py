"""Kernels that start at once: forked from a process that has imported what notebooks import.

PyTorch and Matplotlib take a fresh kernel seconds to import, eight times in a series. Here a *nursery*
imports them once, and each kernel is a fork of it: a process of its own, as separate from the others as ever.

To Jupyter this module is a kernel provisioner, which only the runs of this package choose
(https://jupyter-client.readthedocs.io/en/stable/provisioning.html); JupyterLab starts its kernels as it always does.
"""

import importlib
import json
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner

PROVISIONER = "lowrank-nursery"  # as pyproject.toml registers it
IMPORTED = (
    "ipykernel.kernelapp",
    "ipykernel.zmqshell",
    "lowrank_helpers.plots",
    "lowrank_helpers.series.run",
    "torch._dynamo",  # which PyTorch imports with the first optimiser
)
PLOTTING = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}  # as a kernel sets it before it imports

# Let malloc keep what is freed, since the next step asks for as much again. A worker of Dask is told to give it back at
# once, and its kernels would be too: then a third of their time goes into fresh pages of memory.
MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)}

_nursery: "Nursery | None" = None  # of this process, from the first kernel on


@contextmanager
def forked() -> Iterator[None]:
    """Let this process take the kernels that it starts meanwhile from its nursery.

    Only Linux forks a process with such libraries safely; elsewhere kernels start as they always do.
    """
    factory = KernelProvisionerFactory.instance()
    usual = factory.default_provisioner_name
    if sys.platform == "linux":
        factory.default_provisioner_name = PROVISIONER
    try:
        yield
    finally:
        factory.default_provisioner_name = usual


class Nursery:
    """The process that imports and forks, seen from the one that wants kernels. It ends with it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=PLOTTING | os.environ | MEMORY,
            start_new_session=True,  # Ctrl-C in the terminal is not for it
        )

    @classmethod
    def open(cls) -> "Nursery":
        """Return this process's nursery, a new one if there is none or it has died."""
        global _nursery
        if _nursery is None or _nursery.process.poll() is not None:
            _nursery = cls()
        return _nursery

    def ask(self, **request: Any) -> Any:
        """Send a request and return the answer.

        Raises
        ------
        RuntimeError
            The process has died.
        """
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, ValueError) as error:
            raise RuntimeError("the process that starts kernels has died") from error


class Provisioner(LocalProvisioner):
    """Takes a kernel from the nursery instead of starting one."""

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        """Start a kernel; ``cmd`` is ``python -m ipykernel_launcher`` with its arguments."""
        kernel = Forked(Nursery.open(), arguments=cmd[cmd.index("-m") + 2 :], options=kwargs)
        self.process = kernel  # type: ignore[assignment]  # has what the base class uses of a Popen
        self.pid = self.pgid = kernel.pid
        self.cwd = kwargs.get("cwd", Path.cwd())
        return self.connection_info


class Forked:
    """What Jupyter needs of ``subprocess.Popen``, for a kernel whose parent is the nursery."""

    stdin = stdout = stderr = None

    def __init__(self, nursery: Nursery, arguments: list[str], options: dict[str, Any]) -> None:
        self._nursery = nursery
        self._exit_code: int | None = None
        self.pid: int = nursery.ask(
            arguments=arguments,
            environment=dict(options.get("env") or os.environ),
            folder=str(options.get("cwd") or Path.cwd()),
        )

    def poll(self) -> int | None:
        """Return the exit code, or None while the kernel runs."""
        if self._exit_code is None:
            self._exit_code = self._nursery.ask(ended=self.pid)
        return self._exit_code

    def wait(self) -> int | None:
        """Return the exit code; Jupyter asks when the kernel has ended."""
        return self.poll()

    def send_signal(self, number: int) -> None:
        """Send a signal to the kernel alone, if it still runs."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)


def _serve() -> None:
    """Be the nursery: import, then answer requests, a line of JSON each, until there are no more."""
    for module in IMPORTED:
        importlib.import_module(module)
    import pandas  # here, not above: the command that starts kernels need not wait for it

    # In a process that is no kernel pandas would cut tables to the width of a terminal; this is what a kernel has.
    pandas.set_option("display.max_columns", 20)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        answer = _exit_code(request["ended"]) if "ended" in request else _fork(**request)
        print(json.dumps(answer), flush=True)


def _exit_code(pid: int) -> int | None:
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def _fork(arguments: list[str], environment: dict[str, str], folder: str) -> int:
    with warnings.catch_warnings():
        # Python from 3.12 on warns of forks where there are threads. These are OpenBLAS's and jemalloc's, idle by now,
        # and both libraries see to forks (pthread_atfork).
        warnings.simplefilter("ignore", DeprecationWarning)
        kernel = os.fork()
    return kernel or _be_kernel(arguments, environment, folder)


def _be_kernel(arguments: list[str], environment: dict[str, str], folder: str) -> NoReturn:
    from ipykernel import kernelapp

    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        os.environ.clear()
        os.environ |= environment
        # Requests and answers are the nursery's alone.
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)
        sys.path.pop(0)  # where the nursery was started; the kernel puts its own folder there
        sys.argv = ["ipykernel_launcher", *arguments, f"--IPKernelApp.parent_handle={os.getppid()}"]
        kernelapp.launch_new_instance()
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)  # what is left on the stack is the nursery's


if __name__ == "__main__":
    _serve()

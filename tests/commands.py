"""Runs ``lowrank`` in this process, and commands in others that are interrupted and killed."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil
from click.testing import CliRunner

from lowrank_helpers import cli


def lowrank(*arguments: Any, code: int = 0) -> str:
    """Return what ``lowrank`` prints in this process; it ends with that exit code and without a traceback."""
    result = CliRunner().invoke(cli.main, [*map(str, arguments)])
    assert result.exit_code == code and isinstance(result.exception, SystemExit | None), result.output
    assert "Traceback" not in result.output
    return result.output


def start(*command: Any, **options: Any) -> subprocess.Popen:
    """Start a command in a session of its own, as a terminal's foreground, where it hears Ctrl-C."""
    return subprocess.Popen(
        [*map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in the background of a script
        **options,
    )


def finish(process: subprocess.Popen, code: int) -> str:
    """Return what a command printed; it ends with that exit code and without a traceback."""
    shown, _ = process.communicate(timeout=400)
    assert process.returncode == code, shown
    assert not re.search("Traceback|KeyboardInterrupt", shown), shown
    assert code < 0 or "leaked" not in shown, shown  # a killed process cleans up nothing
    return shown


def wait_for(condition: Callable[[], Any], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def kernels(pid: int) -> list[psutil.Process]:
    """Return the kernels of a process and its workers: what their servers forked; others, such as git, come and go."""
    kernels = []
    for child in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if "lowrank_helpers.series.run" in " ".join(child.cmdline()):  # a fork server, by what it is told to import
                kernels += [kernel for kernel in child.children() if os.getsid(kernel.pid) == kernel.pid]
    return kernels

"""A run that is killed, stopped or starved of disk ends, when resumed, in the same results: the command in a terminal.

It runs a series of small notebooks in a copy of the project. What needs no process of its own is in ``test_execution``.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from processes import heed_interrupts, kernels
from small_series import FIRST, LAST, apart_from_time, write_series

from lowrank_helpers import PROJECT

pytestmark = pytest.mark.slow


@pytest.fixture
def project(tmp_path) -> Path:
    """A copy of the project whose series is three small notebooks."""
    shutil.copytree(PROJECT / "lowrank_helpers", tmp_path / "lowrank_helpers")
    write_series(tmp_path / "notebooks")
    return tmp_path


def start(project: Path, *arguments: str) -> subprocess.Popen:
    """Start ``lowrank run`` into the project's folder ``out``."""
    return subprocess.Popen(
        [sys.executable, "-m", "lowrank_helpers", "run", "-o", "out", *arguments],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(project)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=heed_interrupts,
        start_new_session=True,
    )


def wait_for(condition: Callable[[], Any], process: subprocess.Popen) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.005)


def has_locked(pid: int, out: Path) -> bool:
    """Say whether a run has locked its folder; before, it may not heed an interruption yet."""
    return (out / ".lock").exists() and (out / ".lock").read_text().startswith(f"process {pid} ")


# What to wait for in the run's folder or process, and what then hits the run.
STOPS = {
    "executing": (lambda _, pid: kernels(pid), signal.SIGINT),
    "trained": (lambda out, _: any((out / "networks").glob("*.safetensors")), signal.SIGKILL),
    "between notebooks": (lambda out, pid: has_locked(pid, out) and (out / f"{FIRST}.ipynb").exists(), signal.SIGINT),
    "rendering": (lambda out, _: (out / f"{LAST}.ipynb").exists(), signal.SIGKILL),
}


def test_run_stopped_again_and_again_resumes_to_the_same_results(project):
    out = project / "out"
    for moment, (reached, stop) in STOPS.items():
        process = start(project, "--resume")
        wait_for(lambda reached=reached, pid=process.pid: reached(out, pid), process)
        left = kernels(process.pid)
        if stop == signal.SIGINT:
            os.killpg(process.pid, stop)  # as the terminal does: to all in the foreground
        else:
            process.kill()
        shown, _ = process.communicate(timeout=60)
        assert not re.search("Traceback|KeyboardInterrupt", shown), (moment, shown)
        assert process.returncode == (130 if stop == signal.SIGINT else -signal.SIGKILL), (moment, shown)
        assert ("The same command goes on" in shown) == (stop == signal.SIGINT)
        psutil.wait_procs(left, timeout=20)
        assert not any(kernel.is_running() for kernel in left), moment
    results = []
    for resume, n_kept in (["--resume"], 3), ([], 0):
        process = start(project, *resume)
        shown, _ = process.communicate(timeout=200)
        assert process.returncode == 0 and shown.count("kept") == n_kept, shown
        results.append(apart_from_time(json.loads((out / "results.json").read_text())))
    assert results[0] == results[1], "resumed as undisturbed"
    assert list(out.rglob(".*.tmp*")) == []


def test_interrupted_while_importing_leaves_no_traceback(project):
    process = start(project)
    maps = Path(f"/proc/{process.pid}/maps")
    if not maps.exists():
        pytest.skip("this system does not say what a process has loaded")
    wait_for(lambda: "libtorch" in maps.read_text(), process)
    process.send_signal(signal.SIGINT)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in shown
    assert not (project / "out").exists()


IN_A_SMALL_DISK = """
mkdir out && mount -t tmpfs -o size=4k none out && {run}; echo "exit $?"
mount -o remount,size=100m out && {run} --resume && cp out/results.json saved.json
"""


def test_full_disk_is_a_clear_error_and_resumes(project):
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    try:
        subprocess.run([*namespace, "mount", "-t", "tmpfs", "none", str(project)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine lets no test mount a small disk")
    run = f"{sys.executable} -m lowrank_helpers run {FIRST} -o out"
    done = subprocess.run(
        [*namespace, "sh", "-c", IN_A_SMALL_DISK.format(run=run)],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(project)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    assert "No space left on device" in done.stdout and "exit 1" in done.stdout, done.stdout
    assert "Traceback" not in done.stdout
    assert json.loads((project / "saved.json").read_text())["claims"]["1.1"]["holds"]

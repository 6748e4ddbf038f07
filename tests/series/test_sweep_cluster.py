"""Sweeps on Dask as users run them: the command line, a scheduler and workers in processes of their own, over TCP.

The series is one small notebook in a copy of the project. It says when it begins, waits while there is a file
``hold SEED``, and fails where there is a file ``fail SEED``.
"""

import gc
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import psutil
import pytest
from commands import finish, kernels, lowrank, start, wait_for
from distributed import Client
from small_series import notebook

from lowrank_helpers import PROJECT
from lowrank_helpers.models import mlp
from lowrank_helpers.series import execution, sweep
from lowrank_helpers.series.cluster import connected
from lowrank_helpers.series.execution import RunError
from lowrank_helpers.series.store import TEMPORARY
from lowrank_helpers.training import Recipe, fit

pytestmark = pytest.mark.slow

WORK = """
import time
from pathlib import Path

with Path("begun").open("a") as begun:
    begun.write(f"{seed}\\n")
while Path(f"hold {seed}").exists():
    time.sleep(0.05)
if Path(f"fail {seed}").exists():
    raise ValueError("no such luck")

from lowrank_helpers.models import mlp
from lowrank_helpers.series.run import Run
from lowrank_helpers.training import Recipe

run = Run("01_small", globals())
model, history = run.train(mlp([784, 16, 10], seed=seed), Recipe(1, 64, 1e-3, seed=seed))
common, _ = run.train(mlp([784, 8, 10], seed=99), Recipe(1, 64, 1e-3, seed=99))
measured = vars(history.final("test"))
run.claim("2.1", "Some are right.", holds=True, measured=measured, timings={"s": time.time()})
"""


class Project:
    """A copy of the project whose series is the small notebook, and the processes that run in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.notebooks = folder, folder / "notebooks"
        self.started: list[subprocess.Popen] = []
        self.notebooks.mkdir(parents=True)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PROJECT / "lowrank_helpers", folder / "lowrank_helpers", ignore=ignored)
        nbformat.write(notebook(WORK), self.notebooks / "01_small.ipynb")

    def start(self, *command: Any) -> subprocess.Popen:
        environment = os.environ | {"PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1"}
        process = start(sys.executable, "-m", *command, cwd=self.folder, env=environment)
        self.started.append(process)
        return process

    def cluster(self) -> tuple[str, list[psutil.Process]]:
        """Start a scheduler and two workers without a nanny, so that a killed one is not replaced."""
        file, local = self.folder / "scheduler.json", ["--host", "127.0.0.1", "--no-dashboard"]
        self.start("dask", "scheduler", *local, "--port=0", "--scheduler-file", file)
        wait_for(lambda: file.exists() and file.read_text().endswith("}"))  # it is not written at once
        address = json.loads(file.read_text())["address"]
        worker = ["dask", "worker", address, *local, "--nthreads=1", "--no-nanny"]
        return address, [psutil.Process(self.start(*worker).pid) for _ in range(2)]

    def begun(self) -> list[int]:
        """Return the seeds of the points that began, in order, as often as they did."""
        file = self.notebooks / "begun"
        return [int(line) for line in file.read_text().splitlines()] if file.exists() else []

    @contextmanager
    def told(self, *words: str) -> Iterator[None]:
        """Have files of these names beside the notebook to the end of this context."""
        for word in words:
            (self.notebooks / word).touch()
        yield
        for word in words:
            (self.notebooks / word).unlink()


@pytest.fixture
def project(tmp_path) -> Iterator[Project]:
    project = Project(tmp_path / "project")
    yield project
    for process in project.started:
        process.kill()
        process.wait()


def test_what_is_interrupted_killed_or_fails_loses_no_point_and_changes_no_number(project, digits, tmp_path):
    """One folder, three sweeps: stopped by Ctrl-C, killed, and at last one that loses a worker and has points fail."""
    out = tmp_path / "out"
    with project.told("hold 1"):
        process = project.start("lowrank_helpers", "sweep", "-g", "seed=0..1", "--workers", "1", "-o", out)
        wait_for(lambda: project.begun() == [0, 1])
        started = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)  # as the terminal does: to all in the foreground
        assert "Stopped. With --resume" in finish(process, 128 + signal.SIGINT)
    assert psutil.wait_procs(started, timeout=30)[1] == [], "no worker and no kernel is left"

    address, workers = project.cluster()
    resumed = ["lowrank_helpers", "sweep", "-o", out, "--scheduler", address, "--resume", "-g"]
    with project.told("hold 1", "hold 2"):
        process = project.start(*resumed, "seed=0..2")
        wait_for(lambda: len(project.begun()) == 4)
        assert all(kernels(worker.pid) for worker in workers)
        process.kill()
        process.wait()
    wait_for(lambda: len(list((out / "points").glob("*/01_small.ipynb"))) == 3)  # workers finish what they were at
    assert sorted(project.begun()) == [0, 1, 1, 2], "what was done was kept"

    with project.told("hold 3", "fail 4", "fail 5"):
        process = project.start(*resumed, "seed=0..5")
        wait_for(lambda: sorted(project.begun())[4:] == [3, 4, 4, 5, 5])
        wait_for(lambda: len([worker for worker in workers if kernels(worker.pid)]) == 1)
        (killed,) = (worker for worker in workers if kernels(worker.pid))
        (orphan,) = kernels(killed.pid)
        leftover = out / "networks" / f".of-the-killed{TEMPORARY}"
        leftover.write_bytes(b"half a network")
        killed.kill()
        assert psutil.wait_procs([orphan], timeout=30)[1] == [], "it would write into a folder that is another's now"
        wait_for(lambda: project.begun()[-1] == 3)
    shown = finish(process, 1)
    assert sorted(project.begun()) == [0, 1, 1, 2, 3, 3, 4, 4, 5, 5], "only what was missing ran, failures twice"
    assert re.search(r"Failed twice: seed=[45] and 1 more: 01_small, cell 3: ValueError: no such luck\n", shown)
    assert shown.count("no such luck") == 1 and "Points: 6, failed: 2" in shown and "seed=3: done" in shown
    assert "no such luck" in (out / "index.html").read_text()
    assert len(list((out / "networks").glob("*.safetensors"))) == 5, "the common network was made once"
    assert not leftover.exists()

    table = pd.read_csv(out / "table.csv")
    found = table[table["quantity"].eq("loss")].set_index("seed")["value"]
    assert list(found.index) == [0, 1, 2, 3]
    for seed, loss in zip(range(4), found, strict=True):
        history = fit(mlp([784, 16, 10], seed=seed), digits.hold_out(), Recipe(1, 64, 1e-3, seed=seed))
        assert loss == pytest.approx(history.final("test").loss, rel=1e-6)


@pytest.mark.parametrize("differing", ["python", "the lock"])
def test_worker_with_other_code_or_another_disk_is_refused_by_name(tmp_path, differing):
    lock = tmp_path / execution.LOCK
    lock.write_text("mine")
    needed = sweep.shared(tmp_path)
    sweep.check_shared(needed, tmp_path)
    if differing == "python":
        needed["python"] = "2.7"
    else:
        lock.unlink()
    said = f"worker process {os.getpid()} on \\S+ differs from the sweep: (python is |{lock} .* is missing, .* mine)"
    with pytest.raises(RunError, match=said):
        sweep.check_shared(needed, tmp_path)


def test_unreachable_scheduler_is_an_error_within_ten_seconds(tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{closed.getsockname()[1]}"
        begin = time.monotonic()
        command = ["sweep", "-g", "seed=0..2", "-p", "dataset", "digits", "--scheduler", address, "-o", tmp_path]
        assert f"no scheduler answers at {address}" in lowrank(*command, code=1)
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("address", ["nowhere", "tls://127.0.0.1:1"])
def test_an_address_that_is_none_is_named_and_leaves_no_open_client(address):
    """Its traceback holds the client; collected while another starts, it would wait for a lock for good."""
    with pytest.raises(RunError, match=f"no scheduler answers at {address}") as failure, connected(address):
        pass
    clients = [thing for thing in gc.get_objects() if issubclass(type(thing), Client)]
    assert {client.status for client in clients} == {"closed"}, failure

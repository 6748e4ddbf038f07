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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import psutil
import pytest
from click.testing import CliRunner
from distributed import Client
from processes import heed_interrupts, kernels
from small_series import notebook

from lowrank_helpers import PROJECT
from lowrank_helpers.cli import main
from lowrank_helpers.series import execution, sweep
from lowrank_helpers.series.cluster import ClusterError, connected
from lowrank_helpers.series.store import TEMPORARY

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
        self.folder = folder
        self.started: list[subprocess.Popen] = []
        self.notebooks = folder / "notebooks"
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PROJECT / "lowrank_helpers", folder / "lowrank_helpers", ignore=ignored)
        self.notebooks.mkdir()
        nbformat.write(notebook(WORK), self.notebooks / "01_small.ipynb")

    def start(self, *command: Any) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=heed_interrupts,
        )
        self.started.append(process)
        return process

    def stop(self) -> None:
        """Kill what a failed test has left."""
        for process in self.started:
            process.kill()
            process.wait()

    def sweep(self, *arguments: Any) -> subprocess.Popen:
        return self.start("-m", "lowrank_helpers", "sweep", *arguments)

    def begun(self) -> list[int]:
        """Return the seeds of the points that began, in order, as often as they did."""
        file = self.notebooks / "begun"
        return [int(line) for line in file.read_text().splitlines()] if file.exists() else []

    def forget_begun(self) -> None:
        (self.notebooks / "begun").unlink(missing_ok=True)

    @contextmanager
    def told(self, *words: str) -> Iterator[None]:
        """Have files of these names beside the notebook to the end of this context."""
        for word in words:
            (self.notebooks / word).touch()
        try:
            yield
        finally:
            for word in words:
                (self.notebooks / word).unlink()


class Cluster:
    """A scheduler and two workers without a nanny, so that a killed one is not replaced."""

    def __init__(self, project: Project, folder: Path) -> None:
        file, local = folder / "scheduler.json", ["--host", "127.0.0.1", "--no-dashboard"]
        self.processes = [project.start("-m", "dask", "scheduler", *local, "--port=0", "--scheduler-file", file)]
        wait_for(lambda: file.exists() and file.read_text().endswith("}"))  # it is not written at once
        self.address = json.loads(file.read_text())["address"]
        worker = ["-m", "dask", "worker", self.address, *local, "--nthreads=1", "--no-nanny"]
        self.processes += [project.start(*worker) for _ in range(2)]

    @property
    def workers(self) -> list[psutil.Process]:
        return [psutil.Process(process.pid) for process in self.processes[1:] if process.poll() is None]


def wait_for(condition: Callable[[], Any], seconds: float = 300) -> Any:
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return value


def busy(cluster: Cluster) -> list[psutil.Process]:
    return [worker for worker in cluster.workers if kernels(worker.pid)]


def finish(process: subprocess.Popen, code: int = 0) -> str:
    shown, _ = process.communicate(timeout=400)
    assert process.returncode == code, shown
    assert "Traceback" not in shown
    return shown


def untimed(out: Path) -> pd.DataFrame:
    """Return a sweep's table but for times, after a look that both files say the same."""
    parquet = pd.read_parquet(out / "table.parquet")
    csv = pd.read_csv(out / "table.csv").astype(parquet.dtypes.to_dict())
    pd.testing.assert_frame_equal(csv, parquet)
    return parquet[parquet["kind"].ne("timings")].reset_index(drop=True)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Iterator[Project]:
    project = Project(tmp_path_factory.mktemp("swept") / "project")
    yield project
    project.stop()


@pytest.fixture(scope="module")
def cluster(project, tmp_path_factory) -> Cluster:
    """One for all tests: importing PyTorch is the most that a worker does here."""
    return Cluster(project, tmp_path_factory.mktemp("cluster"))


@pytest.fixture(scope="module")
def reference(project, cluster, tmp_path_factory) -> Path:
    """A sweep of two points by one worker of its own, stopped by Ctrl-C at the second, and resumed on the cluster."""
    out = tmp_path_factory.mktemp("reference") / "out"
    with project.told("hold 1"):
        process = project.sweep("-g", "seed=0..1", "--workers", "1", "-o", out)
        wait_for(lambda: project.begun() == [0, 1])
        started = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)  # as the terminal does: to all in the foreground
        shown = finish(process, 130)
    assert "1 of 2 points are done. Add --resume" in shown
    assert not re.search("Traceback|KeyboardInterrupt|leaked", shown), shown
    assert psutil.wait_procs(started, timeout=30)[1] == [], "no worker and no kernel is left"
    shown = finish(project.sweep("-g", "seed=0..1", "--scheduler", cluster.address, "-o", out, "--resume"))
    assert "Points: 2, failed: 0" in shown
    assert project.begun() == [0, 1, 1], "what was done was kept"
    project.forget_begun()
    return out


def test_sweep_stopped_by_ctrl_c_resumes_and_ends(reference):
    table = untimed(reference)
    assert list(table["point"]) == ["seed=0", "seed=0", "seed=1", "seed=1"]
    assert table["value"].nunique() == 4
    assert len(list((reference / "networks").glob("*.safetensors"))) == 3, "the common network was made once"


def test_failing_points_are_tried_twice_reported_once_and_stop_no_other(project, cluster, tmp_path):
    out = tmp_path / "out"
    with project.told("fail 1", "fail 2"):
        shown = finish(project.sweep("-g", "seed=0..2", "--scheduler", cluster.address, "-o", out), 1)
    begun = sorted(project.begun())
    project.forget_begun()
    assert begun == [0, 1, 1, 2, 2]
    assert re.search("Failed twice: seed=[12], seed=[12]: 01_small \\(cell 3\\): ValueError: no such luck", shown)
    assert "Points: 3, failed: 2" in shown and "seed=0: done" in shown
    assert set(untimed(out)["point"]) == {"seed=0"}
    assert shown.count("no such luck") == 1
    assert "no such luck" in (out / "index.html").read_text()


@pytest.mark.parametrize("differing", [{"installed": {"python": "2.7"}}, {"lock": "process 0 on another disk"}])
def test_worker_with_other_code_or_another_disk_is_refused_by_name(tmp_path, differing):
    (tmp_path / execution.LOCK).write_text("mine")
    needed = {"folder": tmp_path, "lock": "mine", "installed": sweep._installed()}
    sweep.Requirements(**needed).check()
    wrong = needed | differing | {"installed": needed["installed"] | differing.get("installed", {})}
    with pytest.raises(ClusterError, match=rf"worker process {os.getpid()} on \S+ (has python|does not see)"):
        sweep.Requirements(**wrong).check()


def test_killed_client_and_killed_worker_lose_no_point(project, cluster, reference, tmp_path):
    out = tmp_path / "out"
    arguments = ["-g", "seed=0..2", "--scheduler", cluster.address, "-o", out]
    with project.told("hold 0", "hold 1"):
        process = project.sweep(*arguments)
        wait_for(lambda: len(project.begun()) == 2)
        assert len(busy(cluster)) == 2
        process.kill()
        process.wait()
    wait_for(lambda: len(list((out / "points").glob("*/results.json"))) == 2)  # workers finish what they were at
    project.forget_begun()

    with project.told("hold 2"):
        process = project.sweep(*arguments, "--resume")
        wait_for(project.begun)
        (killed,) = busy(cluster)
        (orphan,) = kernels(killed.pid)
        leftover = out / "networks" / f".of-the-killed{TEMPORARY}"
        leftover.write_bytes(b"half a network")
        killed.kill()
        assert psutil.wait_procs([orphan], timeout=30)[1] == [], "it would write into a folder that is another's now"
        wait_for(lambda: len(project.begun()) == 2)
    shown = finish(process)
    assert "Points: 3, failed: 0" in shown
    assert len(set(project.begun())) == 1, "only the point that was missing ran"
    project.forget_begun()
    found = untimed(out)
    assert found["point"].nunique() == 3
    both = found[found["seed"] < 2].reset_index(drop=True)
    pd.testing.assert_frame_equal(both, untimed(reference))
    assert len(list((out / "networks").glob("*.safetensors"))) == 4
    assert not leftover.exists()


def test_unreachable_scheduler_is_an_error_within_ten_seconds(tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{closed.getsockname()[1]}"
        start = time.monotonic()
        command = ["sweep", "-g", "seed=0..2", "-p", "dataset", "digits", "--scheduler", address, "-o", str(tmp_path)]
        result = CliRunner().invoke(main, command)
    assert time.monotonic() - start < 10
    assert result.exit_code == 1
    assert f"no scheduler answers at {address}" in result.output


@pytest.mark.parametrize("address", ["nowhere", "tls://127.0.0.1:1"])
def test_an_address_that_is_none_is_named_and_leaves_no_open_client(address):
    """Its traceback holds the client; collected while another starts, it would wait for a lock for good."""
    with pytest.raises(ClusterError, match=f"no scheduler answers at {address}") as failure, connected(address):
        pass
    clients = [thing for thing in gc.get_objects() if issubclass(type(thing), Client)]
    assert {client.status for client in clients} == {"closed"}, failure

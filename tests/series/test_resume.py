"""A run that is killed, stopped, starved of disk or handed damaged files ends, when resumed, in the same results.

The real command line runs a series of small notebooks, in a copy of the project that holds nothing else.
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

import nbformat
import psutil
import pytest
from processes import heed_interrupts, kernels

from lowrank_helpers import PROJECT
from lowrank_helpers.series.execution import run_folder

pytestmark = pytest.mark.slow

PARAMETERS = """
dataset = "digits"
data_dir = ""
seed = 0
device = "cpu"
precision = "float32"
"""
SETUP = """
from lowrank_helpers.models import mlp
from lowrank_helpers.series.run import Run
from lowrank_helpers.training import Recipe
run = Run("{name}", globals())
"""
TRAIN = """
import time
start = time.perf_counter()
model, history = run.train(mlp([784, 64, 10], seed=seed), Recipe(epochs=2, batch_size=64, learning_rate=1e-3))
accuracy = history.final("test").accuracy
run.claim("{id}", "Most are right.", holds=accuracy > 0.5, measured={{"accuracy": accuracy}})
run.claim("{id}/took", "It takes time.", holds=True, timings={{"seconds": time.perf_counter() - start}})
"""
CONCLUDE = """
run.answers(of_all=True)
"""
NOTEBOOKS = {"01_first": TRAIN.format(id="2.1"), "02_same": TRAIN.format(id="2.2"), "03_conclusions": CONCLUDE}


READ = ["01_first", "02_same"]  # by the last


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A project whose series has run, undisturbed: two notebooks use the same network, the third reads claims."""
    folder = tmp_path_factory.mktemp("done") / "project"
    shutil.copytree(
        PROJECT / "lowrank_helpers", folder / "lowrank_helpers", ignore=shutil.ignore_patterns("__pycache__")
    )
    (folder / "notebooks").mkdir()
    for name, source in NOTEBOOKS.items():
        write_notebook(folder, name, source)
    finish(folder)
    return folder


@pytest.fixture
def project(done, tmp_path) -> Path:
    """A copy of that project, with what its run left."""
    return Path(shutil.copytree(done, tmp_path / "project"))


@pytest.fixture
def fresh(project) -> Path:
    """A copy of that project, before any run."""
    shutil.rmtree(project / "out")
    return project


@pytest.fixture(scope="module")
def reference(done) -> dict[str, Any]:
    """Results of the undisturbed run."""
    return found(done)


def write_notebook(project: Path, name: str, source: str) -> None:
    notebook = nbformat.v4.new_notebook(metadata={"lowrank": {"reads": READ if source == CONCLUDE else []}})
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    parameters = nbformat.v4.new_code_cell(PARAMETERS, id="parameters", metadata={"tags": ["parameters"]})
    notebook.cells = [parameters]
    notebook.cells += [nbformat.v4.new_code_cell(text) for text in (SETUP.format(name=name), source)]
    nbformat.write(notebook, project / "notebooks" / f"{name}.ipynb")


def start(project: Path, *arguments: str, **options: Any) -> subprocess.Popen:
    """Start ``lowrank run`` into the project's folder ``out``."""
    command = [sys.executable, "-m", "lowrank_helpers", "run", "-o", "out", *arguments]
    return subprocess.Popen(
        command,
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(project)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=heed_interrupts,
        **options,
    )


def finish(project: Path, *arguments: str) -> str:
    """Run to the end, expect success, and return what the terminal showed."""
    process = start(project, *arguments)
    shown, _ = process.communicate(timeout=200)
    assert process.returncode == 0, shown
    return shown


def found(project: Path) -> dict[str, Any]:
    return apart_from_time(json.loads((project / "out" / "results.json").read_text()))


def apart_from_time(results: dict[str, Any]) -> dict[str, Any]:
    """Drop dates, durations, and what a resumed run says of notebooks that it kept."""
    results["seconds"] = None
    for notebook in results["notebooks"].values():
        notebook |= {"status": notebook["status"].replace("kept", "done"), "seconds": None, "seconds_by_kind": None}
        notebook.get("environment", {}).pop("started", None)
    for claim in results["claims"].values():
        claim["timings"] = None
    return results


def wait_for(condition: Callable[[], Any], process: subprocess.Popen) -> Any:
    end = time.monotonic() + 120
    while not (value := condition()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.005)
    return value


def test_reference_holds_what_was_asked(reference):
    assert set(reference["notebooks"]) == set(NOTEBOOKS)
    assert set(reference["claims"]) == {"2.1", "2.1/took", "2.2", "2.2/took"}
    assert reference["claims"]["2.1"]["measured"]["accuracy"][""] > 0.8


def test_order_and_repetition_change_nothing(fresh, reference):
    finish(fresh, "02_same")
    finish(fresh, "01_first")
    shown = finish(fresh, "--resume")
    assert shown.count("kept") == 2
    assert found(fresh) == reference


@pytest.mark.parametrize("workers", ["1", "2"])
def test_numbers_do_not_depend_on_how_many_notebooks_run_at_once(fresh, reference, workers):
    finish(fresh, "--workers", workers)
    assert found(fresh) == reference


def holds(pid: int, out: Path) -> bool:
    """Say whether a run holds its folder; before, it may not heed an interruption yet."""
    return (out / ".lock").exists() and (out / ".lock").read_text().startswith(f"process {pid} ")


# What to wait for in the run's folder or process, and what then hits the run.
STOPS = {
    "starting": (lambda out, _: (out / ".lock").exists(), signal.SIGKILL),
    "executing": (lambda _, pid: kernels(pid), signal.SIGINT),
    "trained": (lambda out, _: any((out / "networks").glob("*.safetensors")), signal.SIGKILL),
    "between notebooks": (lambda out, pid: holds(pid, out) and (out / "01_first.ipynb").exists(), signal.SIGINT),
    "rendering": (lambda out, _: (out / "03_conclusions.ipynb").exists(), signal.SIGKILL),
    "rendered": (lambda out, _: (out / "03_conclusions.html").exists(), signal.SIGKILL),
}


def test_run_stopped_again_and_again_resumes_to_the_same_results(fresh, reference):
    for moment, (reached, stop) in STOPS.items():
        process = start(fresh, "--resume", start_new_session=True)
        wait_for(lambda reached=reached, pid=process.pid: reached(fresh / "out", pid), process)
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
    assert finish(fresh, "--resume").count("kept") == 3
    assert found(fresh) == reference
    assert list((fresh / "out").rglob(".*.tmp*")) == []


def test_interrupted_while_importing_leaves_no_traceback(fresh):
    process = start(fresh)
    maps = Path(f"/proc/{process.pid}/maps")
    if not maps.exists():
        pytest.skip("this system does not say what a process has loaded")
    wait_for(lambda: "libtorch" in maps.read_text(), process)
    process.send_signal(signal.SIGINT)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in shown
    assert not (fresh / "out").exists()


def test_killed_kernel_is_a_failed_notebook_and_resume_runs_it(project, reference):
    (project / "out" / "01_first.ipynb").unlink()
    process = start(project, "--resume")
    wait_for(lambda: kernels(process.pid), process)[0].kill()
    shown, _ = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "Traceback" not in shown
    assert "Kernel died" in shown
    assert "02_same          kept" in shown
    finish(project, "--resume")
    assert found(project) == reference


def test_second_run_into_a_folder_says_who_holds_it(project):
    environment = dict(os.environ)
    with run_folder(project / "out"):
        process = start(project)
        shown, _ = process.communicate(timeout=60)
    assert dict(os.environ) == environment
    assert process.returncode == 1
    assert f"in use by process {os.getpid()}" in shown
    assert "Traceback" not in shown


def test_notebook_that_raises_fails_alone_and_resume_goes_on_from_it(project, reference):
    write_notebook(project, "01_first", "raise ValueError('no such luck')")
    process = start(project, "--resume")
    shown, _ = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "Traceback" not in shown
    assert "01_first         failed" in shown
    assert "ValueError: no such luck" in shown
    assert "02_same          kept" in shown
    assert "03_conclusions   done" in shown, "it reads what 01_first claims"
    assert "no such luck" in (project / "out" / "01_first.html").read_text()
    assert set(found(project)["claims"]) == {"2.2", "2.2/took"}, "no claim of an earlier run is left"
    write_notebook(project, "01_first", NOTEBOOKS["01_first"])
    assert "02_same          kept" in finish(project, "--resume")
    assert found(project) == reference


def test_damaged_run_folder_resumes_to_the_same_results(project, reference):
    network = next((project / "out" / "networks").iterdir())
    network.write_bytes(network.read_bytes()[:-1])
    filed = project / "out" / "claims" / "01_first.json"
    filed.write_text(filed.read_text().replace("right", "wrong"))
    truncated, altered = (project / "out" / f"{name}.ipynb" for name in ("02_same", "03_conclusions"))
    truncated.write_text(truncated.read_text()[:1000])
    altered.write_text(altered.read_text().replace("right", "wrong"))
    shown = finish(project, "--resume")
    assert all(file.name in shown for file in (filed, truncated, altered)), "warnings name them"
    assert "kept" not in shown
    executed = [(project / "out" / f"{name}.ipynb").read_text() for name in ("01_first", "02_same")]
    assert any(network.name in text for text in executed), "whichever finds the network first warns, and names it"
    assert found(project) == reference


IN_A_SMALL_DISK = """
mkdir out && mount -t tmpfs -o size={size},{mode} none out && {run}; echo "exit $?"
mount -o remount,rw,size=100m out && {run} --resume && cp out/results.json saved.json
"""


@pytest.mark.parametrize(
    ("size", "mode", "complaint"),
    [
        ("4k", "rw", "No space left on device"),  # not even for the notebook
        ("120k", "rw", "No space left on device"),  # for the notebook, not for its network
        ("100m", "ro", "Read-only file system"),
    ],
)
def test_full_or_protected_disk_is_a_clear_error_and_resumes(fresh, reference, size, mode, complaint):
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    try:
        subprocess.run([*namespace, "mount", "-t", "tmpfs", "none", str(fresh)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine lets no test mount a small disk")
    run = f"{sys.executable} -m lowrank_helpers run 01_first -o out"
    done = subprocess.run(
        [*namespace, "sh", "-c", IN_A_SMALL_DISK.format(size=size, mode=mode, run=run)],
        cwd=fresh,
        env=os.environ | {"PYTHONPATH": str(fresh)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    assert complaint in done.stdout, done.stdout
    assert "exit 1" in done.stdout
    assert "Traceback" not in done.stdout
    resumed = apart_from_time(json.loads((fresh / "saved.json").read_text()))
    assert resumed["claims"]["2.1"] == reference["claims"]["2.1"]

"""Runs that are stopped, killed, damaged or starved of disk end, when resumed, in the same results.

Most run in this process, whose kernels are forked from one server; importing PyTorch is the most that a command does.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
from commands import finish, kernels, lowrank, start, wait_for
from idx_files import write_small_fashion_mnist
from small_series import FIRST, LAST, SAME, SETUP, apart_from_time, notebook, write_series

from lowrank_helpers.series import execution
from lowrank_helpers.series.execution import run_folder

pytestmark = pytest.mark.slow


lowrank_run = partial(lowrank, "run")


def found(out: Path) -> dict:
    return apart_from_time(json.loads((out / "results.json").read_text()))


@pytest.fixture
def sources(monkeypatch, tmp_path) -> Path:
    """The series of three small notebooks, in place of the project's."""
    write_series(tmp_path / "notebooks")
    monkeypatch.setattr(execution, "NOTEBOOK_FOLDER", tmp_path / "notebooks")
    return tmp_path / "notebooks"


def write(sources: Path, **notebooks: list[str]) -> None:
    """Write notebooks, by name, of these code cells, in place of those that are there."""
    for file in sources.iterdir():
        file.unlink()
    for name, cells in notebooks.items():
        nbformat.write(notebook(*cells), sources / f"{name.removeprefix('n')}.ipynb")


def test_order_repetition_workers_failures_and_damage_change_no_result(sources, tmp_path):
    out, again = tmp_path / "out", tmp_path / "again"
    lowrank_run("--workers", 2, "-o", out)
    reference = found(out)
    assert {*reference["claims"]} == {"1.1", "1.1/took", "2.1", "2.1/took"}
    assert reference["claims"]["1.1"]["measured"]["accuracy"][""] > 0.8
    assert len([*(out / "networks").iterdir()]) == 1, "two notebooks train the same network"

    lowrank_run(SAME, "--workers", 1, "-o", again)
    assert lowrank_run("--resume", "--workers", 1, "-o", again).count("kept") == 1
    assert found(again) == reference

    first = sources / f"{FIRST}.ipynb"
    intact = first.read_bytes()
    nbformat.write(notebook("raise ValueError('no such luck')"), first)
    shown = lowrank_run("--resume", "-o", out, code=1)
    assert f"{FIRST}          failed" in shown and f"{SAME}         kept" in shown
    assert f"{LAST}   done" in shown, "it reads what the first claims"
    assert f"Failed: {FIRST}, cell 2: ValueError: no such luck" in shown
    assert "no such luck" in (out / f"{FIRST}.html").read_text()
    assert {*found(out)["claims"]} == {"2.1", "2.1/took"}, "no claim of an earlier run is left"

    nbformat.write(notebook("import os, signal", "os.kill(os.getpid(), signal.SIGKILL)"), first)
    assert "Kernel died" in lowrank_run("--resume", "-o", out, code=1)
    first.write_bytes(intact)
    assert f"{SAME}         kept" in lowrank_run("--resume", "-o", out)
    assert found(out) == reference

    network = next((out / "networks").iterdir())
    network.write_bytes(network.read_bytes()[:-1])
    filed = out / "claims" / f"{FIRST}.json"
    filed.write_text(filed.read_text().replace("right", "wrong"))
    truncated = out / f"{SAME}.ipynb"
    truncated.write_text(truncated.read_text()[:1000])
    with pytest.warns(UserWarning) as warned:
        assert "kept" not in lowrank_run("--resume", "-o", out)
    named = " ".join(str(warning.message) for warning in warned)
    assert filed.name in named and truncated.name in named
    executed = [(out / f"{name}.ipynb").read_text() for name in (FIRST, SAME)]
    assert any(network.name in text for text in executed), "whichever finds the network first warns, and names it"
    assert found(out) == reference


IN_A_SERIES = """
import sys
from pathlib import Path
from lowrank_helpers.__main__ import main
from lowrank_helpers.series import execution
execution.NOTEBOOK_FOLDER = Path(sys.argv.pop(1))
main()
"""


def stop(process: subprocess.Popen, number: int, when: Callable[[], Any]) -> str:
    """Send a signal to all in the foreground, as a terminal does, or kill the command alone; return what it said."""
    wait_for(lambda: when() or process.poll() is not None)
    left = kernels(process.pid)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.kill()
    shown = finish(process, 128 + number if number == signal.SIGINT else -number)
    assert psutil.wait_procs(left, timeout=20)[1] == []
    return shown


def test_run_interrupted_and_killed_resumes_to_the_same_results(sources, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", IN_A_SERIES, sources, "run", "--resume", "-o", out]
    process = start(*command)
    assert "Stopped. With --resume" in stop(process, signal.SIGINT, when=lambda: kernels(process.pid))
    shutil.rmtree(out / "networks", ignore_errors=True)  # if it came so far
    (out / f"{SAME}.ipynb").write_text("{")
    shown = stop(start(*command), signal.SIGKILL, when=lambda: any((out / "networks").glob("*.safetensors")))
    assert f"Warning: {SAME}.ipynb in the run's folder is damaged" in shown and "warnings.warn" not in shown
    lowrank_run("--resume", "-o", out)
    assert list(out.rglob(".*.tmp*")) == []
    assert lowrank_run("--resume", "-o", out).count("kept") == 3
    altered = out / f"{SAME}.ipynb"
    altered.write_text(altered.read_text().replace("right", "wrong"))
    with pytest.warns(UserWarning, match=rf"{SAME}\.ipynb in the run's folder is damaged"):
        assert lowrank_run("--resume", "-o", out).count("kept") == 1
    resumed = found(out)
    lowrank_run("-o", tmp_path / "undisturbed")
    assert found(tmp_path / "undisturbed") == resumed


def test_interrupted_while_importing_leaves_no_traceback(tmp_path):
    process = start(sys.executable, "-m", "lowrank_helpers", "run", "-o", tmp_path / "out")
    maps = Path(f"/proc/{process.pid}/maps")
    if not maps.exists():
        pytest.skip("this system does not say what a process has loaded")
    stop(process, signal.SIGINT, when=lambda: "libtorch" in maps.read_text())
    assert not (tmp_path / "out").exists()


def test_full_disk_is_a_clear_error_and_resumes(sources, tmp_path):
    def mount(*options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", *options, "none", str(tmp_path / "out")]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    (tmp_path / "out").mkdir()
    if not mount("size=4k"):
        pytest.skip("this user may not mount a small disk")
    try:
        assert "No space left on device" in lowrank_run(FIRST, "-o", tmp_path / "out", code=1)
        assert mount("remount,size=100m")
        lowrank_run(FIRST, "--resume", "-o", tmp_path / "out")
        assert found(tmp_path / "out")["claims"]["1.1"]["holds"]
    finally:
        subprocess.run(["umount", str(tmp_path / "out")], check=True)


def test_second_run_into_a_folder_says_who_has_locked_it(sources, tmp_path):
    with run_folder(tmp_path):
        assert f"in use by process {os.getpid()}" in lowrank_run("-o", tmp_path, code=1)


def test_failing_notebooks_leave_partial_outputs_and_say_why(sources, tmp_path):
    write(
        sources,
        n01_data=["print('so far')", "raise ValueError('no luck')", "print('never')"],
        n02_train=["raise ValueError('no luck')"],
        n03_rank=["print('fine', seed, type(seed).__name__)"],
    )
    (tmp_path / "mine.yaml").write_text("seed: 5\ndataset: digits\n")
    shown = lowrank_run("-f", tmp_path / "mine.yaml", "-p", "seed", 7, "--workers", 1, "-o", tmp_path / "out", code=1)
    assert "Failed: 01_data, cell 4: ValueError: no luck\nFailed: 02_train, cell 3: ValueError: no luck\n" in shown
    assert not (tmp_path / "out" / "01_data.ipynb").exists()
    partial = (tmp_path / "out" / "01_data.failed.ipynb").read_text()
    assert "so far" in partial and "ValueError" in partial
    assert "fine 7 int" in (tmp_path / "out" / "03_rank.ipynb").read_text(), "the command line goes over the file"
    notebooks = json.loads((tmp_path / "out" / "results.json").read_text())["notebooks"]
    assert [notebook["status"] for notebook in notebooks.values()] == ["failed", "failed", "done"]


LOADS = """
from lowrank_helpers import data
textbook = data.torchvision_set(run.data.name, run.data_dir, train=True)
run.claim("1.1", "There are images.", holds=True, measured={"images": len(textbook)})
"""


def test_relative_data_folder_is_relative_to_where_the_command_runs(sources, tmp_path, monkeypatch):
    write_small_fashion_mnist(tmp_path / "here" / "images")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("LOWRANK_DATA_DIR", "nowhere")
    write(sources, n01_data=[SETUP.format(name="01_data"), LOADS])
    lowrank_run("-p", "dataset", "fashion_mnist", "-p", "data_dir", "images", "-o", "out")
    results = Path("out", "results.json").read_text()
    assert json.loads(results)["claims"]["1.1"]["measured"]["images"] == {"": 60}
    for left in (results, Path("out", "01_data.ipynb").read_text()):
        assert str(tmp_path) not in left, "what is recorded holds no path of this machine"
    assert os.environ["LOWRANK_DATA_DIR"] == "nowhere"

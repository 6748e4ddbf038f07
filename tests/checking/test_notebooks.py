"""The recorded notebooks, executed again, must show what is recorded."""

import subprocess
import sys

import nbformat
import pytest

from lowrank_helpers import PROJECT
from lowrank_helpers.checking.comparison import treatment
from lowrank_helpers.series.execution import notebook_names, notebook_path

SHORT = ["01_data", "02_train"]
LOWRANK = [sys.executable, "-m", "lowrank_helpers"]
CHECK = [sys.executable, "-m", "pytest", "-p", "lowrank_helpers.checking.plugin", "--nbval-current-env"]


def passes(command: list[str]) -> None:
    done = subprocess.run(
        command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_recorded_outputs_reproduce_or_digits_reproduce_themselves(request, tmp_path):
    """Those of the shortest notebooks; `make check` has all. Without MNIST a second run must agree with a first."""
    try:
        request.getfixturevalue("mnist_dir")
    except pytest.skip.Exception:
        passes([*LOWRANK, "run", *SHORT, "-p", "dataset", "digits", "-o", str(tmp_path)])
        passes([*CHECK, *map(str, sorted(tmp_path.glob("*.ipynb")))])
    else:
        passes([*LOWRANK, "check", *SHORT])


@pytest.mark.parametrize("name", notebook_names())
def test_every_code_cell_is_recorded_and_most_are_checked(name):
    cells = [cell for cell in nbformat.read(notebook_path(name), as_version=4).cells if cell.cell_type == "code"]
    assert [cell.id for cell in cells if cell.execution_count is None] == []
    treated = [treatment(cell)[0] for cell in cells]
    assert treated.count("unchecked") <= 0.2 * len(treated)

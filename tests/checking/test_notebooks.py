"""The recorded notebooks, executed again, must show what is recorded."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import nbformat
import pytest

from lowrank_helpers.checking.comparison import CHECKED, treatment
from lowrank_helpers.checking.tolerances import FREE
from lowrank_helpers.data import PROJECT
from lowrank_helpers.series.execution import notebook_names, notebook_path

pytestmark = pytest.mark.slow

SHORT = ["01_data", "02_train", "04_overfit", "05_approximate"]
TOLERANCES = PROJECT / "docs" / "tolerances.md"
LOWRANK = [sys.executable, "-m", "lowrank_helpers"]
CHECK = [sys.executable, "-m", "pytest", "-p", "lowrank_helpers.checking.plugin", "--nbval-current-env"]


def passes(command: list[str], **environment: str) -> None:
    done = subprocess.run(
        command, cwd=PROJECT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    print(done.stdout)


def test_recorded_outputs_reproduce(mnist_dir: Path):
    """Those of the notebooks that take a minute or less; `make check` has all."""
    passes([*LOWRANK, "check", *SHORT], LOWRANK_DATA_DIR=str(mnist_dir))


def test_series_reproduces_itself_on_digits(request, tmp_path):
    """Where MNIST is not at hand: that the series runs, and that its second run agrees with its first."""
    try:
        request.getfixturevalue("mnist_dir")
    except pytest.skip.Exception:
        passes([*LOWRANK, "run", "-p", "dataset", "digits", "-o", str(tmp_path)])
        passes([*CHECK, *map(str, sorted(tmp_path.glob("*.ipynb")))])
    else:
        pytest.skip("MNIST is at hand: the recorded outputs themselves are checked")


def test_at_least_four_fifths_of_the_printing_cells_are_checked_where_enough_chains_ran():
    """Of notebooks that fewer executed, the cells say so, and their words are checked."""
    extents: Counter[str] = Counter()
    for name in notebook_names():
        notebook = nbformat.read(notebook_path(name), as_version=4)
        printing = [treatment(cell) for cell in notebook.cells if cell.get("outputs")]
        if FREE not in {treated.reason for treated in printing}:
            extents.update(treated.extent for treated in printing)
    assert extents.total() > 0, "no outputs are recorded, or no notebook has limits"
    assert extents[CHECKED] >= 0.8 * extents.total(), extents


def test_every_limit_is_one_that_the_table_says():
    rows = [line.strip("| ").split(" | ") for line in TOLERANCES.read_text().splitlines() if line.startswith("| ")]
    table = {(row[0], row[1]): row[4] for row in rows if len(row) == 7 and row[0] in notebook_names()}
    widest = {}
    for name in notebook_names():
        for cell in nbformat.read(notebook_path(name), as_version=4).cells:
            if cell.cell_type == "code" and (stated := treatment(cell).intervals):
                limits = [within for allowed in stated.values() for within in allowed if within]
                widest[name, cell.id] = f"{max((high - low) / 2 for low, high in limits):.3g}"
    assert widest and widest.items() <= table.items()


@pytest.mark.parametrize("name", notebook_names())
def test_every_code_cell_is_recorded(name):
    cells = nbformat.read(notebook_path(name), as_version=4).cells
    missing = [cell.id for cell in cells if cell.cell_type == "code" and cell.execution_count is None]
    assert missing == []


@pytest.mark.parametrize("name", notebook_names())
def test_every_metadata_is_in_the_vocabulary(name):
    notebook = nbformat.read(notebook_path(name), as_version=4)
    assert [treatment(cell) for cell in notebook.cells if cell.cell_type == "code"]

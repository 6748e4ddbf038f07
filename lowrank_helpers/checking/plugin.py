"""Re-executes recorded notebooks and compares their outputs: a pytest plugin on nbval, and ``lowrank check``.

``pytest -p lowrank_helpers.checking.plugin NOTEBOOK.ipynb …`` executes notebooks in the order given, sharing one fresh
run folder, a test a cell. nbval runs the cells; what must agree is in :mod:`lowrank_helpers.checking.comparison`, as
nbval compares whole texts. The recorded files are only read.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbval.plugin import IPyNbCell, IPyNbFile

from lowrank_helpers import data
from lowrank_helpers.checking.comparison import (
    CHECKED,
    TEXT_ONLY,
    UNCHECKED,
    MetadataError,
    Treatment,
    differences,
    treatment,
)
from lowrank_helpers.series import execution

PRINTING = pytest.StashKey[list["RecordedCell"]]()


def check(names: Sequence[str], given: Mapping[str, Any]) -> int:
    """Re-execute recorded notebooks of the series and compare their outputs with the recorded ones.

    Parameters
    ----------
    names : sequence of str
        Empty for all. With a notebook that reads the others' findings, all are executed.
    given : mapping
        Parameters in place of the recorded ones, such as another ``precision``, in the notebooks that declare them.

    Returns
    -------
    int
        pytest's exit status: 0 where everything agrees.

    Raises
    ------
    ParameterError
        A notebook or a parameter is unknown, or a value is not allowed.
    DatasetError
        MNIST, on which the notebooks are recorded, is not at hand.
    """
    planned = execution.plan(names, given)
    planned = execution.plan(sorted({*planned}.union(*map(execution.reads, planned))), given)
    data.resolve("mnist")  # here, that it is said once if it cannot be had
    paths = [str(execution.notebook_path(name)) for name in planned]
    return pytest.main(["-p", __name__, "--nbval-current-env", f"--given={json.dumps(planned)}", *paths])


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let notebooks be executed with other parameters than those recorded."""
    parser.addoption("--given", type=json.loads, default={}, help="JSON: by notebook, parameters and their values")


def pytest_configure(config: pytest.Config) -> None:
    """Give the notebooks a run folder of their own, as `lowrank run` would."""
    stack = ExitStack()
    config.add_cleanup(stack.close)
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="lowrank-check-"))
    stack.enter_context(execution.run_folder(Path(folder)))


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> "RecordedNotebook | None":
    """Take every notebook named on the command line."""
    return RecordedNotebook.from_parent(parent, path=file_path) if file_path.suffix == ".ipynb" else None


def pytest_collection_finish(session: pytest.Session) -> None:
    """Note the cells that print, for the summary."""
    cells = [item for item in session.items if isinstance(item, RecordedCell)]
    session.config.stash[PRINTING] = [cell for cell in cells if cell.cell.outputs]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how much of what the notebooks print was compared, and why the rest was not."""
    printing = config.stash.get(PRINTING, [])
    extents = Counter(cell.treatment.extent for cell in printing)
    counts = ", ".join(f"{extents[extent]} {extent}" for extent in (CHECKED, TEXT_ONLY, UNCHECKED))
    terminalreporter.section("recorded outputs")
    terminalreporter.line(f"{len(printing)} cells that print: {counts}")
    for cell in printing:
        if cell.treatment.reason:
            terminalreporter.line(f"{cell.treatment.extent}: {cell.nodeid} ({cell.treatment.reason})")


class RecordedNotebook(IPyNbFile):
    """A recorded notebook, which nbval executes cell by cell."""

    def collect(self) -> Iterator["RecordedCell"]:
        """Yield the code cells under their ids."""
        recorded = nbformat.read(self.path, as_version=4)
        sealed = recorded.metadata.get("lowrank", {}).get("outputs")
        if sealed and sealed != execution.outputs_checksum(recorded):
            raise self.CollectError(
                f"{self.path.name}: outputs are not as `lowrank record` wrote them; record them anew"
            )
        given = self.config.getoption("given").get(self.path.stem, {})
        for item in super().collect():
            if "parameters" in item.cell.metadata.get("tags", []):
                item.cell.source += "".join(f"\n{name} = {value!r}" for name, value in given.items())
            try:
                treated = treatment(item.cell)
            except MetadataError as error:
                raise self.CollectError(f"{self.path.name}, cell {item.cell.id}: {error}") from error
            cell = RecordedCell.from_parent(
                self, name=item.cell.id, cell_num=item.cell_num, cell=item.cell, options=item.options
            )
            cell.treatment = treated
            yield cell


class RecordedCell(IPyNbCell):
    """A cell whose outputs are compared as its metadata says."""

    treatment: Treatment
    differences: Sequence[str] = ()

    def runtest(self) -> None:
        """Execute the cell and compare; a cell that was never executed has nothing to compare with."""
        if self.cell.source.strip() and self.cell.execution_count is None:
            pytest.fail("no outputs are recorded; `lowrank record` records them", pytrace=False)
        super().runtest()

    def compare_outputs(self, test: Any, ref: Any, skip_compare: Any = None) -> bool:
        """Put this module's comparison in the place of nbval's."""
        self.differences = differences(ref, test, self.treatment)
        self.comparison_traceback = list(self.differences)
        return not self.differences

    def reportinfo(self) -> tuple[Path, int, str]:
        """Head a failure with the cell's id; nbval's number is of no cell that a reader sees."""
        return self.path, 0, f"{self.path.name}, cell {self.cell.id}"

    def repr_failure(self, excinfo: pytest.ExceptionInfo) -> Any:
        """Name the cell, and both values and the limits of each difference."""
        if not self.differences:
            return super().repr_failure(excinfo)
        return "\n".join(["not as recorded:", *self.differences])

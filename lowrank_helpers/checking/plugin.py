"""Re-executes recorded notebooks and compares them: a pytest plugin on nbval, and ``lowrank check``.

``pytest -p lowrank_helpers.checking.plugin NOTEBOOK.ipynb …`` executes notebooks in the order given, sharing one fresh
run folder: a test a cell, of whose outputs the words are compared, and a last test a notebook, which holds its claims
against the evidence. The recorded files are only read.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbval.plugin import IPyNbCell, IPyNbFile

from lowrank_helpers import data
from lowrank_helpers.checking.comparison import essence, treatment
from lowrank_helpers.series import evidence, execution
from lowrank_helpers.series.results import read_claims

FOLDER = pytest.StashKey[Path]()
REMARKS = pytest.StashKey[list[str]]()


def check(names: Sequence[str], given: Mapping[str, Any]) -> int:
    """Re-execute recorded notebooks (none named: all) and those that they read; return pytest's exit status.

    Parameters
    ----------
    given : mapping
        Parameters in place of the recorded ones, such as another ``seed``, in the notebooks that declare them.

    Raises
    ------
    ParameterError
        A notebook or a parameter is unknown, or a value is not allowed.
    DatasetError
        MNIST, on which the notebooks are recorded, is not at hand.
    """
    planned = execution.plan(execution.with_what_they_read(names), given)
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
    config.stash[FOLDER] = stack.enter_context(execution.run_folder(Path(folder)))
    config.stash[REMARKS] = []


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> "RecordedNotebook | None":
    """Take every notebook named on the command line."""
    return RecordedNotebook.from_parent(parent, path=file_path) if file_path.suffix == ".ipynb" else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Name what was not compared, and why, and evidence that is missing or older than the code."""
    terminalreporter.section("not compared, and evidence")
    for remark in config.stash[REMARKS] or ["all is compared, with evidence of today's code"]:
        terminalreporter.line(remark)


class RecordedNotebook(IPyNbFile):
    """A recorded notebook, which nbval executes cell by cell."""

    def collect(self) -> Iterator[pytest.Item]:
        """Yield the code cells under their ids, then the claims."""
        recorded = nbformat.read(self.path, as_version=4)
        sealed = recorded.metadata.get("lowrank", {}).get("outputs")
        if sealed and sealed != execution.outputs_checksum(recorded):
            raise self.CollectError(f"{self.path.name}: outputs are not as `make record` wrote them; record them anew")
        given = self.config.getoption("given").get(self.path.stem, {})
        for item in super().collect():
            if "parameters" in item.cell.metadata.get("tags", []):
                item.cell.source += "".join(f"\n{name} = {value!r}" for name, value in given.items())
            yield RecordedCell.from_parent(
                self, name=item.cell.id, cell_num=item.cell_num, cell=item.cell, options=item.options
            )
        yield Claims.from_parent(self, name="claims")


class RecordedCell(IPyNbCell):
    """A cell of whose outputs the essence is compared, as far as its metadata says."""

    def runtest(self) -> None:
        """Execute the cell and compare; a cell that was never executed has nothing to compare with."""
        if self.cell.source.strip() and self.cell.execution_count is None:
            pytest.fail("no outputs are recorded; `make record` records them", pytrace=False)
        super().runtest()

    def compare_outputs(self, test: Any, ref: Any, skip_compare: Any = None) -> bool:
        """Give nbval less to compare."""
        key, reason = treatment(self.cell)
        if key == "unchecked":
            self.config.stash[REMARKS].append(f"unchecked: {self.nodeid} ({reason})")
            return True
        test, ref = ([essence(each, exact=key == "exact") for each in outputs] for outputs in (test, ref))
        return bool(super().compare_outputs(test, ref, skip_compare=("output_type",)))


class Claims(pytest.Item):
    """What a notebook claimed and measured, against what the recorded runs did."""

    def runtest(self) -> None:
        """Fail where this run is unlike the recorded ones, and remark that there are none, or none of today's code."""
        name, remarks = self.path.stem, self.config.stash[REMARKS]
        filed = read_claims(self.config.stash[FOLDER]).get(name)
        if not filed:
            return
        dataset = filed["environment"]["dataset"]
        recorded = evidence.quoted(name, dataset, filed["parameters"])
        if not recorded.runs:
            remarks.append(f"no evidence: {name} on {dataset} with these parameters")
            return
        if changed := evidence.changed(recorded):
            said = f"{' and '.join(changed)} changed since revision {recorded.made_by['revision']}"
            remarks.append(f"old evidence: {name}: {said}; `python scripts/evidence.py {name}` makes it anew")
        checked = {item.path.stem for item in self.session.items}
        n_values = sum(each.n_values for each in (evidence.read(name, dataset) for name in checked) if each)
        if lines := evidence.unlike(recorded, filed["claims"], n_values):
            pytest.fail("\n".join(["unlike the recorded runs:", *lines]), pytrace=False)

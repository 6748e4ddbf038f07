"""Sets the tolerances of the recorded notebooks from runs under other conditions, and writes the table of them.

Record the series, then run it under other conditions, and give this script the run folders::

    make record
    lowrank sweep -f sweeps/seeds.yaml
    OMP_NUM_THREADS=1 lowrank run -o reports/one-thread
    lowrank run -p precision float32 -o reports/float32
    python tests/tolerances.py --seeds reports/sweeps/seeds/points/seed=[1-4] \\
        --thread reports/one-thread --float32 reports/float32

A cell's tolerance is the least that allows all the deviations that these runs show, rounded up to 1, 2 or 5 times a
power of ten, whether absolute, relative or the wider of both. A machine that rounds otherwise draws, in effect, another
order of the same sums; other seeds are the wider draw. A cell of which no run changes a number must agree exactly.
"""

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from lowrank_helpers.checking.comparison import CHECKED, are_whole, differences, printed_value, treatment
from lowrank_helpers.data import PROJECT
from lowrank_helpers.series.execution import notebook_names, notebook_path
from lowrank_helpers.series.store import write_atomically

TABLE = PROJECT / "docs" / "tolerances.md"
CONDITIONS = ("seeds", "thread", "float32")
HEAD = """# Tolerances of the recorded outputs

The recorded run has seed 0, two threads and matrix products in bfloat16. How far do its numbers move with other seeds
({n_seeds} runs), with one thread, and in float32? Each column has the largest deviation of whole numbers, then of
decimals, absolute and relative to the recorded number, where there is one. *Words*: in how many of the runs
the text beside the numbers differs, as where a comparison comes out the other way. The tolerance of a cell is set
from these by `tests/tolerances.py`, which says how. Checked cells that are not listed agree exactly in all runs.

| notebook | cell | seeds | one thread | float32 | words | tolerance |
|---|---|---|---|---|---|---|
"""


@dataclass
class Watcher:
    """Stands in for a tolerance: allows every number, and remembers by how much each is off the recorded one."""

    whole: list[Decimal] = field(default_factory=list)
    decimal: list[tuple[Decimal, Decimal]] = field(default_factory=list)  # the recorded number's size, the gap

    def allows(self, recorded: str, new: str) -> bool:
        old, now = printed_value(recorded), printed_value(new)
        if are_whole(recorded, new):
            self.whole.append(abs(now - old))
        else:
            self.decimal.append((abs(old), abs(now - old)))
        return True

    def __str__(self) -> str:
        whole = max(self.whole, default=0)
        gap = max((gap for _, gap in self.decimal), default=0)
        share = max((gap / size for size, gap in self.decimal if size), default=0)
        parts = [f"{whole:,}" if whole else "", f"{gap:.2g} ({100 * share:.2g} %)" if gap else ""]
        return "; ".join(filter(None, parts)) or "–"


def rounded_up(value: Decimal) -> Decimal:
    """Return the least of 1, 2 and 5 times a power of ten that is not below a value."""
    if not value:
        return value
    power = Decimal(10) ** math.floor(value.log10())
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value)


def tolerance(watchers: Sequence[Watcher]) -> dict[str, float | int]:
    """Return the tolerance that allows all the deviations seen, and of the decimals as little else as can be."""
    seen = [pair for watcher in watchers for pair in watcher.decimal]

    def relative(absolute: Decimal) -> Decimal:
        beyond = [(size, gap) for size, gap in seen if gap > absolute]
        if any(size == 0 for size, _ in beyond):
            return Decimal("Infinity")
        return rounded_up(max((gap / size for size, gap in beyond), default=Decimal(0)))

    def slack(absolute: Decimal) -> Decimal:
        share = relative(absolute)
        return sum((min(Decimal(1), max(absolute / size, share)) for size, _ in seen if size), Decimal(0))

    candidates = {rounded_up(gap) for _, gap in seen} | {Decimal(0)}
    absolute = min(sorted(candidates), key=slack)
    whole = rounded_up(max((gap for watcher in watchers for gap in watcher.whole), default=Decimal(0)))
    stated = {"relative": relative(absolute), "absolute": absolute, "integers": whole}
    return {name: int(value) if value == int(value) else float(value) for name, value in stated.items() if value}


def read(folder: Path, name: str) -> dict[str, NotebookNode]:
    """Return the cells of an executed notebook by id."""
    return {cell.id: cell for cell in nbformat.read(folder / f"{name}.ipynb", as_version=4).cells}


def watch(recorded: NotebookNode, runs: Iterable[NotebookNode]) -> tuple[Watcher, int]:
    """Compare a recorded cell with the same cell of other runs: its deviations, and how many differ in words."""
    watcher, worded = Watcher(), 0
    for run in runs:
        worded += bool(differences(recorded.outputs, run.outputs, watcher))  # type: ignore[arg-type]
    return watcher, worded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for condition in CONDITIONS:
        parser.add_argument(f"--{condition}", nargs="+", type=Path, required=True, metavar="FOLDER")
    folders = vars(parser.parse_args())
    rows = []
    for name in notebook_names():
        notebook = nbformat.read(notebook_path(name), as_version=4)
        notebook.metadata.get("lowrank", {}).pop("tolerance", None)
        runs = {condition: [read(folder, name) for folder in folders[condition]] for condition in CONDITIONS}
        for cell in notebook.cells:
            if not cell.get("outputs") or treatment(cell, notebook).extent != CHECKED:
                continue
            seen = [watch(cell, [run[cell.id] for run in runs[condition]]) for condition in CONDITIONS]
            watchers = [watcher for watcher, _ in seen]
            stated = tolerance(watchers)
            cell.metadata.pop("lowrank", None)
            if stated:
                cell.metadata["lowrank"] = {"tolerance": stated}
            words = sum(worded for _, worded in seen)
            if stated or words:
                said = [name, cell.id, *watchers, words or "–", treatment(cell, notebook).tolerance]
                rows.append(f"| {' | '.join(map(str, said))} |")
        write_atomically(notebook_path(name), (nbformat.writes(notebook) + "\n").encode())
    head = HEAD.format(n_seeds=len(folders["seeds"]))
    write_atomically(TABLE, (head + "\n".join(rows) + "\n").encode())


if __name__ == "__main__":
    main()

"""Write the outputs of reports/latest into notebooks/ and its pages into reports/reference/: ``make record``."""

import base64
import json
import shutil
import sys
from pathlib import Path

import nbformat

from lowrank_helpers import PROJECT
from lowrank_helpers.series.execution import notebook_names, notebook_path, outputs_checksum
from lowrank_helpers.series.parameters import declared
from lowrank_helpers.series.store import write_atomically

LATEST = PROJECT / "reports" / "latest"
REFERENCE = PROJECT / "reports" / "reference"
README_FIGURES = {"03_rank": "densities", "05_approximate": "accuracy-figure"}  # of each notebook a cell's id


def write_outputs(name: str, executed: Path) -> None:
    """Write the outputs of an executed notebook back into that of the series, and the README's figure into docs/."""
    recorded = nbformat.read(notebook_path(name), as_version=4)
    cells = {cell.id: cell for cell in nbformat.read(executed, as_version=4).cells}
    for cell in recorded.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = cells[cell.id].outputs, cells[cell.id].execution_count
    recorded.metadata.setdefault("lowrank", {})["outputs"] = outputs_checksum(recorded)
    write_atomically(notebook_path(name), (nbformat.writes(recorded) + "\n").encode())
    if name in README_FIGURES:
        outputs = cells[README_FIGURES[name]].outputs
        (image,) = (output.data["image/png"] for output in outputs if "image/png" in output.get("data", {}))
        write_atomically(PROJECT / "docs" / f"{name}-figure.png", base64.b64decode(image))


def main() -> None:
    """Record, or end with what may not be recorded."""
    runs = json.loads((LATEST / "results.json").read_text())["notebooks"]
    for name in notebook_names():
        environment, parameters = (runs.get(name, {}).get(part, {}) for part in ("environment", "parameters"))
        if environment.get("dataset") != "mnist" or parameters != declared(notebook_path(name)):
            sys.exit(f"Error: {name} in reports/latest did not run on MNIST with its defaults: make record")
    for name in notebook_names():
        write_outputs(name, LATEST / f"{name}.ipynb")
    REFERENCE.mkdir(parents=True, exist_ok=True)
    for file in [*LATEST.glob("*.html"), LATEST / "results.json"]:
        shutil.copyfile(file, REFERENCE / file.name)
    print("Recorded in notebooks/ and reports/reference/.")


if __name__ == "__main__":
    main()

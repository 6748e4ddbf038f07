"""Executes recorded notebooks again. Their words must be the same on every machine and from every seed.

Numbers in free text may differ, but for cells with the tag ``exact``; those of claims are held against the evidence.
Images must agree in kind and pixel size, widgets in being there. What the package shows of this machine or of other
runs is not compared: such an output's metadata has ``unchecked`` under ``lowrank``.
"""

import base64
import io
import json
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from PIL import Image

from lowrank_helpers.series import evidence, execution
from lowrank_helpers.series.execution import Planned, RunError
from lowrank_helpers.series.results import Outcome, failures, read_claims

NUMBER = re.compile(r"(?<![\w.])[-−+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?(?:[eE][-+]?\d+)?")  # not of fc1 or v2.1
QUOTED = 12  # words of two outputs that differ, from a little before where they part


def check(planned: Planned, *, workers: int | None = None) -> Iterator[tuple[Outcome, list[str], list[str]]]:
    """Execute recorded notebooks into a folder of their own, as ``execute`` does, and compare each once it has ended.

    Yields
    ------
    tuple
        How a notebook ended; its faults; and remarks: what was compared with nothing, or with old evidence.

    Raises
    ------
    RunError
        A notebook's outputs are not as they were recorded.
    """
    recorded = {name: _recorded(name) for name in planned}
    with tempfile.TemporaryDirectory(prefix="lowrank-check-") as made, execution.run_folder(Path(made)) as folder:
        for outcome in execution.execute(planned, folder, workers=workers):
            faults, remarks = failures([outcome]), list[str]()
            if not faults:
                cells = recorded[outcome.notebook].cells
                new = nbformat.read(folder / f"{outcome.notebook}.ipynb", as_version=4)
                faults = list(_differences(cells, {cell.id: cell.outputs for cell in new.cells if "outputs" in cell}))
                unlike, remarks = _held_against_evidence(outcome.notebook, folder, planned.keys())
                faults += unlike
            yield outcome, faults, remarks


def _recorded(name: str) -> NotebookNode:
    """Read a recorded notebook, before time is spent on its execution."""
    notebook: NotebookNode = nbformat.read(execution.notebook_path(name), as_version=4)
    if notebook.metadata.get("lowrank", {}).get("outputs") != execution.outputs_checksum(notebook):
        raise RunError(f"{name}: outputs are not as `make record` wrote them; record them anew")
    return notebook


def _differences(cells: list[NotebookNode], new: Mapping[str, list[NotebookNode]]) -> Iterator[str]:
    """Quote recorded outputs and new ones, which are by their cell's id, where they part."""
    for cell in cells:
        if cell.cell_type == "code":
            exact = "exact" in cell.metadata.get("tags", [])
            before, now = (essence(outputs, exact=exact) for outputs in (cell.outputs, new[cell.id]))
            for kind in before | now:
                was, has = _parting(before.get(kind, ""), now.get(kind, ""))
                if was != has:
                    yield f"cell {cell.id}: {kind} was {was!r} and is {has!r}"


def _parting(*texts: str) -> list[str]:
    """Return some words of two texts from a little before where they part, the same where they agree."""
    split = [text.split() for text in texts]
    parting = next((i for i, (one, other) in enumerate(zip_longest(*split)) if one != other), 0)
    start = max(0, parting - QUOTED // 3)
    return [" ".join(text[start : start + QUOTED]) for text in split]


def _held_against_evidence(name: str, folder: Path, names: Collection[str]) -> tuple[list[str], list[str]]:
    """Return what a notebook claimed and measured unlike the recorded runs, and remarks on these."""
    if not (filed := read_claims(folder).get(name)):
        return [], []
    dataset = filed["environment"]["dataset"]
    recorded = evidence.quoted(name, dataset, filed["parameters"])
    if not recorded.runs:
        return [], [f"no evidence on {dataset} with these parameters"]
    n_values = sum(each.n_values for each in (evidence.read(name, dataset) for name in names) if each)
    unlike, changed = evidence.unlike(recorded, filed["claims"], n_values), evidence.changed(recorded)
    said = f"{' and '.join(changed)} changed since revision {recorded.made_by['revision']}"
    return unlike, [f"old evidence: {said}; `python scripts/evidence.py {name}` makes it anew"] if changed else []


def essence(outputs: list[NotebookNode], *, exact: bool = False) -> dict[str, str]:
    """Return what must be the same of a cell's outputs, by kind: MIME type, stream, or the outputs' metadata."""
    found: dict[str, str] = {}
    for stream in ("stdout", "stderr"):  # which arrives in pieces, cut anywhere
        if text := "".join(output.text for output in outputs if output.get("name") == stream):
            found[stream] = text if exact else words(text)
    for output in outputs:
        shown, marks = output.get("data", {}), output.get("metadata", {}).get("lowrank", {})
        if not shown or "unchecked" in marks:
            continue
        if "text/html" in shown:  # as plain text a table breaks its lines where numbers have more digits
            shown = {kind: data for kind, data in shown.items() if kind != "text/plain"}
        of_text = of_claim if "claim" in marks else str if exact else words
        essences = {kind: OF_KIND.get(kind, of_text)(data) for kind, data in shown.items()}
        essences["description"] = json.dumps(output.metadata, sort_keys=True, ensure_ascii=False)
        for kind, text in essences.items():
            found[kind] = f"{found.get(kind, '')} {text}"
    return found


def words(text: Any) -> str:
    """Return a text with a sign for each number, and without the padding that makes columns of them."""
    return " ".join(NUMBER.sub(" # ", str(text)).split())


def of_claim(markdown: str) -> str:
    """Return a claim's sentence and the names in its table, without how it stands and what was measured."""
    sentence, *parts = markdown.split("\n\n")  # then how it stands, and the table if it has one
    return "\n".join([sentence, *(row.split("|")[1] for table in parts[1:] for row in table.splitlines())])


def _pixels(image: str) -> str:
    width, height = Image.open(io.BytesIO(base64.b64decode(image))).size
    return f"{width}×{height} pixels"


OF_KIND: dict[str, Callable[[Any], str]] = {
    "image/png": _pixels,
    "image/jpeg": _pixels,
    "application/vnd.jupyter.widget-view+json": lambda _: "",  # a random id
}

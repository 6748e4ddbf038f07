"""Renders a run folder: one page a notebook, and an index of the assignment's items."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from lowrank_helpers.series import evidence
from lowrank_helpers.series.claims import Claim, table, verdict
from lowrank_helpers.series.execution import marked
from lowrank_helpers.series.parameters import parse
from lowrank_helpers.series.store import write_atomically

ASSIGNMENT = Path(__file__).parent / "assignment.yaml"

CONDITIONS = {  # what the index says of a run's environment, by label
    "Dataset": "dataset",
    "Device": "device",
    "Matrix products in": "precision",
    "Threads": "threads",
    "Git revision": "revision",
    "Python": "python",
}


def render(folder: Path, results: Mapping[str, Any]) -> None:
    """Write a page beside every executed notebook of a run folder, failed ones included, and ``index.html``.

    ``results`` is what :func:`lowrank_helpers.series.results.gather` returned for this folder.
    """
    from lowrank_helpers.report import pages  # here: nbconvert takes seconds to import, too long for a refusal

    endings = ".ipynb", ".failed.ipynb"
    files = [(name, folder / f"{name}{ending}") for name in sorted(results["notebooks"]) for ending in endings]
    notebooks = {name: nbformat.read(file, as_version=4) for name, file in files if file.exists()}
    for name, notebook in notebooks.items():
        shown = {"name": name, "run": results["notebooks"][name], "names": list(notebooks)}
        html, _ = pages.EXPORTER.from_notebook_node(notebook, resources=shown)
        write_atomically(folder / f"{name}.html", html.encode())
    pages.write_index(folder, "index", **_index(notebooks, results))


def _index(notebooks: Mapping[str, NotebookNode], results: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the template of the index shows."""
    runs = results["notebooks"]
    claims = {id: _shown(id, filed, runs[filed["notebook"]]) for id, filed in results["claims"].items()}
    figures = {  # which a notebook shows as `plots.show(…, key=item)`, with text and size
        item: {**output.metadata["image/png"], "png": output.data["image/png"].strip()}
        for notebook in notebooks.values()
        for item, output in marked(notebook, "figure")
    }
    explorers = [found for notebook in notebooks.values() for found in marked(notebook, "explorer")]
    assignment = parse(ASSIGNMENT.read_bytes(), ASSIGNMENT.name)
    items, beyond = (
        [item | _answer(item, claims, runs) | {"figure": figures.get(item["id"])} for item in assignment[part]]
        for part in ("items", "beyond")
    )
    filing = [run for run in runs.values() if "environment" in run]  # a claim; only these say what they ran on
    pictures = assignment["story"]["pictures"]
    ran_on = conditions(filing) | {"The run took": f"{results['seconds']:.0f} s"}
    return {
        "story": [claims[id] for id in assignment["story"]["claims"] if id in claims],
        "illustration": next((figures[id] | {"caption": of} for id, of in pictures.items() if id in figures), None),
        "explorer": next((output.data["text/html"] for _, output in explorers), None),
        "headline": [number | _headline(number, claims) for number in assignment["headline"]],
        "items": items,
        "beyond": beyond,
        "rules": [rule | {"kept": rule["kept"].format(device=ran_on["Device"])} for rule in assignment["rules"]],
        "conditions": ran_on,
        "names": list(notebooks),
        "notebooks": runs,
        "failed": {name: run["error"] for name, run in runs.items() if run["status"] == "failed"},
        "stand_in": stand_in(filing),
    }


def _shown(id: str, filed: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """Return a claim as it is filed, with how it stands, a table of its numbers, and where its evidence is."""
    claim = Claim.from_json(filed)
    holds, measured = evidence.quoted(filed["notebook"], run["environment"]["dataset"], run["parameters"]).of(id)
    href = f"{filed['notebook']}.html#claim-{id}"
    return {**filed, "stands": verdict(claim, holds, measured), "table": table(claim, measured), "href": href}


def _answer(item: Mapping[str, str], claims: Mapping[str, Any], runs: Mapping[str, Any]) -> dict[str, Any]:
    """Return an item's claim with its parts, or why there is none."""
    parts = [claim for id, claim in claims.items() if id.startswith(f"{item['id']}/")]
    status = runs.get(item["notebook"], {}).get("status", "not run")
    reason = {"failed": "its notebook failed", "not run": "its notebook was not run"}
    absent = {"absence": f"No answer: {reason.get(status, 'its notebook filed none')}."}
    answer: dict[str, Any] = claims.get(item["id"], absent)
    return answer | {"parts": parts}


def _headline(number: Mapping[str, str], claims: Mapping[str, Any]) -> dict[str, str]:
    """Return a number of the strip as text, and where it was measured; a dash where it was not."""
    claim = claims.get(number["claim"], {"measured": {}, "timings": {}})
    value = (claim["measured"] | claim["timings"]).get(number["quantity"], {}).get(number.get("of", ""))
    if value is None:
        return {"text": "–"}
    return {"text": number["format"].format(value), "href": claim["href"]}


def conditions(runs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Say what runs were made on; where they differ, all that there is, and a dash where there is nothing."""
    values = {label: [run["environment"][name] for run in runs] for label, name in CONDITIONS.items()}
    values["Seed"] = [run["parameters"]["seed"] for run in runs]
    values["Started"] = sorted(run["environment"]["started"].replace("T", " ") for run in runs)[:1]
    values["Versions"] = [" ".join(each) for run in runs for each in run["environment"]["versions"].items()]
    return {label: ", ".join(dict.fromkeys(map(str, each))) or "–" for label, each in values.items()}


def stand_in(runs: Iterable[Mapping[str, Any]]) -> bool:
    """Say whether digits stand in for MNIST, which could not be had."""
    return any(run["parameters"]["dataset"] == "auto" and run["environment"]["dataset"] == "digits" for run in runs)

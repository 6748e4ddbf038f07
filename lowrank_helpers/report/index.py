"""Renders a run folder: one page a notebook, and an index of the assignment's items."""

import base64
import io
import shutil
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
import yaml
from nbformat import NotebookNode
from PIL import Image

from lowrank_helpers.series import evidence
from lowrank_helpers.series.claims import Claim, standing, table
from lowrank_helpers.series.store import write_atomically

ASSIGNMENT = Path(__file__).parent / "assignment.yaml"
THUMBNAIL = (840, 720)  # pixels at most; shown at half that, so crisp at 200 %
THUMBNAIL_COLOURS = 128

Figure = dict[str, Any]


def render(folder: Path, results: Mapping[str, Any]) -> None:
    """Write a page for every executed notebook of a run folder, failed ones included, and ``index.html``.

    Parameters
    ----------
    folder : Path
        Holds ``<name>.ipynb`` or, of a notebook that failed, ``<name>.failed.ipynb``; the pages go beside them
        as ``<name>.html``.
    results : mapping
        What :func:`lowrank_helpers.series.results.gather` returned for this folder.
    """
    from lowrank_helpers.report import (
        pages,  # here: nbconvert takes seconds to import, which a refusal need not wait for
    )

    notebooks = _executed(folder, results["notebooks"])
    for name, notebook in notebooks.items():
        html = pages.page(notebook, name=name, run=results["notebooks"][name], names=list(notebooks))
        write_atomically(folder / f"{name}.html", html.encode())
    template = pages.environment().get_template("index.html.j2")
    write_atomically(folder / "index.html", template.render(_index(notebooks, results)).encode())


def publish(folder: Path, target: Path) -> None:
    """Copy a run's pages and results, but not its networks, to a folder that is committed."""
    target.mkdir(parents=True, exist_ok=True)
    for file in [*folder.glob("*.html"), folder / "results.json"]:
        shutil.copyfile(file, target / file.name)


def _executed(folder: Path, names: Iterable[str]) -> dict[str, NotebookNode]:
    """Read the executed notebooks of a run folder, by name and in order."""
    files = {name: (folder / f"{name}.ipynb", folder / f"{name}.failed.ipynb") for name in sorted(names)}
    found = {name: next((file for file in pair if file.exists()), None) for name, pair in files.items()}
    return {name: nbformat.read(file, as_version=4) for name, file in found.items() if file}


def _index(notebooks: Mapping[str, NotebookNode], results: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the template of the index shows."""
    runs = results["notebooks"]
    claims = {id: _shown(id, filed, runs) for id, filed in results["claims"].items()}
    assignment = _assignment()
    figures: dict[str, Figure] = {}
    for notebook in notebooks.values():
        figures |= _key_figures(notebook)

    def chapters(items: Iterable[Mapping[str, str]]) -> dict[str, list[dict[str, Any]]]:
        by_notebook: dict[str, list[dict[str, Any]]] = {}
        for item in items:
            by_notebook.setdefault(item["notebook"], []).append({**item, **_answer(item, claims, runs, figures)})
        return by_notebook

    conditions = _conditions(runs) | _duration(results)
    return {
        "chapters": chapters(assignment["items"]),
        "beyond": chapters(assignment["beyond"]),
        "conditions": conditions,
        "headline": [number | _headline(number, results["claims"]) for number in assignment["headline"]],
        "rules": [rule | {"kept": rule["kept"].format(device=conditions["Device"])} for rule in assignment["rules"]],
        "pages": list(notebooks),
        "notebooks": runs,
        "time": _time(runs),
        "failed": {name: run["error"] for name, run in runs.items() if run["status"] == "failed"},
        "stand_in": stand_in(filed(runs)),
    }


@cache
def _assignment() -> dict[str, list[dict[str, str]]]:
    return yaml.safe_load(ASSIGNMENT.read_text())


def _shown(id: str, filed: Mapping[str, Any], runs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the index shows of a claim: its sentence, how it stands, its numbers, and where its evidence is."""
    run = runs[filed["notebook"]]
    claim = Claim.from_json({name: value for name, value in filed.items() if name != "notebook"})
    recorded = evidence.quoted(filed["notebook"], run["environment"]["dataset"], run["parameters"])
    holds, measured = recorded.of(id) if recorded else ([], {})
    stands = standing(claim, holds, measured)
    href = f"{filed['notebook']}.html#claim-{id}"
    return {
        "id": id,
        "sentence": claim.sentence,
        "holds": claim.holds,
        "settled": stands.settled,
        "stands": stands.text,
        "table": table(claim, measured),
        "href": href,
    }


def _answer(
    item: Mapping[str, str], claims: Mapping[str, Any], runs: Mapping[str, Any], figures: Mapping[str, Figure]
) -> dict[str, Any]:
    """Return an item's claim with its parts and its figure, or why there is none."""
    parts = [claim for id, claim in claims.items() if id.startswith(f"{item['id']}/")]
    if item["id"] not in claims:
        status = runs.get(item["notebook"], {}).get("status", "not run")
        reason = {"failed": "its notebook failed", "not run": "its notebook was not run"}
        return {"parts": parts, "absence": f"No answer: {reason.get(status, 'its notebook filed none')}."}
    return claims[item["id"]] | {"parts": parts, "figure": figures.get(item["id"])}


def _headline(number: Mapping[str, str], claims: Mapping[str, Any]) -> dict[str, str]:
    """Return a number of the strip as text, and where it was measured; a dash where it was not."""
    claim = claims.get(number["claim"])
    value = claim and (claim["measured"] | claim["timings"]).get(number["quantity"], {}).get(number.get("of", ""))
    if value is None:
        return {"text": "–"}
    return {"text": number["format"].format(value), "href": f"{claim['notebook']}.html#claim-{number['claim']}"}


def _conditions(runs: Mapping[str, Any]) -> dict[str, str]:
    """Say what the results were made on; where notebooks differ, all that there is."""
    those = filed(runs)
    versions = (f"{library} {number}" for run in those for library, number in run["environment"]["versions"].items())
    return {
        "Dataset": environment(those, "dataset"),
        "Seed": together(run["parameters"]["seed"] for run in those),
        "Device": environment(those, "device"),
        "Matrix products in": environment(those, "precision"),
        "Threads": environment(those, "threads"),
        "Started": min((run["environment"]["started"] for run in those), default="–").replace("T", " "),
        "Git revision": environment(those, "revision"),
        "Python": environment(those, "python"),
        "Versions": together(versions),
    }


def filed(runs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the runs that filed a claim: only these say what they ran on."""
    return [run for run in runs.values() if "environment" in run]


def stand_in(runs: Iterable[Mapping[str, Any]]) -> bool:
    """Say whether digits stand in for MNIST, which could not be had."""
    return any(run["parameters"]["dataset"] == "auto" and run["environment"]["dataset"] == "digits" for run in runs)


def environment(runs: Iterable[Mapping[str, Any]], name: str) -> str:
    """Say what runs were made on; where they differ, all that there is."""
    return together(run["environment"][name] for run in runs)


def together(values: Iterable[Any]) -> str:
    """Write each of some values once; a dash where there are none."""
    return ", ".join(dict.fromkeys(map(str, values))) or "–"


def _time(runs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the processor seconds of each notebook by kind of work, where they were measured."""
    spent = {name: run["seconds_by_kind"] for name, run in runs.items() if "seconds_by_kind" in run}
    kinds = dict.fromkeys(kind for seconds in spent.values() for kind in seconds)
    return {
        "notebooks": spent,
        "kinds": sorted(kinds, key=lambda kind: kind == "rest"),  # what is left over comes last
        "longest": max((sum(seconds.values()) for seconds in spent.values()), default=0),
    }


def _duration(results: Mapping[str, Any]) -> dict[str, str]:
    return {} if results["seconds"] is None else {"The run took": f"{results['seconds']:.0f} s"}


def _key_figures(notebook: NotebookNode) -> dict[str, Figure]:
    """Return, by item, the figures that a notebook shows as ``plots.show(…, key=item)``."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    marked = [(output.get("metadata", {}).get("lowrank", {}).get("figure"), output) for output in outputs]
    return {item: _thumbnail(output) for item, output in marked if item}


def _thumbnail(output: NotebookNode) -> Figure:
    image = Image.open(io.BytesIO(base64.b64decode(output["data"]["image/png"]))).convert("RGB")
    image.thumbnail(THUMBNAIL, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.quantize(THUMBNAIL_COLOURS).save(buffer, format="PNG", optimize=True)
    return {
        "source": f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}",
        "alt": output["metadata"].get("image/png", {}).get("alt", "Figure"),
        "width": image.width // 2,
        "height": image.height // 2,
    }

"""Do the exercises of the notebooks as solutions/exercises.yaml says, and write solutions/README.md.

The first exercises of all notebooks are one run of the series, the second ones another, and so on, in
reports/solutions/. What they measure stands beside what the recorded run did.
"""

import base64
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import nbformat
from nbformat import NotebookNode

from lowrank_helpers import PROJECT, data
from lowrank_helpers.series import execution, parameters, results
from lowrank_helpers.series.claims import Claim
from lowrank_helpers.series.execution import Planned
from lowrank_helpers.series.results import Outcome

FOLDER = PROJECT / "solutions"
NOTEBOOKS = execution.NOTEBOOK_FOLDER
QUESTION = re.compile(r"^\d+\. (.*?)(?: \*Hint:.*)?$", re.MULTILINE)
TITLE = """# Solutions

`python scripts/solutions.py` does the exercises as [exercises.yaml](exercises.yaml) says, and writes this page.
The tables show what the recorded run measured, and what the same run measures after the change. A small difference may
be luck. What the change leaves as it was is left out.
"""


def exercises() -> dict[str, list[dict[str, Any]]]:
    """Return how each exercise is done, by notebook."""
    return parameters.parse((FOLDER / "exercises.yaml").read_bytes(), "exercises.yaml")


def questions(name: str) -> list[str]:
    """Return the exercises of a notebook as they are asked, without the hints."""
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
    return QUESTION.findall(next(cell.source for cell in cells if cell.id == "exercises"))


def edited(notebook: NotebookNode, edits: Mapping[str, tuple[str, str]]) -> NotebookNode:
    """Change cells of a notebook, by their ids, as an exercise asks; raise ``ValueError`` where an old text is gone."""
    for cell in notebook.cells:
        old, new = edits.get(cell.id, ("", ""))
        if old not in cell.source:
            raise ValueError(f"the cell {cell.id} has no {old!r}")
        cell.source = cell.source.replace(old, new) if old else cell.source + new
    return notebook


def run(number: int) -> Path:
    """Do the exercises of this number, one of each notebook, and return the run's folder."""
    done = {name: of[number] for name, of in exercises().items() if number < len(of)}
    planned = {name: execution.plan([name], each.get("set", {}))[name] for name, each in done.items()}
    output = PROJECT / "reports" / "solutions"
    told = {"networks_dir": output / "networks", "auto_dataset": data.resolve("mnist")}
    with execution.run_folder(output / str(number + 1), **told) as folder:
        for outcome in execute(planned, folder, lambda name, notebook: edited(notebook, done[name].get("edit", {}))):
            click.echo(f"{outcome.notebook:16} {outcome.status:7} {outcome.seconds:7.1f} s {outcome.error}")
    return folder


def execute(planned: Planned, folder: Path, edit: Callable[[str, NotebookNode], object]) -> Iterator[Outcome]:
    """Execute changed copies of notebooks into a run folder; ``edit`` changes a notebook of this name in place."""
    execution.NOTEBOOK_FOLDER = folder / "notebooks"
    execution.NOTEBOOK_FOLDER.mkdir(exist_ok=True)
    try:
        for name in planned:
            notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
            edit(name, notebook)
            nbformat.write(notebook, execution.notebook_path(name))
        yield from execution.execute(planned, folder, resume=True)
    finally:
        execution.NOTEBOOK_FOLDER = NOTEBOOKS


def table(show: Mapping[str, Any], before: Mapping[str, Claim], after: Mapping[str, Claim]) -> str:
    """Return quantities of claims that differ, as recorded and after the exercise, as a Markdown table."""
    rows = ["| | as recorded | after |", "|---|--:|--:|"]
    for id, names in show.items():
        for name in [names] if isinstance(names, str) else names:
            was, has = ((of[id].measured | of[id].timings)[name] for of in (before, after))
            for label in dict.fromkeys([*was, *has]):
                numbers = [f"{x:.4g}" if (x := of.get(label)) is not None else "–" for of in (was, has)]
                if numbers[0] != numbers[1]:
                    rows.append(f"| {': '.join(filter(None, (name, label)))} | {' | '.join(numbers)} |")
    return "\n".join(rows)


def picture(notebook: NotebookNode, cell: str, name: str) -> str:
    """Write the last figure of a cell beside the page, and return its Markdown."""
    outputs = next(each.outputs for each in notebook.cells if each.id == cell)
    output = [output for output in outputs if "image/png" in output.get("data", {})][-1]
    (FOLDER / f"{name}.png").write_bytes(base64.b64decode(output.data["image/png"]))
    return f"![{output.metadata['image/png']['alt']}]({name}.png)"


@click.command()
def main() -> None:
    """Run the exercises and write the page."""
    folders = [run(number) for number in range(max(map(len, exercises().values())))]
    filed = json.loads((PROJECT / "reports" / "reference" / "results.json").read_text())["claims"]
    recorded = {id: Claim.from_json(claim) for id, claim in filed.items()}
    parts = [TITLE]
    for name, of in exercises().items():
        parts.append(f"## {name}\n")
        for number, (each, question) in enumerate(zip(of, questions(name), strict=True)):
            parts.append(f"**{number + 1}.** {question}\n\n{each['answer']}\n")
            if "show" in each:
                after = results.read_claims(folders[number])[name]["claims"]
                parts.append(f"{table(each['show'], recorded, after)}\n")
            if "figure" in each:
                notebook = nbformat.read(folders[number] / f"{name}.ipynb", as_version=4)
                parts.append(f"{picture(notebook, each['figure'], f'{name}-{number + 1}')}\n")
    (FOLDER / "README.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()

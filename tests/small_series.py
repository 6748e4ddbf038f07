"""Small notebooks in place of the project's: two for the report, one of which fails, and three for runs that resume."""

from collections.abc import Sequence
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from lowrank_helpers.report import index
from lowrank_helpers.series import execution, results

PARAMETERS = 'dataset = "digits"\ndata_dir = ""\nseed = 3\ndevice = "cpu"\nprecision = "float32"\nrecipes = {}'
SETUP = """import time
import pandas as pd
from lowrank_helpers import models, plots
from lowrank_helpers.report import explorer
from lowrank_helpers.series.run import Run
from lowrank_helpers.training import Recipe
run = Run("{name}", globals())"""
THEORY = r"""## Theory

Inline $\sigma_1^2$ and, on a line of its own,

$$\min_{B,C}\|A - BC\|_F^2 = \frac{\alpha}{r}\sum_{i>r}\sigma_i^2 \log p.$$

$$\begin{aligned} a &= b \\ c &= d \end{aligned}$$

| measure | value |
|---|---|
| rank | 3 |

Next: [overfitting](04_overfit.ipynb).
"""
TABLE = 'pd.DataFrame({f"a long column name {i}": [i, 2 * i] for i in range(12)})'
FIGURE = 'figure, axes = plots.panels()\naxes.plot([3, 2, 1])\nplots.show(figure, alt="A line that <falls>", key="3.1")'
EXPLORER = "explorer.show(models.mlp([784, 32, 16, 10], seed=seed), run.data)"
CLAIM = """run.claim(
    "3.1",
    "The average rank is full, $r<n$.",
    holds=True,
    measured={"rank, averaged over the layers": {"full": 21.0, "numerical": 19.0}},
)"""
PART = 'run.claim("3.1/spread", "Seeds do not matter.", holds=False, measured={"spread (%)": 25})'


def notebook(*cells: NotebookNode | str, reads: Sequence[str] = ()) -> NotebookNode:
    """Return a notebook of a parameters cell and others; a text is the source of a code cell."""
    code = [new_code_cell(cell) if isinstance(cell, str) else cell for cell in cells]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    parameters = new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    return new_notebook(cells=[parameters, *code], metadata={"kernelspec": kernel, "lowrank": {"reads": [*reads]}})


def rank_notebook() -> NotebookNode:
    code = [SETUP.format(name="03_rank"), TABLE, FIGURE, "for line in range(60):\n    print(line)"]
    texts = [new_markdown_cell(text) for text in ("# 03 · A small notebook", THEORY, "## Answers")]
    return notebook(*texts[:2], *code, texts[2], CLAIM, PART, EXPLORER)


def explorer_notebook() -> NotebookNode:
    """Return a notebook short enough to fit a screen: JupyterLab draws only what is in sight."""
    return notebook(new_markdown_cell("# An explorer"), SETUP.format(name="03_rank"), EXPLORER)


def run_and_render(sources: Path, folder: Path) -> None:
    """Write the notebooks into one folder, execute them into another, and render that."""
    failing = notebook(new_markdown_cell("# 04 · One that fails"), 'raise ValueError("no luck")')
    sources.mkdir()
    nbformat.write(rank_notebook(), sources / "03_rank.ipynb")
    nbformat.write(failing, sources / "04_overfit.ipynb")
    with pytest.MonkeyPatch.context() as patch, execution.run_folder(folder):
        patch.setattr(execution, "NOTEBOOK_FOLDER", sources)
        outcomes = list(execution.execute({"03_rank": {"seed": 5}, "04_overfit": {}}, folder))
        index.render(folder, results.gather(folder, outcomes, seconds=1.0))


TRAIN = """
start = time.perf_counter()
model, history = run.train(models.mlp([784, 64, 10], seed=seed), Recipe(epochs=2, batch_size=64, learning_rate=1e-3))
accuracy = history.final("test").accuracy
run.claim("{id}", "Most are right.", holds=accuracy > 0.5, measured={{"accuracy": accuracy}})
run.claim("{id}/took", "It takes time.", holds=True, timings={{"seconds": time.perf_counter() - start}})
"""
FIRST, SAME, LAST = "01_data", "02_train", "07_conclusions"


def write_series(folder: Path) -> None:
    """Write three notebooks: the first two train the same network, and the last shows what they claim."""
    folder.mkdir()
    for name, id in ((FIRST, "1.1"), (SAME, "2.1")):
        nbformat.write(notebook(SETUP.format(name=name), TRAIN.format(id=id)), folder / f"{name}.ipynb")
    last = notebook(SETUP.format(name=LAST), "run.answers(of_all=True)", reads=[FIRST, SAME])
    nbformat.write(last, folder / f"{LAST}.ipynb")


def apart_from_time(results: dict) -> dict:
    """Drop dates, durations, and what a resumed run says of notebooks that it kept."""
    results["seconds"] = None
    for run in results["notebooks"].values():
        run |= {"status": run["status"].replace("kept", "done"), "seconds": None}
        run.get("environment", {}).pop("started", None)
    for claim in results["claims"].values():
        claim["timings"] = None
    return results

"""Two small notebooks, one of which fails, run for real and rendered: what the tests of the report look at."""

from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from lowrank_helpers.report import index
from lowrank_helpers.series import execution, results

PARAMETERS = 'dataset = "digits"\ndata_dir = ""\nseed = 3\ndevice = "cpu"\nprecision = "float32"\nrecipes = {}'
SETUP = (
    "import pandas as pd\n"
    "from lowrank_helpers import models, plots\n"
    "from lowrank_helpers.report import panel\n"
    "from lowrank_helpers.series.run import Run\n"
    'run = Run("{name}", globals())'
)
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
PANEL = "panel.explore(models.mlp([784, 32, 16, 10], seed=seed), run.data.splits())"
CLAIM = """run.claim(
    "3.1",
    "The average rank is full, $r<n$.",
    holds=True,
    measured={"rank, averaged over the layers": {"full": 21.0, "numerical": 19.0}},
)"""
PART = 'run.claim("3.1/spread", "Seeds do not matter.", holds=False, measured={"spread (%)": 25})'


def rank_notebook() -> NotebookNode:
    return _notebook(
        "03_rank",
        new_markdown_cell("# 03 · A small notebook"),
        new_markdown_cell(THEORY),
        new_code_cell(TABLE),
        new_code_cell(FIGURE),
        new_code_cell("for line in range(60):\n    print(line)"),
        new_markdown_cell("## Answers"),
        new_code_cell(CLAIM),
        new_code_cell(PART),
        new_code_cell(PANEL),
    )


def panel_notebook() -> NotebookNode:
    """Return a notebook short enough to fit a screen: JupyterLab draws only what is in sight."""
    return _notebook("03_rank", new_markdown_cell("# A panel"), new_code_cell(PANEL))


def _notebook(name: str, *cells: NotebookNode) -> NotebookNode:
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    parameters = new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    setup = new_code_cell(SETUP.format(name=name))
    return new_notebook(cells=[cells[0], parameters, setup, *cells[1:]], metadata=kernel)


def run_and_render(sources: Path, folder: Path) -> None:
    """Write the notebooks into one folder, execute them into another, and render that."""
    failing = _notebook(
        "04_overfit", new_markdown_cell("# 04 · One that fails"), new_code_cell('raise ValueError("no luck")')
    )
    sources.mkdir()
    nbformat.write(rank_notebook(), sources / "03_rank.ipynb")
    nbformat.write(failing, sources / "04_overfit.ipynb")
    with pytest.MonkeyPatch.context() as patch, execution.run_folder(folder):
        patch.setattr(execution, "NOTEBOOK_FOLDER", sources)
        outcomes = list(execution.execute({"03_rank": {"seed": 5}, "04_overfit": {}}, folder))
        index.render(folder, results.gather(folder, outcomes))

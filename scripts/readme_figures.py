"""Copies the README's figures out of the recorded notebooks into ``docs/``: ``make figures``."""

import base64
from pathlib import Path

import nbformat

PROJECT = Path(__file__).resolve().parent.parent
FIGURES = {"03_rank": "densities", "05_approximate": "accuracy-figure"}  # of each notebook a cell's id

for name, wanted in FIGURES.items():
    notebook = nbformat.read(PROJECT / "notebooks" / f"{name}.ipynb", as_version=4)
    (cell,) = (cell for cell in notebook.cells if cell.id == wanted)
    (image,) = (output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {}))
    (PROJECT / "docs" / f"{name}-figure.png").write_bytes(base64.b64decode(image))

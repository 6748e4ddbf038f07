"""Which code made this: digests of source, blind to comments, docstrings and layout."""

import ast
import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from lowrank_helpers import PROJECT

PACKAGE = "lowrank_helpers"
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

# By dotted name. Read when the code is: the files may change while a kernel runs.
SOURCES = {
    ".".join(file.relative_to(PROJECT).with_suffix("").parts): file.read_text()
    for file in sorted((PROJECT / PACKAGE).rglob("*.py"))
}
RECIPES = (PROJECT / PACKAGE / "series" / "recipes.yaml").read_text()


def of_json(value: Any) -> str:
    """Return the SHA-256 (64 hexadecimal digits) of what JSON knows, blind to the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def of_cells(sources: Sequence[str]) -> str:
    """Return a digest (32 hexadecimal digits) of code cells; one with magics, which is not Python, counts as text."""
    return hashlib.sha256("\0".join(map(_meaning, sources)).encode()).hexdigest()[:32]


def of_notebook(notebook: Path) -> str:
    """Return a digest (32 hexadecimal digits) of a notebook's code cells."""
    return of_cells([source for source, _ in code_cells(notebook)])


def code_cells(notebook: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return the source and the metadata of each code cell, without nbformat, whose import would delay a kernel."""
    cells = json.loads(notebook.read_text())["cells"]
    return [("".join(cell["source"]), cell["metadata"]) for cell in cells if cell["cell_type"] == "code"]


@cache
def of_package() -> str:
    """Return a digest (32 hexadecimal digits) of all of the package's code, as this process imported it."""
    return of_cells([RECIPES, *SOURCES.values()])


def of_science(notebook: Path) -> str:
    """Return a digest (32 hexadecimal digits) of the recipes and of the science that a notebook imports."""
    names = (imported(source) for source, _ in code_cells(notebook))
    return of_json([RECIPES, of_modules(set[str]().union(*names))])[:32]


def of_modules(names: Iterable[str]) -> str:
    """Return a digest (32 hexadecimal digits) of the science in modules of this package and in all that they import.

    The science is in the top modules: how it is run and shown does not count.
    """
    found, more = set[str](), {*names}
    while more:
        found |= more
        more = set[str]().union(*(imported(SOURCES[module]) for module in more)) - found
    return of_cells([SOURCES[module] for module in sorted(found) if module.count(".") == 1])


@cache  # Python 3.11 parses code in one thread alone: what threads ask for, a run has asked for before them
def imported(source: str) -> set[str]:
    """Return the modules of this package that code imports, anywhere in it; none of a cell with magics."""
    names: set[str] = set()
    with suppress(SyntaxError):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom):
                names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
    return names & SOURCES.keys()


@cache
def _meaning(source: str) -> str:
    """Return what code does, without what it says: better words change nothing."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return source
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.unparse(tree)

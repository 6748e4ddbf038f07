"""The rooms of the package: what may import what."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from lowrank_helpers import PROJECT

PACKAGE = PROJECT / "lowrank_helpers"
FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if file.name != "__init__.py"]
MODULES = {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file for file in FILES}


def imported(file: Path) -> set[str]:
    """Return the modules of the package that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.removeprefix("lowrank_helpers.") for name in names} & MODULES.keys()


def room(module: str) -> str:
    """Return the room of a module: ``series`` of ``series.run``; at the top, all but the command is science."""
    above, _, name = module.rpartition(".")
    return above or ("cli" if name in ("cli", "__main__") else "science")


IMPORTS = {module: imported(file) for module, file in MODULES.items()}

# Each room, and each row of the science, imports from those above it; a room from itself too.
ROOMS = {
    "science": set(),
    "series": {"science"},
    "report": {"science", "series"},
    "cli": {"science", "series", "report"},
}
SCIENCE = [
    {"hashing", "timing", "statistics", "parallel", "cuda_graphs", "factorization"},
    {"data"},
    {"models", "subspace"},
    {"layers", "training", "unfold"},
    {"calibration", "rank"},
    {"analysis", "lora", "costs", "plots", "selection"},
    {"compression"},
]


@pytest.mark.parametrize("module", IMPORTS)
def test_module_imports_from_rooms_above_its_own(module):
    own = room(module)
    assert {room(other) for other in IMPORTS[module]} <= ROOMS[own] | {own}


@pytest.mark.parametrize("module", [module for module in IMPORTS if room(module) == "science"])
def test_science_reads_top_down(module):
    (row,) = (number for number, modules in enumerate(SCIENCE) if module in modules)
    assert IMPORTS[module] <= set().union(*SCIENCE[:row])


def test_no_room_has_a_circle():
    assert list(TopologicalSorter(IMPORTS).static_order())

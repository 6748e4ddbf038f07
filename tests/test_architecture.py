"""The rooms of the package: what may import what, and the picture of it."""

import runpy
from graphlib import TopologicalSorter

import pytest

from lowrank_helpers import PROJECT

SCRIPT = runpy.run_path(str(PROJECT / "scripts" / "draw_architecture.py"))
IMPORTS = SCRIPT["imports"]()

# Each room, and each row of the science, imports from those above it; a room from itself too.
ROOMS = {
    "science": set(),
    "series": {"science"},
    "report": {"science", "series"},
    "checking": {"science", "series"},
    "cli": {"science", "series", "report", "checking"},
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
    room = SCRIPT["room"](module)
    assert {SCRIPT["room"](other) for other in IMPORTS[module]} <= ROOMS[room] | {room}


@pytest.mark.parametrize("module", [module for module in IMPORTS if SCRIPT["room"](module) == "science"])
def test_science_reads_top_down(module):
    (row,) = (number for number, modules in enumerate(SCIENCE) if module in modules)
    assert IMPORTS[module] <= set().union(*SCIENCE[:row])


def test_no_room_has_a_circle():
    assert list(TopologicalSorter(IMPORTS).static_order())


def test_imports_are_found_wherever_they_stand():
    assert "series.results" in IMPORTS["series.execution"], "from a module"
    assert "plots" in IMPORTS["series.run"], "from the package"
    assert "report.pages" in IMPORTS["report.index"], "within a function"


def test_picture_is_of_these_imports():
    assert SCRIPT["picture"]() in SCRIPT["PAGE"].read_text(), "`python scripts/draw_architecture.py` draws it anew"

"""The rooms of the package: what may import what."""

from graphlib import TopologicalSorter

import pytest

from lowrank_helpers.series.digest import SOURCES, imported


def room(module: str) -> str:
    """Return the room of a module: ``series`` of ``series.run``; at the top, all but the command is science."""
    above, _, name = module.rpartition(".")
    return above or ("cli" if name in ("cli", "__main__") else "science")


def short(module: str) -> str:
    return module.removeprefix("lowrank_helpers.")


IMPORTS = {
    short(module): {*map(short, imported(source))} for module, source in SOURCES.items() if "__init__" not in module
}

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
    {"models", "subspace", "text"},
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

"""The exercises of the series, done as a student would: each runs as it is written, on a small dataset."""

import importlib.util
from pathlib import Path

import nbformat
import pytest
from matplotlib import pyplot as plt

from lowrank_helpers import PROJECT, timing
from lowrank_helpers.series.execution import notebook_names, notebook_path, plan
from lowrank_helpers.series.parameters import recipes

pytestmark = pytest.mark.slow

SMALL = {
    "dataset": "digits", "device": "cpu", "precision": "float32", "widths": [784, 24, 24, 10],
    "big_widths": [784, 64, 48, 32, 16, 10], "deep_widths": [784, 16, 16, 16, 10], "activations": ["relu", "identity"],
    "ranks": [8, 8, 8, 8], "small_ranks": [4, 4, 4, 4], "low_rank": 4, "rank_grid": [1, 8, 64], "accuracy_kept": 0.5,
    "descent_steps": 2, "subspace_widths": [20, 40], "subspace_dimensions": [50, 100],
    "n_blocks": 3, "context": 16, "budget_shares": [0.1, 0.2, 0.5], "rehearsal": 20, "adapter_ranks": [1, 4],
}  # fmt: skip
# Of notebook 08, which trains networks of up to 284,000 parameters.
FRONTIER = {"big_widths": [784, 320, 320, 160, 80, 10], "cut_budgets": [40000, 60000, 125000]}
QUICK = {"epochs": 1, "batch_size": 1024}  # a network of digits then takes four epochs of five steps


SPEC = importlib.util.spec_from_file_location("solutions", PROJECT / "scripts" / "solutions.py")
solutions = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(solutions)


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> Path:
    """Where one notebook finds what another one has trained."""
    return tmp_path_factory.mktemp("networks")


@pytest.mark.parametrize("name", notebook_names())
def test_exercises_run_as_they_are_written(name, networks, tmp_path, monkeypatch):
    """All of a notebook at once, as each changes something else."""
    plt.switch_backend("Agg")
    monkeypatch.setenv("LOWRANK_RUN_DIR", str(tmp_path))
    monkeypatch.setenv("LOWRANK_NETWORKS_DIR", str(networks))
    monkeypatch.setitem(timing.median_seconds.__kwdefaults__, "at_least", 1e-3)  # seconds of each measured time
    notebook, exercises = nbformat.read(notebook_path(name), as_version=4), solutions.exercises()[name]
    given: dict = {"recipes": {}}
    for exercise in exercises:
        asked = exercise.get("set", {})
        plan([name], asked)
        given |= asked | {"recipes": given["recipes"] | asked.get("recipes", {})}
        solutions.edited(notebook, exercise.get("edit", {}))
    if name == "06_factorized":
        given["ranks"] = [59, 27, 19, 10]  # as many numbers as these smaller matrices
    given["recipes"] = {kind: QUICK | given["recipes"].get(kind, {}) for kind in recipes()}
    parameters = SMALL | (FRONTIER if name == "08_frontier" else {}) | given
    namespace: dict = {"__name__": "__main__"}
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        exec(compile(cell.source, f"{name}, {cell.id}", "exec"), namespace)
        if "parameters" in cell.metadata.get("tags", []):
            namespace |= {key: value for key, value in parameters.items() if key in namespace}
    plt.close("all")
    assert list(namespace["run"].folder.glob("claims/*.json")), "exercises that claim nothing have not run"


def test_every_exercise_is_solved_on_the_page_in_its_own_words():
    page = (PROJECT / "solutions" / "README.md").read_text()
    assert solutions.exercises().keys() == {*notebook_names()}
    for name, exercises in solutions.exercises().items():
        asked = solutions.questions(name)
        assert len(exercises) == len(asked) == 3
        for exercise, question in zip(exercises, asked, strict=True):
            assert f"{question}\n\n{exercise['answer']}\n" in page, f"{name}: run scripts/solutions.py again"
            assert len(exercise["answer"]) > 20

"""The exercises of the series, done as a student would: each runs as it is written, on a small dataset."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import nbformat
import pytest
from matplotlib import pyplot as plt

from lowrank_helpers.series.execution import notebook_names, notebook_path

pytestmark = pytest.mark.slow

QUICK = {
    "dataset": "digits", "device": "cpu", "precision": "float32", "n_seeds": 1, "epochs": 1, "big_epochs": 1,
    "big_batch_size": 512, "few_seeds": 1, "few_epochs": 1,
    "factorized_epochs": 1, "tuning_epochs": 1, "shifted_epochs": 1, "low_epochs": 1, "subspace_epochs": 1,
    "adapter_epochs": 1, "als_sweeps": 2, "gradient_steps": 2, "rank_grid": [1, 50], "accuracy_kept": 0.5,
}  # fmt: skip
NARROW = {"big_widths": [784, 64, 48, 32, 16, 10], "ranks": [8, 8, 8, 8], "rank_grid": [1, 8, 64]}

FRONTIER = {
    "big_widths": [784, 64, 48, 32, 16, 10], "cut_budgets": [8000, 12000, 16000, 20000, 25000, 30000, 40000],
    "tuned_budgets": [8000, 12000, 20000, 30000],
}  # fmt: skip
SCORED = """
from lowrank_helpers.selection import WAYS

teacher, _ = run.train(mlp(big_widths, activation, seed=seed), run.recipe(1, batch_size, dense_learning_rate))
moment = factorization.input_moments(teacher, run.data.train_images, hidden)
plain_of, fitted_of = factorization.decompose(teacher), factorization.decompose(teacher, moment)
own = layers_of({name: plain_of[name] for name in hidden}, {name: fitted_of[name] for name in hidden})


def score(ranks):
    small = factorization.factorize(teacher, ranks, fitted_of)
    return -evaluate(small, run.data.validation_images, run.data.validation_labels, run.precision).loss


assert WAYS["validation"](own, cut_budgets[2] - last, score).parameters <= cut_budgets[2] - last
"""


class Change(NamedTuple):
    """An edit of a cell: what stands in place of what; in place of nothing it is added at the end."""

    cell: str
    old: str
    new: str


EXERCISES: dict[str, list[dict | list[Change]]] = {
    "01_data": [
        {},  # another dataset, which needs files
        {"batch_size": 32},
        [
            Change(
                "spectrum",
                "",
                "\nvectors = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -10:]"
                "\nfigure, axes = plots.panels(10)"
                "\n[ax.imshow(vector.reshape(28, 28)) for ax, vector in zip(axes, vectors.T)]",
            )
        ],
    ],
    "02_train": [
        {"widths": [784, 32, 32, 10]},
        {"activation": "identity"},
        {"batch_size": 32, "learning_rate": 1e-3},
    ],
    "03_rank": [
        {"recipes": {"small": {"epochs": 12}}},
        {"deep_widths": [784, *[64] * 10, 10]},
        [
            Change(
                "setup",
                "",
                "\nmake = mlp"
                "\ndef mlp(*args, **options): network = make(*args, **options); "
                "[W.data.mul_(0.1) for W in network.parameters()]; return network",
            )
        ],
    ],
    "04_overfit": [
        {"recipes": {"big": {"epochs": 5, "batch_size": 512}}},
        {"activation": "tanh"},
        [Change("setup", "", "\nrun.data.train_labels[:] = run.data.train_labels.flip(0)")],
    ],
    "05_approximate": [
        NARROW | {"accuracy_kept": 0.999},
        NARROW | {"big_epochs": 3},
        [Change("why-figure", "for k in hidden", 'for k in ["fc1"]')],
    ],
    "06_factorized": [
        {"ranks": [444, 512, 341, 170]},
        {"small_ranks": [15, 5, 4, 4]},
        [Change("tune", 'trained["dense", s][0]', 'trained["dense", seed][0]')],
    ],
    "07_conclusions": [
        {"subspace_widths": [200], "subspace_dimensions": [50, 200, 800, 3200]},
        [
            Change(
                "components-figure",
                '{"image": test} | {f"r = {r}": keep(test, r) for r in (5, 20, 80)}',
                '{"image": -test} | {f"r = {r}": keep(-test, r) for r in (5, 20, 80)}',
            )
        ],
        [
            Change(
                "methods",
                "A = big.fc2.weight.detach()",
                "A = mlp(big_widths, seed=seed).fc2.weight.detach()",
            )
        ],
    ],
    "bonus_lora": [
        {"held_out_digit": 3},
        {"layers": "first", "rank": 8},
        {"alpha": 4.0, "adapter_learning_rate": 1.6e-2},
    ],
    "08_frontier": [
        FRONTIER | {"layer_shares": [0.29, 0.33, 0.25, 0.13]},
        [Change("ways", "", SCORED)],
        FRONTIER | {"moment_images": 100},
    ],
    "09_your_network": [
        {"patch": 7},
        {"small_share": 0.1},
        [Change("compress", "budget=small_share", 'budget=small_share, of="flops"')],
    ],
}
CASES = [(name, number) for name, exercises in EXERCISES.items() for number in range(1, len(exercises) + 1)]


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> Path:
    """Where one exercise finds what another one has trained."""
    return tmp_path_factory.mktemp("networks")


@pytest.fixture(autouse=True)
def quiet(tmp_path, networks) -> Iterator[None]:
    """Draw to no screen, show no bars, keep everything in temporary folders."""
    os.environ |= {"LOWRANK_RUN_DIR": str(tmp_path), "LOWRANK_NETWORKS_DIR": str(networks), "TQDM_DISABLE": "1"}
    with mpl.rc_context({"backend": "Agg"}):
        yield
        plt.close("all")


@pytest.mark.parametrize("name", notebook_names())
def test_every_exercise_is_done_here(name):
    [text] = [cell.source for cell in nbformat.read(notebook_path(name), as_version=4).cells if cell.id == "exercises"]
    assert len(EXERCISES.get(name, [])) == len(re.findall(r"^\d+\. ", text, re.MULTILINE))


@pytest.mark.parametrize(("name", "number"), CASES, ids=[f"{name}-{number}" for name, number in CASES])
def test_exercise_runs_as_it_is_written(name, number):
    exercise = EXERCISES[name][number - 1]
    changes = exercise if isinstance(exercise, list) else []
    small = {"05_approximate": NARROW, "08_frontier": FRONTIER}.get(name, {})
    parameters = QUICK | small | (exercise if not changes else {})
    namespace: dict = {"__name__": "__main__"}
    for cell in nbformat.read(notebook_path(name), as_version=4).cells:
        if cell.cell_type != "code":
            continue
        source = cell.source
        for change in (change for change in changes if change.cell == cell.id):
            assert change.old in source, f"{name} has no {change.old!r} in its cell {cell.id}"
            source = source.replace(change.old, change.new) if change.old else source + change.new
        exec(compile(source, f"{name}, {cell.id}", "exec"), namespace)
        if "parameters" in cell.metadata.get("tags", []):
            namespace |= {key: value for key, value in parameters.items() if key in namespace}
    assert set(namespace["run"].findings()), "an exercise that finds nothing has not run"

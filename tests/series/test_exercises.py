"""The exercises of the series, done as a student would: each runs as it is written, on a small dataset."""

import re
from pathlib import Path

import nbformat
import pytest
from matplotlib import pyplot as plt

from lowrank_helpers import timing
from lowrank_helpers.series.execution import notebook_names, notebook_path
from lowrank_helpers.series.parameters import check, recipes

pytestmark = pytest.mark.slow

SMALL = {
    "dataset": "digits", "device": "cpu", "precision": "float32", "widths": [784, 24, 24, 10],
    "big_widths": [784, 64, 48, 32, 16, 10], "deep_widths": [784, 16, 16, 16, 10], "activations": ["relu", "identity"],
    "ranks": [8, 8, 8, 8], "small_ranks": [4, 4, 4, 4], "low_rank": 4, "rank_grid": [1, 8, 64], "accuracy_kept": 0.5,
    "als_sweeps": 2, "gradient_steps": 2, "subspace_widths": [20, 40], "subspace_dimensions": [50, 100],
    "n_blocks": 1, "budget_shares": [0.1, 0.2, 0.5], "rehearsal": 20, "adapter_ranks": [1, 4],
}  # fmt: skip
# Of notebook 08, which trains networks of up to 284,000 parameters.
FRONTIER = {"big_widths": [784, 320, 320, 160, 80, 10], "cut_budgets": [40000, 60000, 125000]}
QUICK = {"epochs": 1, "batch_size": 1024}  # a network of digits then takes four epochs of five steps


# By notebook: each exercise as the parameters that it asks for, or as an edit of a cell: its id, the old text and the
# new one. Where there is no old text, the new one is added at the end.
EXERCISES: dict[str, list[dict | tuple[str, str, str]]] = {
    "01_data": [
        {},  # another dataset, which needs files
        {"batch_size": 32},
        (
            "spectrum",
            "",
            "\nvectors = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -10:]"
            "\nfigure, axes = plots.panels(10)"
            "\n[ax.imshow(vector.reshape(28, 28)) for ax, vector in zip(axes, vectors.T)]",
        ),
    ],
    "02_train": [
        {"widths": [784, 32, 32, 10]},
        {"activation": "identity"},
        {"recipes": {"small": {"batch_size": 32, "learning_rate": 1e-3}}},
    ],
    "03_rank": [
        {"recipes": {"small": {"epochs": 12}}},
        {"deep_widths": [784, *[64] * 10, 10]},
        (
            "setup",
            "",
            "\nmake = mlp"
            "\ndef mlp(*args, **options): network = make(*args, **options); "
            "[W.data.mul_(0.1) for W in network.parameters()]; return network",
        ),
    ],
    "04_overfit": [
        {"recipes": {"big": {"epochs": 4, "batch_size": 512}}},
        {"activation": "tanh"},
        ("setup", "", "\nrun.data.train_labels[:] = run.data.train_labels.flip(0)"),
    ],
    "05_approximate": [
        {"accuracy_kept": 0.999},
        {"recipes": {"big": {"epochs": 3}}},
        ("why", "for k in hidden]) for r", 'for k in ["fc1"]]) for r'),
    ],
    "06_factorized": [
        {"ranks": [59, 27, 19, 10]},  # as many numbers as these smaller matrices
        {"small_ranks": [15, 5, 4, 4]},
        {"low_rank": 50},
    ],
    "07_conclusions": [
        {"subspace_widths": [200], "subspace_dimensions": [50, 200, 800, 3200]},
        (
            "components-figure",
            '{"image": test} | {f"r = {r}": keep(test, r) for r in (5, 20, 80)}',
            '{"image": -test} | {f"r = {r}": keep(-test, r) for r in (5, 20, 80)}',
        ),
        ("methods", "A = big.fc2.weight.detach()", "A = mlp(big_widths, seed=seed).fc2.weight.detach()"),
    ],
    "08_frontier": [
        {"layer_shares": [0.25, 0.25, 0.25, 0.25]},
        {"moment_images": 50},
        {"recipes": {"tuned": {"epochs": 20}}},
    ],
    "09_your_network": [
        {"patch": 7},
        {"small_share": 0.1},
        ("compress", "run.data, share", 'run.data, share, metric="flops"'),
    ],
    "bonus_lora": [
        {"held_out_digit": 3},
        {"layers": "first"},
        {"alpha": 4.0, "recipes": {"lora": {"learning_rate": 1.6e-2}}},
    ],
}


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
    cells = nbformat.read(notebook_path(name), as_version=4).cells
    [text] = [cell.source for cell in cells if cell.id == "exercises"]
    exercises = EXERCISES[name]
    assert len(exercises) == len(re.findall(r"^\d+\. ", text, re.MULTILINE)), "every exercise is done here"
    given: dict = {"recipes": {}}
    for exercise in exercises:
        if isinstance(exercise, dict):
            check(exercise)
            given |= exercise | {"recipes": given["recipes"] | exercise.get("recipes", {})}
    given["recipes"] = {kind: QUICK | given["recipes"].get(kind, {}) for kind in recipes()}
    parameters = SMALL | (FRONTIER if name == "08_frontier" else {}) | given
    edits = [exercise for exercise in exercises if isinstance(exercise, tuple)]
    namespace: dict = {"__name__": "__main__"}
    for cell in cells:
        if cell.cell_type != "code":
            continue
        source = cell.source
        for _, old, new in [edit for edit in edits if edit[0] == cell.id]:
            assert old in source, f"{name} has no {old!r} in its cell {cell.id}"
            source = source.replace(old, new) if old else source + new
        exec(compile(source, f"{name}, {cell.id}", "exec"), namespace)
        if "parameters" in cell.metadata.get("tags", []):
            namespace |= {key: value for key, value in parameters.items() if key in namespace}
    plt.close("all")
    assert list(namespace["run"].folder.glob("claims/*.json")), "exercises that claim nothing have not run"

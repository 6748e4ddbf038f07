"""The recorded rates: each recipe has the one that is best on validation images, and the script adds to them."""

import importlib.util

import pandas as pd
import pytest
from click.testing import CliRunner

from lowrank_helpers import PROJECT, text
from lowrank_helpers.series import run

SPEC = importlib.util.spec_from_file_location("choose_rates", PROJECT / "scripts" / "choose_rates.py")
choose_rates = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(choose_rates)

NOISE = 3e-4  # three of the validation images
OTHERWISE = {
    "big": "it is to overfit: at 3e-3 and seed 100 it knew 99.98 % of its training images after 10 epochs, and its "
    "validation loss had risen by 36 %"
}


@pytest.mark.parametrize("kind", sorted(run.recipes().keys() - OTHERWISE.keys()))
def test_no_rate_is_better_on_validation_images_than_the_recipes(kind):
    """In the mean over networks and seeds, among the rates at which all of them were trained, and but for noise."""
    recipe, table = run.recipes()[kind], pd.read_csv(choose_rates.TABLE)
    rows = table[table["recipe"] == kind]
    means = rows.pivot_table("accuracy", ["network", "seed"], "learning_rate").dropna(axis="columns").mean()
    assert means[recipe["learning_rate"]] >= means.max() - NOISE
    assert len(means) >= 3
    assert set(rows["seed"]) == set(choose_rates.SEEDS)


def test_every_recipe_is_measured_in_the_notebook_that_trains_by_it():
    patterns = [pattern for patterns in choose_rates.NOTEBOOKS.values() for pattern in patterns]
    for kind in run.recipes().keys() - OTHERWISE.keys():
        assert sum(choose_rates.fnmatch(kind, pattern) for pattern in patterns) == 1, kind


def test_what_is_missing_is_measured_on_validation_images_and_added(tmp_path, monkeypatch):
    monkeypatch.setattr(choose_rates, "TABLE", tmp_path / "rates.csv")
    monkeypatch.setattr(choose_rates, "GIVEN", {"dataset": "digits", "widths": [784, 16, 10]})
    monkeypatch.setattr(choose_rates, "STEPS", (1, 2))
    monkeypatch.setattr(choose_rates, "SEEDS", (100,))
    for owner, name in ((run, "Run"), (text, "load_text")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # so that the script's own is taken away at the end
    monkeypatch.setattr(run, "recipes", lambda: {"small": {"epochs": 1, "batch_size": 64, "learning_rate": 4e-3}})
    done = dict(zip(choose_rates.KEY, ("small", "MLP", 4e-3, 1, 100), strict=True)) | {"accuracy": 0.9, "loss": 0.3}
    pd.DataFrame([done]).to_csv(choose_rates.TABLE, index=False)
    assert CliRunner().invoke(choose_rates.main, ["sm*"], catch_exceptions=False).exit_code == 0
    kept, added = pd.read_csv(choose_rates.TABLE).to_dict("records")
    assert kept == done
    assert (added["recipe"], added["network"]) == ("small", "MLP") and 0.5 < added["accuracy"] < 1
    n_right = 239 * added["accuracy"]
    assert n_right == pytest.approx(round(n_right), abs=1e-3), "a share of the 239 validation images"

"""The recorded sweep of learning rates: what it holds, how it goes on, and that the notebooks took what it says."""

import importlib.util

import pandas as pd
import pytest
from click.testing import CliRunner

from lowrank_helpers.data import PROJECT
from lowrank_helpers.series.execution import notebook_names, notebook_path
from lowrank_helpers.series.parameters import declared

SPEC = importlib.util.spec_from_file_location("choose_rates", PROJECT / "scripts" / "choose_rates.py")
choose_rates = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(choose_rates)


@pytest.fixture(scope="module")
def recorded() -> pd.DataFrame:
    return choose_rates.read(choose_rates.TABLE)


@pytest.fixture(scope="module")
def chosen_06(recorded) -> pd.Series:
    return choose_rates.chosen(recorded)


@pytest.mark.parametrize(
    ("parameter", "arm"),
    {
        "dense_learning_rate": "dense",
        "narrow_learning_rate": "narrow",
        "effective_learning_rate": "effective",
        "longer_learning_rate": "effective, longer",
        "tuning_learning_rate": "effective, tuned",
        "low_learning_rate": "low, standard",
        "spectral_learning_rate": "low, spectral",
    }.items(),
)
def test_notebook_06_takes_the_rate_that_validation_chose(chosen_06, parameter, arm):
    assert declared(notebook_path("06_factorized"))[parameter] == chosen_06[f"06/{arm}"]


@pytest.mark.parametrize("notebook", ["02_train", "03_rank", "04_overfit"])
def test_the_small_network_takes_the_rate_that_validation_chose(recorded, notebook):
    given = declared(notebook_path(notebook))
    assert given["learning_rate"] == choose_rates.chosen(recorded)[f"02/{given['epochs']} epochs"]


@pytest.mark.parametrize(
    ("parameter", "trained"), [("all_weights_learning_rate", "all weights"), ("subspace_learning_rate", "subspace")]
)
def test_notebook_07_takes_the_rate_that_is_best_in_the_mean_over_its_widths(recorded, parameter, trained):
    given = declared(notebook_path("07_conclusions"))
    arms = [f"07/{trained}, width {width}" for width in given["subspace_widths"]]
    means = recorded[recorded["arm"].isin(arms)].groupby("learning_rate")["validation_accuracy"].mean()
    assert given[parameter] == means.idxmax()


def test_the_bonus_takes_for_each_way_and_rank_the_rate_that_validation_chose(recorded):
    given, chosen = declared(notebook_path("bonus_lora")), choose_rates.chosen(recorded)
    assert given["full_learning_rate"] == chosen["bonus/full"]
    assert given["last_layer_learning_rate"] == chosen["bonus/last layer"]
    ranks = [given["rank"], *given["adapter_ranks"]]
    rates = [given["adapter_learning_rate"], *given["adapter_rates"]]
    assert rates == [chosen[f"bonus/LoRA, rank {rank}"] for rank in ranks]


@pytest.mark.parametrize("kind", ["convnet", "transformer"])
def test_notebook_09_takes_the_rates_that_validation_chose(recorded, kind):
    given, chosen = declared(notebook_path("09_your_network")), choose_rates.chosen(recorded)
    assert given[f"{kind}_learning_rate"] == chosen[f"09/{kind}"]
    assert given[f"{kind}_tuning_learning_rate"] == chosen[f"09/{kind}, tuned"]


@pytest.mark.parametrize("kind", ["weight_decay", "frobenius_decay"])
def test_notebook_06_takes_the_strength_and_rate_that_validation_chose(recorded, kind):
    best = _best(recorded[recorded["arm"].str.startswith(f"06/low, {kind} ")])
    given = declared(notebook_path("06_factorized"))
    assert (f"06/low, {kind} {given[kind]:g}", given[f"{kind}_learning_rate"]) == best


def test_notebook_06_takes_the_smallest_ranks_that_validation_chose(recorded):
    best = _best(recorded[recorded["arm"].str.startswith("06/small ")])
    given = declared(notebook_path("06_factorized"))
    shape = "-".join(map(str, given["small_ranks"]))
    assert (f"06/small {shape}, tuned", given["small_learning_rate"]) == best


def test_notebook_06_takes_the_batch_and_rate_of_the_published_ranks_that_validation_chose(recorded):
    best = _best(recorded[recorded["arm"].str.startswith("06/published, longer")])
    given = declared(notebook_path("06_factorized"))
    batch = f", batch {given['published_batch_size']}" if given["published_batch_size"] != given["batch_size"] else ""
    assert (f"06/published, longer{batch}", given["published_learning_rate"]) == best


def _best(rows: pd.DataFrame) -> tuple[str, float]:
    """Return the arm and rate with the highest mean accuracy."""
    return rows.groupby(["arm", "learning_rate"])["validation_accuracy"].mean().idxmax()


def test_every_arm_has_every_rate_from_seeds_that_no_notebook_uses(recorded):
    wanted = {
        (name, rate, arm.epochs, seed)
        for name, arm in choose_rates.all_arms().items()
        for rate in arm.rates
        for seed in choose_rates.SEEDS
    }
    rows = recorded[choose_rates.KEY]
    assert set(rows.itertuples(index=False, name=None)) == wanted
    assert len(rows) == len(wanted)
    for given in map(declared, map(notebook_path, notebook_names())):
        n_seeds = max(given.get("n_seeds", 1), given.get("few_seeds", 1))
        assert not set(choose_rates.SEEDS) & set(range(given["seed"], given["seed"] + n_seeds))


def test_the_mean_over_seeds_decides_and_not_the_best_seed():
    rows = [("a", 1e-3, 0.90), ("a", 1e-3, 0.92), ("a", 2e-3, 0.95), ("a", 2e-3, 0.80)]
    table = pd.DataFrame(rows, columns=["arm", "learning_rate", "validation_accuracy"])
    assert choose_rates.chosen(table)["a"] == 1e-3


def test_rows_are_added_in_order_and_replace_their_like(tmp_path):
    file = tmp_path / "rates.csv"
    for arm, rate, accuracy in [("b", 1e-3, 0.5), ("a", 1.6e-2, 0.6), ("a", 2e-3, 0.7), ("b", 1e-3, 0.8)]:
        row = {"arm": arm, "learning_rate": rate, "epochs": 1, "seed": 100}
        choose_rates.add(row | {"validation_accuracy": accuracy, "validation_loss": 0.1}, file)
    table = choose_rates.read(file)
    assert table["validation_accuracy"].tolist() == [0.7, 0.6, 0.8]
    assert table["arm"].tolist() == ["a", "a", "b"]


def test_a_sweep_that_was_stopped_trains_what_is_missing(tmp_path, monkeypatch, digits):
    trained = []

    train = choose_rates.Bench.train

    def counted(bench, model, data, recipe, stop=None):
        trained.append((recipe.learning_rate, recipe.seed))
        return train(bench, model, data, recipe, stop)

    def small(bench, seed):
        return choose_rates.mlp([784, 8, 10], seed=seed)

    monkeypatch.setattr(choose_rates.Bench, "train", counted)
    monkeypatch.setattr(choose_rates.data, "load", lambda name, folder: digits)
    monkeypatch.setattr(choose_rates, "take_one_thread_each", lambda: None)
    monkeypatch.setattr(choose_rates, "TABLE", tmp_path / "rates.csv")
    monkeypatch.setattr(choose_rates, "ARMS", {"00": lambda: {"small": choose_rates.Arm(small, 1, 256)}})
    row = {"arm": "00/small", "learning_rate": 1e-3, "epochs": 1, "seed": 100}
    choose_rates.add(row | {"validation_accuracy": 0.123, "validation_loss": 2.0}, tmp_path / "rates.csv")
    result = CliRunner().invoke(choose_rates.main, ["00/*", "--networks", str(tmp_path / "networks")])
    assert result.exit_code == 0, result.output
    assert len(trained) == len(choose_rates.RATES) * len(choose_rates.SEEDS) - 1
    assert (1e-3, 100) not in trained
    table = choose_rates.read(tmp_path / "rates.csv")
    assert len(table) == len(trained) + 1
    assert table["validation_accuracy"].max() > 0.123


def test_an_unknown_arm_is_refused_with_those_there_are():
    result = CliRunner().invoke(choose_rates.main, ["06/sparse"])
    assert result.exit_code == 2
    assert "06/sparse" in result.output
    assert "06/dense" in result.output


def test_notebook_08_takes_for_each_size_the_rate_that_validation_chose(recorded):
    given, chosen = declared(notebook_path("08_frontier")), choose_rates.chosen(recorded)
    assert given["tuned_learning_rates"] == [chosen[f"08/tuned {budget}"] for budget in given["tuned_budgets"]]


@pytest.mark.parametrize("kind", ["distilled", "shifted", "born", "narrow", "pruned", "adaptive"])
def test_notebook_08_takes_the_rate_that_is_best_in_the_mean_over_the_sizes_of_a_kind(recorded, kind):
    arm = "DLRT" if kind == "adaptive" else kind
    means = recorded[recorded["arm"].str.startswith(f"08/{arm}")].groupby("learning_rate")["validation_accuracy"].mean()
    assert declared(notebook_path("08_frontier"))[f"{kind}_learning_rate"] == means.idxmax()

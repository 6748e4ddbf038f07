"""What a notebook works with: findings are filed as data and shown as sentences."""

import json
import os
from importlib.metadata import version

import numpy as np
import pytest
import torch
from filelock import FileLock
from idx_files import write_small_fashion_mnist
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from lowrank_helpers import training
from lowrank_helpers.data import PROJECT
from lowrank_helpers.models import mlp
from lowrank_helpers.series import run as run_module
from lowrank_helpers.series import store
from lowrank_helpers.series.parameters import ParameterError
from lowrank_helpers.series.run import Run, Training, histories_by_label, rate_table
from lowrank_helpers.series.store import TEMPORARY, _key
from lowrank_helpers.training import fit

COMMON = {"dataset": "digits", "data_dir": "", "seed": 3, "device": "cpu", "precision": "float32"}


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setenv("LOWRANK_RUN_DIR", str(tmp_path))
    return Run("02_train", **COMMON)


@pytest.fixture
def shell():
    """A notebook's own shell, so that what is displayed can be read."""
    yield InteractiveShell.instance()
    InteractiveShell.clear_instance()


def _filed(run):
    return json.loads((run.folder / "findings" / "02_train.json").read_text())


def test_a_finding_is_filed_with_what_produced_it(run):
    run.finding("2.1", "{accuracy:.1%} after {n}", met=True, accuracy=np.float32(0.5), n=torch.tensor(3), never=np.nan)
    finding = _filed(run)["findings"]["2.1"]
    assert finding["answer"] == "50.0 % after 3" and finding["met"] is True
    assert finding["values"] == {"accuracy": 0.5, "n": 3, "never": None}
    assert _filed(run)["parameters"] == COMMON
    assert _filed(run)["environment"]["dataset"] == "digits"
    assert _filed(run)["environment"]["versions"]["torch"] == version("torch")


def test_timings_are_filed_apart_from_what_must_reproduce(run):
    run.finding("6.4/speed", "{ratio:.1f} times faster", timings={"ratio": 2.0}, width=5)
    finding = _filed(run)["findings"]["6.4/speed"]
    assert (finding["values"], finding["timings"], finding["met"]) == ({"width": 5}, {"ratio": 2.0}, None)


def test_a_finding_shown_again_replaces_the_first_and_others_stay(run):
    for id, value in (("3.1", 1), ("3.2", 2), ("3.1", 3)):
        run.finding(id, "{x}", x=value)
    assert {id: finding["values"]["x"] for id, finding in run.findings().items()} == {"3.1": 3, "3.2": 2}


@pytest.mark.parametrize("id", ["0.1", "3", "3.1/Spread", "3.1/", "", "x3.1"])
def test_ids_that_are_no_items_are_refused(run, id):
    with pytest.raises(ValueError, match="allowed: an item such as"):
        run.finding(id, "nothing")


def test_a_recipe_takes_the_runs_seed_and_precision_unless_told_otherwise(run):
    assert (run.recipe(1, 8, 1e-3).seed, run.recipe(1, 8, 1e-3).precision) == (3, "float32")
    assert run.recipe(1, 8, 1e-3, seed=9).seed == 9


def test_rates_are_those_of_the_notebook_and_their_table_shows_means_over_seeds(run, monkeypatch, tmp_path):
    (tmp_path / "sweeps").mkdir()
    rows = ["02/short,0.001,1,100,0.5,1", "02/short,0.001,1,101,0.7,1", "02/long,0.002,2,100,0.9,1"]
    rows += ["02/long,0.002,2,101,0.92,1", "bonus/02/short,0.001,1,100,0.1,1"]
    header = "arm,learning_rate,epochs,seed,validation_accuracy,validation_loss"
    (tmp_path / "sweeps" / "rates.csv").write_text("\n".join([header, *rows]))
    monkeypatch.setattr(run_module, "PROJECT", tmp_path)
    rates = run.rates()
    assert rates[["arm", "learning_rate", "seed", "accuracy"]].values.tolist()[1] == ["short", 0.001, 101, 70]
    table = rate_table(rates)
    assert table.to_dict() == {0.001: {"long": "", "short": "60.00"}, 0.002: {"long": "91.00", "short": ""}}
    assert table.index.name == "validation accuracy (%), mean of 2 seeds"


def test_the_same_training_is_done_once(run):
    recipe = run.recipe(1, 256, 1e-3)
    first, history = run.train(mlp([784, 8, 10], seed=0), recipe)
    again, same = run.train(mlp([784, 8, 10], seed=0), recipe)
    assert same == history  # seconds included: it was read, not run
    assert torch.equal(first.fc1.weight, again.fc1.weight)
    assert run.train(mlp([784, 8, 10], seed=1), recipe)[1] != history


def test_moved_starts_are_other_networks_that_start_next_to_the_old_ones(run, monkeypatch, tmp_path):
    recipe = run.recipe(1, 256, 1e-3)
    network, _ = run.train(mlp([784, 8, 10], seed=0), recipe)
    monkeypatch.setenv("LOWRANK_MOVED_STARTS", "1")
    moved, _ = Run("02_train", **COMMON).train(mlp([784, 8, 10], seed=0), recipe)
    assert len(list((run.folder / "networks").iterdir())) == 2
    assert not torch.equal(moved.fc1.weight, network.fc1.weight)
    torch.testing.assert_close(moved.fc1.weight, network.fc1.weight, rtol=0, atol=1e-5)


def test_several_trainings_come_back_under_their_keys_as_if_done_one_by_one(run):
    keys = [("a", 0), ("a", 1), ("b", 0)]

    def trainings():
        return {key: Training(mlp([784, 8, 10], seed=i), run.recipe(1, 256, 1e-3)) for i, key in enumerate(keys)}

    trained = run.train_all(trainings())
    assert list(trained) == keys
    assert len(list((run.folder / "networks").iterdir())) == 3, "each is stored, and nothing else is left"
    for key, same in trainings().items():
        network, history = run.train(same.model, same.recipe)
        assert history == trained[key][1], "loaded"
        assert torch.equal(network.fc1.weight, trained[key][0].fc1.weight)
    grouped = histories_by_label(trained)
    assert grouped == {"a": [trained["a", 0][1], trained["a", 1][1]], "b": [trained["b", 0][1]]}


def test_the_same_training_asked_for_twice_at_once_is_done_once(run, monkeypatch):
    monkeypatch.setattr(training, "_n_side_by_side", 2)
    same = [Training(mlp([784, 64, 10], seed=0), run.recipe(3, 64, 1e-3)) for _ in range(2)]
    (first, history), (second, other) = run.train_all(dict(enumerate(same))).values()
    assert history == other, "the durations would differ had both been trained"
    assert torch.equal(first.fc1.weight, second.fc1.weight)


def test_what_another_process_is_training_is_left_for_the_end(run, monkeypatch):
    asked = {key: Training(mlp([784, 8, 10], seed=key), run.recipe(1, 256, 1e-3)) for key in range(3)}
    _, recipe, _ = asked[0]
    networks = run.folder / "networks"
    networks.mkdir()
    busy = FileLock(networks / f".{_key(asked[0].model, run.data, recipe, {})}.lock{TEMPORARY}")
    busy.acquire()  # as if a process were at the first network
    began = []

    def fit_and_note(model, data, recipe, **options):
        began.append(len(began))
        if len(began) == 2:
            busy.release()  # it gave up, when both others had begun
        return fit(model, data, recipe, **options)

    monkeypatch.setattr(store, "fit", fit_and_note)
    trained = run.train_all(asked)
    assert list(trained) == [0, 1, 2] and len(began) == 3
    assert len(list(networks.iterdir())) == 3


def test_networks_are_kept_where_several_runs_share_them(monkeypatch, tmp_path):
    monkeypatch.setenv("LOWRANK_NETWORKS_DIR", str(tmp_path / "shared"))
    for name in ("one", "two"):
        monkeypatch.setenv("LOWRANK_RUN_DIR", str(tmp_path / name))
        run = Run("02_train", **COMMON)
        run.train(mlp([784, 8, 10], seed=0), run.recipe(1, 256, 1e-3))
    assert len(list((tmp_path / "shared").iterdir())) == 1
    assert not (tmp_path / "one" / "networks").exists()


def test_without_a_command_a_relative_data_folder_is_relative_to_the_project(monkeypatch, tmp_path):
    write_small_fashion_mnist(tmp_path / "images")
    images = os.path.relpath(tmp_path / "images", PROJECT)
    monkeypatch.setenv("LOWRANK_RUN_DIR", str(tmp_path))
    monkeypatch.chdir(PROJECT / "notebooks")  # as JupyterLab does
    for variable, parameter in ((images, ""), ("nowhere", images)):
        monkeypatch.setenv("LOWRANK_DATA_DIR", variable)
        run = Run("02_train", **COMMON | {"dataset": "fashion_mnist", "data_dir": parameter})
        assert len(run.whole_data.train_labels) == 60
        assert run.parameters["data_dir"] == parameter


def test_impossible_parameters_are_refused_before_anything_else():
    with pytest.raises(ParameterError, match="epochs = -1"):
        Run("02_train", **COMMON, epochs=-1)


def test_the_reader_is_told_what_stands_in_for_mnist(monkeypatch, tmp_path, shell):
    monkeypatch.setenv("LOWRANK_RUN_DIR", str(tmp_path))
    monkeypatch.setenv("LOWRANK_AUTO_DATASET", "digits")
    for dataset, told in (("auto", True), ("digits", False)):
        with capture_output() as shown:
            Run("02_train", **COMMON | {"dataset": dataset})
        (header,) = (output.data["text/markdown"] for output in shown.outputs)
        assert ("MNIST could not be had" in header) is told
        images = "1,437 training images, 239 of them for validation, and 360 test images"
        assert f"Dataset **digits** ({images}) · seed **3**" in header

"""What a notebook works with: claims are filed as data and shown as sentences; networks are trained once."""

import json
import os
from importlib.metadata import version

import numpy as np
import pytest
import torch
from idx_files import write_small_fashion_mnist
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from lowrank_helpers import PROJECT, parallel
from lowrank_helpers.models import mlp
from lowrank_helpers.series import evidence
from lowrank_helpers.series.parameters import ParameterError, declared
from lowrank_helpers.series.run import Run, Training, recipes
from lowrank_helpers.training import Recipe

VARIABLES = declared(PROJECT / "notebooks" / "02_train.ipynb") | {
    "dataset": "digits", "seed": 3, "device": "cpu", "precision": "float32"
}  # fmt: skip
BRIEF = Recipe(epochs=1, batch_size=256, learning_rate=1e-3)


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setenv("LOWRANK_RUN_DIR", str(tmp_path))
    return Run("02_train", VARIABLES)


@pytest.fixture
def shell():
    """A notebook's own shell, so that what is displayed can be read."""
    yield InteractiveShell.instance()
    InteractiveShell.clear_instance()


def _filed(run):
    return json.loads((run.folder / "claims" / "02_train.json").read_text())


def test_a_claim_is_filed_with_what_produced_it(run):
    run.claim(
        "2.1", "So.", holds=np.bool_(True), measured={"accuracy": np.float32(0.5), "never": np.nan}, timings={"s": 2}
    )
    filed = _filed(run)
    claim = filed["claims"]["2.1"]
    assert claim["measured"] == {"accuracy": {"": 0.5}, "never": {"": None}} and claim["holds"] is True
    assert claim["timings"] == {"s": {"": 2}}, "apart from what must reproduce"
    assert filed["parameters"] == run.parameters and filed["parameters"]["widths"] == [784, 512, 512, 10]
    environment = filed["environment"]
    assert environment["dataset"] == "digits" and environment["versions"]["torch"] == version("torch")
    assert environment["source"] and environment["package"]


def test_a_claim_made_again_replaces_the_first_and_others_stay(run):
    for id, value in (("3.1", 1), ("3.2", 2), ("3.1", 3)):
        run.claim(id, "So.", holds=True, measured={"x": value})
    assert {id: claim["measured"]["x"][""] for id, claim in _filed(run)["claims"].items()} == {"3.1": 3, "3.2": 2}


@pytest.mark.parametrize("id", ["0.1", "3", "3.1/Spread", "3.1/", "", "x3.1"])
def test_ids_that_are_no_items_are_refused(run, id):
    with pytest.raises(ValueError, match="allowed: an item such as"):
        run.claim(id, "So.", holds=True)


@pytest.mark.parametrize(
    "stated",
    [{}, {"holds": True, "counts": 0.1}, {"larger": {"x": ("a", "b")}}, {"alike": {"x": ("a", "b")}, "holds": True}],
)
def test_a_claim_needs_one_way_to_be_decided(run, stated):
    with pytest.raises(ValueError, match=r"claim 3\.1 needs either holds, or counts with"):
        run.claim("3.1", "So.", **stated)


def test_a_quantity_of_a_claim_has_one_place(run):
    with pytest.raises(ValueError, match="'rank' more than once"):
        run.claim("3.1", "So.", holds=True, measured={"rank": 3}, series={"rank": {1: 3}})


def record(run, monkeypatch, folder, parameters):
    """Record evidence of four runs of one claim, and return a run that may quote it."""
    monkeypatch.setattr(evidence, "FOLDER", folder / "evidence")
    kept = {name: value for name, value in parameters.items() if name not in evidence.FREE}
    measured = {"2.1": {"rank": {"1": [1.0, 2.0, 3.0, 4.0]}}}
    evidence.write(
        evidence.Evidence("02_train", "digits", kept, {}, [{}] * 4, {"2.1": [True, True, True, False]}, measured)
    )
    return Run("02_train", VARIABLES)


def test_a_claim_is_shown_beside_the_recorded_runs(run, monkeypatch, tmp_path, shell):
    quoting = record(run, monkeypatch, tmp_path, run.parameters)
    with capture_output() as shown:
        quoting.claim("2.1", "Ranks fall.", holds=True, measured={"rank": {"1": 2.5}})
        quoting.answers()
    claim, answers = (output.data["text/markdown"] for output in shown.outputs)
    assert "holds in 3 of 4 recorded runs, and in this one" in claim and "2.500 ± 1.291 (1.000 to 4.000)" in claim
    assert shown.outputs[0].metadata["lowrank"] == {"claim": "2.1"}
    assert answers == "- **2.1** Ranks fall. *not settled: 3 of 4 runs*"
    assert quoting.recorded("2.1", "rank")[1.0].tolist() == [1, 2, 3, 4]


def test_evidence_of_other_parameters_is_not_quoted(run, monkeypatch, tmp_path, shell):
    alone = record(run, monkeypatch, tmp_path, run.parameters | {"activation": "tanh"})
    with capture_output() as shown:
        alone.claim("2.1", "Ranks fall.", holds=True, measured={"rank": {"1": 2.5}})
    assert "no runs like it are recorded" in shown.outputs[0].data["text/markdown"]
    assert alone.recorded("2.1", "rank").empty


def test_a_recipe_takes_the_runs_seed_and_precision_and_what_the_parameter_says(monkeypatch, tmp_path):
    monkeypatch.setenv("LOWRANK_RUN_DIR", str(tmp_path))
    run = Run("02_train", VARIABLES | {"recipes": {"small": {"epochs": 2}}})
    recipe = run.recipe("small", seed=9)
    assert (run.recipe("small").seed, recipe.seed, recipe.precision) == (3, 9, "float32")
    assert recipe.epochs == 8 and recipe.batch_size == recipes()["small"]["batch_size"] // 4, "a small set: more steps"


def test_the_same_training_is_done_once(run):
    recipe = BRIEF
    first, history = run.train(mlp([784, 8, 10], seed=0), recipe)
    again, same = run.train(mlp([784, 8, 10], seed=0), recipe)
    assert same == history  # seconds included: it was read, not run
    assert torch.equal(first.fc1.weight, again.fc1.weight)
    assert run.train(mlp([784, 8, 10], seed=1), recipe)[1] != history


def test_several_trainings_come_back_under_their_keys_as_if_done_one_by_one(run):
    keys = [("a", 0), ("a", 1), ("b", 0)]

    def trainings():
        return {key: Training(mlp([784, 8, 10], seed=i), BRIEF) for i, key in enumerate(keys)}

    trained = run.train_all(trainings())
    assert list(trained) == keys
    assert len(list((run.folder / "networks").iterdir())) == 3, "each is stored, and nothing else is left"
    for key, same in trainings().items():
        network, history = run.train(same.model, same.recipe)
        assert history == trained[key][1], "loaded"
        assert torch.equal(network.fc1.weight, trained[key][0].fc1.weight)


def test_the_same_training_asked_for_twice_at_once_is_done_once(run, monkeypatch):
    monkeypatch.setattr(parallel, "_n_side_by_side", 2)
    same = [Training(mlp([784, 64, 10], seed=0), Recipe(epochs=3, batch_size=64, learning_rate=1e-3)) for _ in range(2)]
    (first, history), (second, other) = run.train_all(dict(enumerate(same))).values()
    assert history == other, "the durations would differ had both been trained"
    assert torch.equal(first.fc1.weight, second.fc1.weight)


def test_networks_are_kept_where_several_runs_share_them(monkeypatch, tmp_path):
    monkeypatch.setenv("LOWRANK_NETWORKS_DIR", str(tmp_path / "shared"))
    for name in ("one", "two"):
        monkeypatch.setenv("LOWRANK_RUN_DIR", str(tmp_path / name))
        run = Run("02_train", VARIABLES)
        run.train(mlp([784, 8, 10], seed=0), BRIEF)
    assert len(list((tmp_path / "shared").iterdir())) == 1
    assert not (tmp_path / "one" / "networks").exists()


def test_without_a_command_a_relative_data_folder_is_relative_to_the_project(monkeypatch, tmp_path):
    write_small_fashion_mnist(tmp_path / "images")
    images = os.path.relpath(tmp_path / "images", PROJECT)
    monkeypatch.setenv("LOWRANK_RUN_DIR", str(tmp_path))
    monkeypatch.chdir(PROJECT / "notebooks")  # as JupyterLab does
    for variable, parameter in ((images, ""), ("nowhere", images)):
        monkeypatch.setenv("LOWRANK_DATA_DIR", variable)
        run = Run("02_train", VARIABLES | {"dataset": "fashion_mnist", "data_dir": parameter})
        assert len(run.data.train_labels) == 50
        assert run.parameters["data_dir"] == parameter


def test_impossible_parameters_are_refused_before_anything_else():
    with pytest.raises(ParameterError, match="seed = -1"):
        Run("02_train", VARIABLES | {"seed": -1})


def test_the_reader_is_told_what_stands_in_for_mnist(monkeypatch, tmp_path, shell):
    monkeypatch.setenv("LOWRANK_RUN_DIR", str(tmp_path))
    monkeypatch.setenv("LOWRANK_AUTO_DATASET", "digits")
    for dataset, told in (("auto", True), ("digits", False)):
        with capture_output() as shown:
            Run("02_train", VARIABLES | {"dataset": dataset})
        (header,) = (output.data["text/markdown"] for output in shown.outputs)
        assert ("MNIST could not be had" in header) is told
        images = "1,198 training, 239 validation and 360 test images"
        assert f"Dataset **digits** ({images}) · seed **3**" in header

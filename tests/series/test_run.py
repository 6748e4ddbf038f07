"""What a notebook works with: claims are filed as data and shown as sentences; networks are trained once."""

import json
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import pytest
import torch
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


@pytest.fixture(autouse=True)
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
    measured = {"accuracy": np.float32(0.5), "never": np.nan}
    run.claim("2.1", "So.", holds=np.bool_(True), measured=measured, timings={"s": 2})
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


@pytest.mark.parametrize(
    ("id", "stated", "said"),
    [
        *((id, {"holds": True}, "allowed: an item such as") for id in ("0.1", "3", "3.1/Spread", "3.1/", "x3.1")),
        ("3.1", {}, "needs either holds, or counts with"),
        ("3.1", {"holds": True, "counts": 0.1}, "needs either holds, or counts with"),
        ("3.1", {"larger": {"x": ("a", "b")}}, "needs either holds, or counts with"),
        ("3.1", {"alike": {"x": ("a", "b")}, "holds": True}, "needs either holds, or counts with"),
        ("3.1", {"holds": True, "measured": {"rank": 3}, "series": {"rank": {1: 3}}}, "'rank' more than once"),
    ],
)
def test_what_is_no_claim_is_refused(run, id, stated, said):
    with pytest.raises(ValueError, match=f"{id}.* {said}"):
        run.claim(id, "So.", **stated)


def test_a_claim_is_shown_beside_the_recorded_runs_with_its_parameters(run, monkeypatch, tmp_path, shell):
    monkeypatch.setattr(evidence, "FOLDER", tmp_path / "evidence")
    kind = evidence.kind_of(run.parameters)
    measured = {"2.1": {"rank": {"1": [1.0, 2.0, 3.0, 4.0]}, "by layer": {"fc1": [1.0] * 4}}}
    holds = {"2.1": [True, True, True, False]}
    evidence.write(evidence.Evidence("02_train", "digits", kind, {}, [{}] * 4, holds, measured))
    other, run = (Run("02_train", VARIABLES | {"activation": name}) for name in ("tanh", "relu"))
    with capture_output() as shown:
        for each in (other, run):
            each.claim("2.1", "Ranks fall.", holds=True, measured={"rank": {"1": 2.5}})
        run.answers()
    alone, claim, answers = (output.data["text/markdown"] for output in shown.outputs)
    assert [output.metadata.get("lowrank") for output in shown.outputs[:2]] == [{"claim": "2.1"}] * 2
    assert "no runs like it are recorded" in alone and other.recorded("2.1", "rank").empty
    assert "holds in 3 of 4 recorded runs, and in this one" in claim and "2.500 ± 1.291 (1.000 to 4.000)" in claim
    assert answers == "- **2.1** Ranks fall. *not settled: 3 of 4 runs*"
    assert run.recorded("2.1", "rank")[1.0].tolist() == [1, 2, 3, 4]
    assert [*run.recorded("2.1", "by layer")] == ["fc1"]


def test_a_recipe_takes_the_runs_seed_and_precision_and_what_the_parameter_says(run):
    run = Run("02_train", VARIABLES | {"recipes": {"small": {"epochs": 2}}})
    recipe = run.recipe("small")
    assert (recipe.seed, recipe.precision) == (3, "float32")
    assert recipe.epochs == 8 and recipe.batch_size == recipes()["small"]["batch_size"] // 4, "a small set: more steps"
    labels = torch.zeros(200, 64, dtype=torch.int64)
    assert run.recipe("small", replace(run.data, train_labels=labels)).epochs == 2, "a text with many characters"


def test_trainings_come_back_under_their_keys_and_are_done_once(run):
    def trainings():
        return {("a", seed): Training(mlp([784, 8, 10], seed=seed), BRIEF) for seed in range(3)}

    trained = run.train_all(trainings())
    assert list(trained) == list(trainings())
    assert len(list((run.folder / "networks").iterdir())) == 3, "each is stored, and nothing else is left"
    for key, same in trainings().items():
        network, history = run.train(same.model, same.recipe)
        assert history == trained[key][1], "seconds included: it was read, not run"
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


def test_impossible_parameters_are_refused_before_anything_else():
    with pytest.raises(ParameterError, match="seed = -1"):
        Run("02_train", VARIABLES | {"seed": -1})


def test_the_reader_is_told_what_stands_in_for_mnist(monkeypatch, shell):
    monkeypatch.setenv("LOWRANK_AUTO_DATASET", "digits")
    for dataset, told in (("auto", True), ("digits", False)):
        with capture_output() as shown:
            Run("02_train", VARIABLES | {"dataset": dataset})
        (header,) = (output.data["text/markdown"] for output in shown.outputs)
        assert ("MNIST could not be had" in header) is told
        images = "1,198 training, 239 validation and 360 test images"
        assert f"Dataset **digits** ({images}) · seed **3**" in header

"""The command line: what it refuses before a kernel starts, and one run from end to end."""

import json
import re
import runpy

import pytest
import torch
from commands import lowrank

from lowrank_helpers import PROJECT, cli, layers
from lowrank_helpers.models import mlp
from lowrank_helpers.report import compression_page
from lowrank_helpers.series import execution
from lowrank_helpers.series.execution import notebook_names, notebook_path
from lowrank_helpers.series.parameters import declared, parse

MISSING = next(device for device in ("mps", "cuda") if not getattr(torch, device).is_available())


@pytest.mark.parametrize(
    ("command", "arguments", "named"),
    [
        ("run", ["99_nothing"], ["'99_nothing'", "02_train"]),
        ("run", ["-p", "epochs", "3"], ["'epochs'", "recipes", "02_train:"]),
        ("run", ["-p", "recipes", "{small: {epochs: three}}"], ["small.epochs", "'three'", "whole number, at least 1"]),
        ("run", ["-p", "widths", "[1"], ["widths", "not YAML"]),
        ("run", ["-p", "activation", "swish"], ["activation", "'swish'", "relu, tanh, sigmoid, gelu, identity"]),
        ("run", ["-p", "dataset", "cifar"], ["dataset", "'cifar'", "auto, mnist, fashion_mnist, kmnist, digits"]),
        ("run", ["-p", "device", MISSING], [f"'{MISSING}' is not on this machine; allowed: auto, "]),
        ("run", ["-f", "/nonexistent.yaml"], ["/nonexistent.yaml"]),
        ("sweep", [], ["needs a grid"]),
        ("sweep", ["-g", "epochs=1..99999999999"], ["the grid has 99,999,999,999 points", "at most 10,000"]),
        ("sweep", ["-g", "seed=0..100", "-g", "epochs=1..100"], ["the grid has 10,100 points", "at most 10,000"]),
        ("sweep", ["-g", "seed"], ["'seed'", "NAME=VALUES"]),
        ("sweep", ["-g", "seed="], ["'seed='", "NAME=VALUES"]),
        ("sweep", ["-g", "seed=3..1"], ["seed", "no values"]),
        ("sweep", ["-g", "seed=1,2,1"], ["seed", "1 more than once"]),
        ("sweep", ["-g", "sed=0..3"], ["'sed'", "seed"]),
        ("sweep", ["-g", "activation=relu,swish"], ["'swish'", "relu, tanh"]),
        ("sweep", ["-g", "seed=0..3", "-p", "device", "gpu"], ["device", "one of auto, cpu, cuda, mps"]),
        ("sweep", ["-g", "seed=0..3", "-p", "seed", "1"], ["seed", "both fixed and in the grid"]),
        ("sweep", ["-g", "seed=[1"], ["not YAML"]),
        ("sweep", ["99_nothing", "-g", "seed=0..3"], ["'99_nothing'", "02_train"]),
        ("sweep", ["-g", "seed=0..3", "--workers", "2", "--scheduler", "tcp://here:1"], ["--workers", "--scheduler"]),
    ],
)
def test_bad_input_is_refused_with_its_name_its_value_and_what_is_allowed(command, arguments, named, tmp_path):
    output = lowrank(command, "02_train", *arguments, "-o", tmp_path / "out", code=2)
    assert [part for part in named if part not in output] == []
    assert not (tmp_path / "out").exists()  # no kernel started, nothing made


@pytest.mark.parametrize(
    ("content", "named"),
    [(b"- 1\n- 2\n", "name: value"), (b"seed: [", "not YAML"), (b"\xff\x00", "not YAML"), (b"seed: -1\n", "seed = -1")],
)
def test_bad_parameter_files_are_refused_by_name(content, named, tmp_path):
    (tmp_path / "mine.yaml").write_bytes(content)
    assert named in lowrank("run", "02_train", "-f", tmp_path / "mine.yaml", "-o", tmp_path / "out", code=2)


@pytest.mark.parametrize("other", [{"environment": {"dataset": "digits"}}, {"parameters": {"seed": 1}}])
def test_only_a_run_on_mnist_with_the_defaults_is_recorded(other, tmp_path, monkeypatch):
    notebooks = {name: declared(notebook_path(name)) for name in notebook_names()}
    runs = {name: {"environment": {"dataset": "mnist"}, "parameters": given} for name, given in notebooks.items()}
    runs["03_rank"] |= other
    (tmp_path / "reports" / "latest").mkdir(parents=True)
    (tmp_path / "reports" / "latest" / "results.json").write_text(json.dumps({"notebooks": runs}))
    monkeypatch.setattr("lowrank_helpers.PROJECT", tmp_path)
    with pytest.raises(SystemExit, match="03_rank in reports/latest did not run on MNIST with its defaults"):
        runpy.run_path(str(PROJECT / "scripts" / "record.py"), run_name="__main__")


def test_a_dataset_that_cannot_be_had_is_refused_before_a_kernel_starts(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte").write_bytes(b"altered")
    output = lowrank("run", "02_train", "-p", "data_dir", tmp_path, "-o", tmp_path / "out", code=2)
    assert "train-images-idx3-ubyte is not the published MNIST file" in output
    assert not list((tmp_path / "out").glob("*.ipynb"))


def test_an_output_folder_that_cannot_be_made_is_a_clear_error(tmp_path):
    out = tmp_path / "file" / "out"
    (tmp_path / "file").write_text("in the way")
    output = lowrank("run", "02_train", "-p", "dataset", "digits", "-o", out, code=1)
    assert f"cannot write to {out}: Not a directory" in output


def test_help_lists_notebooks_parameters_and_examples():
    shown = lowrank("run", "--help")
    for part in [*execution.notebook_names(), *cli.parameters.RULES, "\n    lowrank run -f mine.yaml -p seed 1\n"]:
        assert part in shown


def test_the_readmes_parameter_file_is_accepted():
    (example,) = re.findall(r"```yaml\n(.*?)```", (PROJECT / "README.md").read_text(), re.DOTALL)
    planned = execution.plan((), parse(example, "README.md"))
    assert planned["02_train"]["recipes"] == {"small": {"learning_rate": 1e-3}}


MINE = """
import torch
from lowrank_helpers.models import mlp
model = mlp([20, 16, 4], seed=0)
def batches(): return [{"x": torch.randn(8, 20)} for _ in range(9)]
def forward(model, batch): return model(batch["x"])
def score(model): return sum(parameter.numel() for parameter in model.parameters()) / 1000
"""


def test_your_own_network_is_compressed_into_a_folder_from_which_it_comes_back(tmp_path, monkeypatch):
    (tmp_path / "mine_to_compress.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    model, data, forward = (f"mine_to_compress:{name}" for name in ("model", "batches", "forward"))
    command = "compress", model, "--data", data, "-o", "small", "--budget", "0.6"
    refused = lowrank(*command, code=2)
    assert f"Error: {model} was not compressed; ValueError: Sequential does not run on a dict" in refused
    output = lowrank(*command, "--forward", forward)
    assert re.match(r"(Faster|Smaller|Slower).* with \d\d% of the parameters .*\nparameters: ", output)
    results = json.loads((tmp_path / "small" / "results.json").read_text())
    assert output.startswith(results["verdict"]) and max(results["frontier"].values()) > 0.5
    assert results["verdict"] in (tmp_path / "small" / "index.html").read_text()
    small = layers.load(mlp([20, 16, 4], seed=1), tmp_path / "small")
    assert f"fc1: rank {small.fc1.rank}" in output
    scored = lowrank(*command[:-1], "0.3", "--forward", forward, "--metric", "mine_to_compress:score")
    assert re.search(r"^score: 0\.384 → 0\.3\d*", scored, re.MULTILINE)
    assert "No module named 'nothing'" in lowrank("compress", "nothing:model", "--data", data, "-o", "small", code=2)


def test_the_knee_is_where_the_curve_bends():
    assert compression_page.knee({share / 10: max(0, 3 - share) for share in range(11)}) == 0.3

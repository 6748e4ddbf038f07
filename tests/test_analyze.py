"""``lowrank analyze``: what it prints and writes, and what it refuses."""

import json
import re
from pathlib import Path

import pytest
import torch
from bs4 import BeautifulSoup
from click.testing import CliRunner
from safetensors.torch import save_file

from lowrank_helpers import cli
from lowrank_helpers.analysis import analyze
from lowrank_helpers.models import mlp
from lowrank_helpers.report import analysis_page

LONG = "a_module_with_a_name.and_another_in_it.which_go_on_for_longer_than_a_terminal_is_wide_by_far.and_still_on"


def _lowrank(*arguments):
    return CliRunner().invoke(cli.main, ["analyze", *map(str, arguments)])


def _file(folder, tensors):
    file = folder / "net <b>.safetensors"
    save_file(tensors, file)
    return file


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A file with a thin matrix, a full one, a convolution in half precision, packed projections and what is none."""
    draw = torch.Generator().manual_seed(0)
    tensors = {
        "thin.weight": torch.randn(60, 3, generator=draw) @ torch.randn(3, 50, generator=draw),
        f"{LONG}.weight": torch.eye(1000, 300),
        "conv.weight": torch.randn(8, 4, 3, 3, generator=draw).half(),
        "attn.in_proj_weight": torch.randn(48, 16, generator=draw),
        "<i>bias</i>": torch.ones(5),
        **{f"norm{i}.weight": torch.ones(3) for i in range(9)},
    }
    return _file(tmp_path_factory.mktemp("network"), tensors)


def test_the_table_fits_a_terminal_of_100_columns_and_says_what_must_be_known(network):
    result = _lowrank(network)
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 100
    assert re.search(r"^thin +60×50 +3/50 .*\d+ %$", result.output, re.MULTILINE)
    assert re.search(r"^….*and_still_on +1000×300 +300/300 .*–$", result.output, re.MULTILINE)
    assert re.search(r"^conv +8×4·3·3 +8/8 ", result.output, re.MULTILINE)
    assert re.search(r"^attn\.k +16×16 +16/16 ", result.output, re.MULTILINE)
    output = " ".join(result.output.split())
    assert "packed q, k, v, split by rows: attn.q, attn.k, attn.v" in output
    assert "a vector or a number: <i>bias</i>, norm0.weight, norm1.weight, norm2.weight, and 6 more" in output
    for part in ("Gavish–Donoho 0 means", "half-precision", "A convolution is unfolded", "pay in 1 of 6 matrices"):
        assert part in output


def test_notes_stand_only_where_they_apply(tmp_path):
    signal = torch.diag(torch.cat([torch.full((2,), 100.0), torch.ones(38)]))
    output = _lowrank(_file(tmp_path, {"plain": signal})).output
    for part in ("Gavish–Donoho 0", "half-precision", "convolution", "Not measured"):
        assert part not in output


def test_page_and_results_hold_every_number_and_name(network, tmp_path):
    for _ in range(2):  # an analysis is written anew
        result = _lowrank(network, "-o", tmp_path / "out")
        assert result.exit_code == 0 and "index.html" in result.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    found = analyze(str(network))
    assert list(results["matrices"]) == list(found.table.index)
    for name, row in results["matrices"].items():
        assert row == {key: pytest.approx(value) for key, value in found.table.loc[name].items()}
    assert results["skipped"] == found.skipped and len(found.skipped) == 10
    assert results["saved"] == found.n_saved == found.table.loc["thin", "saved"] > 0
    assert results["source"] == str(network) and "torch" in results["environment"]["versions"]
    page = BeautifulSoup((tmp_path / "out" / "index.html").read_text(), "html.parser")
    rows = {row.th.text: [cell.text for cell in row.find_all("td")] for row in page.select(".dataframe tbody tr")}
    assert list(rows) == list(found.table.index)
    assert rows["thin"][:2] == ["60×50", "3/50"] and "norm8.weight" in page.text
    assert results["answer"] == page.select_one(".claim p").text
    assert "<i>bias</i>" in page.text and not page.find("i")
    assert page.img["src"].startswith("data:image/png;base64,") and page.img["alt"]
    assert page.h1.text == "How low-rank is net <b>.safetensors?"


def test_folders_of_something_else_and_those_that_cannot_be_made_are_refused_before_measuring(network, tmp_path):
    (tmp_path / "run").mkdir()
    other = '{"format": 1, "notebooks": {}, "findings": {}}'
    (tmp_path / "run" / "results.json").write_text(other)
    result = _lowrank(network, "-o", tmp_path / "run")
    assert result.exit_code == 2 and "holds the results of something else" in result.output
    assert (tmp_path / "run" / "results.json").read_text() == other
    (tmp_path / "file").touch()
    result = _lowrank(network, "-o", tmp_path / "file" / "out")
    assert result.exit_code == 2 and "cannot be written to" in result.output and "effective" not in result.output


@pytest.mark.parametrize("name", ["nowhere.safetensors", "damaged.safetensors", "damaged.pt", "whole.pt", "x:y"])
def test_bad_sources_are_refused_in_one_line_before_anything_is_written(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name.startswith("damaged"):
        Path(name).write_bytes(b"\x80\x02words")
    if name.startswith("whole"):
        torch.save(mlp([3, 2], seed=0), name)
    result = _lowrank(name, "-o", "out")
    assert result.exit_code == 2 and not Path("out").exists()
    assert result.output.startswith(f"Error: {name}") and result.output.count("\n") == 1


def test_a_callable_is_found_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_own_network.py").write_text("from torch import nn\ndef build():\n    return nn.Linear(7, 5)\n")
    result = _lowrank("my_own_network:build")
    assert result.exit_code == 0 and re.search(r"^weight +5×7 +5/5 ", result.output, re.MULTILINE)


@pytest.mark.parametrize(
    ("tensors", "plain", "evidence"),
    [
        ({"a": torch.eye(8)}, "save nothing", "Each of the 1 matrices, 64 parameters"),
        ({"a": torch.ones(8, 8)}, "save 75 % of the parameters", "1 of 1 matrices: 48 of 64 are saved"),
        ({"a": torch.eye(8), "b": torch.ones(8, 8)}, "save 38 %", "1 of 2 matrices: 48 of 128 are saved"),
    ],
)
def test_the_answer_turns_with_the_numbers(tensors, plain, evidence, tmp_path):
    said = analysis_page.answer(analyze(str(_file(tmp_path, tensors))))
    assert plain in said[0] and evidence in said[1]

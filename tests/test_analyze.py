"""``lowrank analyze``: what it prints and writes, and what it refuses."""

import json
import re
from pathlib import Path

import pytest
import torch
from bs4 import BeautifulSoup
from commands import lowrank
from safetensors.torch import save_file

from lowrank_helpers.analysis import analyze
from lowrank_helpers.report import analysis_page

LONG = "a_module_with_a_name.and_another_in_it.which_go_on_for_longer_than_a_terminal_is_wide_by_far.and_still_on"


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
    text = analysis_page.text(analyze(str(network)))
    assert max(map(len, text.splitlines())) <= 100
    for row in (
        r"^thin +60×50 +3/50 .*\d+ %$",
        r"^….*and_still_on +1000×300 +300/300 .*–$",
        r"^conv +8×4·3·3 +8/8 ",
        r"^attn\.k +16×16 +16/16 ",
    ):
        assert re.search(row, text, re.MULTILINE)
    output = " ".join(text.split())
    assert "packed q, k, v, split by rows: attn.q, attn.k, attn.v" in output
    assert "a vector or a number: <i>bias</i>, norm0.weight, norm1.weight, norm2.weight, and 6 more" in output
    for part in ("Gavish–Donoho 0 means", "half-precision", "A convolution is unfolded", "pay in 1 of 6 matrices"):
        assert part in output


def test_notes_stand_only_where_they_apply(tmp_path):
    signal = torch.diag(torch.cat([torch.full((2,), 100.0), torch.ones(38)]))
    output = lowrank("analyze", _file(tmp_path, {"plain": signal}))
    for part in ("Gavish–Donoho 0", "half-precision", "convolution", "Not measured"):
        assert part not in output


def test_page_and_results_hold_every_number_and_name(network, tmp_path):
    for _ in range(2):  # an analysis is written anew
        assert "index.html" in lowrank("analyze", network, "-o", tmp_path / "out")
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


def test_a_folder_that_cannot_be_made_is_refused_before_measuring(network, tmp_path):
    (tmp_path / "file").touch()
    output = lowrank("analyze", network, "-o", tmp_path / "file" / "out", code=2)
    assert "cannot be written to" in output and "effective" not in output


@pytest.mark.parametrize("name", ["nowhere.safetensors", "damaged.safetensors", "damaged.pt", "x:y"])
def test_bad_sources_are_refused_in_one_line_before_anything_is_written(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name.startswith("damaged"):
        Path(name).write_bytes(b"\x80\x02words")
    output = lowrank("analyze", name, "-o", "out", code=2)
    assert output.startswith(f"Error: {name}") and output.count("\n") == 1
    assert not list(Path("out").iterdir())


def test_a_callable_is_found_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_own_network.py").write_text("from torch import nn\ndef build():\n    return nn.Linear(7, 5)\n")
    assert re.search(r"^weight +5×7 +5/5 ", lowrank("analyze", "my_own_network:build"), re.MULTILINE)


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

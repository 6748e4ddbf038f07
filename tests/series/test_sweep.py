"""Sweeps without a cluster: what a grid means and what is refused, the table, the intervals and the page."""

import pandas as pd
import pytest
from bs4 import BeautifulSoup
from commands import lowrank
from scipy import stats

from lowrank_helpers.report import sweep_pages
from lowrank_helpers.series import execution, sweep
from lowrank_helpers.series.claims import Claim
from lowrank_helpers.series.results import file_claims
from lowrank_helpers.series.sweep import Sweep


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0..3", [0, 1, 2, 3]),
        ("-1..1", [-1, 0, 1]),
        ("7", [7]),
        ("relu,tanh", ["relu", "tanh"]),
        ("1e-3,2.5", [0.001, 2.5]),
        ("[relu, tanh]", ["relu", "tanh"]),
        ("[[150, 80], [64, 32]]", [[150, 80], [64, 32]]),
        ("[150, 80], [64, 32]", [[150, 80], [64, 32]]),
    ],
)
def test_grid_values(text, values):
    name, read = sweep.grid_axis(f"ranks={text}")
    assert name == "ranks" and list(read) == values


def test_points_are_all_combinations_and_each_notebook_gets_what_it_declares_in_the_series_order():
    grid = {"activation": ["relu", "tanh"], "seed": [0, 1, 2]}
    points = sweep.points(Sweep(["02_train", "01_data"], grid, {"device": "cpu"}))
    assert [*points] == [f"activation={activation},seed={seed}" for activation in ("relu", "tanh") for seed in range(3)]
    first, second = points["activation=tanh,seed=1"].items()
    assert first == ("01_data", {"seed": 1, "device": "cpu"})
    assert second == ("02_train", {"activation": "tanh", "seed": 1, "device": "cpu"})


def test_point_names_can_be_read_told_apart_and_used_as_folders(tmp_path):
    grid = {"ranks": [[64, 64, 64, 8], [64, 64, 64, 80]], "data_dir": ["a/b", "a_b", "a%2Fb", "", "ü: *?"], "seed": [3]}
    points = sweep.points(Sweep(["06_factorized"], grid))
    assert next(iter(points)) == "ranks=64-64-64-8,data_dir=a%2Fb,seed=3"
    folders = {sweep.folder_of(point, tmp_path) for point in points}
    for folder in folders:
        folder.mkdir(parents=True)
    assert len(folders) == len(points) == len(list((tmp_path / "points").iterdir()))


@pytest.mark.parametrize("command", [["run"], ["run", "02_train"], ["sweep", "-g", "seed=0..1"], ["check"]])
def test_without_notebooks_a_command_says_what_is_missing_and_what_to_do(command, tmp_path, monkeypatch):
    """As where the package is installed from a wheel."""
    monkeypatch.setattr(execution, "NOTEBOOK_FOLDER", tmp_path / "notebooks")
    output = lowrank(*command, code=2)
    assert f"no notebooks in {tmp_path}" in output and "clone of the project" in output


def _filed(seed, activation, scale=1.0):
    environment = {
        "dataset": "digits", "device": "cpu", "precision": "float32", "threads": 1, "revision": "abc",
        "started": "2026-01-01T00:00:00", "python": "3", "versions": {},
    }  # fmt: skip
    given = {"dataset": "auto", "data_dir": "/data", "seed": seed, "activation": activation, "widths": [784, 16, 10]}
    measured = {"rank": {"": 10.0 * scale + seed}, "share": {"full": 0.4, "tanh": 0.5, "relu": None}}
    parts = measured, {"error": {"1": 0.9, "2": 0.5}}, {"seconds": {"": 0.5}}
    claims = [
        Claim("3.1", "Ranks are <low>.", seed < 10, [], *parts),
        Claim("3.1/part", "Ranks are <low>.", None, measured={"hidden": {"": 1}}),
    ]
    by_id = {claim.id: claim for claim in claims}
    return {"notebook": "03_rank", "parameters": given, "environment": environment, "claims": by_id}


@pytest.fixture
def swept(tmp_path):
    """A sweep of two activations and three seeds in a folder; of one point nothing is left."""
    definition = Sweep(["03_rank"], {"activation": ["relu", "tanh"], "seed": [0, 1, 10]})
    points = sweep.points(definition)
    for point, planned in [*points.items()][:-1]:
        given = planned["03_rank"]
        filed = _filed(**given, scale=1 + (given["activation"] == "tanh"))
        file_claims(sweep.folder_of(point, tmp_path), filed)
    return tmp_path, definition, [*points]


def test_table_has_a_row_a_number_and_parameters_as_columns():
    table = sweep_pages.table({"one": {"03_rank": _filed(0, "relu")}, "two": {"03_rank": _filed(1, "tanh")}})
    found = table[table["point"].eq("one") & table["claim"].eq("3.1")].fillna({"label": ""})
    found = found.set_index(["kind", "quantity", "label"])["value"]
    assert found.dropna().to_dict() == {
        ("measured", "rank", ""): 10.0,
        ("measured", "share", "full"): 0.4,
        ("measured", "share", "tanh"): 0.5,
        ("series", "error", "1"): 0.9,
        ("series", "error", "2"): 0.5,
        ("timings", "seconds", ""): 0.5,
    }
    assert set(table["seed"]) == {0, 1} and pd.api.types.is_integer_dtype(table["seed"])
    assert set(table["widths"]) == {"784-16-10"}
    assert set(table["dataset"]) == {"digits"}, "what auto stood for"
    assert "data_dir" not in table


def test_files_are_the_same_each_time(swept):
    folder, definition, points = swept
    written = []
    for _ in range(2):
        sweep_pages.write(folder, definition, points, {points[-1]: "03_rank: no luck"})
        written.append({name: (folder / name).read_bytes() for name in ("index.html", "table.csv")})
    assert written[0] == written[1]
    written = pd.read_csv(folder / "table.csv")
    assert list(written["point"].unique()) == points[:-1], "in the grid's order"


def _page(swept, **changes):
    folder, definition, points = swept
    sweep_pages.write(folder, Sweep(**vars(definition) | changes), points, {points[-1]: "03_rank: no <luck>"})
    return BeautifulSoup((folder / "index.html").read_text(), "html.parser")


def _rows(page, heading):
    section = page.find("h3", string=heading)
    return [[cell.text for cell in row.find_all(["th", "td"])] for row in section.find_next("tbody").find_all("tr")]


def test_page_shows_what_items_measured_with_students_interval_and_says_what_failed(swept):
    page = _page(swept)
    assert [heading.text for heading in page.find_all("h3")] == ["rank", "share"], "no part, no curve and no time"
    low, high = stats.t.interval(0.95, 2, loc=10 + 11 / 3, scale=stats.sem([0, 1, 10]))
    assert _rows(page, "rank")[0] == ["relu", f"{10 + 11 / 3:.5g}", f"{low:.5g} to {high:.5g}", "3"]
    assert _rows(page, "rank")[1][::3] == ["tanh", "2"], "of the third seed nothing is left"
    claim = page.select_one(".claim").text
    assert "Ranks are" in claim and "It holds at 4 of 5 points." in claim
    assert "activation=tanh,seed=10 (03_rank: no <luck>)" in page.text
    assert "6, 1 failed" in page.text and "Not MNIST" in page.text
    for image in page.find_all("img"):
        assert image["src"].startswith("data:image/png;base64,") and image["alt"]


def test_page_has_a_quantitys_labels_beside_another_axis_than_the_seed_or_in_its_place(swept):
    folder, definition, points = swept
    assert [row[:2] for row in _rows(_page(swept), "share")][:2] == [["relu", "full"], ["relu", "tanh"]]
    page = _page((folder, definition, points[:3]), grid={"seed": [0, 1, 10]})
    assert [row[0] for row in _rows(page, "share")] == ["full", "tanh"]
    page = _page((folder, definition, points[:1]), grid={"seed": [0]})
    assert _rows(page, "rank") == [["digits", "10", "–", "1"]]


def test_sweep_that_found_nothing_has_a_page_that_says_why(swept):
    folder, definition, points = swept
    page = _page((folder, definition, points[-1:]))
    assert "1, 1 failed" in page.text and "no <luck>" in page.text
    assert list(pd.read_csv(folder / "table.csv").columns) == list(sweep_pages.COLUMNS)

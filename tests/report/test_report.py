import json
import re
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup

from lowrank_helpers import PROJECT
from lowrank_helpers.report import index as report
from lowrank_helpers.report import pages
from lowrank_helpers.series import evidence
from lowrank_helpers.series.evidence import Evidence
from lowrank_helpers.series.parameters import parse

pytestmark = pytest.mark.slow


def soup(file: Path) -> BeautifulSoup:
    return BeautifulSoup(file.read_text(), "html.parser")


@pytest.fixture(scope="module")
def index(small_report):
    return soup(small_report / "index.html")


@pytest.fixture
def results(small_report):
    return json.loads((small_report / "results.json").read_text())


def rendered(results, folder: Path) -> BeautifulSoup:
    report.render(folder, results)
    return soup(folder / "index.html")


@pytest.fixture(scope="module")
def rank_page(small_report):
    return soup(small_report / "03_rank.html")


def test_index_lists_every_item_and_rule_of_the_assignment(index):
    items = [
        section["id"].removeprefix("item-") for section in index.select(".item") if not section.find_parent(id="beyond")
    ]
    counts = {"1": 2, "2": 1, "3": 3, "4": 2, "5": 3, "6": 4, "7": 2, "B": 4}
    assert items == [f"{chapter}.{i}" for chapter, count in counts.items() for i in range(1, count + 1)]
    assert [rule.strong.text for rule in index.select("#rules ~ dl dt")] == ["R1", "R2", "R3", "R4", "R5"]
    assert [item["id"] for item in index.select("#beyond .item")][:2] == ["item-8.1", "item-8.2"]


def test_an_answered_item_shows_sentence_standing_table_figure_and_parts(index):
    section = index.find(id="item-3.1")
    assert section.h3.text == "3.1 The average rank of the weight matrices over all layers"
    assert section.select_one(".sentence").math, "the sentence is Markdown"
    assert section.select_one(".badge").text == "holds in this run"
    assert "no runs like it are recorded" in section.text
    assert ["rank, averaged over the layers: numerical", "19.00"] in rows(section)
    assert section.select_one(".key img")["alt"] == "A line that <falls>"
    assert "Seeds do not matter." in section.details.text
    assert section.details.select_one(".badge").text == "does not hold in this run"


def rows(section):
    return [[cell.text for cell in row.select("td")] for row in section.select("tbody tr")]


@pytest.mark.parametrize(("n_held", "badge"), [(20, "20 of 20 runs"), (18, "not settled: 18 of 20 runs")])
def test_recorded_runs_are_quoted_beside_this_one(results, tmp_path, monkeypatch, n_held, badge):
    monkeypatch.setattr(evidence, "FOLDER", tmp_path / "evidence")
    given = results["notebooks"]["03_rank"]["parameters"]
    parameters = {name: value for name, value in given.items() if name not in evidence.FREE}
    values = {"rank, averaged over the layers": {"full": [21.0] * 20, "numerical": [18.0, 20.0] * 10}}
    holds = [True] * n_held + [False] * (20 - n_held)
    recorded = Evidence("03_rank", "digits", parameters, {}, [{}] * 20, {"3.1": holds}, {"3.1": values})
    evidence.write(recorded)
    section = rendered(results, tmp_path).find(id="item-3.1")
    assert section.select_one(".badge").text == badge
    assert f"{n_held} of 20 recorded runs" in section.text
    assert rows(section)[:2] == [
        ["rank, averaged over the layers: full", "21.00", "21.00 in all"],
        ["rank, averaged over the layers: numerical", "19.00", "19.00 ± 1.03 (18.00 to 20.00)"],
    ]


def test_index_begins_with_the_story_and_one_picture(index):
    story = index.select_one("main > .story")
    assert [link["href"] for link in story.select("li a")] == ["#item-3.1"], "of its claims, those that there are"
    assert story.figure.img["alt"] == "A line that <falls>"
    parts = [part.get("class", [part.name])[0] for part in index.main.find_all(recursive=False)[:5]]
    assert parts == ["h1", "alarm", "story", "section", "headline"]
    assert index.select_one("main > section .explorer")
    assert index.footer.find(id="run") and index.footer.find(id="rules") and index.footer.find(id="notebooks")


def test_story_and_headline_name_items():
    assignment = parse(report.ASSIGNMENT.read_bytes(), "assignment.yaml")
    items = [item["id"] for item in assignment["items"]]
    told = {id.partition("/")[0] for id in assignment["story"]["claims"]}  # an item's claim, or a part of its answer
    assert len(assignment["story"]["claims"]) == 5
    assert told <= {*items, *(item["id"] for item in assignment["beyond"])}
    assert set(assignment["story"]["pictures"]) <= set(items)
    assert {number["claim"] for number in assignment["headline"]} <= set(items)


def test_index_says_what_was_run_what_failed_and_why_an_item_has_no_answer(index):
    conditions = {row.dt.text: row.dd.text for row in index.select(".conditions div")}
    assert (conditions["Dataset"], conditions["Seed"], conditions["Device"]) == ("digits", "5", "cpu")
    assert "torch" in conditions["Versions"]
    assert "ValueError: no luck" in index.select_one(".alarm").text
    for id, reason in {"3.2": "filed none", "4.1": "failed", "5.1": "was not run"}.items():
        assert f"its notebook {reason}" in " ".join(index.find(id=f"item-{id}").text.split())


def test_the_headline_shows_what_was_measured_and_a_dash_for_the_rest(results, tmp_path):
    share = {"numerical rank, averaged over the layers (% of full)": {"big": 99.7}}
    results["claims"]["4.2"] = results["claims"]["3.1"] | {"id": "4.2", "measured": share}
    numbers = rendered(results, tmp_path).select(".headline .number")
    assert [number.text for number in numbers] == ["100 %", "–", "–", "–", "–"]


def test_notebooks_are_listed_with_how_they_ended_and_how_long_they_took(results, tmp_path):
    results["notebooks"]["03_rank"] |= {"seconds": 9.5}
    results["notebooks"]["04_overfit"] |= {"seconds": 1.5}
    results["notebooks"]["07_conclusions"] = {"status": "earlier"}
    table = rendered(results, tmp_path).find(id="notebooks").find_next("table")
    assert [[cell.text for cell in row.select("th, td")] for row in table.select("tr")] == [
        ["notebook", "ended", "seconds"],
        ["03_rank", "done", "9.5"],
        ["04_overfit", "failed", "1.5"],
        ["07_conclusions", "earlier", ""],
    ]


@pytest.mark.parametrize(("asked", "warned"), [("auto", True), ("digits", False)])
def test_digits_in_place_of_mnist_are_announced(results, tmp_path, asked, warned):
    results["notebooks"]["03_rank"]["parameters"]["dataset"] = asked
    assert ("Not MNIST" in rendered(results, tmp_path).text) == warned


def test_every_link_of_every_page_leads_somewhere(small_report):
    pages = {file.name: soup(file) for file in small_report.glob("*.html")}
    assert set(pages) == {"index.html", "03_rank.html", "04_overfit.html"}
    for name, content in pages.items():
        for link in content.select("a[href]"):
            file, _, anchor = link["href"].partition("#")
            assert (small_report / (file or name)).is_file(), link
            assert not anchor or pages[file or name].find(id=anchor), link


def test_a_page_has_boxes_of_claims_with_anchors_its_parameters_and_contents(rank_page):
    claim = rank_page.find(id="claim-3.1")
    assert "The average rank is full" in claim.blockquote.text and "claim" in claim["class"]
    assert claim.select_one("a.here")["href"] == "#claim-3.1"
    assert "Seeds do not matter." in rank_page.find(id="claim-3.1/spread").text
    parameters = {row.th.text: row.td.text for row in rank_page.select(".parameters tr")}
    assert parameters["seed"] == "5"
    assert [entry.text for entry in rank_page.select(".contents li")] == ["Theory", "Answers"]


def test_a_failed_notebook_has_a_page_that_shows_where(small_report):
    content = soup(small_report / "04_overfit.html")
    assert "no luck" in content.select_one(".alarm").text
    assert "ValueError" in content.select_one(".output_error").text


def test_figures_have_their_own_words_size_and_twice_the_pixels(rank_page):
    (figure,) = rank_page.select(".output_png img")
    assert figure["alt"] == "A line that <falls>"
    assert (int(figure["width"]), int(figure["height"])) == (378, 279)


def test_formulas_are_mathml(rank_page):
    assert rank_page.select("math[display=block] mfrac")
    assert rank_page.select("math[display=block] mtable mtr")
    assert rank_page.find(id="claim-3.1").math
    assert not any("$" in text.text for text in rank_page.select(".text, .output_markdown"))


def test_a_formula_that_cannot_be_converted_is_shown_as_latex():
    assert pages.EXPORTER.markdown2html({}, r"$x^{1}^{2}$") == "<p><code>x^{1}^{2}</code></p>\n"


@pytest.mark.parametrize("notebook", sorted((PROJECT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_formulas_of_the_series_use_only_what_mathml_can_show(notebook):
    sources = [cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "markdown"]
    html = "".join(pages.EXPORTER.markdown2html({}, source) for source in sources)
    assert not re.findall(r"<m\w+[^>]*>[^<]*[\\&](?!#|lt|gt|amp)[^<]*</m", html)

"""The check of recorded outputs must fail where an output is wrong, and only there."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from copy import deepcopy
from pathlib import Path

import nbformat
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from nbclient import NotebookClient

from lowrank_helpers.checking.comparison import MetadataError, compare_text, treatment
from lowrank_helpers.series.execution import outputs_checksum

pytestmark = pytest.mark.slow

FIGURE = """
import io
from IPython.display import Image, display
from PIL import Image as Picture
def figure(width):
    buffer = io.BytesIO()
    Picture.new("RGB", (width, 40)).save(buffer, "png")
    display(Image(buffer.getvalue(), format="png", alt=f"A figure of {width} pixels"))
"""
TABLE = """
import pandas as pd
pd.DataFrame({"layer": ["fc1", "fc2"], "rank": [48, 7], "error": [0.125, 1.5]})
"""
SENTENCE = """
from IPython.display import Markdown
Markdown("After 3 epochs, **97.83 %** of 10,000 test images are right.")
"""


# Of the border, the rows' names, and by row the rank and the error.
TABLE_LIMITS = [None, None, [46, 50], None, None, None, [1.35, 1.65]]
CHECK = [sys.executable, "-m", "pytest", "-p", "lowrank_helpers.checking.plugin"]


def notebook(cells: dict[str, tuple[str, dict]]) -> nbformat.NotebookNode:
    """Build a notebook of code cells, by id their source and metadata, and record its outputs."""
    built = nbformat.v4.new_notebook()
    built.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    for id, (source, stated) in cells.items():
        built.cells.append(nbformat.v4.new_code_cell(source, id=id, metadata={"lowrank": stated}))
    NotebookClient(built).execute()
    return built


def check(recorded: nbformat.NotebookNode, folder: Path) -> tuple[dict[str, str], str]:
    """Run the plugin on a notebook; return each cell's failure (empty where it passed) and the whole report."""
    file, report = folder / "recorded.ipynb", folder / "report.xml"
    nbformat.write(recorded, file)
    before = file.read_bytes()
    command = [*CHECK, f"--junitxml={report}", str(file)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert file.read_bytes() == before, "the recorded notebook was altered"
    assert report.exists(), done.stdout + done.stderr
    failures = {}
    for case in ET.parse(report).iter("testcase"):
        problem = next(iter([*case.iter("failure"), *case.iter("error")]), None)
        failures[case.get("name", "")] = "" if problem is None else problem.text or ""
    assert done.returncode == (1 if any(failures.values()) else 0)
    return failures, done.stdout


@pytest.fixture(scope="module")
def recorded() -> nbformat.NotebookNode:
    return notebook(
        {
            "sentence": (SENTENCE, {"intervals": {"0 text/markdown": [None, [97.53, 98.1], None]}}),
            "exact-sentence": (SENTENCE, {"exact": "nothing in it depends on training"}),
            "table": (TABLE, {"intervals": {"0 text/html": TABLE_LIMITS}}),
            "sentence-beyond": (SENTENCE, {"intervals": {"0 text/markdown": [None, [97.84, 98.1], None]}}),
            "table-beyond": (TABLE, {"intervals": {"0 text/html": [None, None, [49, 50], *TABLE_LIMITS[3:]]}}),
            "print": ("print('loss', 0.25); print('done')", {}),
            "define": (FIGURE, {}),
            "figure": ("figure(60)", {}),
            "wider": ("figure(61)", {}),
            "stray": ("x = 1", {}),
            "time": ("import time; print(f'took {time.perf_counter_ns()} ns')", {"unchecked_numbers": "a timing"}),
            "machine": ("import uuid; print('machine', uuid.uuid4())", {"unchecked": "differs by machine"}),
        }
    )


@pytest.fixture(scope="module")
def untouched(recorded, tmp_path_factory) -> tuple[dict[str, str], str]:
    return check(recorded, tmp_path_factory.mktemp("untouched"))


def test_agreement_passes(untouched):
    failures, _ = untouched
    assert len(failures) == 12
    assert {name for name, failure in failures.items() if failure} == {"sentence-beyond", "table-beyond"}


def test_report_counts_what_was_compared_and_says_why_the_rest_was_not(untouched):
    _, report = untouched
    assert "10 cells that print: 8 checked, 1 text only, 1 unchecked" in report
    assert "unchecked: recorded.ipynb::machine (differs by machine)" in report


def test_a_digit_changed_by_hand_where_numbers_are_free_is_caught_too(recorded, tmp_path):
    sealed = deepcopy(recorded)
    sealed.metadata["lowrank"] = {"outputs": outputs_checksum(recorded)}
    time = next(cell for cell in sealed.cells if cell.id == "time")
    time.outputs[0].text = "took 12 ns\n"
    nbformat.write(sealed, tmp_path / "sealed.ipynb")
    done = subprocess.run([*CHECK, "sealed.ipynb"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode and "not as `lowrank record` wrote them" in done.stdout


@pytest.fixture(scope="module")
def altered(recorded, tmp_path_factory) -> dict[str, str]:
    """One fault in each of several copies of the cells, all checked in one go."""
    faulty = deepcopy(recorded)
    cells = {cell.id: cell for cell in recorded.cells}
    faulty.cells = [cells["define"], *(_with(cells, *fault) for fault in FAULTS.values())]
    for name, cell in zip(FAULTS, faulty.cells[1:], strict=True):
        cell.id = name
    failures, _ = check(faulty, tmp_path_factory.mktemp("altered"))
    return failures


def _with(cells: dict, id: str, kind: str, old: str, new: str) -> nbformat.NotebookNode:
    """Return a copy of a cell whose recorded output of that kind has one text replaced."""
    cell = deepcopy(cells[id])
    for output in cell.outputs:
        if kind in output.get("data", {}):
            assert old in output.data[kind]
            output.data[kind] = output.data[kind].replace(old, new)
        elif kind == "stdout":
            assert old in output.text
            output.text = output.text.replace(old, new)
        elif kind == "alt":
            output.metadata["image/png"]["alt"] = new
    if kind == "outputs":
        cell.outputs = cell.outputs[:-1] if new == "fewer" else [*cell.outputs, *cells["figure"].outputs]
    if kind == "image":
        cell.outputs[0].data["image/png"] = cells["wider"].outputs[0].data["image/png"]
    if kind == "never run":
        cell.outputs, cell.execution_count = [], None
    return cell


# Name of the fault: the cell, where in its outputs, what is there, what is put there.
FAULTS = {
    "number-beyond": ("sentence-beyond", "text/markdown", "97.83", "97.83"),
    "number-exact": ("exact-sentence", "text/markdown", "97.83", "97.84"),
    "integer": ("sentence", "text/markdown", "3 epochs", "4 epochs"),
    "count": ("sentence", "text/markdown", "10,000", "10,001"),
    "word": ("sentence", "text/markdown", "right", "wrong"),
    "number-gone": ("sentence", "text/markdown", "10,000 ", ""),
    "table-integer": ("table-beyond", "text/html", "fc2", "fc2"),
    "table-name": ("table", "text/html", "fc2", "fc3"),
    "text-of-a-table": ("table", "text/plain", "0.125", "0.225"),
    "printed": ("print", "stdout", "0.25", "0.26"),
    "output-gone": ("figure", "outputs", "", "fewer"),
    "figure-new": ("print", "outputs", "", "more"),
    "figure-in-silence": ("stray", "outputs", "", "more"),
    "figure-size": ("figure", "image", "", ""),
    "figure-text": ("figure", "alt", "", "A figure of 60 points"),
    "timing-number": ("time", "stdout", "took ", "took 9"),
    "timing-word": ("time", "stdout", "ns", "ms"),
    "not-compared": ("machine", "stdout", "machine", "computer"),
    "never-run": ("print", "never run", "", ""),
}
ALLOWED = {"timing-number", "not-compared", "text-of-a-table"}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_caught_and_nothing_else(altered, fault):
    assert bool(altered[fault]) == (fault not in ALLOWED), altered[fault]


def test_failure_names_both_numbers_and_the_limits(altered):
    assert "recorded 97.83, now 97.83 (allowed: 97.84 to 98.1)" in altered["number-beyond"]
    assert "recorded 48, now 48 (allowed: 49 to 50)" in altered["table-integer"]
    assert "recorded 97.84, now 97.83 (exact)" in altered["number-exact"]
    assert "0 outputs recorded (nothing), now 1 (image/png, text/plain, metadata)" in altered["output-gone"]
    assert "recorded 61×40 pixels, now 60×40" in altered["figure-size"]


def test_cell_that_raises_fails_and_shows_the_error(tmp_path):
    raising = notebook({"fine": ("print(1)", {}), "raises": ("print(2)", {})})
    raising.cells[1].source = "1 / 0"
    failures, _ = check(raising, tmp_path)
    assert not failures["fine"]
    assert "ZeroDivisionError" in failures["raises"]


@pytest.mark.parametrize(
    ("stated", "complaint"),
    [
        ({"tolerance": {"relative": 0.1}}, "'tolerance' is unknown; allowed: intervals, exact"),
        ({"intervals": {"0 text/html": [[2, 1]]}}, "a list of"),
        ({"intervals": {"0 text/html": [[1, 2, 3]]}}, "a list of"),
        ({"intervals": [[1, 2]]}, "by output"),
        ({"exact": ""}, "reason"),
        ({"unchecked": ""}, "reason"),
        ({"unchecked_numbers": True}, "reason"),
        ({"unchecked": "why", "exact": "why"}, "exclude each other"),
    ],
)
def test_metadata_outside_the_vocabulary_is_refused(stated, complaint):
    cell = nbformat.v4.new_code_cell("", metadata={"lowrank": stated})
    with pytest.raises(MetadataError, match=complaint):
        treatment(cell)


numbers = st.decimals(min_value=-(10**6), max_value=10**6, places=3)
words = st.text(st.characters(categories=["L", "P", "Zs"]))


@given(words, numbers, words)
def test_text_agrees_with_itself(before, number, after):
    text = f"{before} {number} {after}"
    assert compare_text(text, text) == []


@given(words, numbers, numbers, numbers, numbers)
def test_number_passes_exactly_within_its_limits(label, recorded, new, one, two):
    assume(not re.search(r"\d", label))
    low, high = sorted(map(float, (one, two)))
    found = compare_text(f"{label} = {recorded} s", f"{label} = {new} s", [[low, high]])
    assert bool(found) == (not low <= float(new) <= high)


@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9))
def test_numbers_without_limits_are_exact(recorded, new):
    assume(recorded != new)
    assert compare_text(f"{recorded:,} of", f"{new:,} of")
    assert compare_text(f"{recorded:,} of 5.0", f"{new:,} of 5.5", [None, [1, 9]])


@given(words, words, numbers)
def test_changed_word_is_never_allowed(recorded, new, number):
    assume(" ".join(recorded.split()) != " ".join(new.split()))
    assert compare_text(f"{number} {recorded}.", f"{number} {new}.", [[-(10**7), 10**7]])


def test_limits_for_other_texts_say_so():
    assert "set them anew" in compare_text("1 of 2", "1 of 2", [[0, 9]])[0]


def test_padding_of_columns_follows_the_numbers():
    limits = [[9, 11], [-1, 1], [0, 2], [-1, 1]]
    assert compare_text("a   9.95 -0.10\nb   1.00  0.10", "a  10.05  0.10\nb   1.00 -0.10", limits) == []


def test_digits_in_names_are_text():
    assert compare_text("fc1 has rank 7", "fc2 has rank 7", [[0, 9]])
    assert compare_text("torch v2.1.0", "torch v2.1.1")

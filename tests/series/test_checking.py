"""The check of recorded notebooks must fail where a word or a claim is wrong, and only there."""

import subprocess
import sys
from collections import defaultdict

import nbformat
import pytest
from commands import lowrank
from hypothesis import given
from hypothesis import strategies as st
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_output
from small_series import notebook

from lowrank_helpers import PROJECT, data
from lowrank_helpers.series import claims, evidence, execution
from lowrank_helpers.series.checking import essence, words
from lowrank_helpers.series.claims import Claim
from lowrank_helpers.series.execution import marked, notebook_names, notebook_path, outputs_checksum

NUMBERS = st.one_of(
    st.integers(-(10**9), 10**9).map("{:,}".format),
    st.floats(-1e9, 1e9, allow_subnormal=False).map("{:.3g}".format),
    st.floats(-1e3, 1e3, allow_subnormal=False).map("{:.1f}".format),
)
WORDS = st.text(st.characters(categories=["L"]), min_size=1)


def shown(data: str, kind: str = "text/markdown", **metadata) -> nbformat.NotebookNode:
    return new_output("display_data", {kind: data}, metadata=metadata)


@given(WORDS, NUMBERS, NUMBERS, WORDS)
def test_numbers_are_no_words_however_they_are_printed(before, one, other, after):
    texts = [[shown(f"{before} {number} ({number} %) {after}")] for number in (one, other)]
    assert essence(texts[0]) == essence(texts[1])
    assert (essence(texts[0], exact=True) == essence(texts[1], exact=True)) == (one == other)


@given(WORDS, WORDS, NUMBERS)
def test_words_are_compared_beside_any_number(one, other, number):
    assert (words(f"{number} {one}.") == words(f"{number} {other}.")) == (one == other)


@pytest.mark.parametrize(
    ("recorded", "new", "same"),
    [
        ("a   9.95 -0.10\nb   1.00  0.10", "a  10.05  0.10\nb   1.00 -0.10", True),
        ("loss 0.5", "loss nan", False),
        ("fc1 has rank 7", "fc2 has rank 7", False),
        ("torch v2.1.0", "torch v2.1.1", False),
    ],
)
def test_what_counts_as_a_number(recorded, new, same):
    assert (words(recorded) == words(new)) == same


def claim(sentence="Ranks fall below 95 %.", value=3.0, name="rank", standing=(True, True)) -> nbformat.NotebookNode:
    one = Claim("3.1", sentence, True, measured=claims.quantities({name: {"fc1": value}}))
    recorded = {name: {"fc1": [2.0, 4.0]}} if standing else {}
    return shown(claims.markdown(one, standing, recorded), lowrank={"claim": "3.1"})


def test_the_sentence_of_a_claim_and_the_names_of_its_quantities_are_exact_and_nothing_else():
    for same in ({"value": 4.5}, {"standing": (True, False)}, {"standing": ()}):
        assert essence([claim()]) == essence([claim(**same)]), same
    for other in ({"sentence": "Ranks fall below 90 %."}, {"name": "stable rank"}):
        assert essence([claim()]) != essence([claim(**other)]), other


def test_a_table_is_compared_as_html_alone_and_a_stream_whole():
    tables = [new_output("execute_result", {"text/html": "<td>3</td>", "text/plain": text}) for text in ("a", "b")]
    assert essence([tables[0]]) == essence([tables[1]]) != essence([tables[0]] * 2)
    pieces = [new_output("stream", text=text) for text in ("loss 0.2", "5\n", "loss 0.25\n")]
    assert essence(pieces[:2]) == essence(pieces[2:])


@pytest.mark.parametrize("name", notebook_names())
def test_every_code_cell_is_recorded_warns_of_nothing_and_most_are_checked(name):
    recorded = nbformat.read(notebook_path(name), as_version=4)
    cells = [cell for cell in recorded.cells if cell.cell_type == "code"]
    assert [cell.id for cell in cells if cell.execution_count is None] == []
    assert [output.text for cell in cells for output in cell.outputs if output.get("name") == "stderr"] == []
    assert len(marked(recorded, "unchecked")) <= 2, "the header, and the explorer or what others found"


FIGURE = """
import io
from IPython.display import Image, display
from PIL import Image as Picture
def figure(width, alt="A line"):
    buffer = io.BytesIO()
    Picture.new("RGB", (width, 40)).save(buffer, "png")
    display(Image(buffer.getvalue(), format="png", alt=alt))
"""
FILE = """
import os
from pathlib import Path
from lowrank_helpers.series import results
from lowrank_helpers.series.claims import Claim
def file(**measured):
    claims = {id: Claim(id, "So it is.", True, measured={"rank": {"": x}}) for id, x in measured.items()}
    environment = {"dataset": "digits"}
    filed = {"notebook": "02_train", "parameters": {"seed": 0}, "environment": environment, "claims": claims}
    if "LOWRANK_RUN_DIR" in os.environ:
        results.file_claims(Path(os.environ["LOWRANK_RUN_DIR"]), filed)
"""
UNCHECKED = "display({{'text/plain': '{}'}}, raw=True, metadata={{'lowrank': {{'unchecked': True}}}})"
# By id: the source that is recorded, the source that the check runs, if it is another, and tags.
CELLS = {
    "define": (FIGURE + FILE, None),
    "number": ("print('loss', 0.25)", "print('loss', 1.5)"),
    "word": ("print('loss', 0.25)", "print('gain', 0.25)"),
    "exact-number": ("print('rank', 2)", "print('rank', 3)", "exact"),
    "unchecked": (UNCHECKED.format("here"), UNCHECKED.format("there")),
    "figure": ("figure(60)", None),
    "figure-size": ("figure(60)", "figure(61)"),
    "figure-text": ("figure(60)", "figure(60, alt='A dot')"),
    "output-gone": ("print(1)", "1;"),
    "output-new": ("1;", "print(1)"),
    "file": ("file(**{'2.1': 5.0, '2.1/new': 1.0, '2.2': 1.1})", None),
}
FAULTS = {
    "word": "stdout was 'loss #' and is 'gain #'",
    "exact-number": "stdout was 'rank 2' and is 'rank 3'",
    "figure-size": "image/png was '60×40 pixels' and is '61×40 pixels'",
    "figure-text": "A dot",
    "output-gone": "stdout was '#' and is ''",
    "output-new": "stdout was '' and is '#'",
}


def record(name, cells, changed=None):
    """Write a notebook with the outputs of these cells, and the source of others."""
    recorded = notebook(*cells)
    NotebookClient(recorded).execute()
    recorded.metadata["lowrank"]["outputs"] = outputs_checksum(recorded)
    for cell in recorded.cells:
        cell.source = (changed or {}).get(cell.id) or cell.source
    nbformat.write(recorded, notebook_path(name))


@pytest.mark.slow
def test_each_fault_is_named_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(execution, "NOTEBOOK_FOLDER", tmp_path)
    monkeypatch.setattr(evidence, "FOLDER", tmp_path / "evidence")
    monkeypatch.setattr(data, "resolve", lambda name, data_dir="": name)
    known = {id: {"rank": {"": [1.0, 1.1, 0.9, 1.05]}} for id in ("2.1", "2.2")}
    made_by = {"revision": "abc1234", "versions": {}, "source": "of old", "package": "of old"}
    evidence.write(evidence.Evidence("02_train", "digits", {}, made_by, [{}] * 4, {}, known))
    cells = [new_code_cell(text, id=id, metadata={"tags": tags}) for id, (text, _, *tags) in CELLS.items()]
    record("02_train", cells, {id: now for id, (_, now, *_) in CELLS.items()})
    record("03_rank", [new_code_cell("print(1)", id="raises")], {"raises": "1 / 0"})
    before = notebook_path("02_train").read_bytes()
    report = lowrank("check", code=1)
    assert notebook_path("02_train").read_bytes() == before, "the recorded notebook was altered"
    faults = defaultdict(str)
    for line in report.splitlines():
        if line.startswith("  cell "):
            id, _, fault = line.removeprefix("  cell ").partition(": ")
            faults[id] += fault
    assert faults.keys() == FAULTS.keys() and all(said in faults[id] for id, said in FAULTS.items()), report
    assert "  2.1: rank is 5; expected" in report and "2.1/new is not in the evidence" in report
    assert "2.2" not in report
    assert "ZeroDivisionError" in report and "03_rank          differs" in report
    assert "(old evidence: the notebook and the package changed since revision abc1234;" in report
    assert "Notebooks: 2, differences: 9" in report

    altered = before.replace(b"loss 0.25", b"loss 0.24")
    notebook_path("02_train").write_bytes(altered)
    assert "02_train: outputs are not as `make record` wrote them" in lowrank("check", "02_train", code=1)


SHORT = ["01_data", "02_train"]


@pytest.mark.slow
def test_the_shortest_recorded_notebooks_agree_with_a_new_run(mnist_dir):
    assert "Notebooks: 2, differences: 0" in lowrank("check", *SHORT)


@pytest.mark.slow
def test_nbval_finds_the_words_of_digits_again(tmp_path, monkeypatch):
    """Which needs no MNIST: a second run, by other software, must agree with a first."""
    lowrank("run", *SHORT, "-p", "dataset", "digits", "-o", tmp_path)
    command = ["pytest", "-p", "no:cacheprovider", "--nbval", "--nbval-current-env"]
    command += ["--nbval-sanitize-with", PROJECT / "tests" / "series" / "nbval.cfg", *sorted(tmp_path.glob("*.ipynb"))]
    monkeypatch.setenv("TQDM_DISABLE", "1")  # as in a run
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout

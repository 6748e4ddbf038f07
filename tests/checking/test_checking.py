"""The check of recorded notebooks must fail where a word or a claim is wrong, and only there."""

import subprocess
import sys
import xml.etree.ElementTree as ET

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook, new_output

from lowrank_helpers.checking.comparison import MetadataError, essence, treatment, words
from lowrank_helpers.series import claims, evidence
from lowrank_helpers.series.claims import Claim
from lowrank_helpers.series.execution import outputs_checksum

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
    texts = [shown(f"{before} {number} ({number} %) {after}") for number in (one, other)]
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
        assert essence(claim()) == essence(claim(**same)), same
    for other in ({"sentence": "Ranks fall below 90 %."}, {"name": "stable rank"}):
        assert essence(claim()) != essence(claim(**other)), other


def test_table_is_compared_as_html_alone():
    tables = [new_output("execute_result", {"text/html": "<td>3</td>", "text/plain": text}) for text in ("a", "b")]
    assert essence(tables[0]) == essence(tables[1])


@pytest.mark.parametrize(
    "stated", [{"intervals": {}}, {"exact": ""}, {"unchecked": " "}, {"unchecked": "why", "exact": "why"}]
)
def test_metadata_outside_the_vocabulary_is_refused(stated):
    with pytest.raises(MetadataError, match="exact or unchecked, and a reason"):
        treatment(new_code_cell("", metadata={"lowrank": stated}))


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
# By id: the source that is recorded, the metadata, and the source that the check runs, if it is another.
CELLS = {
    "define": (FIGURE + FILE, {}, None),
    "number": ("print('loss', 0.25)", {}, "print('loss', 1.5)"),
    "word": ("print('loss', 0.25)", {}, "print('gain', 0.25)"),
    "exact-number": ("print('rank', 2)", {"exact": "a shape"}, "print('rank', 3)"),
    "unchecked": ("print('here')", {"unchecked": "the machine"}, "print('there')"),
    "figure": ("figure(60)", {}, None),
    "figure-size": ("figure(60)", {}, "figure(61)"),
    "figure-text": ("figure(60)", {}, "figure(60, alt='A dot')"),
    "output-gone": ("print(1)", {}, "1;"),
    "output-new": ("1;", {}, "print(1)"),
    "raises": ("print(1)", {}, "1 / 0"),
    "never-run": ("print(1)", {}, None),
    "unknown-key": ("print(1)", {"intervals": {}}, None),
    "file": ("file(**{'2.1': 5.0, '2.1/new': 1.0, '2.2': 1.1})", {}, None),
}
FAILING = {
    "word": "loss #",
    "exact-number": "rank 2",
    "figure-size": "60×40 pixels",
    "figure-text": "A line",
    "output-gone": "stdout",
    "output-new": "stdout",
    "raises": "ZeroDivisionError",
    "never-run": "no outputs are recorded",
    "unknown-key": "exact or unchecked",
    "claims": "2.1: rank is 5; expected",
}


@pytest.fixture(scope="module")
def checked(tmp_path_factory) -> tuple[dict[str, str], str]:
    """Check a notebook whose cells have changed since; return each failure and the terminal's text."""
    folder = tmp_path_factory.mktemp("checked")
    recorded = new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "", "language": "python"}})
    recorded.cells = [new_code_cell(text, id=id, metadata={"lowrank": of}) for id, (text, of, _) in CELLS.items()]
    NotebookClient(recorded).execute()
    for cell in recorded.cells:
        cell.source = CELLS[cell.id][2] or cell.source
        if cell.id == "never-run":
            cell.outputs, cell.execution_count = [], None
    file = folder / "02_train.ipynb"
    nbformat.write(recorded, file)
    before = file.read_bytes()
    known = {id: {"rank": {"": [1.0, 1.1, 0.9, 1.05]}} for id in ("2.1", "2.2")}
    made_by = {"revision": "abc1234", "versions": {}, "source": "of old", "package": "of old"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence, "FOLDER", folder / "evidence")
        evidence.write(evidence.Evidence("02_train", "digits", {}, made_by, [{}] * 4, {}, known))
    (folder / "conftest.py").write_text(
        f"from pathlib import Path\nfrom lowrank_helpers.series import evidence\n"
        f"evidence.FOLDER = Path({str(folder / 'evidence')!r})"
    )
    sealed = new_notebook(cells=[new_code_cell("", outputs=[new_output("stream", text="took 11 ns")])])
    sealed.metadata["lowrank"] = {"outputs": outputs_checksum(sealed)}
    sealed.cells[0].outputs[0].text = "took 12 ns"
    nbformat.write(sealed, folder / "sealed.ipynb")
    command = [sys.executable, "-m", "pytest", "-p", "lowrank_helpers.checking.plugin", "--junitxml=report.xml"]
    command += ["--continue-on-collection-errors", file.name, "sealed.ipynb"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and file.read_bytes() == before, "the recorded notebook was altered"
    failures = {}
    for case in ET.parse(folder / "report.xml").iter("testcase"):
        problem = next(iter([*case.iter("failure"), *case.iter("error")]), None)
        failures[case.get("name", "")] = "" if problem is None else problem.text or ""
    return failures, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("id", [*CELLS, "claims"])
def test_each_fault_is_caught_and_nothing_else(checked, id):
    failures, _ = checked
    assert FAILING[id] in failures[id] if id in FAILING else not failures[id]
    if id == "claims":
        assert "2.1/new is not in the evidence" in failures[id] and "2.2" not in failures[id]


@pytest.mark.slow
def test_report_names_what_was_not_compared_old_evidence_and_outputs_changed_by_hand(checked):
    _, report = checked
    assert "unchecked: 02_train.ipynb::unchecked (the machine)" in report
    assert "old evidence: 02_train: the notebook and the package changed since revision abc1234" in report

    assert "sealed.ipynb: outputs are not as `make record` wrote them" in report

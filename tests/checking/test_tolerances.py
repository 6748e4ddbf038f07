"""Where recorded numbers may lie: against SciPy, on chains of known spread, and what is caught."""

from decimal import Decimal

import nbformat
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_notebook, new_output
from scipy import stats

from lowrank_helpers.checking import tolerances
from lowrank_helpers.checking.comparison import compare_text, treatment
from lowrank_helpers.checking.tolerances import WINDOW, ChainsError, limits, mean_correlation, set_limits, unit
from lowrank_helpers.series.results import file_findings

SENTENCE = "Of {count:,} images **{accuracy:.2f} %** are correct: ✓ met, {word}."

APART = range(0, 50, 5)  # first seeds of chains that share no network


@pytest.mark.parametrize(
    ("printed", "step"), [("98.30", "0.01"), ("1,024", "1"), ("−3", "1"), ("1e-13", "1e-13"), ("2.50e-02", "0.0001")]
)
def test_unit_is_one_of_the_last_printed_place(printed, step):
    assert unit(printed) == Decimal(step)


def test_limits_are_scipys_prediction_interval():
    values = np.array([98.31, 98.4, 98.22, 98.35, 98.3, 98.27, 98.45, 98.38, 98.29, 98.33])
    low, high = limits("98.30", values, ["float32"] * 10, APART, level=1e-4)
    reach = stats.t.interval(1 - 1e-4, 9, loc=values.mean(), scale=values.std(ddof=1) * np.sqrt(1.1))
    assert (low, high) == pytest.approx(reach, abs=0.0101)  # half a unit for rounding, and the printed grid
    assert low <= reach[0] and high >= reach[1]


def test_limits_reach_over_both_precisions_and_judge_each_about_its_own_mean():
    near, far = np.array([1.0, 1.1, 0.9, 1.0, 1.05]), np.array([5.0, 5.1, 4.9, 5.0, 5.05])
    both = limits("1.000", np.concatenate([near, far]), ["float32"] * 5 + ["bfloat16"] * 5, APART, level=0.01)
    alone = limits("1.000", near, ["float32"] * 5, APART[:5], level=0.01)
    assert both[0] == pytest.approx(alone[0], abs=0.2) and both[1] == pytest.approx(alone[1] + 4, abs=0.2)


@given(st.floats(-1e3, 1e3, allow_subnormal=False), st.floats(0.01, 50), st.integers(0, 10**6))
def test_the_recorded_number_is_always_allowed(mean, spread, seed):
    values = np.random.default_rng(seed).normal(mean, spread, 11)
    recorded = f"{values[0]:.2f}"
    low, high = limits(recorded, values[1:].round(2), ["float32"] * 10, APART, level=0.5)
    assert low <= float(recorded) <= high


@pytest.mark.parametrize(
    ("printed", "allowed"), [("872,800", None), ("100", None), ("7", [6, 8]), ("100.00", [99.99, 100.01])]
)
def test_what_never_varied_is_exact_if_a_count_and_else_may_move_by_a_unit(printed, allowed):
    value = float(printed.replace(",", ""))
    assert limits(printed, np.full(10, value), ["float32"] * 10, APART, level=1e-5) == allowed


def test_a_sound_chain_falls_outside_as_rarely_as_said():
    """Chains as the series makes them: means over five seeds, which share networks with their neighbours."""
    rng = np.random.default_rng(1)
    outside = 0
    for _ in range(2000):
        seeds = rng.normal(50, 3, (2, 13))  # of either precision
        seen = [seeds[precision, first : first + 5].mean() for precision in (0, 1) for first in range(0, 10, 2)]
        low, high = limits(
            "50.000", np.array(seen), ["bfloat16"] * 5 + ["float32"] * 5, [*range(0, 10, 2)] * 2, level=0.1
        )
        outside += not low <= rng.normal(50, 3, 5).mean() <= high
    assert stats.binom.ppf(0.0001, 2000, 0.05) <= outside <= stats.binom.ppf(0.9999, 2000, 0.1)


def test_means_over_the_same_seeds_are_correlated_as_numpy_finds():
    starts = np.array([0, 1, 3, 20])
    draws = np.random.default_rng(2).normal(size=(40_000, 25))
    means = np.array([draws[:, first : first + WINDOW].mean(axis=1) for first in starts])
    correlations = np.corrcoef(means)[np.triu_indices(4, k=1)]
    assert mean_correlation(starts) == pytest.approx(correlations.mean(), abs=0.01)


@pytest.fixture
def series(tmp_path, monkeypatch):
    """A recorded notebook, and a function that adds a chain which shows other values."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.setattr("lowrank_helpers.series.execution.NOTEBOOK_FOLDER", folder)
    monkeypatch.setattr(tolerances, "TABLE", tmp_path / "tolerances.md")

    def shown(accuracy, word="larger"):
        text = SENTENCE.format(count=60000, accuracy=accuracy, word=word)
        output = new_output("display_data", {"text/markdown": text})
        cell = new_code_cell("show()", id="finding", outputs=[output], execution_count=1)
        return new_notebook(cells=[cell, new_code_cell("", id="empty")])

    nbformat.write(shown(98.3), folder / "02_train.ipynb")

    def add(name, accuracy, word="larger", precision="float32", seed=50):
        point = tmp_path / "sweep" / "points" / name
        point.mkdir(parents=True)
        nbformat.write(shown(accuracy, word), point / "02_train.ipynb")
        filed = {
            "notebook": "02_train",
            "parameters": {"seed": seed},
            "environment": {"precision": precision},
            "findings": {},
        }
        file_findings(point, filed)

    for i, accuracy in enumerate(np.linspace(98.1, 98.5, 10)):
        add(f"seed={i}", accuracy, precision="float32" if i % 2 else "bfloat16", seed=5 * i)
    return tmp_path, add


def _recorded(folder):
    return next(
        cell for cell in nbformat.read(folder / "notebooks" / "02_train.ipynb", as_version=4).cells if cell.outputs
    )


def test_limits_are_written_into_the_cells_and_the_docs(series):
    folder, _ = series
    assert set_limits([folder / "sweep"]) == []
    cell = _recorded(folder)
    count, accuracy = treatment(cell).intervals["0 text/markdown"]
    assert count is None and accuracy[0] < 98.1 and accuracy[1] > 98.5
    table = (folder / "tolerances.md").read_text()
    assert "10 chains (5 in bfloat16, 5 in float32)" in table and "fail 0 of 10 chains" in table
    assert "| verdict turned | 2 (100.0%) | 2 |" in table
    text = cell.outputs[0].data["text/markdown"]
    allowed = treatment(cell).intervals["0 text/markdown"]
    assert compare_text(text, text.replace("98.30", "98.44"), allowed) == []
    assert "allowed" in compare_text(text, text.replace("98.30", "99.99"), allowed)[0]
    assert compare_text(text, text.replace("60,000", "60,001"), allowed)


def test_a_word_that_turns_is_named_with_both_texts(series):
    folder, add = series
    add("seed=10", 98.3, word="smaller")
    (line,) = set_limits([folder / "sweep"])
    assert line.startswith("02_train, finding: sweep seed=10") and "met, smaller." in line and "met, larger." in line


def test_a_chain_apart_is_found_by_leaving_it_out(series):
    folder, add = series
    add("seed=10", 12.3)
    set_limits([folder / "sweep"])
    assert "fail 1 of 11 chains (sweep seed=10: 1 numbers)" in (folder / "tolerances.md").read_text()


def test_cells_that_say_why_keep_their_metadata(series):
    folder, _ = series
    file = folder / "notebooks" / "02_train.ipynb"
    notebook = nbformat.read(file, as_version=4)
    notebook.cells[0].metadata["lowrank"] = {"exact": "does not depend on training"}
    nbformat.write(notebook, file)
    set_limits([folder / "sweep"])
    assert _recorded(folder).metadata["lowrank"] == {"exact": "does not depend on training"}


def test_a_chain_without_a_notebook_is_left_out_of_its_limits(series):
    folder, _ = series
    (folder / "sweep" / "points" / "seed=0" / "02_train.ipynb").rename(
        folder / "sweep" / "points" / "seed=0" / "x.ipynb"
    )
    set_limits([folder / "sweep"])
    assert "| 02_train | finding | 2 | 1 | " in (text := (folder / "tolerances.md").read_text()) and "% | 9 |" in text


def test_a_notebook_that_no_chain_has_executed_keeps_the_limits_that_others_gave_it(series):
    folder, _ = series
    set_limits([folder / "sweep"])
    limited = _recorded(folder).metadata["lowrank"]
    for point in (folder / "sweep" / "points").iterdir():
        (point / "02_train.ipynb").rename(point / "03_rank.ipynb")
    (folder / "notebooks" / "03_rank.ipynb").write_bytes((folder / "notebooks" / "02_train.ipynb").read_bytes())
    set_limits([folder / "sweep"])
    assert _recorded(folder).metadata["lowrank"] == limited
    table = (folder / "tolerances.md").read_text()
    assert "Limits of 02_train are those of earlier chains" in table
    assert table.index("| 02_train | finding |") < table.index("| 03_rank | finding |")


def test_too_few_chains_are_refused(tmp_path):
    with pytest.raises(ChainsError, match="there are 0 chains"):
        tolerances.read_chains([tmp_path])


def test_what_may_vary_with_training_may_move_where_other_numbers_of_its_cell_do(series):
    """A rank that is full in all chains by luck, and a spread over seeds; not a count of images."""
    folder, _ = series
    texts = {"rank 512, 0.50 ± 0.02": "rank 511, 0.50 ± 0.08", "rank 512, 0.50 ± 0.01": "rank 300, 0.50 ± 0.02"}
    for file in [folder / "notebooks" / "02_train.ipynb", *(folder / "sweep" / "points").rglob("02_train.ipynb")]:
        notebook = nbformat.read(file, as_version=4)
        notebook.cells[0].outputs[0].data["text/markdown"] += "; " + next(iter(texts))
        nbformat.write(notebook, file)
    set_limits([folder / "sweep"])
    cell = _recorded(folder)
    text, allowed = cell.outputs[0].data["text/markdown"], treatment(cell).intervals["0 text/markdown"]
    allowed_text, refused = (text.replace(next(iter(texts)), new) for new in texts.values())
    assert compare_text(text, allowed_text, allowed) == []
    assert len(compare_text(text, refused, allowed)) == 1, "a rank of 300 is no matter of luck"
    assert compare_text(text, text.replace("60,000", "60,001"), allowed)

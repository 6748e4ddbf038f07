"""Claims say what their numbers say: how they stand, what is shown, and what is refused."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_helpers.series import claims, counts, results
from lowrank_helpers.series.claims import Claim, Comparison

FLOATS = st.floats(allow_subnormal=False)  # training flushes them to zero


@given(st.booleans(), st.lists(st.booleans(), min_size=1, max_size=40))
def test_a_counted_claim_is_settled_by_nineteen_of_twenty(here, holds):
    verdict = claims.verdict(Claim("3.1", "So.", here), holds, {})
    assert verdict.settled == (20 * sum(holds) >= 19 * len(holds))
    assert f"olds in {sum(holds)} of {len(holds)} recorded runs" in verdict.text
    assert ("**not** in this one" in verdict.text) == (not here)
    assert ("**Not settled:**" in verdict.text) == verdict.short.startswith("not settled") == (not verdict.settled)


MISTAKES = {"tuned": [90, 92, 91, 89], "dense": [150, 152, 149, 151], "other": [151, 150, 150, 151]}


@pytest.mark.parametrize(
    ("first", "relation", "second", "settled"),
    [
        ("tuned", "smaller", "dense", True),
        ("dense", "larger", "tuned", True),
        ("dense", "alike", "other", True),
        ("tuned", "larger", "dense", False),
        ("dense", "larger", "other", False),
        ("tuned", "alike", "dense", False),
    ],
)
def test_the_recorded_runs_decide_what_holds_on_average(first, relation, second, settled):
    compared = Comparison("mistakes", first, second, relation, counts.MISTAKES)
    verdict = claims.verdict(Claim("6.3", "So.", None, [compared]), [], {"mistakes": MISTAKES})
    assert verdict.settled is settled
    assert ("**Not settled**" in verdict.text) is not settled
    assert f"Mistakes, {first} against {second}:" in verdict.text and "4 recorded runs" in verdict.text


def test_a_claim_on_train_and_test_needs_both_and_recorded_runs():
    both = [Comparison(name, "tuned", "dense", "smaller", counts.MISTAKES) for name in ("train", "test")]
    recorded = {"train": MISTAKES, "test": MISTAKES}
    claim = Claim("6.3", "So.", None, both)
    assert claims.verdict(claim, [], recorded).settled is True
    assert claims.verdict(claim, [], recorded | {"train": {"tuned": [9, 9], "dense": [9, 9]}}).settled is False
    for alone in (claim, Claim("3.1", "So.", True)):
        assert claims.verdict(alone, [], {}).settled is None and "recorded" in claims.verdict(alone, [], {}).text


def test_a_table_shows_this_run_beside_the_mean_the_spread_and_the_extremes():
    claim = Claim("3.1", "So.", True, measured=claims.quantities({"rank": {"fc1": 3.0}, "layers": 2}))
    recorded = {"rank": {"fc1": [1.0, 2.0, 3.0, None]}, "layers": {"": [2, 2, 2, 2]}}
    rows = claims.table(claim, recorded).splitlines()
    assert rows[2:] == ["| rank: fc1 | 3.000 | 2.000 ± 1.000 (1.000 to 3.000) |", "| layers | 2 | 2.000 in all |"]
    assert claims.table(claim, {}).splitlines()[0] == "| | this run |", "nothing is quoted of other runs"
    assert claims.table(Claim("3.1", "So.", True), recorded) == ""


@given(st.dictionaries(st.text(min_size=1), st.one_of(FLOATS, st.integers(), st.dictionaries(st.text(), FLOATS))))
def test_a_claim_survives_json(measured):
    claim = Claim("3.1", "So.", None, [Comparison(*"abc", "larger", 0.1)], claims.quantities(measured))
    assert Claim.from_json(json.loads(json.dumps(asdict(claim)))) == claim


def test_quantities_are_plain_numbers_and_what_is_not_finite_is_none():
    given = {"a": np.float32(0.5), "b": torch.tensor(3), "c": {"x": np.nan, 2: float("inf")}, "d": np.bool_(True)}
    assert claims.quantities(given) == {"a": {"": 0.5}, "b": {"": 3}, "c": {"x": None, "2": None}, "d": {"": True}}
    for value in ("3", [1, 2], None):
        with pytest.raises(TypeError, match="'rank'"):
            claims.quantities({"rank": value})


FILED = {
    "notebook": "02_train",
    "parameters": {"seed": 0},
    "environment": {},
    "claims": {"2.1": Claim("2.1", "So.", True, measured={"x": {"": 0.98}})},
}


@pytest.mark.parametrize(
    ("old", "new"),
    [("0.98", "0.99"), ('"format": 3', '"format": 0'), ("}", ""), ('"seed": 0', '"seed": 1'), ("02_t", "03_t")],
)
def test_claims_come_back_as_filed_and_altered_ones_are_left_out_with_a_warning(tmp_path, old, new):
    results.file_claims(tmp_path, FILED)
    assert results.read_claims(tmp_path) == {"02_train": FILED}
    file = results.claims_file(tmp_path, "02_train")
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.warns(UserWarning, match=r"02_train\.json"):
        assert results.read_claims(tmp_path) == {}

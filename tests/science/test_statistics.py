"""Statistics: intervals against SciPy's, and what the rule of comparison says of differences of known size."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lowrank_helpers.statistics import Comparison, Interval, compare, interval, prediction_interval, shared_verdict

FLOATS = st.floats(-1e3, 1e3, allow_subnormal=False)  # training flushes them to zero
VALUES = st.lists(FLOATS, min_size=2, max_size=12).filter(lambda values: np.std(values) > 1e-3)


@given(VALUES, st.sampled_from([0.8, 0.95, 0.999]))
def test_interval_is_scipys(values, confidence):
    found = interval(values, confidence)
    expected = stats.ttest_1samp(values, 0).confidence_interval(confidence)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9, abs=1e-9)
    assert found.mean == pytest.approx(np.mean(values)) and found.n == len(values)


def test_one_more_value_falls_into_the_prediction_interval_as_often_as_said():
    rng = np.random.default_rng(0)
    draws = rng.normal(5, 2, size=(4000, 11))
    hits = 0
    for *seen, new in draws:
        predicted = prediction_interval(seen, 0.9)
        hits += predicted.low <= new <= predicted.high
    low, high = stats.binom.interval(0.9999, len(draws), 0.9)
    assert low <= hits <= high


@given(VALUES)
def test_the_order_of_the_two_turns_the_verdict_round(values):
    other = np.zeros(len(values))
    turned = {"larger": "smaller", "smaller": "larger"}
    one, two = compare(values, other, margin=1).verdict, compare(other, values, margin=1).verdict
    assert two == turned.get(one, one)


@pytest.mark.parametrize(
    ("difference", "spread", "margin", "verdict"),
    [
        (2.0, 0.1, 1.0, "larger"),
        (-2.0, 0.1, 1.0, "smaller"),
        (0.5, 0.1, 1.0, "the same within 1"),  # beyond chance, and too small to matter
        (1.0, 0.1, 1.0, "undecided"),
        (2.0, 3.0, 1.0, "undecided"),
        (0.0, 3.0, 1.0, "undecided"),
        (0.5, 0.1, 0.0, "larger"),
    ],
)
def test_verdicts_on_differences_of_known_size(difference, spread, margin, verdict):
    noise = spread * np.array([-1.0, 0.5, 0.0, -0.5, 1.0])
    common = np.array([3.0, 50.0, -20.0, 0.0, 7.0])  # what a seed does to both: pairing takes it out
    assert compare(common + difference + noise, common, margin=margin).verdict == verdict


def test_many_comparisons_need_stronger_evidence():
    first = np.array([0.9, 1.1, 1.6, 0.4, 1.0])
    alone, among_ten = (compare(first, 0.0, margin=0.3, n_comparisons=n) for n in (1, 10))
    assert (alone.verdict, among_ten.verdict) == ("larger", "undecided")
    expected = stats.ttest_1samp(first, 0).confidence_interval(0.995)
    assert among_ten.difference.low == pytest.approx(expected.low)


@pytest.mark.parametrize(
    ("values", "spec", "written"),
    [([-0.01, 0.0], ".1f", "0.0 ± 0.1"), ([-0.1, -0.1], "+.1f", "-0.1 ± +0.0"), ([-1e-4], ".2f", "0.00")],
)
def test_an_interval_is_written_as_mean_and_half_width_and_zero_without_a_sign(values, spec, written):
    assert format(interval(values), spec) == written


def test_one_seed_decides_nothing():
    assert compare([5.0], [1.0], margin=0.1).verdict == "undecided"
    assert f"{interval([5.0]):.1f}" == "5.0" and f"{interval([4.0, 6.0, 5.0]):.1f}" == "5.0 ± 2.5"


def test_statements_on_several_comparisons_need_all_of_them():
    larger, same = (Comparison(Interval(0, 0, 0, 5), 1, verdict) for verdict in ("larger", "the same within 1"))
    assert shared_verdict([larger, larger]) == "larger"
    assert shared_verdict([larger, same]) == "undecided"


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: interval([]), "at least one finite number"),
        (lambda: interval([1.0, float("nan")]), "finite"),
        (lambda: interval([1.0, 2.0], 1.0), "confidence 1.0"),
        (lambda: compare([1.0, 2.0], [1.0], margin=1), "2 and 1 values"),
        (lambda: compare([1.0, 2.0], [1.0, 2.0], margin=-1), "margin -1"),
    ],
)
def test_impossible_values_are_refused(call, named):
    with pytest.raises(ValueError, match=named):
        call()

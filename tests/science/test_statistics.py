"""Statistics: intervals against SciPy's and simulation, and verdicts on differences of known size."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lowrank_helpers.statistics import interval, relative_difference

FLOATS = st.floats(-1e3, 1e3, allow_subnormal=False)  # training flushes them to zero
VALUES = st.lists(FLOATS, min_size=2, max_size=12).filter(lambda values: np.std(values) > 1e-3)


@given(VALUES)
def test_interval_is_scipys(values):
    found = interval(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9, abs=1e-9)
    assert found.mean == pytest.approx(np.mean(values)) and found.n == len(values)


def test_one_more_value_falls_into_its_interval_as_often_as_said():
    rng = np.random.default_rng(0)
    draws = rng.normal(5, 2, size=(4000, 11))
    predicted = [interval(seen, 0.9, of_one_more=True) for seen in draws[:, :-1]]
    hits = sum(found.low <= new <= found.high for found, new in zip(predicted, draws[:, -1], strict=True))
    low, high = stats.binom.interval(0.9999, len(draws), 0.9)
    assert low <= hits <= high


@given(VALUES, st.floats(0.01, 1), st.floats(1e-3, 1e3))
def test_the_order_of_the_two_turns_the_verdict_round_and_the_unit_does_not(values, margin, unit):
    first, second = np.array(values) + 2e3, np.full(len(values), 2e3)
    turned = {"larger": "smaller", "smaller": "larger"}
    one, two = (relative_difference(list(a), list(b), margin=margin) for a, b in ((first, second), (second, first)))
    assert two.verdict == turned.get(one.verdict, one.verdict)
    assert (two.low, two.high) == pytest.approx((-one.high, -one.low))
    scaled = relative_difference(list(unit * first), list(unit * second), margin=margin)
    assert (scaled.low, scaled.high) == pytest.approx((one.low, one.high))


@pytest.mark.parametrize(
    ("difference", "spread", "margin", "verdict"),
    [
        (0.2, 0.01, 0.1, "larger"),
        (-0.2, 0.01, 0.1, "smaller"),
        (0.05, 0.01, 0.1, "alike"),  # beyond chance, and too small to matter
        (0.1, 0.01, 0.1, "not settled"),
        (0.2, 0.3, 0.1, "not settled"),
        (0.0, 0.3, 0.1, "not settled"),
        (0.05, 0.01, 0.0, "larger"),
    ],
)
def test_verdicts_on_differences_of_known_size(difference, spread, margin, verdict):
    common = np.array([90.0, 110.0, 80.0, 120.0, 100.0])  # what a seed does to both: pairing takes it out
    noise = 100 * (difference + spread * np.array([-1.0, 0.5, 0.0, -0.5, 1.0]))
    first, second = common + noise / 2, common - noise / 2
    found = relative_difference(list(first), list(second), margin=margin)
    assert found.verdict == verdict
    assert found.mean == pytest.approx(difference)


def test_runs_without_both_values_are_left_out_and_one_run_decides_nothing():
    found = relative_difference([150, None, 150], [100, 100, None], margin=0.1)
    assert found.n == 1 and found.verdict == "not settled"
    assert relative_difference([0, 0], [0, 0], margin=0.1).verdict == "alike"


@pytest.mark.parametrize(
    "call",
    [
        lambda: interval([]),
        lambda: interval([1.0, float("nan")]),
        lambda: relative_difference([None], [1.0], margin=0.1),
        lambda: relative_difference([1.0, 2.0], [1.0], margin=0.1),
    ],
)
def test_impossible_values_are_refused(call):
    with pytest.raises(ValueError):
        call()

"""Evidence: what is joined and what is left out, its file, how often it raises a false alarm, and what it notices."""

import runpy

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lowrank_helpers import PROJECT, cli
from lowrank_helpers.series import evidence, parameters, results
from lowrank_helpers.series.claims import Claim, Comparison, quantities
from lowrank_helpers.series.evidence import Evidence, limits, unlike

SCRIPT = runpy.run_path(str(PROJECT / "scripts" / "evidence.py"))
gather = SCRIPT["gather"]
NAME = "02_train"


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(evidence, "FOLDER", tmp_path / "evidence")
    return tmp_path


def ran(folder, seed, *, whole=True, changes=None, rank=3.0, **environment):
    """File what a run of a seed claims, as a kernel does, and return its folder."""
    losses = quantities({"loss": {f"{seed}": 1 / 3}})
    claims = [
        Claim("2.1", "So.", rank > 2, measured=quantities({"rank": {"fc1": rank}, "layers": 3})),
        Claim("2.1/b", "So.", None, [Comparison(*"abc", "larger", 0.1)], series=losses),
    ]
    declared = parameters.declared(evidence.source_of(NAME))
    made = {"dataset": "digits", "precision": "float32", "started": f"2026-01-{seed:02}", "revision": f"r{seed}"}
    filed = {
        "notebook": NAME,
        "parameters": declared | {"seed": seed, "dataset": "digits"} | (changes or {}),
        "environment": made | {"versions": {}} | evidence.code_of(NAME) | environment,
        "claims": {claim.id: claim for claim in claims},
    }
    results.file_claims(folder / str(seed), filed)
    if whole:
        (folder / str(seed) / f"{NAME}.ipynb").touch()
    return folder / str(seed)


def test_runs_are_joined_by_seed_and_further_ones_are_added(folder):
    runs = [ran(folder, seed, rank=1.0 + seed) for seed in (2, 1)]
    found = gather(runs, NAME)
    assert [run["seed"] for run in found.runs] == [1, 2]
    assert found.of("2.1") == ([False, True], {"rank": {"fc1": [2.0, 3.0]}, "layers": {"": [3, 3]}})
    assert found.of("2.1/b") == ([], {"loss": {"1": [0.33333, None], "2": [None, 0.33333]}})
    assert found.n_values == 4 and found.made_by["revision"] == "r2"
    assert len(gather([*runs, ran(folder, 3)], NAME).runs) == 3


@pytest.mark.parametrize(
    "other", [{"whole": False}, {"changes": {"widths": [784, 8, 10]}}, {"source": "of old"}, {"package": "of old"}]
)
def test_runs_of_another_kind_are_left_out(folder, other):
    assert gather([ran(folder, 1, **other)], NAME) is None
    assert len(gather([folder / "1", ran(folder, 2)], NAME).runs) == 1


def test_a_run_with_other_parameters_quotes_no_evidence(folder):
    evidence.write(gather([ran(folder, seed) for seed in (1, 2)], NAME))
    declared = parameters.declared(evidence.source_of(NAME))
    assert evidence.quoted(NAME, "digits", declared | {"seed": 9, "precision": "bfloat16"}).runs
    assert not evidence.quoted(NAME, "digits", declared | {"activation": "tanh"}).runs
    assert not evidence.quoted(NAME, "mnist", declared).runs


VALUES = st.lists(st.none() | st.integers() | st.booleans() | st.floats(-1e9, 1e9, allow_subnormal=False))
TEXT = st.text(max_size=9)


@given(st.dictionaries(TEXT, st.dictionaries(TEXT, st.dictionaries(TEXT, VALUES))))
def test_a_file_holds_what_was_written_a_quantity_in_a_line(measured):
    parameters = {"widths": [784, 10], "x": ["a [b  c]"]}
    written = Evidence(NAME, "digits", parameters, {}, [{"seed": 1}], {"2.1": [True]}, measured)
    lines = evidence.write(written).read_text().splitlines()
    assert evidence.read(NAME, "digits") == written
    assert len(lines) <= 25 + 3 * (written.n_values + sum(map(len, measured.values())) + len(measured))


DRAWS = {
    "normal": lambda rng, shape: rng.normal(100, 1, shape),
    "small beside their spread": lambda rng, shape: rng.normal(0, 1, shape),
    "skewed": lambda rng, shape: rng.lognormal(0, 0.5, shape),
    "whole": lambda rng, shape: rng.poisson(150, shape),
    "shares near 1": lambda rng, shape: rng.binomial(10_000, 0.985, shape) / 100,
}


@pytest.mark.parametrize("kind", DRAWS)
def test_a_whole_check_raises_a_false_alarm_in_at_most_one_of_a_hundred(kind):
    n_numbers, n_values, n_runs = 2000, 10, 20
    draws = DRAWS[kind](np.random.default_rng(0), (n_numbers, n_runs + 1)).tolist()
    held = [(limits(known, n_values), new) for *known, new in draws]
    alarms = sum(not low <= new <= high for (low, high), new in held)
    assert alarms <= stats.binom.ppf(0.999, n_numbers, evidence.FALSE_ALARMS / n_values)


@pytest.mark.parametrize(
    ("known", "inside", "outside"),
    [
        ([512] * 20, [511, 513], [510]),  # a rank that is full in all runs
        ([100.0] * 20, [99.95], [99.5]),  # an accuracy
        ([0.0] * 20, [0.0], [0.1]),
        ([26, 27, 26, 27] * 5, [25, 28], [22, 31]),
        ([98.0, 98.1, 98.2, 98.1] * 5, [97.8], [97.0]),
    ],
)
def test_limits_of_known_numbers(known, inside, outside):
    low, high = limits(known, 2000)
    assert all(low <= value <= high for value in inside)
    assert not any(low <= value <= high for value in outside)


def claim(holds=True, rank=3.0, name="rank"):
    measured = quantities({name: {"fc1": rank}})
    return {"2.1": Claim("2.1", "Ranks fall.", holds, measured=measured, timings={"s": {"": 99.0}})}


@pytest.mark.parametrize(
    ("claims", "said"),
    [
        (claim(), []),
        (claim(rank=30.0), ["2.1: rank: fc1 is 30; expected"]),
        (claim(rank=float("nan")), ["2.1: rank: fc1 has no value"]),
        (claim(holds=False), ["2.1 does not hold, and held in all 4 recorded runs: Ranks fall."]),
        (claim(name="other"), []),
        ({"2.2": Claim("2.2", "So.", True)}, ["2.2 is not in the evidence"]),
        ({"2.3": Claim("2.3", "So.", False)}, []),  # as in some recorded runs
    ],
)
def test_what_is_unlike_the_recorded_runs_is_named(claims, said):
    known = {"2.1": {"rank": {"fc1": [3.0, 3.1, 2.9, 3.05]}, "s": {"": [1.0, 1.1, 1.0, 1.1]}}, "2.3": {}}
    held = {"2.1": [True] * 4, "2.3": [True, True, True, False]}
    found = unlike(Evidence(NAME, "digits", {}, {}, [{}] * 4, held, known), claims, 100)
    assert len(found) == len(said) and all(line.startswith(start) for line, start in zip(found, said, strict=True))


@pytest.mark.parametrize(("given", "used"), [({}, ["float32", "auto"]), ({"precision": "auto"}, ["auto", "auto"])])
def test_evidence_is_of_both_precisions_unless_one_is_given(given, used):
    planned = [point[NAME] for point in SCRIPT["points_of"]([NAME], [1, 2], given).values()]
    assert planned == [{"seed": 1, "precision": used[0]}, {"seed": 2, "precision": used[1]}]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["-p", "widths", "[784, 8, 10]"], ["'widths'", "precision"]),
        (["-p", "seed", "3"], ["'seed'"]),
        (["--seeds", "3..1"], ["seed has no values"]),
        (["--seeds", "one"], ["seed = 'one'", "whole number"]),
        (["99_nothing"], ["'99_nothing'", "02_train"]),
    ],
)
def test_what_makes_no_evidence_is_refused_before_anything_starts(arguments, named, monkeypatch):
    monkeypatch.setattr(cli, "run_points", lambda *_: pytest.fail("it ran"))
    result = CliRunner().invoke(SCRIPT["main"], ["-p", "dataset", "digits", *arguments])
    assert result.exit_code == 2, result.output
    assert all(part in result.output for part in named)

"""Whatever value a parameter is given, it is either refused cleanly before anything starts, or it runs."""

from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from lowrank_helpers.cli import main
from lowrank_helpers.data import Dataset
from lowrank_helpers.models import ACTIVATIONS, mlp
from lowrank_helpers.series import execution, parameters
from lowrank_helpers.series.parameters import RULES, ParameterError
from lowrank_helpers.training import Recipe, fit

words = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=20)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-10, 1000),
    st.integers(),
    st.sampled_from([0.0, -1.0, 0.5, 1e-300, 1e300, float("inf"), float("nan")]),
    words,
    st.sampled_from(["auto", "cpu", "relu", "digits", "last"]),
)
anything = st.recursive(scalars, lambda items: st.lists(items, max_size=4) | st.dictionaries(words, items, max_size=2))


@pytest.fixture(scope="module")
def tiny(digits) -> Dataset:
    return digits.select(train=torch.arange(40), test=torch.arange(40))


def outcome(name: str, value: Any) -> Any:
    """Return what the command line makes of a value: itself if accepted, or the refusal."""
    try:
        given = parameters.parse(yaml.safe_dump(value), name)
        execution.plan((), {name: given})
    except ParameterError as refusal:
        return refusal
    return given


@given(name=st.sampled_from(sorted(RULES)) | words, value=anything)
def test_refusal_is_one_message_before_anything_starts(name, value, tmp_path_factory):
    refusal = outcome(name, value)
    if not isinstance(refusal, ParameterError):
        return
    folder = tmp_path_factory.getbasetemp() / "never made"
    result = CliRunner().invoke(main, ["run", "-p", name, yaml.safe_dump(value), "-o", str(folder)])
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit), "no exception of another kind got through"
    assert result.output.startswith("Error: ")
    assert result.output.count("Error") == 1 + str(refusal).count("Error")
    assert "Traceback" not in result.output
    assert not folder.exists()


hidden = st.lists(st.integers(-1, 40), max_size=3)
near_the_allowed = st.one_of(
    st.tuples(st.just("widths"), hidden.map(lambda widths: [784, *widths, 10])),
    st.tuples(st.just("activation"), st.sampled_from([*ACTIVATIONS, "Relu", ""])),
    st.tuples(st.just("seed"), st.integers() | st.sampled_from([0, 2**32 - 1, 2**32])),
    st.tuples(st.just("batch_size"), st.integers(-1, 100) | st.sampled_from([2**31, 2**63 - 1, 2**63])),
    st.tuples(st.just("learning_rate"), st.sampled_from([-1, 0, 1e-300, 1e-3, 1, 1e300, float("inf")])),
    st.tuples(st.just("precision"), st.sampled_from(["float32", "bfloat16", "float16"])),
)


@given(near_the_allowed)
def test_what_is_accepted_trains(tiny, choice):
    name, value = choice
    if isinstance(outcome(name, value), ParameterError):
        return
    values = {"widths": [784, 8, 10], "activation": "relu", "seed": 0, "batch_size": 16, "learning_rate": 1e-3}
    values |= {"precision": "float32", name: value}
    model = mlp(values["widths"], values["activation"], seed=values["seed"])
    options = {option: values[option] for option in ("seed", "precision")}
    history = fit(model, tiny, Recipe(1, values["batch_size"], values["learning_rate"], **options))
    assert len(history.seconds) == 2

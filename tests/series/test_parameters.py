"""Parameters: one table of what each name allows, and how values are read."""

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_helpers.series import execution, parameters
from lowrank_helpers.series.parameters import RULES, ParameterError, check, declared, full_ranks, parse

BIG = [784, 1024, 1024, 512, 256, 10]
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_subnormal=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


@given(st.sampled_from(sorted(RULES)), ANYTHING)
def test_any_value_is_accepted_or_refused_by_name_and_value(name, value):
    try:
        check({name: value})
    except ParameterError as refusal:
        assert name in str(refusal) and repr(value) in str(refusal) and "allowed" in str(refusal)


@pytest.mark.parametrize("notebook", execution.notebook_names())
def test_a_notebooks_own_defaults_are_allowed_and_the_common_ones_come_first(notebook):
    defaults = declared(execution.notebook_path(notebook))
    check(defaults)
    assert list(defaults)[:5] == ["dataset", "data_dir", "seed", "device", "precision"]


def test_a_name_has_one_default_in_all_notebooks():
    defaults: dict = {}
    for notebook in execution.notebook_names():
        for name, value in declared(execution.notebook_path(notebook)).items():
            assert defaults.setdefault(name, value) == value, f"{name} in {notebook}"


@pytest.mark.parametrize(
    ("given_values", "message"),
    [
        ({"epoch": 3}, "'epoch' is unknown; allowed: dataset, "),
        ({"ranks": [150, 150, 150, 300], "big_widths": BIG}, r"layer 4 allows 1 to 256, not 300"),
        ({"ranks": [785, 150, 150, 80], "big_widths": BIG}, r"layer 1 allows 1 to 784, not 785"),
        ({"ranks": [0, 150, 150, 80], "big_widths": BIG}, "ranks = .* each at least 1"),
        ({"ranks": [150, 150], "big_widths": BIG}, "one rank for each of the 4 hidden layers"),
        ({"rank_grid": [1, 2000], "big_widths": BIG}, "largest full rank is 1024"),
        ({"rank_grid": [5, 5]}, "without repeats"),
        ({"activations": []}, "activations = .* relu"),
        ({"deep_widths": [784, 64, 64, 10]}, "deep_widths = .* at least three hidden ones"),
        ({"deep_widths": [784, 64, 32, 64, 10]}, "deep_widths = .* all equal"),
        ({"tuned_budgets": [8719, 9000], "big_widths": BIG}, "8,719 parameters are not between 8,720"),
        ({"cut_budgets": [2_509_313], "big_widths": BIG}, "2,509,313 parameters are not between 8,720, .*2,509,312"),
        ({"layer_shares": [0.5, 0.5, 0.5, 0.5]}, "sum is at most 1"),
        ({"layer_shares": [0.5, 0.5], "big_widths": BIG}, "one share for each of the 4 hidden layers"),
    ],
)
def test_what_is_impossible_is_refused(given_values, message):
    with pytest.raises(ParameterError, match=message):
        check(given_values)


def test_what_is_possible_to_the_limit_is_accepted():
    check({"ranks": [784, 1024, 512, 256], "rank_grid": [1, 1024], "big_widths": BIG})
    check({"tuned_budgets": [8720, 2_509_312], "layer_shares": [0.25] * 4, "big_widths": BIG})
    check({"seed": 2**32 - 1, "epochs": 1, "learning_rate": 1e-9, "held_out_digit": 9})


def test_full_ranks_leave_the_last_layer_out():
    assert full_ranks(BIG) == [784, 1024, 512, 256]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-3", 1e-3),  # text to PyYAML, which wants 1.0e-3
        ("-2E5", -2e5),
        ("[1e-3, 2]", [1e-3, 2]),
        ("relu", "relu"),
        ("[784, 64, 10]", [784, 64, 10]),
        ("1e", "1e"),
        ("true", True),
    ],
)
def test_values_are_read_as_yaml_with_numbers_as_people_write_them(text, value):
    read = parse(text, "it")
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize("text", ["[1, 2", "!!python/object/apply:os.getcwd []"])
def test_what_is_not_plain_yaml_is_refused_with_its_source(text):
    with pytest.raises(ParameterError, match="parameter epochs is not YAML"):
        parse(text, "parameter epochs")


def test_a_notebook_without_parameters_is_refused(tmp_path):
    nbformat.write(nbformat.v4.new_notebook(), tmp_path / "empty.ipynb")
    with pytest.raises(ParameterError, match=r"empty\.ipynb has no cell tagged 'parameters'"):
        parameters.declared(tmp_path / "empty.ipynb")


def test_planning_gives_each_notebook_what_it_declares_in_the_series_order():
    planned = execution.plan(["02_train", "01_data"], {"seed": 3, "epochs": 2})
    assert list(planned) == ["01_data", "02_train"]
    assert planned["02_train"] == {"seed": 3, "epochs": 2}
    assert "epochs" not in planned["01_data"]

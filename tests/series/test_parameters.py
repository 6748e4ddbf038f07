"""Parameters: one table of what each name allows, and how values are read."""

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_helpers.series import execution
from lowrank_helpers.series.parameters import RULES, ParameterError, check, declared, parse

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
        ({"ranks": [0, 150, 150, 80], "big_widths": BIG}, "ranks = .* each item a whole number, at least 1"),
        ({"ranks": [150, 150], "big_widths": BIG}, "one rank for each of the 4 hidden layers"),
        ({"rank_grid": [1, 2000], "big_widths": BIG}, "largest full rank is 1024"),
        ({"rank_grid": [5, 5]}, "without repeats"),
        ({"activations": []}, "activations = .* relu"),
        ({"deep_widths": [784, 64, 64, 10]}, "deep_widths = .* at least three hidden ones"),
        ({"deep_widths": [784, 64, 32, 64, 10]}, "deep_widths = .* all equal"),
        ({"cut_budgets": [8719, 9000], "big_widths": BIG}, "8,719 parameters are not between 8,720"),
        ({"cut_budgets": [2_509_313], "big_widths": BIG}, "2,509,313 parameters are not between 8,720, .*2,509,312"),
        ({"layer_shares": [0.5, 0.5, 0.5, 0.5]}, "sum is at most 1"),
        ({"layer_shares": [0.5, 0.5], "big_widths": BIG}, "one share for each of the 4 hidden layers"),
        ({"alpha": 10**400}, "alpha = 1000"),
        ({"seed": 1.5}, "seed = 1.5 .* whole number"),
        ({"seed": True}, "seed = True .* whole number"),
        ({"seed": 2**32}, "seed = 4294967296 .* to 4294967295"),
        ({"widths": [784, 10]}, r"widths = \[784, 10\] .* hidden width"),
        ({"batch_size": 0}, "batch_size = 0 .* whole number from 1"),
        ({"recipes": [3]}, r"recipes = \[3\] is not allowed; allowed: fields by kind of network"),
        ({"recipes": {"big": 3}}, "recipes = .*: 3} is not allowed; allowed: fields by kind of network"),
        ({"recipes": {"huge": {"epochs": 3}}}, "'huge' is unknown; allowed: small, "),
        ({"recipes": {1: {"epochs": 3}}}, "recipes = .* is not allowed; allowed: fields by kind of network"),
        ({"recipes": {"big": {}, "small": {"epoch": 3}}}, "small.epoch = 3 .* the fields epochs, batch_size, "),
        ({"recipes": {"big": {"epochs": 3, "learning_rate": 0}}}, "big.learning_rate = 0 .* a number above 0"),
        ({"recipes": {"big": {"epochs": True}}}, "big.epochs = True .* at least 1"),
    ],
)
def test_what_is_impossible_is_refused(given_values, message):
    with pytest.raises(ParameterError, match=message):
        check(given_values)


def test_what_is_possible_to_the_limit_is_accepted():
    check({"ranks": [784, 1024, 512, 256], "rank_grid": [1, 1024], "big_widths": BIG})
    check({"cut_budgets": [8720, 2_509_312], "layer_shares": [0.25] * 4, "big_widths": BIG})
    check({"seed": 2**32 - 1, "batch_size": 1, "alpha": 1e-9, "held_out_digit": 9, "recipes": {}})
    check({"recipes": parse("{big: {epochs: 3, learning_rate: 1e-3, weight_decay: 0}}", "it")})


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
        ("~", None),
        # What YAML 1.1 takes for octal, binary, sixty minutes, booleans, dates, infinity and merged mappings.
        ("010", 10),
        ("-08", -8),
        ("[007, 1_000]", [7, "1_000"]),
        *((text, text) for text in ("0x1F", "0b11", "1:30", "1:30.5", "1_000.5", "off", "No", "2024-01-05", ".inf")),
        ("{on: {<<: 1, =: 2}}", {"on": {"<<": 1, "=": 2}}),
    ],
)
def test_values_are_read_as_yaml_with_numbers_as_people_write_them(text, value):
    read = parse(text, "it")
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        *("[1, 2", "!!python/object/apply:os.getcwd []", "!!int 0x1F", "9" * 5000, "[" * 5000),
        *("{big: 1, small: 2, big: 3}", "a: {b: 1, b: 1}", "? [1]\n: 2", "1\n---\n2"),
    ],
)
def test_what_is_not_plain_yaml_is_refused_with_its_source(text):
    with pytest.raises(ParameterError, match="parameter epochs is not YAML"):
        parse(text, "parameter epochs")


def _notebook(folder, source):
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), folder / "mine.ipynb")
    return folder / "mine.ipynb"


def test_a_notebook_without_parameters_is_refused(tmp_path):
    nbformat.write(nbformat.v4.new_notebook(), tmp_path / "empty.ipynb")
    with pytest.raises(ParameterError, match=r"empty\.ipynb has no cell tagged 'parameters'"):
        declared(tmp_path / "empty.ipynb")


def test_parameters_may_have_type_hints(tmp_path):
    source = '"""Mine."""\nfrom typing import Final\nseed: int = 0\nwidths: Final[list[int]] = [784, 8, 10]\nshift = -1'
    assert declared(_notebook(tmp_path, source)) == {"seed": 0, "widths": [784, 8, 10], "shift": -1}


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("batch_size = 2**10", r"batch_size = 2 \*\* 10"),
        ("seed = 0\nwidths = list(range(3))", "widths = list"),
        ("rates = {[1]: 2}", "rates = "),
        ("epochs = batch_size = 3", "epochs = batch_size = 3"),
        ("epochs, seed = 3, 0", "epochs, seed"),
        ("epochs: int", "epochs: int"),
        ("epochs = 3\nepochs += 1", "epochs \\+= 1"),
        ("if True:\n    epochs = 3", "if True:"),
        ("%matplotlib inline\nepochs = 3", "not Python"),
    ],
)
def test_what_is_no_literal_is_refused_by_notebook_and_name(tmp_path, source, named):
    with pytest.raises(ParameterError, match=rf"^mine\.ipynb: .*{named}") as refusal:
        declared(_notebook(tmp_path, source))
    assert "\n" not in str(refusal.value)


def test_planning_gives_each_notebook_what_it_declares_in_the_series_order():
    planned = execution.plan(["02_train", "01_data"], {"seed": 3, "activation": "tanh"})
    assert list(planned) == ["01_data", "02_train"]
    assert planned["02_train"] == {"seed": 3, "activation": "tanh"}
    assert planned["01_data"] == {"seed": 3}


@pytest.mark.parametrize(("layers", "most"), [("all", 10), ("first", 512), ("last", 10)])
def test_the_adapters_rank_is_bounded_by_the_layers_chosen(layers, most):
    given = {"widths": [784, 512, 256, 10], "layers": layers}
    check(given | {"rank": most})
    with pytest.raises(ParameterError, match=f"rank = {most + 1} .*allowed: 1 to {most}$"):
        check(given | {"rank": most + 1})

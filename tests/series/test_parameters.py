"""Parameters: one table of what each name allows, how values are read, and refusals before anything starts."""

import json
from typing import Any

import nbformat
import pytest
import torch
from commands import lowrank
from hypothesis import example, given
from hypothesis import strategies as st

from lowrank_helpers.models import ACTIVATIONS, mlp
from lowrank_helpers.series import execution
from lowrank_helpers.series.parameters import RULES, ParameterError, check, declared, parse
from lowrank_helpers.training import Recipe, fit

BIG = [784, 1024, 1024, 512, 256, 10]
WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=20)
SCALARS = st.one_of(
    *(st.none(), st.booleans(), st.integers(-10, 1000), st.integers(), st.floats(allow_subnormal=False), WORDS),
    st.sampled_from(["auto", "cpu", "relu", "digits", "last"]),
)
ANYTHING = st.recursive(
    SCALARS, lambda items: st.lists(items, max_size=4) | st.dictionaries(WORDS | st.just("big"), items, max_size=2)
)


@given(name=st.sampled_from(sorted(RULES)), value=ANYTHING)
@example(name="alpha", value=10**400)
@example(name="seed", value=True)
@example(name="recipes", value={"big": 3})
def test_any_value_is_allowed_or_refused_in_one_sentence_before_anything_starts(name, value, tmp_path_factory):
    try:
        check({name: value})
    except ParameterError as refusal:
        assert name in str(refusal) and repr(value) in str(refusal) and "allowed" in str(refusal)
        folder = tmp_path_factory.getbasetemp() / "never made"
        assert lowrank("run", "-p", name, json.dumps(value), "-o", folder, code=2).startswith("Error: ")
        assert not folder.exists()


@pytest.fixture(scope="module")
def tiny(digits):
    return digits.select(train=torch.arange(40), test=torch.arange(40))


@given(
    st.one_of(
        st.tuples(st.just("widths"), st.lists(st.integers(-1, 40), max_size=3).map(lambda some: [784, *some, 10])),
        st.tuples(st.just("activation"), st.sampled_from([*ACTIVATIONS, "Relu", ""])),
        st.tuples(st.just("seed"), st.integers() | st.sampled_from([0, 2**32 - 1, 2**32])),
        st.tuples(st.just("batch_size"), st.integers(-1, 100) | st.sampled_from([2**31, 2**63 - 1, 2**63])),
        st.tuples(st.just("alpha"), st.sampled_from([-1, 0, 1e-300, 1e-3, 1, 1e300, float("inf")])),
        st.tuples(st.just("precision"), st.sampled_from(["float32", "bfloat16", "float16"])),
    )
)
def test_what_is_allowed_trains(tiny, choice):
    name, value = choice
    try:
        check({name: value})
    except ParameterError:
        return
    values: dict[str, Any] = {"widths": [784, 8, 10], "activation": "relu", "seed": 0, "batch_size": 16}
    values |= {"alpha": 1e-3, "precision": "float32", name: value}  # a rate has the rule of alpha
    model = mlp(values["widths"], values["activation"], seed=values["seed"])
    options = {option: values[option] for option in ("seed", "precision")}
    assert len(fit(model, tiny, Recipe(1, values["batch_size"], values["alpha"], **options)).seconds) == 2


def test_notebooks_defaults_are_allowed_the_common_ones_first_and_one_for_a_name_in_all():
    defaults: dict = {}
    for notebook in execution.notebook_names():
        check(own := declared(execution.notebook_path(notebook)))
        assert list(own)[:5] == ["dataset", "data_dir", "seed", "device", "precision"], notebook
        for name, value in own.items():
            assert defaults.setdefault(name, value) == value, f"{name} in {notebook}"


@pytest.mark.parametrize(
    ("given_values", "message"),
    [
        ({"epoch": 3}, "epoch is unknown; allowed: dataset, "),
        ({"ranks": [150, 150, 150, 300], "big_widths": BIG}, r"full ranks, \[784, 1024, 512, 256\]"),
        ({"ranks": [785, 150, 150, 80], "big_widths": BIG}, r"full ranks, \[784, 1024, 512, 256\]"),
        ({"ranks": [150, 150], "big_widths": BIG}, "one for each hidden layer, 4"),
        ({"rank_grid": [1, 2000], "big_widths": BIG}, "largest full rank, 1024"),
        ({"rank_grid": [5, 5]}, "without repeats"),
        ({"deep_widths": [784, 64, 64, 10]}, "deep_widths = .* at least three hidden ones"),
        ({"deep_widths": [784, 64, 32, 64, 10]}, "deep_widths = .* all equal"),
        ({"cut_budgets": [8719, 9000], "big_widths": BIG}, "parameters from 8,720, "),
        ({"cut_budgets": [2_509_313], "big_widths": BIG}, "parameters from 8,720, .*2,509,312"),
        ({"layer_shares": [0.5, 0.5, 0.5, 0.5]}, "sum is at most 1"),
        ({"layer_shares": [0.5, 0.5], "big_widths": BIG}, "one for each hidden layer, 4"),
        ({"seed": 2**32}, "seed = 4294967296 .* to 4294967295"),
        ({"widths": [784, 10]}, r"widths = \[784, 10\] .* hidden width"),
        ({"recipes": {"huge": {"epochs": 3}}}, "'huge' is unknown; allowed: small, "),
        ({"recipes": {1: {"epochs": 3}}}, "recipes = .*: 1 is unknown; allowed: small, "),
        ({"recipes": {"big": {}, "small": {"epoch": 3}}}, "small.epoch is unknown; allowed: epochs, batch_size, "),
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


@pytest.mark.parametrize(("layers", "most"), [("all", 10), ("first", 512), ("last", 10)])
def test_the_adapters_rank_is_bounded_by_the_layers_chosen(layers, most):
    given = {"widths": [784, 512, 256, 10], "layers": layers}
    check(given | {"rank": most})
    with pytest.raises(ParameterError, match=f"rank = {most + 1} .*allowed: 1 to {most}$"):
        check(given | {"rank": most + 1})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-3", 1e-3),
        ("[-2E5, 2]", [-2e5, 2]),
        ("[784, relu]", [784, "relu"]),
        ("true", True),
        ("~", None),
        ("[0x1F, 0o17, 1_000, .inf]", [31, 15, 1000, float("inf")]),
        # What YAML 1.1 takes for octal, sixty minutes and booleans.
        ("[010, -08]", [10, -8]),
        *((text, text) for text in ("1e", "1:30", "1:30.5", "off")),
    ],
)
def test_values_are_read_as_yaml_with_numbers_as_people_write_them(text, value):
    read = parse(text, "it")
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        *("[1, 2", "!!python/object/apply:os.getcwd []", "9" * 5000, "[" * 5000),
        *("{big: 1, small: 2, big: 3}", "a: {b: 1, b: 1}", "1\n---\n2"),
    ],
)
def test_what_is_not_plain_yaml_is_refused_with_its_source(text):
    with pytest.raises(ParameterError, match="parameter epochs is not YAML"):
        parse(text, "parameter epochs")


def _notebook(folder, source, **metadata):
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]} | metadata)
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), folder / "mine.ipynb")
    return folder / "mine.ipynb"


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
    with pytest.raises(ParameterError, match=r"^mine\.ipynb has no cell tagged 'parameters'"):
        declared(_notebook(tmp_path, source, tags=[]))

"""The notebooks' parameters: what each name allows, checked before anything runs.

A name means the same in every notebook, so one table serves the command line and the notebooks themselves.
"""

import ast
import math
import operator
import sys
from collections.abc import Callable, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from lowrank_helpers.data import DATASETS, N_CLASSES, N_PIXELS
from lowrank_helpers.models import ACTIVATIONS
from lowrank_helpers.series import digest
from lowrank_helpers.training import DEVICES, PRECISIONS, pick_device


class ParameterError(ValueError):
    """A parameter's name or value is not allowed; the message names it, the value and what is allowed."""


@cache
def recipes() -> dict[str, dict[str, Any]]:
    """Return the series' recipes by kind of network, from ``recipes.yaml``."""
    by_kind: dict[str, dict[str, Any]] = parse((Path(__file__).parent / "recipes.yaml").read_bytes(), "recipes.yaml")
    return by_kind


class Rule(NamedTuple):
    """What a parameter allows: the test, and the same in words."""

    accepts: Callable[[Any], bool]
    allowed: str


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max  # false for NaN, and defined for integers beyond any float


def _one_of(*choices: str) -> Rule:
    return Rule(lambda value: isinstance(value, str) and value in choices, f"one of {', '.join(choices)}")


def _whole(least: int, most: int | None = None) -> Rule:
    said = f"a whole number, at least {least}" if most is None else f"a whole number from {least} to {most}"
    return Rule(lambda x: isinstance(x, int) and _is_number(x) and least <= x and (most is None or x <= most), said)


def _list_of(rule: Rule, *, distinct: bool = False) -> Rule:
    def accepts(value: Any) -> bool:
        items_allowed = isinstance(value, list) and bool(value) and all(map(rule.accepts, value))
        return items_allowed and not (distinct and len(set(value)) < len(value))

    return Rule(accepts, f"a list{' without repeats' if distinct else ''}, each item {rule.allowed}")


COUNT = _whole(1)
COUNTS = _list_of(COUNT, distinct=True)
POSITIVE = Rule(lambda value: _is_number(value) and value > 0, "a number above 0")
NOT_NEGATIVE = Rule(lambda value: _is_number(value) and value >= 0, "a number, at least 0")
SHARE = Rule(lambda value: _is_number(value) and 0 < value < 1, "a number between 0 and 1, both excluded")
WIDTHS = Rule(
    lambda value: _list_of(COUNT).accepts(value) and len(value) >= 3 and (value[0], value[-1]) == (N_PIXELS, N_CLASSES),
    f"a list of whole numbers that starts with {N_PIXELS} pixels, ends with {N_CLASSES} classes "
    "and has at least one hidden width between",
)

# The fields of a recipe that a reader may set, and what each allows.
RECIPE_RULES = {
    "epochs": COUNT,
    "batch_size": _whole(1, 2**63 - 1),  # what PyTorch can count
    "learning_rate": POSITIVE,
    "weight_decay": NOT_NEGATIVE,
    "frobenius_decay": NOT_NEGATIVE,
}

RULES: dict[str, Rule] = {
    "dataset": _one_of(*DATASETS),
    "data_dir": Rule(lambda value: isinstance(value, str), "a folder, or empty for LOWRANK_DATA_DIR and data/"),
    "seed": _whole(0, 2**32 - 1),  # what NumPy and scikit-learn take
    "device": _one_of(*DEVICES),
    "precision": _one_of(*PRECISIONS),
    "recipes": Rule(
        lambda value: isinstance(value, dict) and all(isinstance(recipe, dict) for recipe in value.values()),
        f"fields by kind of network, such as {{big: {{epochs: 3}}}}, each one of {', '.join(RECIPE_RULES)}",
    ),
    "batch_size": RECIPE_RULES["batch_size"],
    "activation": _one_of(*ACTIVATIONS),
    "activations": _list_of(_one_of(*ACTIVATIONS), distinct=True),
    "layers": _one_of("all", "first", "last"),
    "deep_widths": Rule(
        lambda value: WIDTHS.accepts(value) and len(value) >= 5 and len(set(value[1:-1])) == 1,
        f"widths such as [{N_PIXELS}, 128, 128, 128, {N_CLASSES}]: at least three hidden ones, all equal",
    ),
    **dict.fromkeys(("widths", "big_widths"), WIDTHS),
    **dict.fromkeys(("rank_grid", "subspace_widths", "subspace_dimensions", "cut_budgets", "adapter_ranks"), COUNTS),
    "token_width": Rule(lambda value: COUNT.accepts(value) and value % 4 == 0, "a multiple of the four heads"),
    **dict.fromkeys(("ranks", "small_ranks", "channels"), _list_of(COUNT)),
    "alpha": POSITIVE,
    "layer_shares": Rule(
        lambda value: _list_of(SHARE).accepts(value) and sum(value) <= 1,
        f"a list whose sum is at most 1, each item {SHARE.allowed}",
    ),
    "budget_shares": _list_of(SHARE, distinct=True),
    **dict.fromkeys(("error_threshold", "accuracy_kept", "target_accuracy", "small_share"), SHARE),
    "rehearsal_share": POSITIVE,
    "held_out_digit": _whole(0, N_CLASSES - 1),
    **dict.fromkeys(("rank", "low_rank", "kept_rank", "descent_steps", "moment_images"), COUNT),
    **dict.fromkeys(("convnet_width", "n_blocks", "context", "rehearsal"), COUNT),
}


def check(parameters: Mapping[str, Any]) -> None:
    """Check values by name, and against each other.

    Raises
    ------
    ParameterError
        A name is unknown, a value is not allowed, a rank is above min(n, m) of its layer, or the device is not
        on this machine.
    """
    _check_each(parameters, RULES)
    for kind, recipe in parameters.get("recipes", {}).items():
        where = f"recipes = {parameters['recipes']}: "
        if kind not in recipes():
            raise ParameterError(f"parameter {where}{kind!r} is unknown; allowed: {', '.join(recipes())}")
        _check_each(recipe, RECIPE_RULES, f"{where}{kind}.")
    if "big_widths" in parameters:
        limits = _of_big_network(list(pairwise(parameters["big_widths"])))
        _check_each({name: value for name, value in parameters.items() if name in limits}, limits)
    if {"widths", "rank", "layers"} <= parameters.keys():
        adapted = choose_layers(list(pairwise(parameters["widths"])), parameters["layers"])
        if parameters["rank"] > (most := min(map(min, adapted))):
            what = f"above min(n, m) of a layer that layers = {parameters['layers']!r} adapts"
            raise ParameterError(f"parameter rank = {parameters['rank']} is {what}; allowed: 1 to {most}")
    try:
        pick_device(parameters.get("device", "auto"))
    except ValueError as error:
        raise ParameterError(str(error)) from error


def _check_each(given: Mapping[str, Any], rules: Mapping[str, Rule], where: str = "") -> None:
    for name, value in given.items():
        if name not in rules:
            raise ParameterError(f"parameter {where}{name} is unknown; allowed: {', '.join(rules)}")
        if not rules[name].accepts(value):
            raise ParameterError(f"parameter {where}{name} = {value!r} is not allowed; allowed: {rules[name].allowed}")


def _of_big_network(shapes: list[tuple[int, int]]) -> dict[str, Rule]:
    """Return what ranks and budgets allow beside the layers of ``big_widths``; the last layer is never cut."""
    *hidden, last = shapes
    full = [min(shape) for shape in hidden]
    each = f"one for each hidden layer, {len(full)}"
    by_layer = Rule(
        lambda ranks: len(ranks) == len(full) and all(map(operator.le, ranks, full)),
        f"{each}, and at most the layers' full ranks, {full}",
    )
    least = sum(n + m for n, m in hidden) + math.prod(last)  # one direction in every hidden layer
    most = sum(n * m for n, m in shapes)
    limits = f"{least:,}, one direction in every hidden layer of big_widths, to {most:,}, the dense network"
    return {
        **dict.fromkeys(("ranks", "small_ranks"), by_layer),
        "layer_shares": Rule(lambda shares: len(shares) == len(full), each),
        "rank_grid": Rule(lambda ranks: max(ranks) <= max(full), f"at most the largest full rank, {max(full)}"),
        "cut_budgets": Rule(lambda budgets: all(least <= x <= most for x in budgets), f"parameters from {limits}"),
    }


def choose_layers(items: list[Any], layers: str) -> list[Any]:
    """Return those of a network's layers, first to last, that a choice of ``layers`` means."""
    return {"all": items, "first": items[:1], "last": items[-1:]}[layers]


@cache  # for a sweep, which asks once a point
def declared(notebook: Path) -> dict[str, Any]:
    """Return the parameters of a notebook and their defaults, from its cell tagged ``parameters``.

    The cell may import, and assigns one literal a line, with a type hint or without.

    Raises
    ------
    ParameterError
        The notebook has no such cell, or the cell does something else.
    """
    tagged = [source for source, metadata in digest.code_cells(notebook) if "parameters" in metadata.get("tags", [])]
    if not tagged:
        raise ParameterError(f"{notebook.name} has no cell tagged 'parameters'")
    values: dict[str, Any] = {}
    try:
        for statement in ast.parse(tagged[0]).body:
            match statement:
                case ast.Assign([ast.Name(name)], value) | ast.AnnAssign(ast.Name(name), _, ast.expr() as value):
                    values[name] = ast.literal_eval(value)
                case ast.Import() | ast.ImportFrom() | ast.Expr(ast.Constant()):
                    pass
                case _:
                    raise ValueError
    except SyntaxError as error:
        raise ParameterError(f"{notebook.name}: the cell of parameters is not Python: {error}") from error
    except (ValueError, TypeError, RecursionError) as error:
        line = ast.unparse(statement).splitlines()[0]
        what = "in the cell of parameters is not a name and a literal, such as epochs = 3"
        raise ParameterError(f"{notebook.name}: {line!r} {what}") from error
    return values


def parse(text: str | bytes, source: str) -> Any:
    """Read a value from the command line or a file as YAML 1.2: ``3``, ``1e-3``, ``relu``, ``[784, 64, 10]``.

    PyYAML knows version 1.1 alone, which reads ``1e-3`` as text and ``off`` as false.

    Raises
    ------
    ParameterError
        The text is not YAML; the message names its source.
    """
    try:
        return YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError, RecursionError) as error:
        raise ParameterError(f"{source} is not YAML: {' '.join(str(error).split())}") from error

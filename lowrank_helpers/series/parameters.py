"""The notebooks' parameters: what each name allows, checked before anything runs.

A name means the same in every notebook, so one table serves the command line and the notebooks themselves.
"""

import ast
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from lowrank_helpers.data import DATASETS, IMAGE_SIDE, N_CLASSES, N_PIXELS
from lowrank_helpers.models import ACTIVATIONS
from lowrank_helpers.training import DEVICES, PRECISIONS, pick_device

LAYER_CHOICES = ("all", "first", "last")


class ParameterError(ValueError):
    """A parameter's name or value is not allowed; the message names it, the value and what is allowed."""


@dataclass(frozen=True)
class Rule:
    """What a parameter allows: the test, and the same in words."""

    accepts: Callable[[Any], bool]
    allowed: str


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _one_of(*choices: str) -> Rule:
    return Rule(lambda value: isinstance(value, str) and value in choices, f"one of {', '.join(choices)}")


def _whole(least: int) -> Rule:
    return Rule(lambda value: _is_whole(value, least), f"a whole number, at least {least}")


def _whole_between(least: int, most: int) -> Rule:
    return Rule(lambda value: _is_whole(value, least) and value <= most, f"a whole number from {least} to {most}")


def _list_of(rule: Rule) -> Rule:
    def accepts(value: Any) -> bool:
        return (
            isinstance(value, list)
            and bool(value)
            and all(rule.accepts(item) for item in value)
            and len(set(value)) == len(value)
        )

    return Rule(accepts, f"a list without repeats, each item {rule.allowed}")


POSITIVE = Rule(lambda value: _is_number(value) and value > 0, "a number above 0")
SHARE = Rule(lambda value: _is_number(value) and 0 < value < 1, "a number between 0 and 1, both excluded")
WIDTHS = Rule(
    lambda value: (
        isinstance(value, list)
        and len(value) >= 3
        and all(_is_whole(width, 1) for width in value)
        and (value[0], value[-1]) == (N_PIXELS, N_CLASSES)
    ),
    f"a list of whole numbers that starts with {N_PIXELS} pixels, ends with {N_CLASSES} classes "
    "and has at least one hidden width between",
)
DEEP_WIDTHS = Rule(
    lambda value: WIDTHS.accepts(value) and len(value) >= 5 and len(set(value[1:-1])) == 1,
    f"widths such as [{N_PIXELS}, 128, 128, 128, {N_CLASSES}]: at least three hidden ones, all equal",
)
SHARES = Rule(
    lambda value: isinstance(value, list) and bool(value) and all(map(SHARE.accepts, value)) and sum(value) <= 1,
    f"a list whose sum is at most 1, each item {SHARE.allowed}",
)
RANKS = Rule(
    lambda value: isinstance(value, list) and bool(value) and all(_is_whole(rank, 1) for rank in value),
    "a list of whole numbers, each at least 1",
)
RATES = Rule(
    lambda value: isinstance(value, list) and bool(value) and all(map(POSITIVE.accepts, value)),
    f"a list, each item {POSITIVE.allowed}",
)

RULES: dict[str, Rule] = {
    "dataset": _one_of(*DATASETS),
    "data_dir": Rule(lambda value: isinstance(value, str), "a folder, or empty for LOWRANK_DATA_DIR and data/"),
    "seed": _whole_between(0, 2**32 - 1),  # what NumPy and scikit-learn take
    "device": _one_of(*DEVICES),
    "precision": _one_of(*PRECISIONS),
    "activation": _one_of(*ACTIVATIONS),
    "activations": _list_of(_one_of(*ACTIVATIONS)),
    "widths": WIDTHS,
    "big_widths": WIDTHS,
    "deep_widths": DEEP_WIDTHS,
    "epochs": _whole(1),
    "big_epochs": _whole(1),
    "big_batch_size": _whole_between(1, 2**63 - 1),
    "batch_size": _whole_between(1, 2**63 - 1),  # what PyTorch can count
    "learning_rate": POSITIVE,
    "big_learning_rate": POSITIVE,
    "n_seeds": _whole(1),
    "factorized_epochs": _whole(1),
    "tuning_epochs": _whole(1),
    "tuning_learning_rate": POSITIVE,
    "weight_decay": POSITIVE,
    "frobenius_decay": POSITIVE,
    "target_accuracy": SHARE,
    "low_rank": _whole(1),
    "low_epochs": _whole(1),
    "dense_learning_rate": POSITIVE,
    "narrow_learning_rate": POSITIVE,
    "effective_learning_rate": POSITIVE,
    "longer_learning_rate": POSITIVE,
    "published_learning_rate": POSITIVE,
    "published_batch_size": _whole_between(1, 2**63 - 1),
    "small_learning_rate": POSITIVE,
    "low_learning_rate": POSITIVE,
    "spectral_learning_rate": POSITIVE,
    "weight_decay_learning_rate": POSITIVE,
    "frobenius_decay_learning_rate": POSITIVE,
    "subspace_widths": _list_of(_whole(1)),
    "subspace_dimensions": _list_of(_whole(1)),
    "subspace_epochs": _whole(1),
    "subspace_learning_rate": POSITIVE,
    "all_weights_learning_rate": POSITIVE,
    "als_sweeps": _whole(1),
    "gradient_steps": _whole(1),
    "rank_grid": _list_of(_whole(1)),
    "cut_budgets": _list_of(_whole(1)),
    "tuned_budgets": _list_of(_whole(1)),
    "layer_shares": SHARES,
    "adaptive_rank": _whole(1),
    "adaptive_tolerances": _list_of(SHARE),
    "moment_images": _whole(1),
    "small_batch_size": _whole_between(1, 2**63 - 1),
    "shifted_epochs": _whole(1),
    "tuned_learning_rates": RATES,
    "distilled_learning_rate": POSITIVE,
    "shifted_learning_rate": POSITIVE,
    "adaptive_learning_rate": POSITIVE,
    "born_learning_rate": POSITIVE,
    "pruned_learning_rate": POSITIVE,
    "channels": RANKS,
    "convnet_width": _whole(1),
    "patch": Rule(lambda value: _is_whole(value, 1) and IMAGE_SIDE % value == 0, f"a divisor of {IMAGE_SIDE}"),
    "token_width": Rule(lambda value: _is_whole(value, 1) and value % 4 == 0, "a multiple of the four heads"),
    "n_blocks": _whole(1),
    "few_seeds": _whole(1),
    "few_epochs": _whole(1),
    "convnet_learning_rate": POSITIVE,
    "transformer_learning_rate": POSITIVE,
    "budget_shares": _list_of(SHARE),
    "small_share": SHARE,
    "short_tuning_epochs": _whole(1),
    "convnet_tuning_learning_rate": POSITIVE,
    "transformer_tuning_learning_rate": POSITIVE,
    "ranks": RANKS,
    "small_ranks": RANKS,
    "error_threshold": SHARE,
    "accuracy_kept": SHARE,
    "held_out_digit": _whole_between(0, N_CLASSES - 1),
    "rank": _whole(1),
    "alpha": POSITIVE,
    "layers": _one_of(*LAYER_CHOICES),
    "rehearsal": _whole(1),
    "rehearsal_share": POSITIVE,
    "adapter_epochs": _whole(1),
    "adapter_learning_rate": POSITIVE,
    "full_learning_rate": POSITIVE,
    "last_layer_learning_rate": POSITIVE,
    "adapter_ranks": _list_of(_whole(1)),
    "adapter_rates": RATES,
    "recipes": Rule(lambda value: isinstance(value, dict), "a mapping of recipes"),
}

RATES_OF = {"adapter_rates": "adapter_ranks", "tuned_learning_rates": "tuned_budgets"}  # one for each of these


def check(parameters: Mapping[str, Any]) -> None:
    """Check values by name, and against each other.

    Raises
    ------
    ParameterError
        A name is unknown, a value is not allowed, a rank is above min(n, m) of its layer, or the device is not
        on this machine.
    """
    for name, value in parameters.items():
        if name not in RULES:
            raise ParameterError(f"parameter {name!r} is unknown; allowed: {', '.join(RULES)}")
        if not RULES[name].accepts(value):
            raise ParameterError(f"parameter {name} = {value!r} is not allowed; allowed: {RULES[name].allowed}")
    if "device" in parameters:
        try:
            pick_device(parameters["device"])
        except ValueError as error:
            raise ParameterError(str(error)) from error
    if "big_widths" in parameters:
        _check_ranks(parameters)
        _check_budgets(parameters)
    if {"widths", "rank", "layers"} <= parameters.keys():
        _check_adapter_rank(parameters["widths"], parameters["rank"], parameters["layers"])
    for name, of in RATES_OF.items():
        if {name, of} <= parameters.keys() and len(parameters[name]) != len(parameters[of]):
            raise ParameterError(
                f"parameter {name} = {parameters[name]} must have one rate for each of {of} = {parameters[of]}"
            )


def _check_ranks(parameters: Mapping[str, Any]) -> None:
    full = full_ranks(parameters["big_widths"])
    for name in ("ranks", "small_ranks"):
        if ranks := parameters.get(name):
            _check_hidden_ranks(name, ranks, full)
    if (grid := parameters.get("rank_grid")) and max(grid) > max(full):
        raise ParameterError(f"parameter rank_grid = {grid}: the largest full rank is {max(full)}")


def _check_budgets(parameters: Mapping[str, Any]) -> None:
    *hidden, last = pairwise(parameters["big_widths"])
    least = sum(n + m for n, m in hidden) + last[0] * last[1]  # one direction in every hidden layer
    most = sum(n * m for n, m in [*hidden, last])
    for name in ("cut_budgets", "tuned_budgets"):
        if wrong := [budget for budget in parameters.get(name, []) if not least <= budget <= most]:
            raise ParameterError(
                f"parameter {name} = {parameters[name]}: {wrong[0]:,} parameters are not between {least:,}, one "
                f"direction in every hidden layer of big_widths, and {most:,}, the dense network"
            )
    if (shares := parameters.get("layer_shares")) and len(shares) != len(hidden):
        raise ParameterError(
            f"parameter layer_shares = {shares} must have one share for each of the {len(hidden)} hidden layers of "
            "big_widths"
        )


def _check_hidden_ranks(name: str, ranks: list[int], full: list[int]) -> None:
    if len(ranks) != len(full):
        raise ParameterError(
            f"parameter {name} = {ranks} must have one rank for each of the {len(full)} hidden layers of big_widths"
        )
    for i, (rank, most) in enumerate(zip(ranks, full, strict=True), start=1):
        if rank > most:
            raise ParameterError(f"parameter {name} = {ranks}: layer {i} allows 1 to {most}, not {rank}")


def _check_adapter_rank(widths: list[int], rank: int, layers: str) -> None:
    shapes = choose_layers(list(pairwise(widths)), layers)
    most = min(min(shape) for shape in shapes)
    if rank > most:
        raise ParameterError(
            f"parameter rank = {rank} is above min(n, m) of a layer that layers = {layers!r} adapts; "
            f"allowed: 1 to {most}"
        )


def choose_layers(items: list[Any], layers: str) -> list[Any]:
    """Return those of a network's layers, first to last, that a choice of ``layers`` means."""
    return {"all": items, "first": items[:1], "last": items[-1:]}[layers]


def full_ranks(widths: list[int]) -> list[int]:
    """Return min(n, m) of every weight matrix but the last, whose rows are the classes."""
    return [min(pair) for pair in pairwise(widths[:-1])]


@cache  # for a sweep, which asks once a point
def declared(notebook: Path) -> dict[str, Any]:
    """Return the parameters of a notebook and their defaults, from its cell tagged ``parameters``.

    Raises
    ------
    ParameterError
        The notebook has no such cell.
    """
    import nbformat  # here, not above: its import takes two seconds, and a notebook's kernel never needs it

    cells = nbformat.read(notebook, as_version=4).cells
    tagged = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    if not tagged:
        raise ParameterError(f"{notebook.name} has no cell tagged 'parameters'")
    return {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(tagged[0]).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but for one thing: 1e-3 is a number, as in YAML 1.2, though it has no dot."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def parse(text: str | bytes, source: str) -> Any:
    """Read a value from the command line or a file as YAML: ``3``, ``1e-3``, ``relu``, ``[784, 64, 10]``.

    Raises
    ------
    ParameterError
        The text is not YAML; the message names its source.
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader: plain values only
    except yaml.YAMLError as error:
        raise ParameterError(f"{source} is not YAML: {' '.join(str(error).split())}") from error

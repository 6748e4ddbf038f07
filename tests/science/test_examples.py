"""The examples in the docstrings of the science do what they show."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "module",
    [
        *("analysis", "calibration", "costs", "factorization", "layers", "lora", "models", "rank", "selection"),
        *("statistics", "subspace"),
    ],
)
def test_examples_give_what_they_show(module):
    failed, tried = doctest.testmod(
        importlib.import_module(f"lowrank_helpers.{module}"),
        optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS,
    )
    assert tried > 0
    assert failed == 0

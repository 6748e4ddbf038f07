"""The examples in the docstrings of the science do what they show."""

import doctest
import importlib

import pytest

MODULES = "analysis calibration costs factorization layers lora models rank selection statistics subspace"


@pytest.mark.parametrize("module", MODULES.split())
def test_examples_give_what_they_show(module):
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    found = doctest.testmod(importlib.import_module(f"lowrank_helpers.{module}"), optionflags=flags)
    assert found.attempted and not found.failed

"""Ranks that a chosen layer cannot have are refused before anything is trained."""

import pytest

from lowrank_helpers.series import execution, parameters
from lowrank_helpers.series.parameters import ParameterError

WIDTHS = [784, 512, 256, 10]


@pytest.mark.parametrize(("layers", "most"), [("all", 10), ("first", 512), ("last", 10)])
def test_the_adapters_rank_is_bounded_by_the_layers_chosen(layers, most):
    parameters.check({"widths": WIDTHS, "rank": most, "layers": layers})
    with pytest.raises(ParameterError, match=f"rank = {most + 1} .*allowed: 1 to {most}$"):
        parameters.check({"widths": WIDTHS, "rank": most + 1, "layers": layers})


def test_the_notebooks_plan_refuses_it_by_name():
    with pytest.raises(ParameterError, match=r"bonus_lora: parameter rank = 11"):
        execution.plan(["bonus_lora"], {"rank": 11})

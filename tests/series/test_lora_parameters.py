"""Ranks that a chosen layer cannot have, and ranks without a rate, are refused before anything is trained."""

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


@pytest.mark.parametrize("rates", [[1e-3], [1e-3, 2e-3, 4e-3, 8e-3]])
def test_each_rank_compared_needs_a_rate(rates):
    parameters.check({"adapter_ranks": [1, 2], "adapter_rates": [1e-3, 1e-3]})
    with pytest.raises(ParameterError, match=r"adapter_rates .*one rate for each of adapter_ranks"):
        parameters.check({"adapter_ranks": [1, 2], "adapter_rates": rates})
    with pytest.raises(ParameterError, match="bonus_lora: parameter adapter_rates"):
        execution.plan(["bonus_lora"], {"adapter_rates": rates})


@pytest.mark.parametrize("rates", [[], [0.0], [-1e-3], ["fast"], 1e-3])
def test_impossible_rates_are_refused(rates):
    with pytest.raises(ParameterError, match="adapter_rates"):
        parameters.check({"adapter_rates": rates})

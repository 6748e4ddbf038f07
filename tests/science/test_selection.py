"""Rank allocation: budgets are kept, strategies do what they say, and those by an error against all allocations."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import draw

from lowrank_helpers import selection
from lowrank_helpers.calibration import output_moments
from lowrank_helpers.layers import decompose, factorize
from lowrank_helpers.models import linear_layers, mlp, n_parameters
from lowrank_helpers.rank import gavish_donoho_threshold
from lowrank_helpers.selection import STRATEGIES, Layer, allocate, allocate_by_shares, layers_of, total_cost


def _layer(n, m, seed):
    generator = np.random.default_rng(seed)
    weights, outputs = (np.sort(generator.gamma(0.5, size=min(n, m)))[::-1] for _ in range(2))
    return Layer((n, m), weights, outputs)


@st.composite
def _layers(draw):
    shapes = draw(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=4))
    return {f"fc{i}": _layer(n, m, i) for i, (n, m) in enumerate(shapes)}


def _budget(layers, share):
    """Return what rank 1 in every layer costs, and that share of the way to dense layers."""
    least, dense = (total_cost(layers, ranks) for ranks in (dict.fromkeys(layers, 1), {}))
    return least + share * (dense - least)


@given(_layers(), st.floats(0, 1), st.sampled_from(list(STRATEGIES)))
def test_a_budget_is_kept_and_no_factors_cost_more_than_their_matrix(layers, share, strategy):
    ranks = allocate(layers, _budget(layers, share), strategy)
    spent = 0
    for name, layer in layers.items():
        n, m = layer.shape
        assert name not in ranks or 0 < ranks[name] * (n + m) < n * m
        spent += ranks[name] * (n + m) if name in ranks else n * m
    assert spent == total_cost(layers, ranks) <= _budget(layers, share)
    assert allocate(layers, _budget(layers, 1), strategy) == {}


@given(_layers(), st.sampled_from(list(STRATEGIES)), st.floats(0, 1), st.floats(0, 1))
def test_more_budget_never_lowers_a_rank(layers, strategy, one, other):
    low, high = (allocate(layers, _budget(layers, share), strategy) for share in sorted((one, other)))
    for name, layer in layers.items():
        assert low.get(name, min(layer.shape) + 1) <= high.get(name, min(layer.shape) + 1)


def test_too_small_a_budget_is_refused_with_the_least():
    layers = {"fc1": _layer(10, 20, 0), "fc2": _layer(5, 10, 1)}
    for budget in (44, float("nan")):
        with pytest.raises(ValueError, match=f"budget of {budget} is too small; one direction in every layer costs 45"):
            allocate(layers, budget)
    assert allocate(layers, 45) == {"fc1": 1, "fc2": 1}


def _trained_like():
    model = mlp([40, 60, 50, 30, 10], seed=0)
    x = draw(200, 40) * torch.logspace(-1, 0, 40)
    outputs = decompose(model, output_moments(model, x, linear_layers(model)))
    return model, layers_of(decompose(model), outputs), x


def test_uniform_ranks_are_equal():
    _, layers, _ = _trained_like()
    wanted = dict.fromkeys(layers, 4)
    assert allocate(layers, total_cost(layers, wanted), "uniform") == wanted


def test_noise_of_the_weights_alone_meets_gavish_and_donoho_at_their_threshold():
    generator = torch.Generator().manual_seed(0)
    layers, wanted = {}, {}
    for name, n, m, rank in (("fc1", 60, 40, 3), ("fc2", 50, 60, 7)):
        A = torch.randn(n, rank, generator=generator) @ torch.randn(rank, m, generator=generator)
        s = torch.linalg.svdvals((A + 0.1 * torch.randn(n, m, generator=generator)).double()).numpy()
        layers[name] = Layer((n, m), s, np.ones(len(s)))
        wanted[name] = int((s > gavish_donoho_threshold(s, (n, m))).sum())
    assert wanted == {"fc1": 3, "fc2": 7}
    assert allocate(layers, total_cost(layers, wanted), "gavish-donoho") == wanted


def _squared_error(layers, ranks, relative):
    """Return the squared error of the outputs of all layers, or that as a share of a layer's square."""
    squares = {name: layer.output_singular_values**2 for name, layer in layers.items()}
    return sum(squares[n][rank:].sum() / (squares[n].sum() if relative else 1) for n, rank in ranks.items())


@pytest.mark.parametrize("strategy", ["activation-aware", "fisher-weighted"])
@given(st.integers(0, 30), st.integers(20, 100))
def test_by_an_error_no_ranks_that_cost_as_little_err_less(strategy, seed, budget):
    layers = {f"fc{i}": _layer(n, m, 10 * seed + i) for i, (n, m) in enumerate([(6, 9), (5, 5)])}
    found = allocate(layers, max(budget, _budget(layers, 0)), strategy)
    if found.keys() != layers.keys():
        return  # the last step, to dense, is not concave
    every = [range(1, layer.largest_rank + 1) for layer in layers.values()]
    ranks = [dict(zip(layers, some, strict=True)) for some in itertools.product(*every)]
    affordable = [some for some in ranks if total_cost(layers, some) <= total_cost(layers, found)]
    of_found, *of_others = (_squared_error(layers, r, strategy == "activation-aware") for r in (found, *affordable))
    assert of_found <= min(of_others) + 1e-12


def test_layers_know_the_error_of_their_outputs_and_what_a_network_costs():
    model, layers, x = _trained_like()
    ranks = {"fc1": 5, "fc3": 7}
    cut = factorize(model, ranks, decompose(model, output_moments(model, x, linear_layers(model))))
    for name, inputs in {"fc1": x, "fc3": model[:4](x)}.items():
        wanted = model.get_submodule(name)(inputs)
        error = ((cut.get_submodule(name)(inputs) - wanted).norm() / wanted.norm()).item() ** 2
        assert error == pytest.approx(_squared_error(layers, {name: ranks[name]}, relative=True), rel=1e-4)
    assert total_cost(layers, ranks) == n_parameters(cut)


@given(st.integers(1, 40), st.lists(st.integers(1, 40), min_size=1))
def test_the_smallest_rank_is_found_between_those_of_the_grid(least, grid):
    assert selection.smallest_rank(lambda rank: float(rank), [*grid, 40], least) == max(least, min(grid))
    with pytest.raises(ValueError, match="even rank 40 stays below the target 41"):
        selection.smallest_rank(lambda rank: float(rank), [*grid, 40], 41)


def test_shares_pay_for_ranks_layer_by_layer():
    layers = {"wide": _layer(100, 80, 0), "narrow": _layer(30, 20, 1)}
    assert allocate_by_shares(layers, 1000, [0.6, 0.4]) == {"wide": 3, "narrow": 8}  # 180 and 50 numbers a rank
    assert allocate_by_shares(layers, 100, [0.5, 0.5]) == {"wide": 1, "narrow": 1}, "one direction at least"
    assert allocate_by_shares(layers, 10**6, [0.5, 0.5]) == {"wide": 44, "narrow": 11}, "never dense"
    with pytest.raises(ValueError, match="shorter"):
        allocate_by_shares(layers, 1000, [1.0])


@given(st.integers(0, 200_000))
def test_a_narrow_network_is_the_largest_of_its_proportions_within_the_budget(budget):
    def weights(widest):
        hidden = [max(1, width * widest // 400) for width in (400, 200)]
        return sum(n * m for n, m in itertools.pairwise([784, *hidden, 10]))

    if budget < weights(1):
        with pytest.raises(ValueError, match="no network of this depth has"):
            selection.narrow_widths([784, 400, 200, 10], budget)
        return
    narrowed = selection.narrow_widths([784, 400, 200, 10], budget)
    assert sum(n * m for n, m in itertools.pairwise(narrowed)) == weights(narrowed[1]) <= budget
    assert weights(narrowed[1] + 1) > budget

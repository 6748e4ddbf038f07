"""Ranks chosen by machine: budgets are kept, ways do what they say, and those by an error against all choices."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_helpers import selection
from lowrank_helpers.factorization import decompose, factorize, input_moments
from lowrank_helpers.models import linear_layers, mlp, n_parameters
from lowrank_helpers.rank import energy_rank, gavish_donoho_rank
from lowrank_helpers.selection import (
    BY_WEIGHTS,
    WAYS,
    Layer,
    by_shares,
    choice_of,
    layers_of,
    narrow_widths,
    smallest,
    take,
)


def _layer(n, m, seed):
    generator = np.random.default_rng(seed)
    weights, outputs = (np.sort(generator.gamma(0.5, size=min(n, m)))[::-1] for _ in range(2))
    return Layer((n, m), weights, outputs)


@st.composite
def _layers(draw):
    shapes = draw(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=4))
    return {f"fc{i}": _layer(n, m, i) for i, (n, m) in enumerate(shapes)}


def choose(way, layers, budget):
    return take(layers, budget, WAYS[way])


def _least(layers):
    return sum(layer.costs[0] for layer in layers.values())


def _dense(layers):
    return sum(n * m for n, m in (layer.shape for layer in layers.values()))


@given(_layers(), st.floats(0, 1), st.sampled_from(list(WAYS)))
def test_a_budget_is_kept_and_no_factors_cost_more_than_their_matrix(layers, share, way):
    budget = _least(layers) + share * (_dense(layers) - _least(layers))
    choice = choose(way, layers, budget)
    spent = 0
    for name, layer in layers.items():
        n, m = layer.shape
        if rank := choice.ranks.get(name):
            assert rank * (n + m) < n * m
        spent += rank * (n + m) if rank else n * m
    assert spent == choice.parameters <= budget


@pytest.mark.parametrize("way", WAYS)
def test_only_the_ways_by_weights_ask_for_the_weights(way):
    layers = {name: _layer(*shape, seed) for seed, (name, shape) in enumerate({"a": (40, 50), "b": (30, 60)}.items())}
    turned = {name: replace(layer, weights=np.ones_like(layer.weights)) for name, layer in layers.items()}
    budget = _dense(layers) / 3
    same = choose(way, layers, budget) == choose(way, turned, budget)
    assert same == (way not in BY_WEIGHTS)


@given(_layers(), st.sampled_from(list(WAYS)))
def test_with_room_for_everything_all_stays_dense(layers, way):
    choice = choose(way, layers, _dense(layers))
    assert choice == selection.Choice({}, _dense(layers), 0)


@given(_layers(), st.sampled_from(list(WAYS)), st.floats(0, 1), st.floats(0, 1))
def test_more_budget_never_lowers_a_rank(layers, way, one, other):
    low, high = (
        choose(way, layers, _least(layers) + share * (_dense(layers) - _least(layers))).ranks
        for share in sorted((one, other))
    )
    for name, layer in layers.items():
        assert low.get(name, min(layer.shape) + 1) <= high.get(name, min(layer.shape) + 1)


@pytest.mark.parametrize("way", WAYS)
def test_too_small_a_budget_is_refused_with_the_least(way):
    layers = {"fc1": _layer(10, 20, 0), "fc2": _layer(5, 10, 1)}
    with pytest.raises(ValueError, match="a budget of 44 is too small; one direction in every layer costs 45"):
        choose(way, layers, 44)
    assert choose(way, layers, 45).ranks == {"fc1": 1, "fc2": 1}
    with pytest.raises(ValueError, match="too small"):
        choose(way, layers, float("nan"))


def _trained_like():
    model = mlp([40, 60, 50, 30, 10], seed=0)
    x = torch.randn(200, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 0, 40)
    outputs = decompose(model, input_moments(model, x, linear_layers(model)))
    return model, layers_of(decompose(model), outputs), x


def test_uniform_ranks_are_equal():
    _, layers, _ = _trained_like()
    per_rank = sum(sum(layer.shape) for layer in layers.values())
    assert choose("uniform", layers, 4 * per_rank).ranks == dict.fromkeys(layers, 4)


def test_energy_keeps_one_share_in_all_layers():
    _, layers, _ = _trained_like()
    wanted = {name: energy_rank(layer.weights, 0.3) for name, layer in layers.items()}
    assert len(set(wanted.values())) > 1
    budget = choice_of(layers, wanted).parameters
    assert choose("energy", layers, budget).ranks == wanted


def test_noise_meets_gavish_and_donoho_at_their_threshold():
    generator = torch.Generator().manual_seed(0)
    layers, wanted = {}, {}
    for name, n, m, rank in (("fc1", 60, 40, 3), ("fc2", 50, 60, 7)):
        A = torch.randn(n, rank, generator=generator) @ torch.randn(rank, m, generator=generator)
        s = torch.linalg.svdvals((A + 0.1 * torch.randn(n, m, generator=generator)).double()).numpy()
        layers[name], wanted[name] = Layer((n, m), s, s), gavish_donoho_rank(s, (n, m))
    assert wanted == {"fc1": 3, "fc2": 7}
    assert choose("Gavish–Donoho", layers, choice_of(layers, wanted).parameters).ranks == wanted


def _squared_error(layers, choice):
    return sum((layers[name].outputs[rank:] ** 2).sum() for name, rank in choice.ranks.items())


@pytest.mark.parametrize(
    ("way", "error"), [("output error", lambda layers, choice: choice.error), ("answer error", _squared_error)]
)
@given(st.integers(0, 30), st.integers(20, 100))
def test_by_an_error_no_choice_that_costs_as_little_errs_less(way, error, seed, budget):
    layers = {f"fc{i}": _layer(n, m, 10 * seed + i) for i, (n, m) in enumerate([(6, 9), (5, 5)])}
    budget = max(budget, _least(layers))
    found = choose(way, layers, budget)
    if not found.ranks or found.ranks.keys() != layers.keys():
        return  # the last step, to dense, is not concave
    every = [range(1, layer.largest_rank + 1) for layer in layers.values()]
    choices = [choice_of(layers, dict(zip(layers, ranks, strict=True))) for ranks in itertools.product(*every)]
    affordable = [choice for choice in choices if choice.parameters <= found.parameters]
    assert error(layers, found) <= min(error(layers, choice) for choice in affordable) + 1e-12


def test_the_predicted_error_is_that_of_the_outputs():
    model, layers, x = _trained_like()
    moments = input_moments(model, x, linear_layers(model))
    ranks = {"fc1": 5, "fc3": 7}
    cut = factorize(model, ranks, decompose(model, moments))
    errors = []
    for name in ranks:
        root = torch.linalg.cholesky(moments[name] + 1e-12 * torch.eye(len(moments[name])))
        A = linear_layers(model)[name].weight.double()
        errors.append(((A - cut.get_submodule(name).weight.double()) @ root).norm() / (A @ root).norm())
    choice = choice_of(layers, ranks)
    assert choice.error == pytest.approx(torch.stack(errors).norm().item(), rel=1e-4)
    assert choice.parameters == n_parameters(cut)


def test_uses_weigh_what_a_layer_costs():
    once, often = _layer(20, 20, 0), Layer((20, 20), *[_layer(20, 20, 0).weights] * 2, uses=100)
    choice = choose("output error", {"once": once, "often": often}, 100 * 40 * 4)
    assert "once" not in choice.ranks and choice.ranks["often"] < 4
    assert choice.parameters == 400 + 100 * 40 * choice.ranks["often"]


def test_the_smallest_choice_reaches_the_target_and_a_smaller_budget_does_not():
    _, layers, _ = _trained_like()

    def score(ranks):
        return -choice_of(layers, ranks).error

    found = smallest("output error", layers, score, -0.2)
    assert score(found.ranks) >= -0.2
    assert score(choose("output error", layers, 0.97 * found.parameters).ranks) < -0.2
    with pytest.raises(ValueError, match="even the whole network stays below the target 1"):
        smallest("output error", layers, score, 1)


def test_shares_pay_for_ranks_layer_by_layer():
    layers = {"wide": _layer(100, 80, 0), "narrow": _layer(30, 20, 1)}
    assert by_shares(layers, 1000, [0.6, 0.4]).ranks == {"wide": 3, "narrow": 8}  # 180 and 50 numbers a rank
    few = by_shares(layers, 100, [0.5, 0.5])
    assert few.ranks == {"wide": 1, "narrow": 1} and few.parameters == 230, "one direction at least"
    assert by_shares(layers, 10**6, [0.5, 0.5]).ranks == {"wide": 44, "narrow": 11}, "never dense"
    with pytest.raises(ValueError, match="shorter"):
        by_shares(layers, 1000, [1.0])


@pytest.mark.parametrize("budget", [813, 5_000, 60_000, 124_999])
def test_a_narrow_network_is_the_largest_of_its_proportions_within_the_budget(budget):
    widths = [784, 400, 200, 10]

    def weights(widest):
        hidden = [max(1, width * widest // 400) for width in widths[1:-1]]
        return sum(n * m for n, m in itertools.pairwise([784, *hidden, 10]))

    narrowed = narrow_widths(widths, budget)
    assert (
        sum(n * m for n, m in itertools.pairwise(narrowed)) == weights(narrowed[1]) <= budget < weights(narrowed[1] + 1)
    )


def test_no_narrow_network_for_a_budget_below_one_unit_a_layer():
    with pytest.raises(ValueError, match="no network of this depth has 700 weights"):
        narrow_widths([784, 400, 10], 700)

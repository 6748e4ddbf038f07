"""Rank allocation: how many directions each layer keeps within a budget.

A layer's directions are taken in order, the strongest first, so ranks say how far to go in each layer. Every strategy
gives each direction a priority, and directions of all layers are taken by it until the budget is spent. ``STRATEGIES``
names the priorities.

The last step of a layer leaves it dense: factors never cost more than the matrix.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from lowrank_helpers.factorization import Decomposition
from lowrank_helpers.rank import gavish_donoho_threshold

PRECISION = 1.01  # ratio of budgets down to which the smallest one is searched

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Layer:
    """What a strategy knows of a layer.

    Attributes
    ----------
    shape : (int, int)
        n and m of its matrix: a rank costs n + m numbers, the dense matrix n·m.
    weight_singular_values : array of shape (min(n, m),)
        Of the matrix, largest first; only the strategies ``BY_WEIGHTS`` use them.
    output_singular_values : array of shape (min(n, m),)
        The root mean square of its outputs along their principal directions, as of
        ``factorization.ActivationAwareSVD``, or of what they do to the model's outputs where that is Fisher-weighted;
        without data, the matrix's again.
    uses : float
        How often the matrix is used for one input: 1 counts parameters; for multiplications, the positions of a
        convolution.
    """

    shape: tuple[int, int]
    weight_singular_values: Array
    output_singular_values: Array
    uses: float = 1

    @property
    def largest_rank(self) -> int:
        """The largest rank whose factors cost less than the matrix; may be 0."""
        n, m = self.shape
        return (n * m - 1) // (n + m)

    @property
    def costs(self) -> Array:
        """What each step costs, rank 1 to ``largest_rank`` and then dense."""
        n, m = self.shape
        steps = np.full(self.largest_rank, n + m)
        return self.uses * np.append(steps, n * m - steps.sum())

    @property
    def errors(self) -> Array:
        """The squared error of the outputs, as a share of their square, at rank 0 to ``largest_rank`` and dense."""
        tails = _tails(self.output_singular_values)
        return np.append(tails[: self.largest_rank + 1], 0)


@dataclass(frozen=True)
class Allocation:
    """Ranks for the layers of a network.

    Attributes
    ----------
    ranks : dict of str to int
        By layer; a layer that is not named stays dense.
    cost : int
        Of all layers, dense ones included, in the unit of the budget: parameters, or multiplications where a layer's
        ``uses`` says so.
    error : float
        Predicted: the root of the summed squares of the layers' relative output errors. To first order, independent
        errors of different layers add in squares.
    """

    ranks: dict[str, int]
    cost: int
    error: float


def layers_of(
    weights: Mapping[str, Decomposition], outputs: Mapping[str, Decomposition] | None = None
) -> dict[str, Layer]:
    """Return what to choose among, from ``decompose(model)`` and ``decompose(model, moments, …)``."""
    outputs = outputs or weights
    return {
        name: Layer(_shape(svd), svd.s.double().cpu().numpy(), outputs[name].s.double().cpu().numpy())
        for name, svd in weights.items()
    }


def _shape(svd: Decomposition) -> tuple[int, int]:
    factors = svd.factors(1)
    return len(factors.B), factors.C.shape[1]


def allocation_of(layers: Mapping[str, Layer], ranks: Mapping[str, int]) -> Allocation:
    """Return ranks with their cost and predicted error; ranks past the largest useful one mean dense."""
    kept = {name: rank for name, rank in ranks.items() if rank <= layers[name].largest_rank}
    cost = sum(layer.costs[: kept.get(name)].sum() for name, layer in layers.items())
    error = sum(layers[name].errors[rank] for name, rank in kept.items())
    return Allocation(kept, round(cost), float(np.sqrt(error)))


def _tails(s: Array) -> Array:
    """Return what share of the squares lies beyond each rank, 0 to len(s)."""
    squares = np.append(s**2, 0)
    tails = np.cumsum(squares[::-1])[::-1]
    return tails / tails[0] if tails[0] > 0 else tails


def by_index(layer: Layer) -> Array:
    """Uniform: the r-th direction of every layer comes before the next one of any."""
    return -np.arange(layer.largest_rank + 1.0)


def by_energy(layer: Layer) -> Array:
    """Energy: every layer keeps the same share of its squared singular values."""
    return _tails(layer.weight_singular_values)[: layer.largest_rank + 1]


def by_noise(layer: Layer) -> Array:
    """Singular values in units of Gavish & Donoho's threshold: those above 1 are signal by their rule."""
    s = layer.weight_singular_values
    return np.nan_to_num((s / gavish_donoho_threshold(s, layer.shape))[: layer.largest_rank + 1])


def by_output_error(layer: Layer) -> Array:
    """Activation-aware: what a step takes off the squared error of the layer's outputs, as a share, per parameter.

    Taking the greatest first is the optimum for a sum of concave curves, up to the last step (Everett 1963).
    """
    return -np.diff(layer.errors) / layer.costs


def by_fisher(layer: Layer) -> Array:
    """Fisher-weighted: what a step takes off the squared error of the model's outputs, to first order, per parameter.

    For Fisher-weighted ``output_singular_values``, which have one unit in all layers.
    """
    return by_output_error(layer) * np.sum(layer.output_singular_values**2)


STRATEGIES: dict[str, Callable[[Layer], Array]] = {
    "uniform": by_index,
    "energy": by_energy,
    "gavish-donoho": by_noise,
    "activation-aware": by_output_error,
    "fisher-weighted": by_fisher,
}  # the priorities to take directions by
BY_WEIGHTS = ("energy", "gavish-donoho")  # the strategies that use ``Layer.weight_singular_values``


def allocate(layers: Mapping[str, Layer], budget: float, strategy: str) -> Allocation:
    """Take directions of all layers by falling priority until the next one does not fit the budget.

    Every layer keeps one direction at least. Of equals the first layer's comes first.

    Parameters
    ----------
    layers : mapping of str to Layer
    budget : float
        Of the cost of all layers.
    strategy : str
        One of ``STRATEGIES``.

    Raises
    ------
    ValueError
        The budget is too small even for one direction in every layer.
    """
    least = sum(layer.costs[0] for layer in layers.values())
    if not budget >= least:
        raise ValueError(f"a budget of {budget:,} is too small; one direction in every layer costs {least:,.0f}")
    steps = [np.minimum.accumulate(STRATEGIES[strategy](layer)) for layer in layers.values()]
    for step in steps:
        step[0] = np.inf
    order = np.argsort(-np.concatenate(steps), kind="stable")
    owner = np.repeat(np.arange(len(layers)), [len(step) for step in steps])[order]
    costs = np.concatenate([layer.costs for layer in layers.values()])[order]
    n_taken = np.searchsorted(np.cumsum(costs), budget, side="right")
    ranks = np.bincount(owner[:n_taken], minlength=len(layers))
    return allocation_of(layers, dict(zip(layers, ranks.tolist(), strict=True)))


def smallest_allocation(
    layers: Mapping[str, Layer], strategy: str, score: Callable[[Mapping[str, int]], float], target: float
) -> Allocation:
    """Return the allocation of the smallest budget, to within 1 %, whose score reaches a target.

    Searched by bisection: the score should rise with the budget, but for noise. All layers dense must reach the target.
    """
    best = allocation_of(layers, {})
    low, high = float(sum(layer.costs[0] for layer in layers.values())), float(best.cost)
    while high > PRECISION * low:
        middle = (low * high) ** 0.5
        allocation = allocate(layers, middle, strategy)
        if score(allocation.ranks) >= target:
            best, high = allocation, middle
        else:
            low = middle
    return best


def allocate_by_shares(layers: Mapping[str, Layer], budget: float, shares: Sequence[float]) -> Allocation:
    """Give each layer a share of the budget: the largest rank that it pays for, but never so many as to stay dense.

    Parameters
    ----------
    shares : sequence of float
        One for each layer, in their order, with a sum of at most 1. Where a network is tuned after the cut, it is what
        a layer can still learn that counts more than what the cut takes from it.

    Raises
    ------
    ValueError
        The shares are not as many as the layers.
    """
    pairs = zip(layers.items(), shares, strict=True)
    paid = {name: int(share * budget / sum(layer.shape)) for (name, layer), share in pairs}
    return allocation_of(layers, {name: min(max(1, paid[name]), layer.largest_rank) for name, layer in layers.items()})


def narrow_widths(widths: Sequence[int], budget: int) -> list[int]:
    """Return the widths of a dense network of at most so many weights whose hidden layers keep their proportions.

    Parameters
    ----------
    widths : sequence of int
        Inputs, hidden units, classes.
    budget : int
        Weights, biases not counted.

    Raises
    ------
    ValueError
        One unit in every hidden layer is too much already.

    Examples
    --------
    >>> narrow_widths([784, 1024, 1024, 512, 256, 10], 125_000)
    [784, 126, 126, 63, 31, 10]
    """
    n_inputs, *hidden, n_classes = widths
    for widest in range(max(hidden), 0, -1):
        narrowed = [n_inputs, *(max(1, width * widest // max(hidden)) for width in hidden), n_classes]
        if sum(n * m for n, m in pairwise(narrowed)) <= budget:
            return narrowed
    raise ValueError(f"no network of this depth has {budget:,} weights or fewer")


def smallest_rank(score: Callable[[int], float], grid: Sequence[int], target: float) -> int:
    """Return the smallest rank from which on a score stays at or above a target.

    Walks down the grid while the target holds, then tries every rank of the gap below, so that the answer is
    exact although the score is computed few times.

    Parameters
    ----------
    score : callable
        Of a rank; rises with it but for noise.
    grid : sequence of int
        Ranks in any order; the largest must reach the target.
    target : float

    Raises
    ------
    ValueError
        The largest rank of the grid misses the target.

    Examples
    --------
    >>> smallest_rank(lambda rank: 1 - 1 / rank, [1, 8, 64], target=0.895)
    10
    """
    ranks = sorted(grid, reverse=True)
    if score(ranks[0]) < target:
        raise ValueError(f"even rank {ranks[0]} stays below the target {target}")
    holds = ranks[0]
    for rank in ranks[1:]:
        if score(rank) < target:
            return next(r for r in range(rank + 1, holds + 1) if score(r) >= target)
        holds = rank
    return holds

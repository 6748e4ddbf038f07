"""Rank allocation: how many directions each layer keeps within a budget.

A layer's directions are taken in order, the strongest first. A strategy gives each a priority, by which those of all
layers are taken until the budget is spent. The last step of a layer leaves it dense: factors never cost more.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from lowrank_helpers.factorization import Decomposition
from lowrank_helpers.rank import Array, gavish_donoho_threshold


@dataclass(frozen=True)
class Layer:
    """What a strategy knows of a layer.

    Attributes
    ----------
    shape : (int, int)
        n and m of its matrix: a rank costs n + m numbers, the dense matrix n·m.
    weight_singular_values : array of shape (min(n, m),)
        Of the matrix, largest first; only the strategy ``gavish-donoho`` uses them.
    output_singular_values : array of shape (min(n, m),)
        ``s`` of its :class:`~lowrank_helpers.factorization.ActivationAwareSVD`; without data, the matrix's again.
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


def layers_of(weights: Mapping[str, Decomposition], outputs: Mapping[str, Decomposition]) -> dict[str, Layer]:
    """Return what to choose among, from ``decompose(model)`` and ``decompose(model, moments, …)``."""
    layers = {}
    for name, svd in weights.items():
        B, C, _ = svd.factors(1)
        s, of_outputs = (svds[name].s.double().cpu().numpy() for svds in (weights, outputs))
        layers[name] = Layer((len(B), C.shape[1]), s, of_outputs)
    return layers


def total_cost(layers: Mapping[str, Layer], ranks: Mapping[str, int]) -> int:
    """Return what all layers cost, those without a rank as dense ones, in the unit that their ``uses`` count."""
    total: float = sum(layer.costs[: ranks.get(name)].sum() for name, layer in layers.items())
    return round(total)


def _tails(s: Array) -> Array:
    """Return what share of the squares lies beyond each rank, 0 to len(s)."""
    squares = np.append(s**2, 0)
    tails = np.cumsum(squares[::-1])[::-1]
    return tails / tails[0] if tails[0] > 0 else tails


def by_index(layer: Layer) -> Array:
    """Uniform: the r-th direction of every layer comes before the next one of any."""
    return -np.arange(layer.largest_rank + 1.0)


def by_noise(layer: Layer) -> Array:
    """Singular values in units of Gavish & Donoho's threshold: those above 1 are signal by their rule."""
    s = layer.weight_singular_values
    return np.nan_to_num((s / gavish_donoho_threshold(s, layer.shape))[: layer.largest_rank + 1])


def by_output_error(layer: Layer) -> Array:
    """Activation-aware: what a step takes off the squared error of the layer's outputs, as a share, per parameter.

    Taking the greatest first is the optimum for a sum of concave curves, up to the last step (Everett 1963).
    """
    errors = np.append(_tails(layer.output_singular_values)[: layer.largest_rank + 1], 0)
    return -np.diff(errors) / layer.costs


def by_fisher(layer: Layer) -> Array:
    """Fisher-weighted: what a step takes off the squared error of the model's outputs, to first order, per parameter.

    For Fisher-weighted ``output_singular_values``, which have one unit in all layers.
    """
    return by_output_error(layer) * np.sum(layer.output_singular_values**2)


STRATEGIES: dict[str, Callable[[Layer], Array]] = {
    "uniform": by_index,
    "gavish-donoho": by_noise,
    "activation-aware": by_output_error,
    "fisher-weighted": by_fisher,
}  # the priorities to take directions by


def allocate(layers: Mapping[str, Layer], budget: float, strategy: str = "fisher-weighted") -> dict[str, int]:
    """Take directions of all layers by falling priority until the next one does not fit the budget; return the ranks.

    The budget is of the cost of all layers. Each layer keeps one at least; a layer that is not returned stays dense.
    Of equal directions the first layer's comes first. The strategy is one of ``STRATEGIES``.

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
    ranks = zip(layers, np.bincount(owner[:n_taken], minlength=len(layers)).tolist(), strict=True)
    return {name: rank for name, rank in ranks if rank <= layers[name].largest_rank}


def allocate_by_shares(layers: Mapping[str, Layer], budget: float, shares: Sequence[float]) -> dict[str, int]:
    """Give each layer a share of the budget: the largest rank that it pays for, but never so many as to stay dense.

    Parameters
    ----------
    shares : sequence of float
        One for each layer, in their order, with a sum of at most 1. Where a network is tuned after the cut, what a
        layer can still learn counts more than what the cut takes from it.

    Raises
    ------
    ValueError
        The shares are not as many as the layers.
    """
    return {
        name: min(max(1, int(share * budget / sum(layer.shape))), layer.largest_rank)
        for (name, layer), share in zip(layers.items(), shares, strict=True)
    }


def narrow_widths(widths: Sequence[int], budget: int) -> list[int]:
    """Return the widths of a dense network of at most so many weights whose hidden layers keep their proportions.

    Widths are inputs, hidden units and classes; the budget counts no biases.

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

    Walks down the grid, given in any order, while the target holds, then tries every rank of the gap below. So the
    answer is exact although the score, which should rise with the rank, is computed few times.

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

"""Ranks chosen by machine: how many directions each layer keeps within a budget.

A layer's directions are taken in order, the strongest first, so a choice of ranks is a choice of how far to go in each
layer. Every way gives each direction a priority, and directions of all layers are taken by it until the budget is
spent. ``WAYS`` names the priorities.

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
Score = Callable[[Mapping[str, int]], float]


@dataclass(frozen=True)
class Layer:
    """What there is to know of a layer when ranks are chosen.

    Attributes
    ----------
    shape : (int, int)
        n and m of its matrix: a rank costs n + m numbers, the dense matrix n·m.
    weights : array of shape (min(n, m),)
        The matrix's singular values, largest first; no other ways than ``BY_WEIGHTS`` ask for them.
    outputs : array of shape (min(n, m),)
        The root mean square of its outputs along their principal directions, as of
        ``factorization.ActivationAwareSVD``, or of what they do to the model's outputs where that is Fisher-weighted;
        where no data are known, ``weights`` again.
    uses : float
        How often the matrix is used for one input: 1 counts parameters; for multiplications, the positions of a
        convolution.
    """

    shape: tuple[int, int]
    weights: Array
    outputs: Array
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
        tails = _tails(self.outputs)
        return np.append(tails[: self.largest_rank + 1], 0)

    def cost(self, rank: int | None) -> float:
        """Return what a rank costs, or the dense layer for None."""
        return float(self.costs[:rank].sum())


@dataclass(frozen=True)
class Choice:
    """Ranks for the layers of a network.

    Attributes
    ----------
    ranks : dict of str to int
        By layer; a layer that is not named stays dense.
    parameters : int
        Of the layers chosen among, dense ones included: in the unit of the budget, so multiplications where a layer's
        ``uses`` says so.
    error : float
        Predicted: the root of the summed squares of the layers' relative output errors. To first order, errors of
        different layers that know nothing of each other add in squares.
    """

    ranks: dict[str, int]
    parameters: int
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


def choice_of(layers: Mapping[str, Layer], ranks: Mapping[str, int]) -> Choice:
    """Return a choice with its cost and predicted error; ranks past the largest useful one mean dense."""
    kept = {name: rank for name, rank in ranks.items() if rank <= layers[name].largest_rank}
    cost = sum(layer.cost(kept.get(name)) for name, layer in layers.items())
    error = sum(layers[name].errors[rank] for name, rank in kept.items())
    return Choice(kept, round(cost), float(np.sqrt(error)))


def _tails(s: Array) -> Array:
    """Return what share of the squares lies beyond each rank, 0 to len(s)."""
    squares = np.append(s**2, 0)
    tails = np.cumsum(squares[::-1])[::-1]
    return tails / tails[0] if tails[0] > 0 else tails


def by_index(layer: Layer) -> Array:
    """Uniform: the r-th direction of every layer comes before the next one of any."""
    return -np.arange(layer.largest_rank + 1.0)


def by_energy(layer: Layer) -> Array:
    """Every layer keeps the same share of its squared singular values."""
    return _tails(layer.weights)[: layer.largest_rank + 1]


def by_output_error(layer: Layer) -> Array:
    """Output error: what a step takes off its square, relative to the outputs', per parameter.

    Taking the greatest first is the optimum for a sum of concave curves, up to the last step (Everett 1963).
    """
    return -np.diff(layer.errors) / layer.costs


def by_answer_error(layer: Layer) -> Array:
    """Answer error: what a step takes off the square of the answers' error, which all layers share, per parameter.

    For ``outputs`` that are Fisher-weighted: others have another unit in each layer.
    """
    return by_output_error(layer) * np.sum(layer.outputs**2)


def by_noise(layer: Layer) -> Array:
    """Singular values in units of Gavish & Donoho's threshold: those above 1 are signal by their rule."""
    signal = layer.weights / gavish_donoho_threshold(layer.weights, layer.shape)
    return np.nan_to_num(signal[: layer.largest_rank + 1])


def take(layers: Mapping[str, Layer], budget: float, priority: Callable[[Layer], Array]) -> Choice:
    """Take directions of all layers by falling priority until the next one does not fit the budget.

    Every layer keeps one direction at least. Of equals the first layer's comes first.

    Raises
    ------
    ValueError
        The budget is too small even for that.
    """
    check_budget(layers, budget)
    steps = {name: np.minimum.accumulate(priority(layer)) for name, layer in layers.items()}
    for step in steps.values():
        step[0] = np.inf
    order = np.argsort(-np.concatenate([*steps.values()]), kind="stable")
    owner = np.repeat(np.arange(len(layers)), [len(step) for step in steps.values()])[order]
    costs = np.concatenate([layer.costs for layer in layers.values()])[order]
    n_taken = np.searchsorted(np.cumsum(costs), budget, side="right")
    ranks = np.bincount(owner[:n_taken], minlength=len(layers))
    return choice_of(layers, dict(zip(layers, ranks.tolist(), strict=True)))


def check_budget(layers: Mapping[str, Layer], budget: float) -> None:
    """Raise ``ValueError`` unless every layer can keep one direction."""
    least = sum(layer.costs[0] for layer in layers.values())
    if not budget >= least:
        raise ValueError(f"a budget of {budget:,} is too small; one direction in every layer costs {least:,.0f}")


def by_shares(layers: Mapping[str, Layer], budget: float, shares: Sequence[float]) -> Choice:
    """Give each layer a share of the budget: the largest rank that it pays for, of which factors still save numbers.

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
    return choice_of(layers, {name: min(max(1, paid[name]), layer.largest_rank) for name, layer in layers.items()})


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
    [784, 116, 116, 58, 29, 10]
    """
    n_inputs, *hidden, n_classes = widths
    for widest in range(max(hidden), 0, -1):
        narrowed = [n_inputs, *(max(1, width * widest // max(hidden)) for width in hidden), n_classes]
        if sum(n * m for n, m in pairwise(narrowed)) <= budget:
            return narrowed
    raise ValueError(f"no network of this depth has {budget:,} weights or fewer")


WAYS: dict[str, Callable[[Layer], Array]] = {
    "uniform": by_index,
    "energy": by_energy,
    "Gavish–Donoho": by_noise,
    "output error": by_output_error,
    "answer error": by_answer_error,
}  # the priorities to take directions by
BY_WEIGHTS = ("energy", "Gavish–Donoho")  # the ways that ask for ``Layer.weights``


def smallest(way: str, layers: Mapping[str, Layer], score: Score, target: float) -> Choice:
    """Return the choice of the smallest budget, to within 1 %, whose score reaches a target.

    Searched by bisection: the score should rise with the budget, but for noise.

    Raises
    ------
    ValueError
        The score of the whole network misses the target.
    """
    best = choice_of(layers, {})
    if score(best.ranks) < target:
        raise ValueError(f"even the whole network stays below the target {target}")
    low, high = sum(layer.costs[0] for layer in layers.values()), best.parameters
    while high > PRECISION * low:
        middle = (low * high) ** 0.5
        choice = take(layers, middle, WAYS[way])
        if score(choice.ranks) >= target:
            best, high = choice, middle
        else:
            low = middle
    return best

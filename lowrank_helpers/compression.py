"""Compress any network: its linear layers and convolutions become low-rank layers, within a budget.

A convolution is a matrix (out, in·window) that is applied at every position. Factors that fit what a layer puts out on
images, instead of its weight, are those of Zhang et al. 2016, arXiv 1505.06798, section 2.1.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lowrank_helpers.calibration import LARGE_BATCH, Batches, Forward, call, output_fisher, output_moments
from lowrank_helpers.data import Dataset
from lowrank_helpers.factorization import SVD, ActivationAwareSVD, Decomposition, Factors, precise
from lowrank_helpers.layers import factorize_standard, replaceable_layers, substitute_, with_factors
from lowrank_helpers.models import LowRankLayer, Replaceable, n_parameters, named_layers
from lowrank_helpers.selection import Layer, allocate, layers_of, total_cost
from lowrank_helpers.timing import median_seconds
from lowrank_helpers.training import progress

MEASURED = 8  # held-out batches at most on which the change of the outputs is measured
FAR = 2.0  # times its prediction: a larger change of the outputs is far from it
SMALL = 0.05  # relative change of the outputs that is never far
PRECISION = 1.01  # ratio of budgets down to which one is searched
NOISE = 0.05  # relative difference of two times that says nothing
Metric = str | Callable[[nn.Module], float]
OWN_OUTPUTS, OWN_WEIGHT = "its own outputs", "its weight"  # what factors fit instead of the model's outputs


class Change(NamedTuple):
    """A quantity of the model that was given and of the one returned."""

    before: float
    after: float

    @property
    def share(self) -> float:
        """What is left of it."""
        return self.after / self.before if self.before else math.nan

    def __str__(self) -> str:
        """Write ``before → after (share)``; counts in full, what is measured to four digits."""
        before, after = (f"{x:,}" if isinstance(x, int) else f"{x:.4g}" for x in (self.before, self.after))
        return f"{before} → {after} ({self.share:.1%})"


@dataclass(frozen=True)
class Report:
    """What :func:`compress` did.

    Attributes
    ----------
    ranks : dict of str to int
        Of the layers that became two. A layer in neither this dict nor the next was chosen to stay dense.
    left_alone : dict of str to str
        The model's other matrices, with the reason why they cannot be replaced.
    fallbacks : dict of str to str
        What a layer's factors fit where the model's outputs have no derivative by it, or changed far more than
        predicted.
    error : float
        The relative change of the outputs that was predicted to first order: √(E‖change‖² / E‖outputs‖²). Layers that
        are fitted to their own outputs count with the relative change of those.
    measured_error : float
        The same, measured on inputs that fitted nothing. With ``logits=True`` outputs count less their mean over the
        classes.
    parameters, flops : Change
        Operations are for one input, two a multiplication and addition, counted by PyTorch's ``FlopCounterMode``, which
        sees no recurrent layers.
    seconds : Change
        Median of a batch, of ``BATCH`` inputs where batches were not given. Fewer FLOPs are often not faster.
    score : Change or None
        What ``metric`` returned, where it is a function.
    frontier : dict of float to float
        What other budgets would cost: by share of the parameters, the score, or else the relative change of the outputs
        on inputs that fitted nothing. Measured with the factors as first chosen.
    """

    ranks: dict[str, int]
    left_alone: dict[str, str]
    fallbacks: dict[str, str]
    error: float
    measured_error: float
    parameters: Change
    flops: Change
    seconds: Change
    score: Change | None = None
    frontier: dict[float, float] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """Say in a sentence whether the model that is returned is worth it."""
        time = self.seconds.share
        slow = "Slower: do not use it" if time > 1 + NOISE else "Smaller, but no faster"
        word = "Faster" if time < 1 - NOISE else slow
        return (
            f"{word}; with {self.parameters.share:.0%} of the parameters it takes {time:.0%} of the time, and its "
            f"outputs change by {self.measured_error:.1%} before tuning."
        )

    def __str__(self) -> str:
        """Write the verdict, and a line for each size and each layer."""
        lines = [self.verdict, *(f"{name}: {size}" for name, size in vars(self).items() if isinstance(size, Change))]
        change = f"predicted {self.error:.3g}, measured {self.measured_error:.3g} on inputs that fitted nothing"
        lines += [f"relative change of the outputs: {change}"]
        fitted = {name: f", fitted to {what}" for name, what in self.fallbacks.items()}
        lines += [f"{name}: rank {rank}{fitted.get(name, '')}" for name, rank in self.ranks.items()]
        return "\n".join(lines + [f"{name}: left alone, {reason}" for name, reason in self.left_alone.items()])


def compress(
    model: nn.Module,
    data: Dataset | Iterable[Any],
    budget: float,
    *,
    forward: Forward = call,
    metric: Metric = "parameters",
    logits: bool = False,
    ignore: Collection[str] = (),
    n_budgets: int = 0,
) -> tuple[nn.Module, Report]:
    """Return a smaller copy of a model and what was done.

    Every ``nn.Linear``, and every ``nn.Conv1d`` to ``nn.Conv3d`` of one group, may become a
    :class:`~lowrank_helpers.models.LowRankLayer`, with factors that change the model's outputs least on about
    ``CALIBRATION`` inputs. Other matrices stay: make of a transposed one, as in GPT-2's ``Conv1D``, an ``nn.Linear``
    first. Nothing is trained: tuning the result for a few epochs regains much of what is lost.

    The change is predicted, then measured on at most ``MEASURED`` batches that fitted nothing. Where it is more than
    ``FAR`` times the prediction, each layer takes those factors with which it is least: as chosen, fitted to the
    layer's own outputs, or the truncated SVD of its weight. If that is far still, and one layer makes more than half
    of the change, it stays dense where the budget allows. Where ``metric`` is a function, nothing is called far.

    Parameters
    ----------
    model : nn.Module
        Stays as it is. One that is a single layer goes in an ``nn.Sequential``. Compile the result, not the model.
    data : Dataset, Tensor, or iterable of batches
        - A Dataset: its training images measure the layers' outputs, its validation images fit nothing.
        - A tensor of inputs (n, …): a sixth, drawn at random, fits nothing.
        - Any other iterable, such as a ``DataLoader`` that shuffles: every sixth batch fits nothing. It is read once,
          up to about ``CALIBRATION`` inputs, which are kept where they are. A batch is moved to the model's device when
          it is used, and must be small enough for a backward pass.
    budget : float
        For ``parameters`` and ``flops`` a share of the model's (a float up to 1) or a count (an int); for ``latency`` a
        share; for a function the least value that it must return of the smallest model found.
    forward : callable
        ``forward(model, batch)`` returns the outputs that count: one tensor (n_inputs, …). It is ``model(batch)`` by
        default, or ``model(batch[0])`` for a tuple or list. For a model that takes and gives dictionaries it may be
        ``lambda model, batch: model(**batch)["logits"]``.
    metric : {"parameters", "flops", "latency"} or callable
        What the budget is of. Latency is measured, here and now, on the first batch. A function scores a model, such as
        its accuracy on validation images or a loss with a minus: the more the better.
    logits : bool
        The outputs are logits: a change that all classes share is free, since it changes no probability.
    ignore : collection of str
        Layers that stay dense, by dotted name or shell pattern: ``["head", "encoder.*"]``.
    n_budgets : int
        Measure so many budgets of parameters besides, from rank 1 to dense, for ``Report.frontier``.

    Raises
    ------
    TypeError
        The model is no module, or the data are of another kind.
    ValueError
        The budget is impossible (the message says what is possible), no layer can be replaced, the model gives no
        finite tensor, or an option is unknown.
    """
    _check_options(budget, metric)
    _check_model(model)
    model_in_use = deepcopy(model).eval()
    batches = Batches.of(model_in_use, data, forward, logits)
    layers, left_alone = _layers_to_replace(model_in_use, batches, ignore)
    score = metric(model_in_use) if callable(metric) else math.nan
    _check_budget(model_in_use, batches, layers, budget, metric, score)
    svds, fallbacks = _decomposed(model_in_use, batches, layers)
    search = _Search(model_in_use, batches, budget, metric, score, svds, fallbacks, left_alone)
    factors, report = search.compressed()
    return with_factors(model, factors), replace(report, frontier=search.frontier(n_budgets))


SIZES: dict[str, Callable[[nn.Module, Batches], float]] = {
    "parameters": lambda model, batches: n_parameters(model),
    "flops": lambda model, batches: int(batches.flops(model)[""]),
}
METRICS = (*SIZES, "latency")


@dataclass(frozen=True)
class _Search:
    """What can be replaced in a model in evaluation mode, within which budget, and data to choose by."""

    model: nn.Module
    batches: Batches
    budget: float
    metric: Metric
    score: float  # what a function that scores models returns of the model itself
    svds: dict[str, ActivationAwareSVD]  # s is a share of the model's outputs, or of the layer's where that falls back
    fallbacks: dict[str, str]  # what factors fit of layers by which the model's outputs have no derivative
    left_alone: dict[str, str]  # the other matrices, with the reason why

    def compressed(self) -> tuple[dict[str, Factors], Report]:
        """Return factors within the budget and what was done, as :func:`compress` does."""
        ranks = self.ranks()
        # To first order, the squared changes by independent layers add.
        predicted = sum(self.svds[n].s[rank:].square().sum().item() for n, rank in ranks.items()) ** 0.5
        far = np.inf if callable(self.metric) else FAR * max(predicted, SMALL)
        factors, fallbacks = _cut(ranks, self.svds), {n: fit for n, fit in self.fallbacks.items() if n in ranks}
        if (error := self.change(factors)) > far:
            factors, refitted = self.refitted(ranks)
            error, fallbacks = self.change(factors), fallbacks | refitted
        small = with_factors(self.model, factors)
        parameters, flops = (Change(of(self.model, self.batches), of(small, self.batches)) for of in SIZES.values())
        score, seconds = Change(self.score, self.metric(small)) if callable(self.metric) else None, self.seconds(small)
        report = Report(ranks, self.left_alone, fallbacks, predicted, error, parameters, flops, seconds, score)
        return (factors, report) if error <= far else self.with_one_left_alone(factors, report)

    def layers(self, metric: str) -> dict[str, Layer]:
        """Return what to choose among where a step costs ``parameters`` or ``flops``."""
        layers = layers_of(self.svds, self.svds)
        if metric == "parameters":
            return layers
        flops = self.batches.flops(self.model)
        return {name: replace(layer, uses=flops[name] / math.prod(layer.shape)) for name, layer in layers.items()}

    def ranks(self) -> dict[str, int]:
        """Choose ranks within the budget."""
        budget, metric = self.budget, self.metric
        if callable(metric):
            return self.bisected("parameters", lambda small: metric(small) >= budget)[1]
        if metric == "latency":
            return self.bisected("flops", lambda small: self.seconds(small).share > budget)[0]
        layers, total = self.layers(metric), SIZES[metric](self.model, self.batches)
        limit = budget if isinstance(budget, Integral) else budget * total
        return allocate(layers, limit - (total - total_cost(layers, {})))

    def bisected(self, metric: str, is_large: Callable[[nn.Module], bool]) -> tuple[dict[str, int], dict[str, int]]:
        """Return the ranks of the largest budget whose model is not large, rank 1 at least, and of the smallest other.

        The two budgets are 1 % apart. What is measured should rise with the budget, but for noise.
        """
        layers = self.layers(metric)
        low, high = map(float, _least_and_most(layers))
        below, above = allocate(layers, low), dict[str, int]()
        halvings = math.ceil(math.log2(max(1.0, math.log(high / low, PRECISION))))
        for _ in progress(range(halvings), "trying budgets"):
            middle = (low * high) ** 0.5
            ranks = allocate(layers, middle)
            if is_large(with_factors(self.model, _cut(ranks, self.svds))):
                above, high = ranks, middle
            else:
                below, low = ranks, middle
        return below, above

    def frontier(self, n_budgets: int) -> dict[float, float]:
        """Return by share of the parameters what so many budgets cost, from rank 1 in every layer to dense ones."""
        layers, total = self.layers("parameters"), n_parameters(self.model)
        least, most = _least_and_most(layers)
        found = {}
        for budget in progress(np.geomspace(least, most, n_budgets).tolist(), "measuring budgets"):
            ranks = allocate(layers, budget)
            factors = _cut(ranks, self.svds)
            cost = self.metric(with_factors(self.model, factors)) if callable(self.metric) else self.change(factors)
            found[1 - (most - total_cost(layers, ranks)) / total] = float(cost)
        return found

    def refitted(self, ranks: Mapping[str, int]) -> tuple[dict[str, Factors], dict[str, str]]:
        """Return factors of these ranks with the least change, and what those fit that fall back.

        Starts with all layers alike, then turns to one after the other: no change is above that of truncated SVDs.
        """
        fits: dict[str, dict[str, Factors]] = {
            "": _cut(ranks, self.svds),
            OWN_OUTPUTS: _cut(ranks, {name: svd.unweighted() for name, svd in self.svds.items()}),
            OWN_WEIGHT: _cut(ranks, {name: SVD.of(self.svds[name].A) for name in ranks}),
        }

        def factors(chosen: Mapping[str, str]) -> dict[str, Factors]:
            return {name: fits[fit][name] for name, fit in chosen.items()}

        def least(choices: Iterable[dict[str, str]]) -> dict[str, str]:
            return min(choices, key=lambda chosen: self.change(factors(chosen)))

        chosen = least(dict.fromkeys(ranks, fit) for fit in fits)
        for name in progress(list(ranks), "trying factors"):
            chosen = least(chosen | {name: fit} for fit in fits)
        return factors(chosen), {name: fit for name, fit in chosen.items() if fit}

    def with_one_left_alone(self, factors: dict[str, Factors], report: Report) -> tuple[dict[str, Factors], Report]:
        """Leave that layer dense without whose cut the outputs change least, if it halves the change in the budget."""
        worst = min(factors, key=lambda name: self.change({n: pair for n, pair in factors.items() if n != name}))
        reason = f"with it cut, the outputs changed by {report.measured_error:.3g}, predicted {report.error:.3g}"
        svds = {name: svd for name, svd in self.svds.items() if name != worst}
        try:
            _check_budget(self.model, self.batches, svds, self.budget, self.metric, self.score)
            other = replace(self, svds=svds, left_alone=self.left_alone | {worst: reason}).compressed()
        except ValueError:  # the budget is too small without it
            return factors, report
        return other if other[1].measured_error < report.measured_error / 2 else (factors, report)

    @cached_property
    def measured_on(self) -> tuple[Sequence[Any], Tensor]:
        """Held-out batches, fewer where a model's outputs are large, and what the whole model puts out for them."""
        n_outputs = len(self.batches.outputs(self.model, self.batches.held_out[:1]))
        held_out = self.batches.held_out[: min(MEASURED, max(1, LARGE_BATCH // n_outputs))]
        return held_out, self.batches.outputs(self.model, held_out)

    def change(self, factors: Mapping[str, Factors]) -> float:
        """Return the relative change of the outputs with these factors, measured."""
        held_out, outputs = self.measured_on
        difference = self.batches.outputs(with_factors(self.model, factors), held_out) - outputs
        change = (difference.norm() / outputs.norm()).item() if difference.any() else 0.0
        return np.inf if np.isnan(change) else change

    def seconds(self, small: nn.Module) -> Change:
        """Time a smaller model right after the model itself, as a machine's speed drifts."""
        return Change(_seconds(self.model, self.batches), _seconds(small, self.batches))


def _least_and_most(layers: Mapping[str, Layer]) -> tuple[int, int]:
    """Return what rank 1 in every layer costs, and what dense layers do."""
    return total_cost(layers, dict.fromkeys(layers, 1)), total_cost(layers, {})


def _cut(ranks: Mapping[str, int], svds: Mapping[str, Decomposition]) -> dict[str, Factors]:
    return {name: svds[name].factors(rank) for name, rank in ranks.items()}


@torch.no_grad()
def _seconds(model: nn.Module, batches: Batches) -> float:
    return median_seconds(lambda: batches.forward(model, batches.fitted[0]), batches.device, at_least=0.02)


@torch.no_grad()
def _decomposed(
    model: nn.Module, batches: Batches, layers: Mapping[str, Replaceable]
) -> tuple[dict[str, ActivationAwareSVD], dict[str, str]]:
    """Decompose what layers do to a model's outputs, or what they put out; return by layer what such factors fit."""
    measured: list[tuple[float, int]] = []  # the sum of squares and the number of a batch's outputs

    def run(model: nn.Module, batch: Any) -> None:
        outputs = batches.forward(model, batch)
        measured.append((batches.counted(outputs).square().sum().item(), len(outputs)))

    moments = output_moments(model, batches.fitted, layers, forward=run)
    squares, n_inputs = map(sum, zip(*measured, strict=True))
    fisher: dict[str, Tensor] = {}
    with suppress(ValueError):  # without a derivative, all factors fit their layers' outputs
        found = output_fisher(model, batches.fitted, layers, logits=batches.logits, forward=batches.forward)
        fisher = {name: G / (squares / n_inputs) for name, G in found.items() if G.any() and squares > 0}
    svds = {}
    for name in progress(list(layers), "decomposing layers"):
        A = layers[name].weight.flatten(1)
        svd = ActivationAwareSVD.of(A.to(precise(A)), moments[name], fisher.get(name))
        svds[name] = svd if name in fisher else svd.relative()
    return svds, dict.fromkeys((name for name in layers if name not in fisher), OWN_OUTPUTS)


def _layers_to_replace(
    model: nn.Module, batches: Batches, ignore: Collection[str]
) -> tuple[dict[str, Replaceable], dict[str, str]]:
    """Return the layers that can be replaced, and of every other matrix of the model why it is left alone.

    A layer can be replaced if it has a weight of its own, the model calls it, and the outputs stay the same with two
    layers in its place. ``nn.MultiheadAttention``, for one, never calls its output layer: it reads the weight.
    """
    layers, left_alone = _layers_with_own_weight(model)
    for pattern in ignore:
        if not (matching := [name for name in (*layers, *left_alone) if fnmatchcase(name, pattern)]):
            raise ValueError(f"{pattern!r}, to be ignored, matches no layer; the layers are {', '.join(layers)}")
        left_alone |= dict.fromkeys(matching, f"ignored by {pattern!r}")
    outputs = batches.outputs(model, batches.fitted[:1])
    if not _alike(batches.outputs(model, batches.fitted[:1]), outputs):
        raise ValueError(f"{type(model).__name__} gives other outputs for the same inputs each time")
    called = batches.flops(model)
    for name in progress([name for name in layers if name not in left_alone], "trying layers"):
        if name not in called:
            left_alone[name] = "the model never calls it, or reads its weight without calling it"
        elif reason := _objection(model, name, layers[name], batches, outputs):
            left_alone[name] = reason
    layers = {name: layer for name, layer in layers.items() if name not in left_alone}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer that can be replaced: {left_alone}")
    return layers, left_alone


def _check_budget(
    model: nn.Module, batches: Batches, names: Collection[str], budget: float, metric: Metric, score: float
) -> None:
    """Refuse an impossible budget of the named layers before minutes are spent on them."""
    if callable(metric):
        if not score >= budget:
            raise ValueError(f"a score of {budget:.4g} is impossible: the model itself has {score:.4g}")
        return
    shapes = {name: model.get_parameter(f"{name}.weight").flatten(1).shape for name in names}
    smallest = factorize_standard(model, {name: 1 for name, (n, m) in shapes.items() if n + m < n * m}, seed=0)
    size = (SIZES | {"latency": _seconds})[metric]
    least = Change(size(model, batches), size(smallest, batches))
    if budget < (least.after if isinstance(budget, Integral) else least.share):
        raise ValueError(f"a budget of {budget:,} is too small: rank 1 wherever it can be leaves {metric} {least}")


def _layers_with_own_weight(model: nn.Module) -> tuple[dict[str, Replaceable], dict[str, str]]:
    """Return the layers that may be replaced, and of every other matrix of the model why it may not."""
    layers, left_alone = replaceable_layers(model), {}
    matrices = {
        f"{name}.{kind}".removesuffix(".weight").removeprefix("."): parameter
        for name, module in named_layers(model).items()
        for kind, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 1
    }
    for name, weight in matrices.items():
        shared = [other for other, w in matrices.items() if w.data_ptr() == weight.data_ptr() and other != name]
        if name not in layers:
            left_alone[name] = "only plain weights of nn.Linear, and of nn.Conv1d to 3d of one group, are replaced"
        elif shared:
            left_alone[name] = f"shares its weight with {', '.join(shared)}"
    return {name: layers[name] for name in matrices if name not in left_alone}, left_alone


def _objection(model: nn.Module, name: str, layer: Replaceable, batches: Batches, wanted: Tensor) -> str:
    """Replace a layer by two that do the same, and say what goes wrong; leave the model as it was."""
    A = layer.weight.flatten(1)
    identity = torch.eye(min(A.shape)).to(A)
    exact = (identity, A) if len(identity) == len(A) else (A, identity)
    try:
        substitute_(model, name, LowRankLayer.of(layer, *exact))
        same = _alike(batches.outputs(model, batches.fitted[:1]), wanted)
    except Exception as error:  # whatever the model's own code raises where it misses the layer
        return f"the model does more with it than to call it ({error})"
    finally:
        substitute_(model, name, layer)
    return "" if same else "it gives something else than its weight and bias say"


def _alike(outputs: Tensor, wanted: Tensor) -> bool:
    return bool((outputs - wanted).abs().max() <= wanted.abs().max() * torch.finfo(wanted.dtype).eps ** 0.5)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be a torch.nn.Module, not {type(model).__name__}")
    if empty := [name for name, p in model.named_parameters() if is_lazy(p) or p.is_meta]:
        raise ValueError(f"{', '.join(empty[:3])}: no values yet; load them, or run the model once, before compressing")
    if any(hasattr(module, "_orig_mod") or module._compiled_call_impl for module in model.modules()):
        raise ValueError("the model is compiled: compress it as it was before, and compile the result")


def _check_options(budget: float, metric: Metric) -> None:
    if callable(metric):
        return
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r} is unknown; allowed: {', '.join(METRICS)}, or a function of a model")
    whole, counts = isinstance(budget, Integral), metric in SIZES
    if not isinstance(budget, Real) or not (budget >= 1 and counts if whole else 0 < budget <= 1):
        count = ", or a whole number as a count" if counts else ""
        raise ValueError(f"budget {budget!r} of {metric} is not allowed; allowed: a float above 0 and up to 1{count}")

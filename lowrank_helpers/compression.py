"""Compress a network of anyone's: its linear layers and convolutions become two thin ones each, within a budget.

A convolution is a matrix (out, in·kh·kw) that is applied at every position. Its factors of rank r are two convolutions:
one of the same window, stride, padding and dilation into r channels, then one of 1×1. Factors that fit what a layer
puts out on images, instead of its weight, are those of Zhang et al. 2016, arXiv 1505.06798, section 2.1.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from lowrank_helpers.calibration import (
    check_names,
    check_task,
    output_moments,
    precise,
    sensitivities,
    without_mean,
)
from lowrank_helpers.costs import median_seconds
from lowrank_helpers.data import Dataset
from lowrank_helpers.factorization import SVD, ActivationAwareSVD, Factors, substitute
from lowrank_helpers.models import linear_layers, n_parameters
from lowrank_helpers.rank import singular_values
from lowrank_helpers.selection import BY_WEIGHTS, WAYS, Choice, Layer, choice_of, smallest, take
from lowrank_helpers.training import evaluate, progress
from lowrank_helpers.unfold import times

BUDGETS = ("parameters", "flops", "accuracy", "latency")
CALIBRATION = 2048  # images at most whose outputs are measured: more change the factors little
FEW = 8  # of them show whether a layer can be replaced
BATCH = 512  # images at a time, of small ones: of convolutions that is faster than fewer and than more
GRADIENT_SHARE = 8  # of these a backward pass takes one in so many, since it keeps what the model computes
LARGE_BATCH = 128 * 3 * 224**2  # numbers of images at a time: large ones of large networks must fit, too
HELD_OUT_PART = 6  # of images without validation images, one in so many fits nothing: as Dataset.hold_out
FAR = 2.0  # times its prediction: a larger change of the outputs is far from it
SMALL = 0.05  # relative change of the outputs that is never far
OWN_OUTPUTS = "its own outputs"

Split = tuple[Tensor, Tensor]
Replaceable = nn.Linear | nn.Conv2d


class Change(NamedTuple):
    """A quantity of the model that was given and of the one returned."""

    before: float
    after: float

    @property
    def share(self) -> float:
        """What is left of it."""
        return self.after / self.before

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
        Of the layers that became two; those named in neither dict stay dense because that was chosen.
    left_alone : dict of str to str
        The model's other matrices, with the reason why they cannot be replaced.
    fallbacks : dict of str to str
        What the factors of a layer fit where the model's outputs have no derivative by it, or where the factors of
        the strategy changed them far more than predicted.
    error : float
        The relative change of the outputs that was predicted to first order: √(E‖change‖² / E‖outputs‖²). Layers that
        are fitted to their own outputs count with the relative change of those.
    measured_error : float
        The same of the model that is returned, measured on images that fitted nothing. For ``task="classification"``
        outputs are logits less their mean over the classes.
    parameters : Change
    flops : Change
        For one input, two a multiplication and addition, counted by PyTorch's ``FlopCounterMode``, which sees no
        recurrent layers.
    seconds : Change
        Median of a batch of ``latency_batch``, measured here and now. Fewer FLOPs are often not faster.
    accuracy : Change or None
        On the validation images, 0 to 1; measured where it is the budget.
    """

    ranks: dict[str, int]
    left_alone: dict[str, str]
    fallbacks: dict[str, str]
    error: float
    measured_error: float
    parameters: Change
    flops: Change
    seconds: Change
    accuracy: Change | None = None

    def __str__(self) -> str:
        """Write a line for each size and each layer."""
        numbers = {name: getattr(self, name) for name in ("parameters", "flops", "seconds", "accuracy")}
        lines = [f"{name}: {change}" for name, change in numbers.items() if change]
        change = f"predicted {self.error:.3g}, measured {self.measured_error:.3g} on images that fitted nothing"
        lines += [f"relative change of the outputs: {change}"]
        fitted = {name: f", fitted to {what}" for name, what in self.fallbacks.items()}
        lines += [f"{name}: rank {rank}{fitted.get(name, '')}" for name, rank in self.ranks.items()]
        return "\n".join(lines + [f"{name}: left alone, {reason}" for name, reason in self.left_alone.items()])


@dataclass(frozen=True)
class Candidates:
    """What of a model can be replaced.

    Attributes
    ----------
    svds : dict of str to ActivationAwareSVD
        By the layer's dotted name: what factors of any rank are cut from. Its squared singular values are shares of
        the model's squared outputs, where they are Fisher-weighted, and else of the layer's.
    rows : dict of str to float
        How many rows of outputs one input gives: 1 for a layer of an MLP, the positions of a convolution.
    left_alone : dict of str to str
        The model's other matrices, with the reason.
    flat : frozenset of str
        Layers by which the model's outputs have no derivative, where one was asked for.
    """

    svds: Mapping[str, ActivationAwareSVD]
    rows: dict[str, float]
    left_alone: dict[str, str]
    flat: frozenset[str]

    def without(self, name: str, reason: str) -> "Candidates":
        """Return those but one layer, which is left alone."""
        svds = {other: svd for other, svd in self.svds.items() if other != name}
        return replace(self, svds=svds, left_alone=self.left_alone | {name: reason})

    def predicted(self, ranks: Mapping[str, int]) -> float:
        """Return the relative change of the outputs to first order: of independent layers, squares add."""
        return sum(self.svds[name].s[rank:].square().sum().item() for name, rank in ranks.items()) ** 0.5

    def layers(self, way: str, *, of: str) -> dict[str, Layer]:
        """Return what a way chooses among where a step costs ``parameters`` or ``flops``."""
        return {name: self._layer(name, way, of) for name in self.svds}

    def _layer(self, name: str, way: str, of: str) -> Layer:
        svd = self.svds[name]
        n, m = svd.A.shape
        outputs = svd.s.cpu().numpy()
        # A large matrix's singular values take minutes, and most ways do not ask for them.
        weights = singular_values(svd.A) if way in BY_WEIGHTS else outputs
        return Layer((n, m), weights, outputs, uses=2 * self.rows[name] if of == "flops" else 1)


def compress(
    model: nn.Module,
    data: Dataset | Split,
    budget: float,
    *,
    of: str = "parameters",
    way: str = "answer error",
    task: str | None = None,
    latency_batch: int = 64,
) -> tuple[nn.Module, Report]:
    """Return a smaller copy of a model, made of PyTorch's own layers, and what was done.

    Every ``nn.Linear`` and ``nn.Conv2d`` may become two, with factors that change the model's outputs least on at most
    ``CALIBRATION`` training images. Nothing is trained: tuning the result for a few epochs regains much of what
    is lost.

    What is predicted is measured too, on at most ``BATCH`` images that fitted nothing. Where the outputs change more
    than ``FAR`` times as much as predicted, each layer takes those factors with which they change least: as chosen,
    fitted to the layer's own outputs, or the truncated SVD of its weight. If that is far still, and one layer makes
    more than half of the change, it stays dense where the budget allows. A budget of accuracy is its own measure.

    Parameters
    ----------
    model : nn.Module
        Maps a batch of images to one tensor, logits (n, n_classes) where accuracy counts. It stays as it is. One that
        takes or gives something else goes in a module that takes and gives such a tensor. Of a compiled model the
        original is cut; compile the result again. A model that is one layer goes in an ``nn.Sequential``.
    data : Dataset or (images, labels)
        Training images measure the layers' outputs. Validation images fit nothing: they choose, and the change of the
        outputs is measured on them. Of a pair, or without them, that is a sixth of the images, drawn at random.
        Labels count for accuracy alone: whole numbers (n,) or (n, 1), or probabilities (n, n_classes).
    budget : float
        For ``parameters`` and ``flops`` a share of the model's (a float up to 1) or a count (an int); for ``latency`` a
        share; for ``accuracy`` the least on validation images, 0 to 1, that the smallest model found must have.
    of : {"parameters", "flops", "accuracy", "latency"}
        What the budget is of. Latency is measured, here and now.
    way : str
        How ranks are chosen: one of ``selection.WAYS``. The default takes a backward pass through the model; with the
        others factors are fitted to each layer's outputs.
    task : {None, "classification"}
        For ``"classification"`` outputs are logits: a change that all classes share is free, since it changes no
        probability. Otherwise all outputs count as they are.
    latency_batch : int
        Images in the batch whose latency is measured: for the report once, which takes a few answers of both models.

    Returns
    -------
    nn.Module, Report

    Raises
    ------
    ValueError
        The budget is impossible (the message says what is possible), no layer can be replaced, the model or the data
        are of another kind, there are no validation images where they must choose, or an option is unknown.
    """
    budget = _plain_number(budget)
    _check_options(budget, of, way, task, latency_batch)
    _check_model(model)
    model = _plain(model)
    device = next(model.parameters()).device
    images, held_out, labels = (tensor.to(device) for tensor in _parts(data))
    if of == "accuracy":
        labels = _classes(labels, _answer(model, images[:FEW]))
    found = candidates(model, images, by_answers=way == "answer error", task=task)
    bench = _Bench(model, found, images, held_out, labels, task, images[:latency_batch])
    return bench.compressed(budget, of, way)


def _flops(model: nn.Module, images: Tensor) -> int:
    """Count the operations for one input; with gradients, as PyTorch's fused attention runs without and is not seen."""
    model = deepcopy(model).requires_grad_()
    with _evaluating(model), torch.enable_grad(), FlopCounterMode(display=False) as counter:
        model(images[:1])
    return int(counter.get_total_flops())


SIZES: dict[str, Callable[[nn.Module, Tensor], int]] = {
    "parameters": lambda model, images: n_parameters(model),
    "flops": _flops,
}


@dataclass(frozen=True)
class _Bench:
    """What ranks are chosen with: the model, its candidates, images to count and time with and images held out."""

    model: nn.Module
    found: Candidates
    images: Tensor
    held_out: Tensor
    labels: Tensor
    task: str | None
    latency_batch: Tensor
    scored: dict[frozenset[tuple[str, int]], float] = field(default_factory=dict)

    def compressed(self, budget: float, of: str, way: str) -> tuple[nn.Module, Report]:
        """Return the model within a budget and what was done, as :func:`compress` does."""
        choice, measured = self._choice(budget, of, way)
        factors, predicted = self.factors(choice.ranks), self.found.predicted(choice.ranks)
        fallbacks = {name: OWN_OUTPUTS for name in choice.ranks if name in self.found.flat}
        error = self.change(factors)
        far = of != "accuracy" and _far(error, predicted)
        if far:
            factors, refitted, error = self.refitted(factors)
            fallbacks |= refitted
        small = replaced(self.model, factors)
        if of != "latency":
            measured["seconds"] = self.seconds(small)
        sizes = {name: Change(size(self.model, self.images), size(small, self.images)) for name, size in SIZES.items()}
        report = Report(choice.ranks, self.found.left_alone, fallbacks, predicted, error, **sizes, **measured)
        if far and _far(error, predicted):
            return self._with_one_left_alone(small, report, factors, budget, of, way)
        return small, report

    def _choice(self, budget: float, of: str, way: str) -> tuple[Choice, dict[str, Change]]:
        """Choose ranks; return what was measured meanwhile, too."""
        if of == "accuracy":
            choice, accuracy = self.accurate_enough(budget, way)
            return choice, {"accuracy": accuracy}
        if of == "latency":
            choice, seconds = self.fast_enough(budget, way)
            return choice, {"seconds": seconds}
        return self.small_enough(budget, way, of), {}

    def refitted(self, default: Mapping[str, Factors]) -> tuple[dict[str, Factors], dict[str, str], float]:
        """Return factors of the same ranks with the least change, what those fit that are others, and the change.

        Starts with all layers alike and then turns to one layer after the other, so that no change is larger than that
        of the truncated SVDs.
        """
        svds = {name: self.found.svds[name] for name in default}
        kinds = {
            "": default,
            OWN_OUTPUTS: {n: svd.unweighted().factors(len(default[n].C)) for n, svd in svds.items()},
            "its weight": {n: SVD.of(svd.A).factors(len(default[n].C)) for n, svd in svds.items()},
        }

        def change(chosen: Mapping[str, str]) -> float:
            return self.change({name: kinds[kind][name] for name, kind in chosen.items()})

        changes = {kind: change(dict.fromkeys(default, kind)) for kind in kinds}
        best = min(kinds, key=changes.__getitem__)
        chosen, least = dict.fromkeys(default, best), changes[best]
        for name in default:
            for kind in [kind for kind in kinds if kind != chosen[name]]:
                trial = chosen | {name: kind}
                if (found := change(trial)) < least:
                    least, chosen = found, trial
        factors = {name: kinds[kind][name] for name, kind in chosen.items()}
        return factors, {name: kind for name, kind in chosen.items() if kind}, least

    def _with_one_left_alone(
        self, small: nn.Module, report: Report, factors: Mapping[str, Factors], budget: float, of: str, way: str
    ) -> tuple[nn.Module, Report]:
        """Leave that layer dense without whose cut the outputs change least, if it halves the change in the budget."""
        worst = min(factors, key=lambda name: self.change({n: pair for n, pair in factors.items() if n != name}))
        reason = f"with it cut, the outputs changed by {report.measured_error:.3g}, predicted {report.error:.3g}"
        try:
            other = replace(self, found=self.found.without(worst, reason)).compressed(budget, of, way)
        except ValueError:  # the budget is too small without it
            return small, report
        return other if other[1].measured_error < report.measured_error / 2 else (small, report)

    def factors(self, ranks: Mapping[str, int]) -> dict[str, Factors]:
        """Return the factors of these ranks."""
        return {name: self.found.svds[name].factors(rank) for name, rank in ranks.items()}

    @cached_property
    def outputs(self) -> Tensor:
        """What the whole model puts out for the images that the change is measured on."""
        return _outputs(self.model, self.measured_on, self.task)

    @cached_property
    def measured_on(self) -> Tensor:
        """Held-out images, fewer where a model's outputs are large."""
        n_outputs = len(_outputs(self.model, self.held_out[:1], self.task))
        return self.held_out[: min(BATCH, max(1, LARGE_BATCH // n_outputs))]

    def change(self, factors: Mapping[str, Factors]) -> float:
        """Return the relative change of the outputs with these factors, measured."""
        difference = _outputs(replaced(self.model, factors), self.measured_on, self.task) - self.outputs
        change = (difference.norm() / self.outputs.norm()).item() if difference.any() else 0.0
        return np.inf if np.isnan(change) else change

    def accuracy(self, ranks: Mapping[str, int]) -> float:
        """Return the share of validation images that the model at these ranks gets right; each model is scored once."""
        key = frozenset(ranks.items())
        if key not in self.scored:
            self.scored[key] = self._score(replaced(self.model, self.factors(ranks)))
        return self.scored[key]

    def _score(self, model: nn.Module) -> float:
        images, labels, hits = self.held_out, self.labels, 0.0
        with _evaluating(model):
            size = _batch_size(images)
            pairs = list(zip(images.split(size), labels.split(size), strict=True))
            for batch, classes in progress(pairs, "scoring ranks"):
                hits += len(classes) * evaluate(model, batch, classes).accuracy
        return hits / len(labels)

    def small_enough(self, budget: float, way: str, of: str) -> Choice:
        """Choose ranks within a budget of parameters or FLOPs."""
        layers, total = self.found.layers(way, of=of), SIZES[of](self.model, self.images)
        limit = budget * total if isinstance(budget, float) else budget
        fixed = total - choice_of(layers, {}).parameters
        least = fixed + choice_of(layers, dict.fromkeys(layers, 1)).parameters
        if limit < least:
            raise ValueError(
                f"a budget of {limit:,.0f} {of} is too small: rank 1 wherever it can be takes {least:,}, "
                f"{least / total:.2%} of the model's {total:,}; {fixed:,} of these are in no layer that can be replaced"
            )
        return take(layers, limit - fixed, WAYS[way])

    def accurate_enough(self, target: float, way: str) -> tuple[Choice, Change]:
        """Choose the smallest model that reaches an accuracy."""
        before = self.accuracy({})
        if before < target:
            raise ValueError(f"an accuracy of {target:.2%} is impossible: the model itself has {before:.2%}")
        choice = smallest(way, self.found.layers(way, of="parameters"), self.accuracy, target)
        return choice, Change(before, self.accuracy(choice.ranks))

    def seconds(self, small: nn.Module) -> Change:
        """Time a smaller model right after the model itself, as a machine's speed drifts."""
        return Change(_seconds(self.model, self.latency_batch), _seconds(small, self.latency_batch))

    def fast_enough(self, target: float, way: str) -> tuple[Choice, Change]:
        """Choose the most FLOPs, to a sixteenth of the model's, with which a batch takes no longer than a share."""
        layers = self.found.layers(way, of="flops")
        dense = choice_of(layers, {}).parameters
        least = choice_of(layers, dict.fromkeys(layers, 1)).parameters
        fastest = np.inf
        for limit in np.linspace(dense, least, 16):
            choice = take(layers, limit, WAYS[way])
            seconds = self.seconds(replaced(self.model, self.factors(choice.ranks)))
            fastest = min(fastest, seconds.share)
            if seconds.share <= target:
                return choice, seconds
        raise ValueError(
            f"a latency of {target:.0%} is impossible for batches of {len(self.latency_batch)}: "
            f"the fastest try took {fastest:.0%}"
        )


def _far(measured: float, predicted: float) -> bool:
    return measured > FAR * max(predicted, SMALL)


@torch.no_grad()
def _seconds(model: nn.Module, batch: Tensor) -> float:
    with _evaluating(model):
        return median_seconds(lambda: model(batch), batch.device, at_least=0.02)


@torch.no_grad()
def candidates(model: nn.Module, images: Tensor, *, by_answers: bool = False, task: str | None = None) -> Candidates:
    """Find the layers of a model that can be replaced, and measure their outputs, or what these do to the model's.

    A layer can be replaced if it has a weight of its own, the model calls it, and the model's outputs stay the same
    with two layers in its place: ``nn.MultiheadAttention``, for one, reads the weight of its output layer and never
    calls it.

    Raises
    ------
    ValueError
        There are no images, the model gives no finite tensor for them, it gives another one each time, it cannot be
        copied, or it has no layer that can be replaced.
    """
    model = _copied(model)
    _use_no_fused_code(model)
    batch_size = _batch_size(images) if len(images) else 1
    with _evaluating(model):
        few = images[:FEW]
        _answer(model, few)
        outputs = _outputs(model, few)
        if not _alike(_outputs(model, few), outputs):
            raise ValueError(f"{type(model).__name__} gives other outputs for the same images each time")
        layers, left_alone = _layers_with_own_weight(model)
        bases = {name: _basis(layer) for name, layer in layers.items()}
        moments, rows = output_moments(model, images, bases, batch_size=batch_size)
        sensitive: dict[str, Tensor] = {}
        if by_answers:
            square = _outputs(model, images[:BATCH], task).square().sum() / len(images[:BATCH])
            fewer = max(1, batch_size // GRADIENT_SHARE)
            try:
                found = sensitivities(model, images, moments.keys(), task=task, bases=bases, batch_size=fewer)
                sensitive = {name: G / square for name, G in found.items() if G.any() and square > 0}
            except ValueError:  # without a derivative, all factors fit their layers' outputs
                pass
        svds = {}
        for name, layer in progress(list(layers.items()), "decomposing layers"):
            if name not in moments:
                left_alone[name] = "the model never calls it, or reads its weight without calling it"
            elif reason := _objection(model, name, layer, few, outputs):
                left_alone[name] = reason
            else:
                svds[name] = _decomposed(layer, moments[name], sensitive.get(name), bases[name])
    if not svds:
        raise ValueError(f"{type(model).__name__} has no layer that can be replaced: {left_alone}")
    flat = svds.keys() - sensitive.keys() if by_answers else ()
    return Candidates(svds, rows, left_alone, frozenset(flat))


def _basis(layer: Replaceable) -> Tensor | None:
    """Return an orthonormal basis of a tall weight's columns: all outputs less the bias lie in its few dimensions."""
    weight = layer.weight.flatten(1)
    return torch.linalg.qr(weight.to(precise(weight))).Q if len(weight) > weight.shape[1] else None


def _outputs(model: nn.Module, images: Tensor, task: str | None = None) -> Tensor:
    """Return a model's outputs in one dimension, each time with the same draws where it draws at random."""
    with _evaluating(model), torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
        torch.manual_seed(0)
        outputs = [model(batch) for batch in images.split(_batch_size(images))]
    outputs = [output.to(precise(output)) for output in outputs]
    return torch.cat([(without_mean(output) if task else output).flatten() for output in outputs])


def _alike(outputs: Tensor, wanted: Tensor) -> bool:
    return bool((outputs - wanted).abs().max() <= wanted.abs().max() * torch.finfo(wanted.dtype).eps ** 0.5)


def _plain(model: nn.Module) -> nn.Module:
    """Return a model whose layers can be found and replaced: a copy without compiled code, a lone layer in a module."""
    if any(hasattr(module, "_orig_mod") or module._compiled_call_impl for module in model.modules()):
        model = _copied(getattr(model, "_orig_mod", model))
        for name, module in list(model.named_modules()):
            module._compiled_call_impl = None
            if hasattr(module, "_orig_mod"):
                substitute(model, name, module._orig_mod)
    return nn.Sequential(model) if isinstance(model, Replaceable) else model


def _copied(model: nn.Module) -> nn.Module:
    try:
        return deepcopy(model)
    except Exception as error:  # RuntimeError of tensors with a history, whatever a model's own code raises
        raise ValueError(
            f"{type(model).__name__} cannot be copied ({error!s:.100}): it may keep a tensor that it computed, as "
            "torch.nn.utils.weight_norm does; torch.nn.utils.parametrizations.weight_norm does not"
        ) from error


def _answer(model: nn.Module, images: Tensor) -> Tensor:
    """Return what a model maps images to, if that is the one tensor that it must be."""
    wanted = f"{type(model).__name__} must map at least one image to a finite tensor"
    given = f"images of {str(images.dtype).removeprefix('torch.')}, {times(images.shape)}"
    wrap = "put a model that takes or gives something else in a module that takes and gives a tensor"
    if not len(images):
        raise ValueError(f"{wanted}; there is none")
    try:
        with _evaluating(model), torch.no_grad():
            answer = model(images)
    except Exception as error:  # whatever the model's own code raises
        raise ValueError(f"{wanted}; for {given}, it raised {type(error).__name__}: {error!s:.200}; {wrap}") from error
    if not isinstance(answer, Tensor):
        raise ValueError(f"{wanted}; it gave {type(answer).__name__}; {wrap}")
    if not answer.isfinite().all():
        raise ValueError(f"{wanted}; for {given}, it gave NaN or infinity")
    return answer


def _layers_with_own_weight(model: nn.Module) -> tuple[dict[str, Replaceable], dict[str, str]]:
    """Return the layers that may be replaced, and of every other matrix of the model why it may not."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter.data_ptr(), []).append(name)
    layers: dict[str, Replaceable] = {}
    left_alone: dict[str, str] = {}
    for name, module in model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            shared = [other for other in owners[parameter.data_ptr()] if other != name]
            if parameter.dim() < 2:
                continue
            if isinstance(module, Replaceable) and kind == "weight_orig":
                left_alone[name] = "pruned: torch.nn.utils.prune.remove makes its masked weight a plain one"
            elif not isinstance(module, Replaceable) or kind != "weight":
                left_alone[f"{name}.{kind}".strip(".").removesuffix(".weight")] = (
                    f"a parameter of {type(module).__name__}, no linear layer or convolution in two dimensions"
                )
            elif shared:
                left_alone[name] = f"shares its weight with {', '.join(shared)}"
            elif getattr(module, "groups", 1) != 1:
                left_alone[name] = f"its {module.groups} groups see different channels"
            else:
                layers[name] = module
    return layers, left_alone


def _objection(model: nn.Module, name: str, layer: Replaceable, images: Tensor, wanted: Tensor) -> str:
    """Replace a layer by two that do the same, and say what goes wrong; leave the model as it was."""
    weight = layer.weight.flatten(1)
    identity = torch.eye(min(weight.shape)).to(weight)
    exact = Factors(identity, weight, []) if len(identity) == len(weight) else Factors(weight, identity, [])
    try:
        substitute(model, name, _two(layer, exact))
        same = _alike(_outputs(model, images), wanted)
    except Exception as error:  # whatever the model's own code raises where it misses the layer
        return f"the model does more with it than to call it ({error})"
    finally:
        substitute(model, name, layer)
    return "" if same else "it gives something else than its weight and bias say"


def _decomposed(
    layer: Replaceable, moment: Tensor, sensitivity: Tensor | None, basis: Tensor | None
) -> ActivationAwareSVD:
    """Decompose a layer's outputs, given their moment; a convolution's weight is unfolded to (out, in·kh·kw)."""
    weight = layer.weight.detach().flatten(1)
    weight = weight.to(precise(weight))
    if sensitivity is None:
        return ActivationAwareSVD.of_outputs(weight, moment, basis=basis).relative()
    return ActivationAwareSVD.of_outputs(weight, moment, sensitivity, basis)


@torch.no_grad()
def replaced(model: nn.Module, factors: Mapping[str, Factors]) -> nn.Module:
    """Return a copy of a model with the named linear layers and convolutions replaced by two layers each.

    Parameters
    ----------
    model : nn.Module
    factors : mapping of str to Factors
        By dotted name, of the weight (out, in), for a convolution (out, in·kh·kw). A layer that the model has under
        several names is replaced under all of them.

    Raises
    ------
    ValueError
        A name is no linear layer or convolution of the model.
    """
    layers = _replaceable(model)
    check_names(factors, layers, "linear layer or convolution")
    copy = deepcopy(model)
    if factors:
        _use_no_fused_code(copy)
    for name, found in factors.items():
        substitute(copy, name, _two(layers[name], found))
    return copy


@torch.no_grad()
def pruned(model: nn.Module, n_kept: int) -> nn.Module:
    """Return a copy whose linear layers keep their largest weights and hold the others at zero.

    Magnitude pruning after Han et al. 2015, arXiv 1506.02626, section 3, with one threshold for all layers. A mask of
    ``torch.nn.utils.prune`` keeps zeros at zero in training too; ``prune.remove`` makes plain weights of the result.

    Parameters
    ----------
    model : nn.Module
    n_kept : int
        Weights left, of all ``nn.Linear`` layers together.

    Raises
    ------
    ValueError
        ``n_kept`` is negative, or the layers have fewer weights.
    """
    copy = deepcopy(model)
    matrices = [(layer, "weight") for layer in linear_layers(copy).values()]
    n_weights = sum(layer.weight.numel() for layer, _ in matrices)
    if not 0 <= n_kept <= n_weights:
        raise ValueError(f"n_kept {n_kept:,} must be between 0 and the {n_weights:,} weights of the linear layers")
    prune.global_unstructured(matrices, pruning_method=prune.L1Unstructured, amount=n_weights - n_kept)
    return copy


def _replaceable(model: nn.Module) -> dict[str, Replaceable]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Replaceable)}


def _two(layer: Replaceable, factors: Factors) -> nn.Sequential:
    """Return two layers that apply C and then B, and the bias."""
    rank, bias = len(factors.C), layer.bias
    own: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    first: nn.Module
    second: nn.Module
    if isinstance(layer, nn.Conv2d):
        window = {
            name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        }
        first = nn.Conv2d(layer.in_channels, rank, bias=False, **window, **own)
        second = nn.Conv2d(rank, layer.out_channels, 1, bias=False, **own)
    else:
        first = nn.Linear(layer.in_features, rank, bias=False, **own)
        second = nn.Linear(rank, layer.out_features, bias=False, **own)
    for new, factor in ((first, factors.C), (second, factors.B)):
        trained = layer.weight.requires_grad
        new.weight = nn.Parameter(factor.reshape(new.weight.shape).to(layer.weight).contiguous(), trained)
    if bias is not None:
        second.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return nn.Sequential(first, second).train(layer.training)


def _use_no_fused_code(model: nn.Module) -> None:
    """Keep PyTorch's transformer from its fused code, which reads ``linear1.weight`` and ``linear2.weight`` itself."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # one of the conditions of the fused code
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def _batch_size(images: Tensor) -> int:
    return max(1, min(BATCH, LARGE_BATCH // images[0].numel()))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch Dropout off and freeze BatchNorm, then put every module back into its mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _parts(data: Dataset | Split) -> tuple[Tensor, Tensor, Tensor]:
    """Return images to measure on, held-out images, and the labels of these if they may choose."""
    if isinstance(data, Dataset):
        images, labels = data.train_images, data.train_labels
    else:
        pair = data if isinstance(data, (tuple, list)) else (data,)
        if len(pair) != 2 or not all(isinstance(part, Tensor) for part in pair):
            kinds = ", ".join(type(part).__name__ for part in pair)
            raise ValueError(f"data must be a Dataset or two tensors, images and labels; given: {kinds:.100}")
        images, labels = pair
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images and {len(labels)} labels: one label for each image is needed")
    if len(images) < 2:
        raise ValueError(f"at least two images are needed, one to fit and one to measure; given: {len(images)}")
    order = _order(len(images)).to(images.device)
    if isinstance(data, Dataset) and len(data.validation_labels):
        return images[order[:CALIBRATION]], data.validation_images, data.validation_labels
    n = max(1, len(images) // HELD_OUT_PART)
    may_choose = labels[:0] if isinstance(data, Dataset) else labels[order[:n]]
    return images[order[n : n + CALIBRATION]], images[order[:n]], may_choose


def _classes(labels: Tensor, logits: Tensor) -> Tensor:
    """Return labels as ``evaluate`` takes them, for a model that gives such logits."""
    if not len(labels):
        raise ValueError("validation images choose here, and there are none: Dataset.hold_out() sets some aside")
    if logits.dim() != 2:
        raise ValueError(f"accuracy needs logits (n, n_classes); the model gives {times(logits.shape)}")
    n_classes = logits.shape[1]
    if labels.shape[1:] == (n_classes,):
        return labels.to(logits)
    if labels.shape[1:] == (1,):
        labels = labels[:, 0]
    classes = labels.long()
    if labels.dim() != 1 or (classes != labels).any() or classes.min() < 0 or classes.max() >= n_classes:
        raise ValueError(
            f"labels must be whole numbers from 0 to {n_classes - 1}, (n,) or (n, 1), or probabilities "
            f"(n, {n_classes}); given: {times(labels.shape)}, {labels.min():g} to {labels.max():g}"
        )
    return classes


def _order(n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"the model must be a torch.nn.Module, not {type(model).__name__}")
    parameters = dict(model.named_parameters())
    if not parameters:
        raise ValueError(f"{type(model).__name__} has no layer that can be replaced: it has no parameters")
    if empty := [name for name, parameter in parameters.items() if is_lazy(parameter) or parameter.is_meta]:
        raise ValueError(f"{', '.join(empty[:3])}: no values yet; load them, or run the model once, before compressing")


def _plain_number(budget: Any) -> Any:
    """Return a Python number for one of NumPy or PyTorch."""
    return budget.item() if getattr(budget, "size", None) == 1 or getattr(budget, "shape", None) == () else budget


def _check_options(budget: float, of: str, way: str, task: str | None, latency_batch: int) -> None:
    check_task(task)
    if of not in BUDGETS:
        raise ValueError(f"of {of!r} is unknown; allowed: {', '.join(BUDGETS)}")
    if way not in WAYS:
        raise ValueError(f"way {way!r} is unknown; allowed: {', '.join(WAYS)}")
    counted = isinstance(budget, int) and not isinstance(budget, bool) and of in SIZES and budget >= 1
    if not (counted or (isinstance(budget, float) and 0 < budget <= 1)):
        count = ", or a whole number as a count" if of in SIZES else ""
        raise ValueError(f"budget {budget!r} of {of} is not allowed; allowed: a float above 0 and up to 1{count}")
    if latency_batch < 1:
        raise ValueError(f"latency_batch {latency_batch} must be at least 1")

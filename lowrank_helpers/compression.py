"""Compress a network of anyone's: its linear layers and convolutions become two thin ones each, within a budget.

A convolution is a matrix (out, in·kh·kw) that is applied at every position. Its factors of rank r are two convolutions:
one of the same window, stride, padding and dilation into r channels, then one of 1×1. Factors that fit what a layer
puts out on images, instead of its weight, are those of Zhang et al. 2016, arXiv 1505.06798, section 2.1.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from lowrank_helpers.costs import median_seconds
from lowrank_helpers.data import Dataset
from lowrank_helpers.factorization import (
    AnswerSVD,
    Factors,
    OutputSVD,
    check_names,
    output_rows,
    precise,
    sensitivities,
    substitute,
)
from lowrank_helpers.models import linear_layers, n_parameters
from lowrank_helpers.rank import singular_values
from lowrank_helpers.selection import BY_WEIGHTS, WAYS, Choice, Layer, choice_of, smallest
from lowrank_helpers.training import evaluate, progress
from lowrank_helpers.unfold import times

BUDGETS = ("parameters", "flops", "accuracy", "latency")
CALIBRATION = 2048  # images at most whose outputs are measured: more change the factors little
FEW = 8  # of them show whether a layer can be replaced
BATCH = 512  # images at a time, of small ones: of convolutions that is faster than fewer and than more
GRADIENT_SHARE = 8  # of these a backward pass takes one in so many, since it keeps what the model computes
LARGE_BATCH = 128 * 3 * 224**2  # numbers of images at a time: large ones of large networks must fit, too

VALIDATION_PART = 6  # of images given as a pair, one in so many chooses: as Dataset.hold_out

Split = tuple[Tensor, Tensor]
Replaceable = nn.Linear | nn.Conv2d
T = TypeVar("T")


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
    error : float
        Predicted, as in :class:`lowrank_helpers.selection.Choice`.
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
    error: float
    parameters: Change
    flops: Change
    seconds: Change
    accuracy: Change | None = None

    def __str__(self) -> str:
        """Write a line for each size and each layer."""
        numbers = {name: getattr(self, name) for name in ("parameters", "flops", "seconds", "accuracy")}
        lines = [f"{name}: {change}" for name, change in numbers.items() if change]
        lines += [f"{name}: rank {rank}" for name, rank in self.ranks.items()]
        return "\n".join(lines + [f"{name}: left alone, {reason}" for name, reason in self.left_alone.items()])


@dataclass(frozen=True)
class Candidates:
    """What of a model can be replaced.

    Attributes
    ----------
    outputs : dict of str to OutputSVD or AnswerSVD
        By the layer's dotted name: its outputs' directions, of which factors of any rank are cut.
    rows : dict of str to float
        How many rows of outputs one input gives: 1 for a layer of an MLP, the positions of a convolution.
    left_alone : dict of str to str
        The model's other matrices, with the reason.
    """

    outputs: Mapping[str, OutputSVD | AnswerSVD]
    rows: dict[str, float]
    left_alone: dict[str, str]

    def layers(self, way: str, *, of: str) -> dict[str, Layer]:
        """Return what a way chooses among where a step costs ``parameters`` or ``flops``."""
        return {name: self._layer(name, way, of) for name in self.outputs}

    def _layer(self, name: str, way: str, of: str) -> Layer:
        svd = self.outputs[name]
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
    latency_batch: int = 64,
) -> tuple[nn.Module, Report]:
    """Return a smaller copy of a model, made of PyTorch's own layers, and what was done.

    Every ``nn.Linear`` and ``nn.Conv2d`` may become two, with factors that change the model's answers least on at most
    ``CALIBRATION`` training images. Nothing is trained: tuning the result for a few epochs regains much of what
    is lost.

    Parameters
    ----------
    model : nn.Module
        Maps a batch of images to one tensor, logits (n, n_classes) where accuracy counts. It stays as it is. One that
        takes or gives something else goes in a module that takes and gives such a tensor.
    data : Dataset or (images, labels)
        Training images measure the layers' outputs, validation images choose. Of a pair a sixth, drawn at random, is
        for choosing.
    budget : float
        For ``parameters`` and ``flops`` a share of the model's (a float up to 1) or a count (an int); for ``latency`` a
        share; for ``accuracy`` the least on validation images, 0 to 1, that the smallest model found must have.
    of : {"parameters", "flops", "accuracy", "latency"}
        What the budget is of. Latency is measured, here and now.
    way : str
        How ranks are chosen: one of ``selection.WAYS``. The default takes a backward pass through the model; with the
        others factors are fitted to each layer's outputs.
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
    _check_options(budget, of, way, latency_batch)
    _check_model(model)
    device = next(model.parameters()).device
    images, validation_images, validation_labels = (tensor.to(device) for tensor in _parts(data))
    found = candidates(model, images, by_answers=way == "answer error")
    bench = _Bench(model, found, images, (validation_images, validation_labels))
    batch = images[:latency_batch]
    measured: dict[str, Change] = {}
    if of == "accuracy":
        choice, measured["accuracy"] = bench.accurate_enough(budget, way)
    elif of == "latency":
        choice, measured["seconds"] = bench.fast_enough(budget, way, batch)
    else:
        choice = bench.small_enough(budget, way, of)
    small = bench.cut(choice.ranks)
    if of != "latency":
        measured["seconds"] = bench.seconds(small, batch)
    sizes = {name: Change(size(model, images), size(small, images)) for name, size in SIZES.items()}
    return small, Report(choice.ranks, found.left_alone, choice.error, **sizes, **measured)


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
    """What ranks are chosen with: the model, its candidates, images to measure on and images to choose on."""

    model: nn.Module
    found: Candidates
    images: Tensor
    validation: Split
    scored: dict[frozenset[tuple[str, int]], float] = field(default_factory=dict)

    def cut(self, ranks: Mapping[str, int]) -> nn.Module:
        """Return the model at these ranks."""
        return replaced(self.model, {name: self.found.outputs[name].factors(rank) for name, rank in ranks.items()})

    def accuracy(self, ranks: Mapping[str, int]) -> float:
        """Return the share of validation images that the model at these ranks gets right; each model is scored once."""
        key = frozenset(ranks.items())
        if key not in self.scored:
            self.scored[key] = self._score(self.cut(ranks))
        return self.scored[key]

    def _score(self, model: nn.Module) -> float:
        images, labels = self.validation
        if not len(labels):
            raise ValueError("validation images choose here, and there are none: Dataset.hold_out() sets some aside")
        hits = 0.0
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
        return WAYS[way](layers, limit - fixed, self.accuracy)

    def accurate_enough(self, target: float, way: str) -> tuple[Choice, Change]:
        """Choose the smallest model that reaches an accuracy."""
        before = self.accuracy({})
        if before < target:
            raise ValueError(f"an accuracy of {target:.2%} is impossible: the model itself has {before:.2%}")
        choice = smallest(way, self.found.layers(way, of="parameters"), self.accuracy, target)
        return choice, Change(before, self.accuracy(choice.ranks))

    def seconds(self, small: nn.Module, batch: Tensor) -> Change:
        """Time a smaller model right after the model itself, as a machine's speed drifts."""
        return Change(_seconds(self.model, batch), _seconds(small, batch))

    def fast_enough(self, target: float, way: str, batch: Tensor) -> tuple[Choice, Change]:
        """Choose the most FLOPs, to a sixteenth of the model's, with which a batch takes no longer than a share."""
        layers = self.found.layers(way, of="flops")
        dense = choice_of(layers, {}).parameters
        least = choice_of(layers, dict.fromkeys(layers, 1)).parameters
        fastest = np.inf
        for limit in np.linspace(dense, least, 16):
            choice = WAYS[way](layers, limit, self.accuracy)
            seconds = self.seconds(self.cut(choice.ranks), batch)
            fastest = min(fastest, seconds.share)
            if seconds.share <= target:
                return choice, seconds
        raise ValueError(
            f"a latency of {target:.0%} is impossible for batches of {len(batch)}: the fastest try took {fastest:.0%}"
        )


@torch.no_grad()
def _seconds(model: nn.Module, batch: Tensor) -> float:
    with _evaluating(model):
        return median_seconds(lambda: model(batch), batch.device, at_least=0.02)


@torch.no_grad()
def candidates(model: nn.Module, images: Tensor, *, by_answers: bool = False) -> Candidates:
    """Find the layers of a model that can be replaced, and measure their outputs, or what these do to its answers.

    A layer can be replaced if it has a weight of its own, the model calls it, and the model's answer stays the same
    with two layers in its place: ``nn.MultiheadAttention``, for one, reads the weight of its output layer and never
    calls it.

    Raises
    ------
    ValueError
        There are no images, the model gives no finite tensor for them, it cannot be copied, or it has no layer that
        can be replaced.
    """
    model = _copied(model)
    _use_no_fused_code(model)
    with _evaluating(model):
        few = images[:FEW]
        answer = _answer(model, few)
        layers, left_alone = _layers_with_own_weight(model)
        moments, rows = _output_moments(model, layers, images)
        found = [name for name in layers if name in moments]
        fewer = max(1, _batch_size(images) // GRADIENT_SHARE)
        sensitive = sensitivities(model, images, found, batch_size=fewer) if by_answers else {}
        outputs = {}
        for name, layer in progress(list(layers.items()), "decomposing layers"):
            if name not in moments:
                left_alone[name] = "the model never calls it, or reads its weight without calling it"
            elif reason := _objection(model, name, layer, few, answer):
                left_alone[name] = reason
            else:
                outputs[name] = _decomposed(layer, moments[name], sensitive.get(name))
    if not outputs:
        raise ValueError(f"{type(model).__name__} has no layer that can be replaced: {left_alone}")
    return Candidates(outputs, rows, left_alone)


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
            if not isinstance(module, Replaceable) or kind != "weight":
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


def _output_moments(
    model: nn.Module, layers: Mapping[str, Replaceable], images: Tensor
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the second moment (out, out), float64, of each layer's outputs less its bias, and its rows an image."""
    sums: dict[str, Tensor] = {}
    rows = dict.fromkeys(layers, 0.0)

    def add(name: str, layer: Replaceable, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        found = output_rows(layer, output) - (0 if layer.bias is None else layer.bias)
        found = found.to(precise(found))
        sums[name] = sums.get(name, 0) + (found.T @ found).double()
        rows[name] += len(found)

    hooks = [layer.register_forward_hook(partial(add, name)) for name, layer in layers.items()]
    try:
        for batch in progress(images.split(_batch_size(images)), "measuring layers"):
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    moments = {name: total / rows[name] for name, total in sums.items()}
    return moments, {name: rows[name] / len(images) for name in moments}


def _objection(model: nn.Module, name: str, layer: Replaceable, images: Tensor, answer: Tensor) -> str:
    """Replace a layer by two that do the same, and say what goes wrong; leave the model as it was."""
    weight = layer.weight.flatten(1)
    identity = torch.eye(min(weight.shape)).to(weight)
    exact = Factors(identity, weight, []) if len(identity) == len(weight) else Factors(weight, identity, [])
    try:
        substitute(model, name, _two(layer, exact))
        difference = (model(images) - answer).abs().max()
    except Exception as error:  # whatever the model's own code raises where it misses the layer
        return f"the model does more with it than to call it ({error})"
    finally:
        substitute(model, name, layer)
    same = difference <= answer.abs().max() * torch.finfo(answer.dtype).eps ** 0.5
    return "" if same else "it gives something else than its weight and bias say"


def _decomposed(layer: Replaceable, moment: Tensor, sensitivity: Tensor | None) -> OutputSVD | AnswerSVD:
    """Decompose a layer's outputs, given their moment; a convolution's weight is unfolded to (out, in·kh·kw)."""
    weight = layer.weight.detach().flatten(1)
    weight = weight.to(precise(weight))
    if sensitivity is None:
        return OutputSVD.of_outputs(weight, moment)
    return AnswerSVD.of_outputs(weight, moment, sensitivity)


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
    """Return images to measure on, and images to choose on with their labels."""
    if isinstance(data, Dataset):
        order = _order(len(data.train_labels))[:CALIBRATION].to(data.train_images.device)
        return data.train_images[order], data.validation_images, data.validation_labels
    pair = data if isinstance(data, (tuple, list)) else (data,)
    if len(pair) != 2 or not all(isinstance(part, Tensor) for part in pair):
        kinds = ", ".join(type(part).__name__ for part in pair)
        raise ValueError(f"data must be a Dataset or two tensors, images and labels; given: {kinds:.100}")
    images, labels = pair
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images and {len(labels)} labels: one label for each image is needed")
    order, n = _order(len(images)).to(images.device), len(images) // VALIDATION_PART
    return images[order[n : n + CALIBRATION]], images[order[:n]], labels[order[:n]]


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


def _check_options(budget: float, of: str, way: str, latency_batch: int) -> None:
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

"""What a network does with data: its outputs, second moments of what its layers put out, and its derivatives there."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from lowrank_helpers.data import Dataset
from lowrank_helpers.factorization import column_basis, precise
from lowrank_helpers.layers import plain_layers, replaceable_layers
from lowrank_helpers.training import progress

CALIBRATION = 2048  # inputs at most for which outputs are measured: more change the factors little
BATCH = 64  # inputs at a time, of a tensor that is split
LARGE_BATCH = 16 * 3 * 224**2  # numbers at a time: a backward pass over large images of large networks must fit, too
FULL_SPEED = 2048  # inputs at a time, of a tensor: large enough for full speed
HELD_OUT_PART = 6  # without validation images, one input or batch in so many fits nothing: as Dataset.hold_out

Forward = Callable[[nn.Module, Any], Any]
Hook = Callable[[str, nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]


def without_mean(logits: Tensor) -> Tensor:
    """Subtract the mean over the classes: a constant added to all logits changes no probability.

    Classes are the last axis, or the second one of images (N, n_classes, H, W).
    """
    axis = 1 if logits.dim() == 4 else -1
    return logits - logits.mean(dim=axis, keepdim=True) if logits.shape[axis] > 1 else logits


def call(model: nn.Module, batch: Any) -> Any:
    """Return ``model(batch)``, or ``model(batch[0])`` for a tuple or list, such as inputs with their labels."""
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


class _SecondMoments:
    """Sums of y·yᵀ, float64, over the rows y of what named layers put out, or of gradients for it.

    For a tall weight, y is in the coordinates of :func:`column_basis`. Products are taken in the model's precision,
    float32 at least, a batch at a time.
    """

    def __init__(self, model: nn.Module, inputs: Tensor | Sequence[Any], names: Collection[str]) -> None:
        self.layers = plain_layers(replaceable_layers(model), names)
        if not len(inputs):
            raise ValueError("second moments need at least one input")
        self.batches = inputs.split(FULL_SPEED) if isinstance(inputs, Tensor) else inputs
        self.bases = {name: column_basis(layer.weight.flatten(1)) for name, layer in self.layers.items()}
        self.sums: dict[str, Tensor] = {}
        self.n_rows = dict.fromkeys(self.layers, 0)

    def hooked(self, hook: Hook) -> ExitStack:
        """Call ``hook(name, layer, arguments, output)`` after each call of a layer, until the context is left."""
        hooks = ExitStack()
        for name, layer in self.layers.items():
            hooks.enter_context(layer.register_forward_hook(partial(hook, name)))
        return hooks

    def add(self, name: str, values: Tensor, bias: Tensor | None = None) -> None:
        """Add a layer's values, (…, n) or of a convolution (…, n, positions along each axis), less its bias."""
        channels_last = values.movedim(1 - self.layers[name].weight.dim(), -1)
        rows, basis = channels_last.reshape(-1, channels_last.shape[-1]), self.bases[name]
        rows = rows if bias is None else rows - bias
        rows = rows.to(precise(rows)) if basis is None else rows.to(basis) @ basis
        self.sums[name] = self.sums.get(name, 0) + (rows.T @ rows).double()
        self.n_rows[name] += len(rows)

    def divided_by(self, n: Mapping[str, int]) -> dict[str, Tensor]:
        """Return the means; raise ``ValueError`` for a layer that was not called."""
        if idle := [name for name in self.layers if name not in self.sums]:
            raise ValueError(f"{', '.join(idle)}: the model does not call this layer")
        return {name: self.sums[name] / n[name] for name in self.layers}


@torch.no_grad()
def output_moments(
    model: nn.Module, inputs: Tensor | Sequence[Any], names: Collection[str], *, forward: Forward = call
) -> dict[str, Tensor]:
    """Return the second moment E[y·yᵀ] of what each named layer puts out, less its bias, while a model maps inputs.

    Parameters
    ----------
    model : nn.Module
        In the mode that it is in: call ``model.eval()`` first where it has Dropout or BatchNorm.
    inputs : Tensor, shape (N, …), or sequence of batches
        Batches are whatever ``forward`` takes.
    names : collection of str
        Linear layers and convolutions of one group, by dotted name. Each position of an output counts as a sample.
    forward : callable
        ``forward(model, batch)`` runs the model on a batch.

    Returns
    -------
    dict of str to Tensor
        (n, n) each, float64; for a tall weight (n, m) it is (m, m), in the coordinates of
        :func:`~lowrank_helpers.factorization.column_basis`.

    Raises
    ------
    ValueError
        There are no inputs, a name is no such layer of the model, or such a layer is never called.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.ReLU(), nn.Linear(2, 1))
    >>> with torch.no_grad():
    ...     _ = model[0].weight.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))
    >>> output_moments(model, torch.eye(3)[:2], ["0"])["0"].tolist()
    [[0.5, 0.0], [0.0, 2.0]]
    """
    moments = _SecondMoments(model, inputs, names)

    def add(name: str, layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        moments.add(name, output, moments.layers[name].bias)

    with moments.hooked(add):
        for batch in progress(moments.batches, "measuring layers"):
            forward(model, batch)
    return moments.divided_by(moments.n_rows)


def output_fisher(
    model: nn.Module,
    inputs: Tensor | Sequence[Any],
    names: Collection[str],
    *,
    logits: bool = False,
    forward: Forward = call,
) -> dict[str, Tensor]:
    """Return how a model's outputs depend on what each named layer puts out: E[Jᵀ·J], J being their derivative.

    It is the Fisher information of outputs with Gaussian noise of variance 1. The sum of an input's outputs, each times
    a standard normal number, has a gradient whose second moment is Jᵀ·J.

    Parameters
    ----------
    model, inputs, names
        As of :func:`output_moments`. All that the model computes for a batch is kept meanwhile.
    logits : bool
        The outputs are logits: what all classes share does not count.
    forward : callable
        Returns the outputs for a batch, a tensor (n_inputs, …).

    Returns
    -------
    dict of str to Tensor
        In the shapes of :func:`output_moments`, summed over the positions where one input uses a layer. Zero where the
        outputs have no derivative, as behind ``torch.no_grad()`` or ``detach()``.

    Raises
    ------
    ValueError
        As of :func:`output_moments`; or PyTorch cannot compute the derivative, or not a finite one.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    >>> with torch.no_grad():
    ...     _ = model[1].weight.copy_(torch.diag(torch.tensor([1.0, 0.0])))  # the second output is never looked at
    >>> output_fisher(model, torch.ones(1000, 2), ["0"])["0"].round(decimals=1).tolist()
    [[1.0, 0.0], [0.0, 0.0]]
    """
    moments = _SecondMoments(model, inputs, names)
    seen: list[tuple[str, Tensor]] = []

    def watch(name: str, layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not output.requires_grad:  # all before it is frozen, or the model takes no derivative here
            output = output.detach().requires_grad_()
        seen.append((name, output))
        return output.clone()  # the model may change it in place

    generator, n_inputs = torch.Generator().manual_seed(0), 0
    with moments.hooked(watch):
        for batch in progress(moments.batches, "measuring derivatives"):
            seen.clear()
            try:
                with torch.enable_grad():
                    outputs = forward(model, batch)
                    gradients = _gradients(outputs, [output for _, output in seen], logits, generator)
            except RuntimeError as error:
                raise ValueError(f"the outputs of {type(model).__name__} have no derivative: {error}") from error
            for (name, _), gradient in zip(seen, gradients, strict=True):
                moments.add(name, gradient)
            n_inputs += len(outputs)
    fisher = moments.divided_by(dict.fromkeys(moments.layers, n_inputs))
    if not_finite := [name for name in fisher if not fisher[name].isfinite().all()]:
        raise ValueError(f"{', '.join(not_finite)}: the derivative of the outputs is NaN or infinite there")
    return fisher


def _gradients(
    outputs: Tensor, layer_outputs: list[Tensor], logits: bool, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """Return the gradient of randomly weighted outputs for what layers put out."""
    draw = torch.randn(outputs.shape, generator=generator).to(outputs)
    total = (outputs * (without_mean(draw) if logits else draw)).sum()
    if not (layer_outputs and total.requires_grad):
        return tuple(torch.zeros_like(output) for output in layer_outputs)
    return torch.autograd.grad(total, layer_outputs, materialize_grads=True)


@dataclass(frozen=True)
class Batches:
    """Batches to measure a model on, batches that fit nothing, and how a model maps one."""

    fitted: Sequence[Any]  # batches are whatever forward takes
    held_out: Sequence[Any]
    forward: Forward  # forward(model, batch) moves the batch to the device and returns outputs (n_inputs, …)
    device: torch.device  # the model's
    logits: bool  # what all classes share does not count

    @classmethod
    def of(cls, model: nn.Module, data: Any, forward: Forward, logits: bool) -> "Batches":
        """Make batches of what :func:`~lowrank_helpers.compression.compress` is given; ``forward`` need move none.

        Raises ``ValueError`` unless the model gives one finite tensor for the first batch.
        """
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

        def run(model: nn.Module, batch: Any) -> Any:
            return forward(model, tree_map(lambda part: part.to(device) if hasattr(part, "to") else part, batch))

        fitted, held_out = _split(data, lambda batch: len(_checked_outputs(model, run, batch)))
        _checked_outputs(model, run, fitted[0])
        return cls(fitted, held_out, run, device, logits)

    def counted(self, outputs: Tensor) -> Tensor:
        """Return that part of outputs whose change counts, in float32 at least."""
        outputs = outputs.to(precise(outputs))
        return without_mean(outputs) if self.logits else outputs

    @torch.no_grad()
    def outputs(self, model: nn.Module, batches: Sequence[Any]) -> Tensor:
        """Return what counts of outputs in one dimension, each time with the same draws where a model draws."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(0)
            return torch.cat([self.counted(self.forward(model, batch)).flatten() for batch in batches])

    def flops(self, model: nn.Module) -> dict[str, float]:
        """Count the operations for one input, by the dotted name of a module, and of the whole model by ``""``.

        With gradients, as PyTorch's fused attention, which is not seen, runs without.
        """
        model = deepcopy(model).requires_grad_()
        with torch.enable_grad(), FlopCounterMode(display=False) as counter:
            n_inputs = len(self.forward(model, self.fitted[0]))
        counts = {name.partition(".")[2]: sum(of.values()) / n_inputs for name, of in counter.get_flop_counts().items()}
        return counts | {"": round(counter.get_total_flops() / n_inputs)}


def _split(data: Any, n_inputs: Callable[[Any], int]) -> tuple[Sequence[Any], Sequence[Any]]:
    """Return batches to measure layers on, and held-out ones."""
    if isinstance(data, Dataset):
        return _split_inputs(data.train_images, data.validation_images)
    if isinstance(data, Tensor):
        return _split_inputs(data, data[:0])
    if isinstance(data, (tuple, Mapping, str)) or not isinstance(data, Iterable):
        what = "a Dataset, a tensor of inputs, or an iterable of batches such as a DataLoader"
        raise TypeError(f"data must be {what}; given: {data!r:.100}")
    batches = iter(data)
    first = list(islice(batches, 1))
    most = round(CALIBRATION * HELD_OUT_PART / (HELD_OUT_PART - 1)) // max([1, *map(n_inputs, first)])
    numbers = progress(range(max(2, most)), "reading batches")
    read = [batch for _, batch in zip(numbers, chain(first, batches), strict=False)]
    if len(read) < 2:
        raise ValueError(f"at least two batches are needed, as one is held out; given: {len(read)}")
    return [batch for i, batch in enumerate(read) if i % HELD_OUT_PART], read[::HELD_OUT_PART]


def _split_inputs(inputs: Tensor, held_out: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Return batches of inputs, and held-out ones: some of the inputs where no others are given for that."""
    if len(inputs) < 2:
        raise ValueError(f"at least two inputs are needed; given: {len(inputs)}")
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0)).to(inputs.device)
    if not len(held_out):
        held, order = order.tensor_split([max(1, len(inputs) // HELD_OUT_PART)])
        held_out = inputs[held]
    size = max(1, min(BATCH, LARGE_BATCH // inputs[0].numel()))
    return inputs[order[:CALIBRATION]].split(size), held_out.split(size)


@torch.no_grad()
def _checked_outputs(model: nn.Module, forward: Forward, batch: Any) -> Tensor:
    """Return a model's outputs for a batch; raise ``ValueError`` unless they are one finite tensor (n_inputs, …)."""
    kind = type(model).__name__
    try:
        outputs = forward(model, batch)
    except Exception as error:  # whatever the model's own code raises for inputs that it does not take
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{kind} does not run on a {type(batch).__name__} ({said}); say how by forward=") from error
    if not isinstance(outputs, Tensor):
        gave = f"a {type(outputs).__name__}"
    elif not (outputs.is_floating_point() and outputs.dim()):
        gave = f"{outputs.dtype} of shape {tuple(outputs.shape)}"
    elif not outputs.isfinite().all():
        gave = "NaN or infinity"
    else:
        return outputs
    raise ValueError(f"{kind} gave {gave}; one finite tensor of floats (n_inputs, …) is needed: choose it by forward=")

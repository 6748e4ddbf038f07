"""What a network does with data: second moments of what its layers put out, and its derivatives there.

This is the one place that hooks layers.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_helpers.factorization import column_basis, precise
from lowrank_helpers.layers import plain_layers, replaceable_layers
from lowrank_helpers.timing import spending
from lowrank_helpers.training import progress

BATCH = 2048  # inputs of one tensor at a time: large enough for full speed
TASKS = (None, "classification")

Forward = Callable[[nn.Module, Any], Any]
Hook = Callable[[str, nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]


def check_task(task: str | None) -> None:
    """Raise ``ValueError`` for an unknown task."""
    if task not in TASKS:
        raise ValueError(f"task {task!r} is unknown; allowed: {', '.join(map(repr, TASKS))}")


def without_mean(logits: Tensor) -> Tensor:
    """Subtract the mean over the classes: a constant added to all logits changes no probability.

    Classes are the last axis, or the second one of images (N, n_classes, H, W).
    """
    axis = 1 if logits.dim() == 4 else -1
    return logits - logits.mean(dim=axis, keepdim=True) if logits.shape[axis] > 1 else logits


def call(model: nn.Module, batch: Any) -> Any:
    """Return ``model(batch)``, or ``model(batch[0])`` for a tuple or list, such as inputs with their labels."""
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


@contextmanager
def _hooked(layers: Mapping[str, nn.Module], hook: Hook) -> Iterator[None]:
    """Call ``hook(name, layer, arguments, output)`` after each call of a layer."""
    handles = [layer.register_forward_hook(partial(hook, name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _SecondMoments:
    """Sums of y·yᵀ, float64, over the rows y of what named layers put out, or of gradients for it.

    Of a layer with a tall weight, y is in the coordinates of :func:`column_basis`. Products are taken in the model's
    precision, float32 at least, a batch at a time.
    """

    def __init__(self, model: nn.Module, inputs: Tensor | Sequence[Any], names: Collection[str]) -> None:
        self.layers = plain_layers(replaceable_layers(model), names)
        if not len(inputs):
            raise ValueError("second moments need at least one input")
        self.batches = inputs.split(BATCH) if isinstance(inputs, Tensor) else inputs
        self.bases = {name: column_basis(layer.weight.flatten(1)) for name, layer in self.layers.items()}
        self.sums: dict[str, Tensor] = {}
        self.n_rows = dict.fromkeys(self.layers, 0)

    def add(self, name: str, values: Tensor, bias: Tensor | None = None) -> None:
        """Add a layer's values, (…, n) or of a convolution (…, n, height, width), less its bias."""
        channels_last = values.movedim(-3, -1) if isinstance(self.layers[name], nn.Conv2d) else values
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


@spending("factorising")
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
        Linear layers and 2-D convolutions, by dotted name. Each position of an output counts as a sample.
    forward : callable
        ``forward(model, batch)`` runs the model on a batch; :func:`call` by default.

    Returns
    -------
    dict of str to Tensor
        (n, n) each, float64; of a layer with a tall weight (n, m) it is (m, m), in the coordinates of
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

    with _hooked(moments.layers, add):
        for batch in progress(moments.batches, "measuring layers"):
            forward(model, batch)
    return moments.divided_by(moments.n_rows)


@spending("factorising")
def output_fisher(
    model: nn.Module,
    inputs: Tensor | Sequence[Any],
    names: Collection[str],
    *,
    task: str | None = None,
    forward: Forward = call,
) -> dict[str, Tensor]:
    """Return how a model's outputs depend on what each named layer puts out: E[Jᵀ·J], J being their derivative.

    It is the Fisher information of outputs with Gaussian noise of variance 1. For each input the model's outputs are
    multiplied by standard normal numbers, and the gradient of the sum is a draw of a vector whose second moment is
    Jᵀ·J.

    Parameters
    ----------
    model : nn.Module
        In the mode that it is in.
    inputs : Tensor, shape (N, …), or sequence of batches
        All that the model computes for a batch is kept meanwhile.
    names : collection of str
        Linear layers and 2-D convolutions, by dotted name.
    task : {None, "classification"}
        For ``"classification"`` the outputs are logits, as of :func:`without_mean`, and what all classes share does
        not count.
    forward : callable
        ``forward(model, batch)`` returns the outputs for a batch, a tensor (n_inputs, …); :func:`call` by default.

    Returns
    -------
    dict of str to Tensor
        In the shapes of :func:`output_moments`, summed over the positions where one input uses a layer. Zero where the
        outputs have no derivative, as behind ``torch.no_grad()`` or ``detach()``.

    Raises
    ------
    ValueError
        There are no inputs, a name is no such layer of the model or one that is never called, the task is unknown, or
        PyTorch cannot compute the derivative, or not a finite one.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    >>> with torch.no_grad():
    ...     _ = model[1].weight.copy_(torch.diag(torch.tensor([1.0, 0.0])))  # the second output is never looked at
    >>> output_fisher(model, torch.ones(1000, 2), ["0"])["0"].round(decimals=1).tolist()
    [[1.0, 0.0], [0.0, 0.0]]
    """
    check_task(task)
    moments = _SecondMoments(model, inputs, names)
    seen: list[tuple[str, Tensor]] = []

    def watch(name: str, layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not output.requires_grad:  # all before it is frozen, or the model takes no derivative here
            output = output.detach().requires_grad_()
        seen.append((name, output))
        return output.clone()  # the model may change it in place

    generator, n_inputs = torch.Generator().manual_seed(0), 0
    with _hooked(moments.layers, watch):
        for batch in progress(moments.batches, "measuring derivatives"):
            seen.clear()
            try:
                with torch.enable_grad():
                    outputs = forward(model, batch)
                    gradients = _gradients(outputs, [output for _, output in seen], task, generator)
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
    outputs: Tensor, layer_outputs: list[Tensor], task: str | None, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """Return the gradient of randomly weighted outputs for what layers put out."""
    draw = torch.randn(outputs.shape, generator=generator).to(outputs)
    total = (outputs * (without_mean(draw) if task else draw)).sum()
    if not (layer_outputs and total.requires_grad):
        return tuple(torch.zeros_like(output) for output in layer_outputs)
    return torch.autograd.grad(total, layer_outputs, materialize_grads=True)

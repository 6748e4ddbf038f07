"""What a network does with data: second moments of what enters and leaves its layers, and its derivatives there.

This is the one place that hooks layers.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from lowrank_helpers.models import FactorizedLinear
from lowrank_helpers.timing import spending
from lowrank_helpers.training import progress

MOMENT_BATCH = 2048  # rows of a batch while moments are taken: large enough for full speed
TASKS = (None, "classification")

Hook = Callable[[str, nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]


def check_names(names: Collection[str], layers: Mapping[str, nn.Module], kind: str) -> None:
    """Raise ``ValueError`` unless all names are those of layers, which are of that kind."""
    if unknown := set(names) - layers.keys():
        raise ValueError(f"{', '.join(sorted(unknown))}: no {kind}; allowed: {', '.join(layers)}")


def check_task(task: str | None) -> None:
    """Raise ``ValueError`` for an unknown task."""
    if task not in TASKS:
        raise ValueError(f"task {task!r} is unknown; allowed: {', '.join(map(repr, TASKS))}")


def precise(tensor: Tensor) -> torch.dtype:
    """Return the precision to sum and to decompose in: float32 at least."""
    return torch.promote_types(tensor.dtype, torch.float32)


def without_mean(logits: Tensor) -> Tensor:
    """Subtract the mean over the classes: a constant added to all logits changes no probability.

    Classes are the last axis, or the second one of images (N, n_classes, H, W).
    """
    axis = 1 if logits.dim() == 4 else -1
    return logits - logits.mean(dim=axis, keepdim=True) if logits.shape[axis] > 1 else logits


@contextmanager
def _hooked(layers: Mapping[str, nn.Module], hook: Hook) -> Iterator[None]:
    """Call ``hook(name, layer, arguments, output)`` after each call of a layer."""
    handles = [layer.register_forward_hook(partial(hook, name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Sums:
    """Sums of x·xᵀ over the rows x of each layer, float64; products are taken a batch at a time."""

    def __init__(self) -> None:
        self.products: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}

    def add(self, name: str, rows: Tensor) -> None:
        rows = rows.to(precise(rows))
        self.products[name] = self.products.get(name, 0) + (rows.T @ rows).double()
        self.rows[name] = self.rows.get(name, 0) + len(rows)

    def means(self) -> dict[str, Tensor]:
        return {name: product / self.rows[name] for name, product in self.products.items()}

    def check_called(self, names: Collection[str]) -> None:
        if idle := set(names) - self.products.keys():
            raise ValueError(f"{', '.join(sorted(idle))}: the model does not call this layer")


def _output_rows(layer: nn.Module, output: Tensor) -> Tensor:
    """Return a layer's outputs, or a gradient for them, as rows: one a position, of a convolution's channels."""
    channels_last = output.movedim(-3, -1) if isinstance(layer, nn.Conv2d) else output
    return channels_last.reshape(-1, channels_last.shape[-1])


@spending("factorising")
@torch.no_grad()
def input_moments(model: nn.Module, inputs: Tensor, names: Collection[str]) -> dict[str, Tensor]:
    """Return the second moment X·Xᵀ/N of what enters each named layer while a model maps inputs.

    Parameters
    ----------
    model : nn.Module
        In the mode that it is in: call ``model.eval()`` first where it has Dropout or BatchNorm.
    inputs : Tensor, shape (N, …)
        The first dimension is split into batches.
    names : collection of str
        Linear or factorised layers, by dotted name. Of inputs (…, m) all but the last dimension count as samples.

    Returns
    -------
    dict of str to Tensor
        (m, m) each, float64, in the order of ``names``. Products are taken in the model's precision, float32 at
        least, a batch at a time, and summed in float64.

    Raises
    ------
    ValueError
        There are no inputs, a name is no linear layer of the model, or such a layer is never called.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> input_moments(model, torch.eye(2), ["0"])["0"].tolist()
    [[0.5, 0.0], [0.0, 0.5]]
    """
    layers = {n: layer for n, layer in model.named_modules() if isinstance(layer, (nn.Linear, FactorizedLinear))}
    check_names(names, layers, "linear layer of the model")
    if not len(inputs):
        raise ValueError("moments need at least one input")
    sums = _Sums()

    def add(name: str, layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        sums.add(name, arguments[0].reshape(-1, arguments[0].shape[-1]))

    with _hooked({name: layers[name] for name in names}, add):
        for batch in inputs.split(MOMENT_BATCH):
            model(batch)
    sums.check_called(names)
    moments = sums.means()
    return {name: moments[name] for name in names}


@torch.no_grad()
def output_moments(
    model: nn.Module, inputs: Tensor, bases: Mapping[str, Tensor | None], *, batch_size: int
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the second moment of each layer's outputs less its bias, and how many rows one input gives.

    Parameters
    ----------
    model : nn.Module
        In the mode that it is in.
    inputs : Tensor, shape (N, …)
    bases : mapping of str to Tensor or None
        By the dotted name of a linear layer or convolution: orthonormal columns (n, k), in whose coordinates the
        moment is wanted, or None for that of the n outputs themselves.
    batch_size : int
        Inputs at a time.

    Returns
    -------
    dict of str to Tensor, dict of str to float
        (k, k) each, float64. Layers that the model does not call are missing.
    """
    sums = _Sums()

    def add(name: str, layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        bias = getattr(layer, "bias", None)
        rows = _output_rows(layer, output) - (0 if bias is None else bias)
        sums.add(name, _in_basis(rows, bases[name]))

    with _hooked({name: model.get_submodule(name) for name in bases}, add):
        for batch in progress(inputs.split(batch_size), "measuring layers"):
            model(batch)
    return sums.means(), {name: n_rows / len(inputs) for name, n_rows in sums.rows.items()}


def _in_basis(rows: Tensor, basis: Tensor | None) -> Tensor:
    return rows if basis is None else rows.to(basis) @ basis


@spending("factorising")
def sensitivities(
    model: nn.Module,
    inputs: Tensor,
    names: Collection[str],
    *,
    task: str | None = None,
    bases: Mapping[str, Tensor | None] | None = None,
    batch_size: int = MOMENT_BATCH,
) -> dict[str, Tensor]:
    """Return how a model's outputs depend on what each named layer puts out: E[Jᵀ·J], J being their derivative.

    For each input the model's outputs are multiplied by standard normal numbers, and the gradient of the sum is a draw
    of a vector whose second moment is Jᵀ·J.

    Parameters
    ----------
    model : nn.Module
        In the mode that it is in. Maps inputs to a tensor (N, …).
    inputs : Tensor, shape (N, …)
    names : collection of str
        Linear layers, or convolutions in two dimensions, by dotted name.
    task : {None, "classification"}
        For ``"classification"`` the outputs are logits, as of :func:`without_mean`, and what all classes share does
        not count.
    bases : mapping of str to Tensor or None, optional
        As for :func:`output_moments`.
    batch_size : int
        Inputs at a time; all that the model computes for them is kept meanwhile.

    Returns
    -------
    dict of str to Tensor
        (n, n) each, float64, in the order of ``names``, summed over the positions where one input uses a layer.
        Zero where the outputs have no derivative, as behind ``torch.no_grad()`` or ``detach()``.

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
    >>> sensitivities(model, torch.ones(1000, 2), ["0"])["0"].round(decimals=1).tolist()
    [[1.0, 0.0], [0.0, 0.0]]
    """
    layers = {n: layer for n, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}
    check_names(names, layers, "linear layer or convolution")
    check_task(task)
    if not len(inputs):
        raise ValueError("sensitivities need at least one input")
    sums, bases = _Sums(), bases or {}
    seen: list[tuple[str, Tensor]] = []

    def watch(name: str, layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not output.requires_grad:  # all before it is frozen, or the model takes no derivative here
            output = output.detach().requires_grad_()
        seen.append((name, output))
        return output.clone()  # the model may change it in place

    generator = torch.Generator().manual_seed(0)
    with _hooked({name: layers[name] for name in names}, watch):
        for batch in progress(inputs.split(batch_size), "measuring sensitivities"):
            seen.clear()
            try:
                gradients = _gradients(model, batch, seen, task, generator)
            except RuntimeError as error:
                raise ValueError(f"the outputs of {type(model).__name__} have no derivative: {error}") from error
            for (name, _), gradient in zip(seen, gradients, strict=True):
                sums.add(name, _in_basis(_output_rows(layers[name], gradient), bases.get(name)))
    sums.check_called(names)
    if endless := [name for name in names if not sums.products[name].isfinite().all()]:
        raise ValueError(f"{', '.join(endless)}: the derivative of the outputs is NaN or infinite there")
    return {name: sums.products[name] / len(inputs) for name in names}


@torch.enable_grad()
def _gradients(
    model: nn.Module, batch: Tensor, seen: list[tuple[str, Tensor]], task: str | None, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """Return the gradient of randomly weighted outputs for what layers put out, which ``seen`` collects meanwhile."""
    answers = model(batch)
    draw = torch.randn(answers.shape, generator=generator).to(answers)
    total = (answers * (without_mean(draw) if task else draw)).sum()
    outputs = [output for _, output in seen]
    if not (outputs and total.requires_grad):
        return tuple(torch.zeros_like(output) for output in outputs)
    return torch.autograd.grad(total, outputs, materialize_grads=True)

"""Data of any kind as batches, and what a model does with them: its outputs, their number, its operations."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from lowrank_helpers.calibration import Forward, without_mean
from lowrank_helpers.data import Dataset
from lowrank_helpers.factorization import precise
from lowrank_helpers.training import progress
from lowrank_helpers.unfold import format_shape

CALIBRATION = 2048  # inputs at most for which outputs are measured: more change the factors little
BATCH = 64  # inputs at a time, of tensors
LARGE_BATCH = 16 * 3 * 224**2  # numbers at a time: a backward pass over large images of large networks must fit, too
HELD_OUT_PART = 6  # without validation images, one input or batch in so many fits nothing: as Dataset.hold_out

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Batches:
    """Batches to measure a model on, batches that fit nothing, and how a model maps one.

    Attributes
    ----------
    fitted, held_out : sequence
        Batches, whatever ``forward`` takes.
    forward : callable
        ``forward(model, batch)`` moves the batch to the device and returns outputs (n_inputs, …).
    device : torch.device
        The model's.
    task : {None, "classification"}
        For ``"classification"`` what all classes share does not count.
    """

    fitted: Sequence[Any]
    held_out: Sequence[Any]
    forward: Forward
    device: torch.device
    task: str | None

    @classmethod
    def of(cls, model: nn.Module, data: Any, forward: Forward, task: str | None) -> "Batches":
        """Make batches of data; raise ``ValueError`` unless the model gives one finite tensor for the first.

        Parameters
        ----------
        model : nn.Module
        data : Dataset, tuple of Tensor, or iterable of batches
            As of :func:`~lowrank_helpers.compression.compress`.
        forward : callable
            ``forward(model, batch)`` returns outputs for a batch on the model's device.
        task : {None, "classification"}
        """
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

        def moved(part: Any) -> Any:
            return part.to(device) if hasattr(part, "to") else part

        def run(model: nn.Module, batch: Any) -> Any:
            return forward(model, tree_map(moved, batch))

        fitted, held_out = _split(data, lambda batch: len(_checked_outputs(model, run, batch)))
        _checked_outputs(model, run, fitted[0])
        return cls(fitted, held_out, run, device, task)

    def labels(self, model: nn.Module) -> Tensor:
        """Return the labels of the held-out batches; raise ``ValueError`` unless they name classes of the logits."""
        labels = torch.cat([_labels_in(batch) for batch in self.held_out]).to(self.device)
        logits = _checked_outputs(model, self.forward, self.held_out[0])
        if logits.dim() != 2:
            raise ValueError(f"accuracy needs logits (n, n_classes); the model gives {format_shape(logits.shape)}")
        n_classes = logits.shape[1]
        if labels.dim() != 1 or (labels != labels.long()).any() or not 0 <= labels.min() <= labels.max() < n_classes:
            raise ValueError(
                f"labels must be whole numbers (n,) from 0 to {n_classes - 1}; "
                f"given: {format_shape(labels.shape)}, {labels.min():g} to {labels.max():g}"
            )
        return labels

    def counted(self, outputs: Tensor) -> Tensor:
        """Return that part of outputs whose change counts, in float32 at least."""
        outputs = outputs.to(precise(outputs))
        return without_mean(outputs) if self.task else outputs

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


def _split(data: Any, n_inputs: Callable[[Any], int]) -> tuple[list[Any], list[Any]]:
    """Return batches to measure layers on, and held-out ones."""
    if isinstance(data, Dataset):
        held_out = data.validation_images, data.validation_labels
        return _split_pair((data.train_images, data.train_labels), held_out if len(held_out[1]) else None)
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        return _split_pair(data, None)
    if isinstance(data, (Tensor, Mapping, str)) or not isinstance(data, Iterable):
        raise TypeError(
            "data must be a Dataset, two tensors (images, labels), or an iterable of batches such as a DataLoader; "
            f"given: {data!r:.100}"
        )
    batches = iter(data)
    first = list(islice(batches, 1))
    most = round(CALIBRATION * HELD_OUT_PART / (HELD_OUT_PART - 1)) // max([1, *map(n_inputs, first)])
    numbers = progress(range(max(2, most)), "reading batches")
    read = [batch for _, batch in zip(numbers, chain(first, batches), strict=False)]
    if len(read) < 2:
        raise ValueError(f"at least two batches are needed, as one is held out; given: {len(read)}")
    return [batch for i, batch in enumerate(read) if i % HELD_OUT_PART], read[::HELD_OUT_PART]


def _split_pair(pair: Pair, held_out: Pair | None) -> tuple[list[Pair], list[Pair]]:
    """Return batches of images with their labels, some of them held out where no others are given for that."""
    n, n_labels = map(len, pair)
    if n != n_labels or n < 2:
        raise ValueError(f"at least two images are needed, with a label each; given: {n}, {n_labels}")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    if held_out:
        return _in_batches(pair, order[:CALIBRATION]), _in_batches(held_out, torch.arange(len(held_out[0])))
    held, order = order.tensor_split([max(1, n // HELD_OUT_PART)])
    return _in_batches(pair, order[:CALIBRATION]), _in_batches(pair, held)


def _in_batches(pair: Pair, order: Tensor) -> list[Pair]:
    images, labels = pair
    size = max(1, min(BATCH, LARGE_BATCH // images[0].numel()))
    return [(images[index.to(images.device)], labels[index.to(labels.device)]) for index in order.split(size)]


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


def _labels_in(batch: Any) -> Tensor:
    if isinstance(batch, Mapping) and isinstance(labels := batch.get("labels"), Tensor):
        return labels
    if isinstance(batch, (tuple, list)) and len(batch) > 1 and isinstance(labels := batch[1], Tensor):
        return labels
    raise ValueError(f"accuracy needs labels: (inputs, labels), or a dictionary with 'labels'; given: {batch!r:.100}")

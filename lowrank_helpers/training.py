"""Training and evaluation: the whole set on the device, shuffled by index, Adam, one pass an epoch."""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from threading import Event
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from lowrank_helpers.cuda_graphs import GraphSteps
from lowrank_helpers.data import Dataset, batches
from lowrank_helpers.models import squared_norm
from lowrank_helpers.timing import median_seconds, synchronise, wait_for_timing

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "float32", "bfloat16")
EVALUATION_BATCH = 2048  # rows: large enough for full speed, small enough to stay in a processor's cache
EVALUATION_BATCH_GPU = 16 * EVALUATION_BATCH  # to launch work on a GPU takes as long as to do it

SCORED_MEANWHILE = 5_000  # images of a split at most, on which a network is scored while it trains
SCORED_AT_END = 10_000  # and after it; MNIST's test set has as many

T = TypeVar("T")
Split = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: everything but the network and the data.

    Adam (Kingma & Ba 2014, arXiv 1412.6980) with its rate falling linearly to zero over the whole training.

    Attributes
    ----------
    epochs, batch_size : int
        Passes over the training set and samples a step.
    learning_rate : float
        Of the first step.
    seed : int
        Shuffles the samples; initialisation has its own.
    frobenius_decay : float
        λ of the penalty λ/2·‖W‖_F² a layer, on the *product* W = B·C for a factorised layer
        (Khodak et al. 2021, arXiv 2105.01029; Kamalakara et al. 2022, arXiv 2209.13569, section 3).
    weight_decay : float
        λ of the penalty λ/2·‖θ‖² on every parameter, for a factorised layer on B and C each.
    precision : {"float32", "bfloat16"}
        Of the matrix products; weights, gradients and Adam's state are float32 in both.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    seed: int = 0
    frobenius_decay: float = 0.0
    weight_decay: float = 0.0
    precision: str = "float32"

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(f"epochs {self.epochs} and batch_size {self.batch_size} must be at least 1")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate {self.learning_rate} must be a positive number")
        if not (0 <= self.frobenius_decay < math.inf and 0 <= self.weight_decay < math.inf):
            raise ValueError(
                f"frobenius_decay {self.frobenius_decay} and weight_decay {self.weight_decay} must be at least 0"
            )
        if self.precision not in PRECISIONS[1:]:
            raise ValueError(f"precision {self.precision!r} is unknown; allowed: float32, bfloat16")


@dataclass
class History:
    """What a training did, epoch by epoch; entry 0 is the network before it.

    Attributes
    ----------
    loss : dict of str to list of float
        Mean cross-entropy in nats, by split (``train``, ``test``, …, but not ``validation``), on a fixed sample of at
        most ``SCORED_MEANWHILE`` images.
    accuracy : dict of str to list of float
        Share of samples classified correctly, 0 to 1, likewise.
    seconds : list of float
        Time spent training since the start, evaluation excluded: processor seconds where one thread trains on the CPU,
        which other work on the machine hardly changes; elsewhere seconds on the clock.
    end : dict of str to dict of str to float
        ``loss`` and ``accuracy`` after the last epoch by split, on a fixed sample of at most ``SCORED_AT_END`` images.
    """

    loss: dict[str, list[float]] = field(default_factory=dict)
    accuracy: dict[str, list[float]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    end: dict[str, dict[str, float]] = field(default_factory=dict)

    def final(self, split: str) -> "Score":
        """Return the score after the last epoch, on at most ``SCORED_AT_END`` images of a split."""
        return Score(**self.end[split])

    def reached(self, split: str, accuracy: float) -> tuple[float, float]:
        """Return the epochs and seconds until an accuracy was reached, interpolated linearly; NaN if it never was."""
        scores = self.accuracy[split]
        after = next((epoch for epoch, score in enumerate(scores) if score >= accuracy), None)
        if after is None:
            return math.nan, math.nan
        around = slice(max(0, after - 1), after + 1)
        epochs = float(np.interp(accuracy, scores[around], range(len(scores))[around]))
        return epochs, float(np.interp(epochs, range(len(scores)), self.seconds))


@dataclass(frozen=True)
class Score:
    """Mean cross-entropy in nats and share of correct answers, 0 to 1, of a network on one split."""

    loss: float
    accuracy: float


def pick_device(name: str = "auto") -> torch.device:
    """Return the device of that name; ``auto`` is CUDA, then Apple's MPS, then the CPU.

    Raises
    ------
    ValueError
        The name is unknown or this machine has no such device.
    """
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    available = [device for device, there in here.items() if there]
    if name == "auto":
        return torch.device(available[0])
    if name not in available:
        raise ValueError(f"device {name!r} is not on this machine; allowed: auto, {', '.join(available)}")
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> str:
    """Return ``float32`` or ``bfloat16``; ``auto`` is bfloat16 where products are clearly faster in it.

    That is measured, as what a processor can do does not say what PyTorch makes of it. Without native instructions
    bfloat16 is many times slower.
    """
    if name != "auto":
        return name

    def seconds_in(dtype: torch.dtype) -> float:
        """Time a product of the size that a training step has."""
        images, weight = (torch.ones(n, 512, dtype=dtype, device=device) for n in (256, 512))
        return median_seconds(lambda: F.linear(images, weight), device, at_least=0.01)

    return "bfloat16" if seconds_in(torch.float32) > 1.3 * seconds_in(torch.bfloat16) else "float32"


def products_in(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Return the context in which matrix products run in that precision."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def fit(
    model: nn.Module,
    data: Dataset,
    recipe: Recipe,
    *,
    others: Mapping[str, Dataset] | None = None,
    label: str = "training",
    stop: Event | None = None,
) -> History:
    """Train a network in place on ``data``'s training set, with its scores before, meanwhile and after.

    Its layers are in training mode for the steps and in evaluation mode for the scores; at the end each is in the mode
    that it was given in.

    Parameters
    ----------
    model : nn.Module
        On the device of the data; maps (n, n_inputs) to logits (n, n_classes), or characters (n, n_tokens) to
        logits (n, n_tokens, n_characters). Frozen parameters stay as they are.
    others : mapping of str to Dataset, optional
        Further data to score the network on, as splits ``"<name> train"``, ``"<name> test"`` and so on.
    label : str
        Names the progress bar.
    stop : Event, optional
        Once set, the training ends before its next step.

    Raises
    ------
    CancelledError
        ``stop`` was set.
    """
    device = data.train_images.device
    scored = {
        " ".join(filter(None, (name, split))): sample(rounded(images, recipe.precision), labels, SCORED_AT_END)
        for name, each in ({"": data} | dict(others or {})).items()
        for split, (images, labels) in each.splits().items()
        if split != "validation"
    }
    shown = "test" if "test" in scored else "train"
    train_images = rounded(data.train_images, recipe.precision)  # once, not in every epoch
    take_step = _step_of(model, train_images, data.train_labels, recipe)
    n_samples = len(data.train_labels)
    n_steps = recipe.epochs * math.ceil(n_samples / recipe.batch_size)
    history = History(seconds=[0.0])
    # Where one thread trains, its processor seconds: work beside it does not count.
    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    bar = tqdm(total=n_steps, desc=label, unit="step", leave=False, disable=_bars_hidden())
    with bar, in_mode(model, training=True):
        _record(history, model, scored, recipe.precision)
        step = 0  # not the bar's count, which stands still where the bar is hidden
        for epoch in range(1, recipe.epochs + 1):
            start = clock()
            for index in batches(n_samples, recipe.batch_size, seed=recipe.seed, epoch=epoch, device=device):
                if stop and stop.is_set():
                    raise CancelledError
                wait_for_timing()
                take_step(index, recipe.learning_rate * (1 - step / n_steps))
                step += 1
                bar.update()
            synchronise(device)
            history.seconds.append(history.seconds[-1] + clock() - start)
            _record(history, model, scored, recipe.precision, last=epoch == recipe.epochs)
            bar.set_postfix({f"{shown}_accuracy": f"{history.accuracy[shown][-1]:.2%}"})
    return history


def progress(items: Sequence[T], label: str) -> Iterable[T]:
    """Go through a sequence, and show how far it is once that has taken two seconds."""
    return tqdm(items, desc=label, leave=False, delay=2, disable=_bars_hidden())


def _bars_hidden() -> bool:
    return "TQDM_DISABLE" in os.environ  # tqdm reads it by itself in a terminal, but not in a notebook


def rounded(images: Tensor, precision: str) -> Tensor:
    """Return images in a precision; characters, which are whole numbers, stay as they are."""
    return images.to(getattr(torch, precision)) if images.is_floating_point() else images


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits (…, n_classes) and classes (…), or probabilities (n, n_classes)."""
    if labels.is_floating_point():
        return F.cross_entropy(logits, labels)
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def sample(images: Tensor, labels: Tensor, n: int = SCORED_MEANWHILE) -> Split:
    """Return at most n images (n, …) of a set, or sequences of n characters in all, always the same and shuffled."""
    n_each = 1 if labels.is_floating_point() else labels.shape[1:].numel()
    index = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[: n // n_each].to(labels.device)
    return images.index_select(0, index), labels.index_select(0, index)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, precision: str = "float32") -> Tensor:
    """Return float32 logits (n, n_classes) for images (n, …), or (n, n_tokens, n_characters), in batches.

    The network answers in evaluation mode, and is left in the mode that it was given in.
    """
    answers = []
    rows = EVALUATION_BATCH if images.device.type == "cpu" else EVALUATION_BATCH_GPU
    n_tokens = 1 if images.is_floating_point() else images.shape[1:].numel()
    with products_in(precision, images.device), in_mode(model, training=False):
        for batch in images.split(math.ceil(rows / n_tokens)):
            wait_for_timing()
            answers.append(model(batch).float())
    return torch.cat(answers)


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put all layers of a network into training or evaluation mode, and each back into its own at the end."""
    modes = {layer: layer.training for layer in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for layer, mode in modes.items():
            layer.training = mode


def evaluate(model: nn.Module, images: Tensor, labels: Tensor, precision: str = "float32") -> Score:
    """Score a network, in evaluation mode, on images (n, …) and labels: classes (n,) or probabilities (n, n_classes).

    Of probabilities, such as another network's answers, the likeliest class is the correct one. Of a text, images and
    labels are characters (n, n_tokens).
    """
    return _score(predict(model, images, precision), labels)


def _score(logits: Tensor, labels: Tensor) -> Score:
    classes = labels.argmax(dim=1) if labels.is_floating_point() else labels
    accuracy = (logits.argmax(dim=-1) == classes).float().mean()
    return Score(cross_entropy(logits, labels).item(), accuracy.item())


def _step_of(model: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe) -> Callable[[Tensor, float], None]:
    """Return what moves a network once, for the images of an index and at a learning rate."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.Adam(
        trainable, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=images.device.type != "mps"
    )

    def move(index: Tensor) -> None:
        # Not images[index], which copies number by number where this copies rows: a quarter of the time.
        with products_in(recipe.precision, images.device):
            logits = model(images.index_select(0, index))
        loss = cross_entropy(logits.float(), labels.index_select(0, index))
        if recipe.frobenius_decay:
            loss = loss + recipe.frobenius_decay / 2 * squared_norm(model)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    on_cuda = images.device.type == "cuda"
    move_at_rate = GraphSteps(move, optimiser, recipe.batch_size, images.device) if on_cuda else move

    def step(index: Tensor, learning_rate: float) -> None:
        group = optimiser.param_groups[0]
        group["lr"] = group["lr"].fill_(learning_rate) if on_cuda else learning_rate  # a graph reads its own tensor
        move_at_rate(index)

    return step


def _record(
    history: History, model: nn.Module, scored: Mapping[str, Split], precision: str, *, last: bool = False
) -> None:
    for name, (images, labels) in scored.items():
        logits = predict(model, images if last else images[:SCORED_MEANWHILE], precision)
        score = _score(logits[:SCORED_MEANWHILE], labels[:SCORED_MEANWHILE])
        history.loss.setdefault(name, []).append(score.loss)
        history.accuracy.setdefault(name, []).append(score.accuracy)
        if last:
            history.end[name] = asdict(_score(logits, labels))

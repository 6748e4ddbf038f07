"""Training and evaluation: the whole set on the device, shuffled by index, Adam, one pass an epoch."""

import copy
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import copy_context
from dataclasses import asdict, dataclass, field
from functools import partial
from threading import Event
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from lowrank_helpers.data import Dataset, batches
from lowrank_helpers.models import squared_norm
from lowrank_helpers.timing import wait_for_timing

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "float32", "bfloat16")
EVALUATION_BATCH = 2048  # rows: large enough for full speed, small enough to stay in a processor's cache
EVALUATION_BATCH_GPU = 16 * EVALUATION_BATCH  # a GPU takes as long to be told what to do as to do it

SCORED_EACH_TIME = 5_000  # images at most, of all but test sets, on which a network is scored while it trains

T = TypeVar("T")
Splits = Mapping[str, tuple[Tensor, Tensor]]

spent: Counter[str] = Counter()  # processor seconds of this process by kind of work; see `spending`

_n_side_by_side = 1
_this_thread = threading.local()
_spent_lock = threading.Lock()


def take_one_thread_each() -> None:
    """Let this process train as many networks side by side as PyTorch has threads, each in one thread.

    Networks of this size keep one core busy and several poorly; and no number depends on how many cores there are.
    PyTorch's threads are ``OMP_NUM_THREADS``, or all cores. To be called once where a program begins: importing this
    module leaves threads as they are, and then networks train one after the other.
    """
    global _n_side_by_side
    _n_side_by_side = max(_n_side_by_side, torch.get_num_threads())
    _prepare_thread()


def n_side_by_side() -> int:
    """Return how many networks train at once in this process, on the CPU."""
    return _n_side_by_side


@contextmanager
def spending(kind: str) -> Iterator[None]:
    """Count the processor seconds that this thread takes meanwhile as ``spent`` on a kind of work."""
    start = time.thread_time()
    try:
        yield
    finally:
        _spend(kind, time.thread_time() - start)


def _spend(kind: str, seconds: float) -> None:
    with _spent_lock:
        spent[kind] += seconds  # type: ignore[assignment]  # counts of a Counter may be fractions


def _prepare_thread() -> None:
    torch.set_num_threads(1)
    # Late in training most gradients underflow; arithmetic on denormal numbers is many times slower.
    torch.set_flush_denormal(True)


def _prepare_worker() -> None:
    _prepare_thread()
    _this_thread.is_worker = True


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
    scores_per_epoch : int
        How often in an epoch the network is scored, at equal distances; 0 for only before the training and after it.
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
    scores_per_epoch: int = 1
    seed: int = 0
    frobenius_decay: float = 0.0
    weight_decay: float = 0.0
    precision: str = "float32"

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or self.scores_per_epoch < 0:
            raise ValueError(
                f"epochs {self.epochs} and batch_size {self.batch_size} must be at least 1, and scores_per_epoch "
                f"{self.scores_per_epoch} at least 0"
            )
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
    """What a training did, score by score; entry 0 is the network before it.

    Attributes
    ----------
    epochs : list of float
        How many epochs the network had been trained for.
    loss : dict of str to list of float
        Mean cross-entropy in nats, by split (``train``, ``validation``, ``test``, …). Of a training or validation set
        on a fixed sample of at most ``SCORED_EACH_TIME`` images.
    accuracy : dict of str to list of float
        Share of samples classified correctly, 0 to 1, likewise.
    seconds : list of float
        Time spent training since the start, evaluation excluded: processor seconds where one thread trains, which
        others at work on the machine hardly change; elsewhere seconds on the clock.
    whole : dict of str to dict of str to float
        ``loss`` and ``accuracy`` after the last epoch on the whole of each split that was sampled.
    evaluation_seconds : float
        Time spent evaluating on the clock, all together.
    """

    epochs: list[float] = field(default_factory=list)
    loss: dict[str, list[float]] = field(default_factory=dict)
    accuracy: dict[str, list[float]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    whole: dict[str, dict[str, float]] = field(default_factory=dict)
    evaluation_seconds: float = 0.0

    def final(self, split: str) -> "Score":
        """Return the score after the last epoch, on the whole split."""
        if split in self.whole:
            return Score(**self.whole[split])
        return Score(self.loss[split][-1], self.accuracy[split][-1])

    def reached(self, split: str, accuracy: float) -> "Reached | None":
        """Return when an accuracy was first reached, interpolated linearly between scores; None if never."""
        scores = self.accuracy[split]
        after = next((i for i, score in enumerate(scores) if score >= accuracy), None)
        if not after:
            return None if after is None else Reached(0.0, 0.0)
        share = (accuracy - scores[after - 1]) / (scores[after] - scores[after - 1])
        return Reached(*(x[after - 1] + share * (x[after] - x[after - 1]) for x in (self.epochs, self.seconds)))


class Reached(NamedTuple):
    """A moment of a training, by epochs and by seconds of training."""

    epochs: float
    seconds: float


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

    That is measured: what a processor can do does not say what PyTorch's libraries make of it, and without native
    instructions bfloat16 is many times slower.
    """
    if name != "auto":
        return name
    seconds = {dtype: _product_seconds(dtype, device) for dtype in (torch.float32, torch.bfloat16)}
    return "bfloat16" if seconds[torch.float32] > 1.3 * seconds[torch.bfloat16] else "float32"


def _product_seconds(dtype: torch.dtype, device: torch.device) -> float:
    """Time a product of the size that a training step has; the best of several, as other work only slows it."""
    images, weight = torch.ones(256, 512, dtype=dtype, device=device), torch.ones(512, 512, dtype=dtype, device=device)
    seconds = []
    for _ in range(6):
        synchronise(device)
        start = time.perf_counter()
        F.linear(images, weight)
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def products_in(precision: str, device: torch.device) -> AbstractContextManager:
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

    All its layers are in training mode for the steps and in evaluation mode for the scores, and at the end each is in
    the mode that it was given in.

    Parameters
    ----------
    model : nn.Module
        On the device of the data; maps (n, n_inputs) to logits (n, n_classes). Frozen parameters stay as they are.
    data : Dataset
    recipe : Recipe
    others : mapping of str to Dataset, optional
        Further data to score the network on, as splits ``"<name> train"``, ``"<name> test"`` and so on.
    label : str
        Names the progress bar.
    stop : Event, optional
        Once set, the training ends before its next step.

    Returns
    -------
    History

    Raises
    ------
    CancelledError
        ``stop`` was set.
    """
    device = data.train_images.device
    splits = data.splits()
    for name, other in (others or {}).items():
        splits |= {f"{name} {split}": pair for split, pair in other.splits().items()}
    # Rounded once, not in every epoch.
    splits = {name: (images.to(getattr(torch, recipe.precision)), labels) for name, (images, labels) in splits.items()}
    images, labels = splits["train"]
    scored = {name: pair if name.endswith("test") else sample(*pair) for name, pair in splits.items()}
    steps_per_epoch = math.ceil(len(labels) / recipe.batch_size)
    n_steps = recipe.epochs * steps_per_epoch
    step = 0
    n_scores = max(1, recipe.epochs * recipe.scores_per_epoch)
    pauses = {round((i + 1) * n_steps / n_scores) for i in range(n_scores)}
    history = History()
    steps = _steps_of(model, images, labels, recipe)
    shown = list(data.splits())[-1]  # "test" where there is one
    bar = tqdm(total=n_steps, desc=label, unit="step", leave=False, disable=_bars_hidden())
    with bar, _in_mode(model, training=True):
        _record(history, model, scored, recipe.precision, epochs=0.0, seconds=0.0)
        clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
        start, processor_start, processor_seconds = clock(), time.thread_time(), 0.0
        for epoch in range(1, recipe.epochs + 1):
            order = batches(len(labels), recipe.batch_size, seed=recipe.seed, epoch=epoch, device=device)
            for index in order:
                if stop and stop.is_set():
                    raise CancelledError
                wait_for_timing()
                steps.take(index, learning_rate=recipe.learning_rate * (1 - step / n_steps))
                step += 1
                bar.update()
                if step in pauses:
                    synchronise(device)
                    seconds = history.seconds[-1] + clock() - start
                    processor_seconds += time.thread_time() - processor_start
                    _record(history, model, scored, recipe.precision, epochs=step / steps_per_epoch, seconds=seconds)
                    bar.set_postfix({f"{shown}_accuracy": f"{history.accuracy[shown][-1]:.2%}"})
                    start, processor_start = clock(), time.thread_time()
        _record_whole(
            history, model, {k: pair for k, pair in splits.items() if pair is not scored[k]}, recipe.precision
        )
    _spend("training", processor_seconds)
    return history


def progress(items: Sequence[T], label: str) -> Iterable[T]:
    """Go through a sequence, and show how far it is once that has taken two seconds."""
    return tqdm(items, desc=label, leave=False, delay=2, disable=_bars_hidden())


def _bars_hidden() -> bool:
    return "TQDM_DISABLE" in os.environ  # tqdm reads it by itself in a terminal, but not in a notebook


def sample(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return at most ``SCORED_EACH_TIME`` images (n, …) of a set with their labels, always the same."""
    if len(labels) <= SCORED_EACH_TIME:
        return images, labels
    generator = torch.Generator().manual_seed(0)
    index = torch.randperm(len(labels), generator=generator)[:SCORED_EACH_TIME].to(labels.device)
    return images.index_select(0, index), labels.index_select(0, index)


def side_by_side(trainings: Sequence[Callable[[Event], T]], device: torch.device) -> list[T]:
    """Do several trainings: on the CPU :func:`n_side_by_side` at the same time, elsewhere one after the other.

    On a GPU, threads that record and replay steps on streams of their own have stood still for good (docs/gpu.md), so
    there it is only processes that share the device.

    Parameters
    ----------
    trainings : sequence of callables
        Each gets the event to pass on to :func:`fit`. The first failure, or an interruption, sets it, and is raised
        when all trainings under way have ended.
    device : torch.device

    Returns
    -------
    list
        What they returned, in their order.
    """
    stop = Event()
    n_workers = min(_n_workers(device), len(trainings))
    if n_workers <= 1:
        return [training(stop) for training in trainings]
    pool = ThreadPoolExecutor(n_workers, initializer=_prepare_worker)
    try:
        # In copies of this context: what it times must not wait for its own lock.
        futures = [pool.submit(copy_context().run, training, stop) for training in trainings]
        for future in wait(futures, return_when=FIRST_EXCEPTION).done:
            future.result()  # raises what it raised
        return [future.result() for future in futures]
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _n_workers(device: torch.device) -> int:
    """Return how many may train here: a worker has no workers of its own."""
    return 1 if device.type != "cpu" or hasattr(_this_thread, "is_worker") else _n_side_by_side


def predict(model: nn.Module, images: Tensor, precision: str = "float32") -> Tensor:
    """Return float32 logits (n, n_classes) for images (n, …), in batches; on the CPU each worker has its share.

    The network answers in evaluation mode, and is left in the mode that it was given in.
    """
    batches = images.split(EVALUATION_BATCH if images.device.type == "cpu" else EVALUATION_BATCH_GPU)
    with _in_mode(model, training=False):
        models = _copies(model, min(_n_workers(images.device), len(batches)))
        size = math.ceil(len(batches) / len(models))
        shares = [batches[first : first + size] for first in range(0, len(batches), size)]
        works = [partial(_predict, own, share, precision) for own, share in zip(models, shares, strict=False)]
        return torch.cat(side_by_side(works, images.device))


@contextmanager
def _in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put all layers of a network into training or evaluation mode, and each back into its own at the end."""
    modes = {layer: layer.training for layer in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for layer, mode in modes.items():
            layer.training = mode


def _copies(model: nn.Module, n: int) -> list[nn.Module]:
    """Return a model for each of n workers: modules may keep state while they compute, as `functional_call` does."""
    try:
        return [model, *(copy.deepcopy(model) for _ in range(1, n))]
    except RuntimeError:  # a module keeps a tensor that it computed, as torch.nn.utils.prune's do
        return [model]


@torch.no_grad()
def _predict(model: nn.Module, batches: Sequence[Tensor], precision: str, stop: Event) -> Tensor:
    with spending("evaluating"), products_in(precision, batches[0].device):
        return torch.cat([_answers(model, batch) for batch in batches])


def _answers(model: nn.Module, batch: Tensor) -> Tensor:
    wait_for_timing()
    return model(batch).float()


def evaluate(model: nn.Module, images: Tensor, labels: Tensor, precision: str = "float32") -> Score:
    """Score a network, in evaluation mode, on images (n, …) and labels: classes (n,) or probabilities (n, n_classes).

    Of probabilities, such as another network's answers, the likeliest class is the correct one.
    """
    logits = predict(model, images, precision)
    classes = labels if labels.dim() == 1 else labels.argmax(dim=1)
    accuracy = (logits.argmax(dim=1) == classes).float().mean()
    return Score(F.cross_entropy(logits, labels).item(), accuracy.item())


class _Steps:
    """Takes the steps of one training."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe) -> None:
        self._model = model
        self._images, self._labels = images, labels
        self._recipe = recipe
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimiser = torch.optim.Adam(
            trainable, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=images.device.type != "mps"
        )

    def take(self, index: Tensor, *, learning_rate: float) -> None:
        """Move the network once, against the gradient of the batch of these images."""
        self._optimiser.param_groups[0]["lr"] = learning_rate
        self._move(index)

    def _move(self, index: Tensor) -> None:
        # Not images[index], which copies number by number where this copies rows: a quarter of the time.
        images, labels = self._images.index_select(0, index), self._labels.index_select(0, index)
        with products_in(self._recipe.precision, images.device):
            logits = self._model(images)
        loss = F.cross_entropy(logits.float(), labels)
        if self._recipe.frobenius_decay:
            loss = loss + self._recipe.frobenius_decay / 2 * squared_norm(self._model)
        self._optimiser.zero_grad()
        loss.backward()
        self._optimiser.step()


class _GraphSteps(_Steps):
    """Takes the steps on a CUDA device, each with one launch.

    A step of such a network is some hundred kernels that run for microseconds each: to launch them one by one takes
    five times as long as they run. So they are recorded once, as a ``torch.cuda.CUDAGraph``, and replayed for the
    images whose numbers its index holds then. The first steps are launched as usual, on the stream of the recording, as
    PyTorch asks before one; so is the smaller batch that ends an epoch, which comes too seldom to be recorded.
    """

    LAUNCHED = 3

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe) -> None:
        super().__init__(model, images, labels, recipe)
        for group in self._optimiser.param_groups:
            group |= {"lr": torch.tensor(recipe.learning_rate, device=images.device), "capturable": True}
        self._stream = torch.cuda.Stream(images.device)
        self._n_launched = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._index = torch.empty(recipe.batch_size, dtype=torch.int64, device=images.device)

    def take(self, index: Tensor, *, learning_rate: float) -> None:
        """Move the network once, against the gradient of the batch of these images."""
        self._optimiser.param_groups[0]["lr"].fill_(learning_rate)
        if self._n_launched < self.LAUNCHED or len(index) < len(self._index):
            self._n_launched += 1
            self._launch(index)
            return
        self._index.copy_(index)
        if not self._graph:
            self._graph = self._recorded()
        self._graph.replay()

    def _launch(self, index: Tensor) -> None:
        usual = torch.cuda.current_stream(index.device)
        self._stream.wait_stream(usual)
        with torch.cuda.stream(self._stream):
            self._move(index)
        usual.wait_stream(self._stream)

    def _recorded(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        self._optimiser.zero_grad()  # gradients are the graph's own
        # Not torch.cuda.graph, which collects garbage and gives all free memory back first, for each network again.
        with torch.cuda.stream(self._stream):
            graph.capture_begin()
            try:
                self._move(self._index)
            finally:
                graph.capture_end()
        return graph


def _steps_of(model: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe) -> _Steps:
    return (_GraphSteps if images.device.type == "cuda" else _Steps)(model, images, labels, recipe)


def _record(
    history: History, model: nn.Module, splits: Splits, precision: str, *, epochs: float, seconds: float
) -> None:
    start = time.perf_counter()
    for name, (images, labels) in splits.items():
        score = evaluate(model, images, labels, precision)
        history.loss.setdefault(name, []).append(score.loss)
        history.accuracy.setdefault(name, []).append(score.accuracy)
    history.epochs.append(epochs)
    history.seconds.append(seconds)
    history.evaluation_seconds += time.perf_counter() - start


def _record_whole(history: History, model: nn.Module, splits: Splits, precision: str) -> None:
    start = time.perf_counter()
    for name, (images, labels) in splits.items():
        history.whole[name] = asdict(evaluate(model, images, labels, precision))
    history.evaluation_seconds += time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    """Wait for queued work, so that a clock read next tells the truth."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()

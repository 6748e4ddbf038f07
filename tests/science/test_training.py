"""Training: the loop against a textbook one, and what it must leave alone."""

import copy
import math
import os
import subprocess
import sys
import textwrap
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import partial
from threading import Event

import numpy as np
import pytest
import torch
from networks import weights_of
from sklearn.metrics import accuracy_score, log_loss
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lowrank_helpers import parallel, timing, training
from lowrank_helpers.data import epoch_generator
from lowrank_helpers.layers import factorize
from lowrank_helpers.models import mlp
from lowrank_helpers.parallel import side_by_side
from lowrank_helpers.training import History, Recipe, evaluate, fit, pick_device, pick_precision, predict, sample


def _model(seed=0):
    return mlp([784, 48, 32, 10], seed=seed)


def _textbook(model, data, recipe, penalty=lambda model: 0.0):
    """Train with a DataLoader, PyTorch's plain Adam and a scheduler, as tutorials do."""
    dataset = TensorDataset(data.train_images, data.train_labels)
    optimiser = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate)
    n_steps = recipe.epochs * -(-len(dataset) // recipe.batch_size)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / n_steps)
    for epoch in range(1, recipe.epochs + 1):
        sampler = RandomSampler(dataset, generator=epoch_generator(recipe.seed, epoch))
        for images, labels in DataLoader(dataset, recipe.batch_size, sampler=sampler):
            loss = F.cross_entropy(model(images), labels) + penalty(model)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            scheduler.step()


def _squares(matrices):
    return 0.05 / 2 * sum(matrix.square().sum() for matrix in matrices)


@pytest.mark.parametrize(
    ("decay", "penalty"),
    [
        ({}, lambda model: 0.0),
        ({"weight_decay": 0.05}, lambda model: _squares(model.parameters())),
        ({"frobenius_decay": 0.05}, lambda model: _squares(of.weight for of in model if hasattr(of, "weight"))),
    ],
)
def test_training_is_the_textbooks_and_frozen_parameters_stay(digits, decay, penalty, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")  # a hidden bar changes nothing
    ours = factorize(_model(), {"fc1": 8, "fc2": 8})
    ours.fc2.C.requires_grad_(False)
    theirs, frozen = copy.deepcopy(ours), ours.fc2.C.weight.clone()
    recipe = Recipe(2, 100, 1e-3, seed=4, **decay)
    fit(ours, digits, recipe)
    _textbook(theirs, digits, recipe, penalty)
    torch.testing.assert_close(weights_of(ours), weights_of(theirs), rtol=0, atol=2e-5)
    assert torch.equal(ours.fc2.C.weight, frozen)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("build", [_model, lambda: factorize(_model(), {"fc1": 8, "fc2": 8})])
def test_on_a_gpu_recorded_steps_are_those_that_the_processor_takes(digits, build):
    recipe = Recipe(epochs=6, batch_size=400, learning_rate=1e-3, weight_decay=0.01)  # the last batch is smaller
    expected, recorded = build(), build().to("cuda")
    data = digits.to("cuda")
    fit(expected, digits, recipe)
    fit(recorded, data, recipe)
    torch.testing.assert_close(weights_of(recorded).cpu(), weights_of(expected), rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_each_of_many_networks_learns_what_the_first_does(digits):
    device, recipe = torch.device("cuda"), Recipe(8, 64, 2e-3, precision="bfloat16")
    data = digits.to(device)
    models = [_model().to(device) for _ in range(25)]
    histories = side_by_side([partial(_fit, model, data, recipe) for model in models], device)
    expected = histories[0].final("test").accuracy
    assert expected > 0.85
    for history in histories:
        assert history.final("test").accuracy == pytest.approx(expected, abs=0.03)


def test_a_network_learns_in_either_precision_and_keeps_float32_weights(digits):
    scores = {}
    for precision in ("float32", "bfloat16"):
        model = _model()
        history = fit(model, digits, Recipe(12, 64, 3e-3, precision=precision))
        scores[precision] = history.final("test").accuracy
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
        assert history.loss["train"][-1] < 0.1 < history.loss["train"][0]
    assert min(scores.values()) > 0.95
    assert scores["float32"] == pytest.approx(scores["bfloat16"], abs=0.02)
    exact, rounded = (predict(model, digits.test_images, precision) for precision in ("float32", "bfloat16"))
    assert rounded.dtype == torch.float32
    difference = (exact - rounded).abs().max() / exact.abs().max()
    assert 1e-4 < difference < 0.05  # bfloat16 has 8 significant bits


def test_history_starts_at_the_untrained_network_and_ends_at_the_trained_one(digits):
    model = _model()
    untrained = evaluate(model, *sample(digits.test_images, digits.test_labels))
    half = digits.select(train=digits.train_labels < 5, test=digits.test_labels < 5)
    history = fit(model, digits, Recipe(3, 128, 1e-3), others={"low": half})
    assert len(history.seconds) == len(history.loss["test"]) == 4
    assert (history.loss["test"][0], history.accuracy["test"][0]) == (untrained.loss, untrained.accuracy)
    assert history.final("train") == evaluate(model, *sample(digits.train_images, digits.train_labels))
    assert history.final("low test") == evaluate(model, *sample(half.test_images, half.test_labels))
    assert set(history.loss) == set(history.accuracy) == {"train", "test", "low train", "low test"}
    assert history.seconds[0] == 0 and np.all(np.diff(history.seconds) > 0)


def test_a_large_set_is_scored_on_a_sample_while_a_network_trains(digits, monkeypatch):
    monkeypatch.setattr(training, "SCORED_MEANWHILE", 500)
    model, data = _model(), digits.hold_out()
    history = fit(model, data, Recipe(1, 100, 1e-3))
    assert set(history.loss) == set(history.end) == {"train", "test"}, "validation images are for who chooses"
    assert history.final("train") == evaluate(model, *sample(data.train_images, data.train_labels))
    n_correct = 500 * history.accuracy["train"][-1]
    assert n_correct == pytest.approx(round(n_correct), abs=1e-3), "of 500 images"
    assert history.accuracy["train"][-1] == pytest.approx(history.final("train").accuracy, abs=0.05)
    assert history.final("test").loss == history.loss["test"][-1], "a set of fewer images is scored whole"


def test_data_without_a_test_set_can_be_trained_on(digits, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    nothing = torch.arange(0)
    history = fit(_model(), digits.select(test=nothing), Recipe(1, 500, 1e-3))
    assert set(history.accuracy) == {"train"} and len(history.accuracy["train"]) == 2


def _normalised():
    torch.manual_seed(0)
    return torch.nn.Sequential(_model(), torch.nn.BatchNorm1d(10))


def test_steps_are_in_training_mode_and_scores_in_evaluation_mode_whatever_the_mode_was(digits):
    ours, theirs = _normalised().eval(), _normalised()
    ours[0].train()  # a mode of its own, which it must come back in
    recipe = Recipe(2, 100, 1e-3)
    history = fit(ours, digits, recipe)
    _textbook(theirs.train(), digits, recipe)
    assert [ours.training, ours[0].training, ours[1].training] == [False, True, False]
    trained = copy.deepcopy(ours.state_dict())
    torch.testing.assert_close(trained, theirs.state_dict(), rtol=0, atol=2e-5)
    expected = theirs.eval()(digits.test_images).argmax(dim=1)
    assert history.final("test").accuracy == pytest.approx((expected == digits.test_labels).float().mean().item())
    scores = [evaluate(ours.train(mode), digits.test_images, digits.test_labels) for mode in (False, True)]
    assert scores[0] == scores[1] and all(layer.training for layer in ours.modules())
    torch.testing.assert_close(ours.state_dict(), trained, rtol=0, atol=0)


@pytest.mark.skipif(timing.fcntl is None, reason="without flock nobody waits")
def test_a_training_pauses_while_another_process_or_thread_times(digits, monkeypatch):
    steps, stop = [], Event()
    model = _model()
    model.register_forward_pre_hook(lambda *given: steps.append(1))
    recipe = Recipe(10_000, 32, 1e-3)
    with ThreadPoolExecutor() as pool:
        trained = pool.submit(fit, model, digits, recipe, stop=stop)
        try:
            while not steps:
                time.sleep(0.01)
            with timing.exclusive_timing():
                at_first = len(steps)
                time.sleep(0.3)
                assert len(steps) - at_first <= 1
            time.sleep(0.01)
        finally:
            stop.set()
        with pytest.raises(CancelledError):
            trained.result()


def test_time_spent_scoring_is_no_time_spent_training(digits, monkeypatch):
    def slowly(*given):
        end = time.thread_time() + 0.1
        while time.thread_time() < end:
            pass
        return predict(*given)

    monkeypatch.setattr(training, "predict", slowly)
    few = digits.select(train=torch.arange(100))
    start = time.thread_time()
    history = fit(_model(), few, Recipe(10, 10, 1e-3))
    assert time.thread_time() - start > 2
    assert history.seconds[-1] < 1


@pytest.mark.parametrize(
    ("accuracy", "expected"), [(0.05, (0, 0)), (0.5, (1, 3)), (0.6, (1.5, 4)), (0.71, (math.nan, math.nan))]
)
def test_when_an_accuracy_was_reached_is_interpolated(accuracy, expected):
    history = History(seconds=[0, 3, 5, 9], accuracy={"test": [0.1, 0.5, 0.7, 0.65]})
    assert history.reached("test", accuracy) == pytest.approx(expected, nan_ok=True)


def test_scores_are_scikit_learns_in_however_many_batches(digits, monkeypatch):
    monkeypatch.setattr(training, "EVALUATION_BATCH", 500)
    model = _model()
    score = evaluate(model, digits.train_images, digits.train_labels)
    probabilities = model(digits.train_images).softmax(dim=1).detach().double().numpy()
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    assert score.accuracy == pytest.approx(accuracy_score(digits.train_labels, probabilities.argmax(axis=1)), abs=1e-7)
    assert score.loss == pytest.approx(log_loss(digits.train_labels, probabilities), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"epochs": 0}, "epochs 0"),
        ({"epochs": -3}, "epochs -3"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"learning_rate": 0.0}, r"learning_rate 0\.0"),
        ({"learning_rate": float("nan")}, "learning_rate nan"),
        ({"learning_rate": float("inf")}, "learning_rate inf"),
        ({"frobenius_decay": -0.1}, r"frobenius_decay -0\.1"),
        ({"weight_decay": float("nan")}, "weight_decay nan"),
        ({"precision": "float16"}, "'float16' is unknown; allowed: float32, bfloat16"),
        ({"precision": "auto"}, "'auto' is unknown"),
    ],
)
def test_impossible_recipes_are_refused(change, named):
    with pytest.raises(ValueError, match=named):
        Recipe(**{"epochs": 1, "batch_size": 1, "learning_rate": 1e-3} | change)


def test_devices_that_are_not_here_are_refused_with_those_that_are():
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert pick_device("auto").type == expected
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"'tpu' is not on this machine; allowed: auto, .*cpu"):
        pick_device("tpu")


@pytest.mark.parametrize(
    ("ratio", "picked"), [(0.2, "float32"), (1.2, "float32"), (1.4, "bfloat16"), (3.0, "bfloat16")]
)
def test_bfloat16_is_picked_where_its_products_are_clearly_faster(ratio, picked, monkeypatch):
    seconds = iter([ratio, 1.0])  # in float32, then in bfloat16
    monkeypatch.setattr(training, "median_seconds", lambda *given, **options: next(seconds))
    assert pick_precision("auto", torch.device("cpu")) == picked
    assert {pick_precision(name, torch.device("cpu")) for name in ("float32", "bfloat16")} == {"float32", "bfloat16"}


@pytest.fixture
def two_workers(monkeypatch):
    monkeypatch.setattr(parallel, "_n_side_by_side", 2)


def test_numbers_depend_neither_on_workers_nor_on_what_is_trained_beside(digits, two_workers):
    recipe = Recipe(epochs=2, batch_size=128, learning_rate=1e-3)
    models = [mlp([784, 256, 256, 10], seed=seed) for seed in range(3)]
    alone = [copy.deepcopy(model) for model in models]
    histories = side_by_side([partial(_fit, model, digits, recipe) for model in models], torch.device("cpu"))
    for model, history, other in zip(models, histories, alone, strict=True):
        expected = fit(other, digits, recipe)
        assert torch.equal(weights_of(model), weights_of(other))
        assert (history.loss, history.accuracy) == (expected.loss, expected.accuracy)


def _fit(model, data, recipe, stop):
    return fit(model, data, recipe, stop=stop)


def test_as_many_are_trained_at_once_as_there_are_workers(two_workers):
    def meet(own, other, stop):
        own.set()
        return other.wait(timeout=20)

    first, second = Event(), Event()
    assert side_by_side([partial(meet, first, second), partial(meet, second, first)], torch.device("cpu")) == [True] * 2


def test_a_failure_stops_the_trainings_beside_it(digits, two_workers):
    def fail(stop):
        raise ValueError("no luck")

    ended = []

    def train(stop):
        try:
            fit(_model(), digits, Recipe(epochs=10_000, batch_size=32, learning_rate=1e-3), stop=stop)
        except CancelledError:
            ended.append(True)
            raise

    start = time.perf_counter()
    with pytest.raises(ValueError, match="no luck"):
        side_by_side([train, fail], torch.device("cpu"))
    assert ended and time.perf_counter() - start < 20


def test_workers_are_as_many_as_the_environment_allows_threads():
    says = """
        import torch
        from lowrank_helpers import parallel
        for _ in range(2):
            print(parallel.n_side_by_side(), torch.get_num_threads())
            parallel.take_one_thread_each()
            parallel.take_one_thread_each()
    """
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", textwrap.dedent(says)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "2", "2", "1"], "the import leaves threads alone"

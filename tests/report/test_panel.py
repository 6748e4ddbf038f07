import time

import numpy as np
import pytest
import torch

from lowrank_helpers import models
from lowrank_helpers.report import panel
from lowrank_helpers.series.settings import VARIABLES
from lowrank_helpers.training import evaluate

WIDTHS = [784, 32, 16, 10]


def test_errors_and_accuracies_are_those_of_the_truncated_matrix(digits):
    model = models.mlp(WIDTHS, seed=0)
    found = panel.Truncations(model, "fc1", digits.splits())
    W = model.fc1.weight.detach().double().numpy()
    U, s, Vh = np.linalg.svd(W, full_matrices=False)
    for rank in (1, 7, 32):
        expected = np.linalg.norm(W - (U[:, :rank] * s[:rank]) @ Vh[:rank]) / np.linalg.norm(W)
        assert float(found.errors[rank]) == pytest.approx(expected, abs=1e-5)
    assert found.accuracies.keys() == {"train", "test"}
    assert found.accuracies["test"][-1] == evaluate(model, digits.test_images, digits.test_labels).accuracy
    assert all(len(curve) == len(found.ranks) for curve in found.accuracies.values())
    assert torch.equal(model.fc1.weight, models.mlp(WIDTHS, seed=0).fc1.weight), "the network stays as it was"


def test_with_a_base_the_update_is_truncated_and_the_base_kept(digits):
    base, tuned = models.mlp(WIDTHS, seed=0), models.mlp(WIDTHS, seed=0)
    tuned.fc1.weight.data += 0.1 * torch.outer(torch.ones(32), torch.linspace(-1, 1, 784))
    update = panel.Truncations(tuned, "fc1", digits.splits(), base)
    assert float(update.errors[1]) < 1e-3, "the update has rank 1"
    expected = evaluate(tuned, digits.test_images, digits.test_labels).accuracy
    assert update.accuracies["test"] == pytest.approx([expected] * len(update.ranks), abs=0.01)


def test_a_run_shows_a_figure_and_a_lab_a_panel(digits, monkeypatch, capsys):
    model = models.mlp(WIDTHS, seed=0)
    monkeypatch.setenv(VARIABLES["run_folder"], "somewhere")
    panel.explore(model, digits.splits())
    assert "IPython.core.display.Image" in capsys.readouterr().out
    monkeypatch.delenv(VARIABLES["run_folder"])
    panel.explore(model, digits.splits())
    assert "VBox" in capsys.readouterr().out


def test_layer_and_slider_change_picture_and_numbers_at_once(digits):
    model = models.mlp([784, 256, 10], seed=0)
    layers = {name: panel.Truncations(model, name, digits.splits()) for name in ("fc1", "fc2")}
    controls, numbers, curves, matrices = panel.interactive_panel(list(layers), layers.__getitem__).children
    layer, slider = controls.children
    seen, seconds, of_fc1 = set(), [], curves.value
    for rank in slider.options:
        start = time.perf_counter()
        slider.value = rank
        seconds.append(time.perf_counter() - start)
        seen.add(matrices.children[0].value)
    assert len(seen) == len(slider.options) and matrices.children[1].value in seen
    assert numbers.value.startswith("rank 256 of 256 · error 0 %")
    assert min(seconds) < 0.15  # the fastest: others wait for whatever else the machine does
    layer.value = "fc2"
    assert slider.options[-1] == 10 and "of 10" in numbers.value and curves.value != of_fc1

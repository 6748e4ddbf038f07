import time

import ipywidgets
import numpy as np
import pytest
import torch

from lowrank_helpers import models
from lowrank_helpers.report import panel
from lowrank_helpers.series.settings import VARIABLES
from lowrank_helpers.training import evaluate

WIDTHS = [784, 32, 16, 10]


@pytest.fixture(scope="module")
def cuts(digits):
    return panel.Cuts(models.mlp(WIDTHS, seed=0), digits.splits(), None, "float32")


@pytest.fixture(scope="module")
def widgets(digits):
    model = models.mlp([784, 256, 10], seed=0)
    return find_widgets(panel.interactive_panel(panel.Cuts(model, digits.splits(), None, "float32")))


def find_widgets(box: ipywidgets.VBox) -> dict[type, ipywidgets.Widget]:
    controls, numbers, picture = box.children
    return {type(widget): widget for widget in (*controls.children, numbers, picture)}


def test_errors_are_those_of_the_truncated_matrix(cuts):
    W = cuts.layers["fc1"].weight.detach().double().numpy()
    U, s, Vh = np.linalg.svd(W, full_matrices=False)
    for rank in (1, 7, 32):
        truncated = (U[:, :rank] * s[:rank]) @ Vh[:rank]
        expected = np.linalg.norm(W - truncated) / np.linalg.norm(W)
        assert float(cuts.errors("fc1")[rank]) == pytest.approx(expected, abs=1e-5)


def test_accuracy_at_full_rank_is_the_networks_own(cuts, digits):
    model = models.mlp(WIDTHS, seed=0)
    curves = cuts.accuracies("fc2")
    assert curves.keys() == {"train", "test"}
    assert curves["test"][-1] == evaluate(model, digits.test_images, digits.test_labels).accuracy
    assert all(len(curve) == len(cuts.ranks("fc2")) for curve in curves.values())


def test_measuring_leaves_the_network_as_it_was(cuts):
    cuts.accuracies("fc1")
    assert torch.equal(cuts.model.fc1.weight, models.mlp(WIDTHS, seed=0).fc1.weight)


def test_with_a_base_the_update_is_cut_and_the_base_kept(digits):
    base, tuned = models.mlp(WIDTHS, seed=0), models.mlp(WIDTHS, seed=0)
    direction = torch.outer(torch.ones(32), torch.linspace(-1, 1, 784))
    with torch.no_grad():
        tuned.fc1.weight += 0.1 * direction
    update = panel.Cuts(tuned, digits.splits(), base, "float32")
    assert float(update.errors("fc1")[1]) < 1e-3  # the update has rank 1
    expected = evaluate(tuned, digits.test_images, digits.test_labels).accuracy
    assert update.accuracies("fc1")["test"] == pytest.approx([expected] * len(update.ranks("fc1")), abs=0.01)


def test_a_run_shows_a_figure_and_a_lab_a_panel(digits, monkeypatch, capsys):
    model = models.mlp(WIDTHS, seed=0)
    monkeypatch.setenv(VARIABLES["run_folder"], "somewhere")
    panel.explore(model, digits.splits())
    assert "IPython.core.display.Image" in capsys.readouterr().out
    monkeypatch.delenv(VARIABLES["run_folder"])
    panel.explore(model, digits.splits())
    assert "VBox" in capsys.readouterr().out


def test_moving_the_slider_changes_picture_and_numbers(widgets):
    slider, picture, numbers = (
        widgets[kind] for kind in (ipywidgets.SelectionSlider, ipywidgets.Image, ipywidgets.Label)
    )
    slider.value = slider.options[0]
    before = picture.value
    slider.value = slider.options[-1]
    assert picture.value != before
    assert numbers.value.startswith("rank 256 of 256 · error 0 %")


def test_choosing_a_layer_offers_its_ranks(widgets):
    layer, slider = widgets[ipywidgets.Dropdown], widgets[ipywidgets.SelectionSlider]
    layer.value = "fc2"
    assert slider.options[-1] == 10
    assert "of 10" in widgets[ipywidgets.Label].value
    layer.value = "fc1"


def test_a_move_is_drawn_in_150_milliseconds(widgets):
    slider = widgets[ipywidgets.SelectionSlider]
    seconds = []
    for rank in slider.options:
        start = time.perf_counter()
        slider.value = rank
        seconds.append(time.perf_counter() - start)
    assert min(seconds[1:]) < 0.15  # the fastest: others wait for whatever else the machine does

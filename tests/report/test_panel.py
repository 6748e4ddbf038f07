import numpy as np
import pytest
import torch

from lowrank_helpers import models
from lowrank_helpers.report import panel
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


def test_a_run_shows_a_figure_and_a_lab_a_choice_of_layer_and_rank(digits, monkeypatch, capsys):
    model = models.mlp(WIDTHS, seed=0)
    monkeypatch.setenv("LOWRANK_RUN_DIR", "somewhere")
    panel.explore(model, digits.splits())
    assert "IPython.core.display.Image" in capsys.readouterr().out
    monkeypatch.delenv("LOWRANK_RUN_DIR")
    drawn = []
    monkeypatch.setattr(panel.plots, "show", lambda figure, alt: drawn.append((figure, alt)))
    monkeypatch.setattr(
        panel.ipywidgets, "interact", lambda show, layer, cut: [show(x, n) for x in layer for n in (1, cut.max)]
    )
    panel.explore(model, digits.splits())
    assert [alt.split(" ·")[0] for _, alt in drawn] == [
        "rank 1 of 32",
        "rank 32 of 32",
        "rank 1 of 16",
        "rank 16 of 16",
        "rank 1 of 10",
        "rank 10 of 10",
    ]
    assert [ax.get_title() for ax in drawn[0][0].axes] == [
        "Spectrum of fc1",
        "What is cut away",
        "The network with this layer cut",
        "rank 1",
        "rank 32: whole",
    ]

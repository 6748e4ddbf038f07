"""What learning curves show of a training."""

import matplotlib.pyplot as plt
import pytest

from lowrank_helpers import plots
from lowrank_helpers.training import History


def history(*accuracies):
    """Return a history of so many scores, an epoch apart."""
    scores = {split: list(accuracies) for split in ("train", "test")}
    return History(epochs=list(range(len(accuracies))), loss=scores, accuracy=scores, seconds=[0.0] * len(accuracies))


def first_line(*accuracies):
    """Return the accuracies drawn of one training, in percent."""
    figure = plots.learning_curves({"network": [history(*accuracies)]})
    try:
        return list(figure.axes[1].lines[0].get_ydata())
    finally:
        plt.close(figure)


def test_curves_begin_after_the_start():
    assert first_line(0.1, 0.9, 0.95) == pytest.approx([90, 95])


def test_a_training_of_one_epoch_is_a_line_from_its_start():
    assert first_line(0.8, 0.9) == pytest.approx([80, 90])

"""What learning curves show of a training, and which colours networks have."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from lowrank_helpers import plots
from lowrank_helpers.training import History


def history(*accuracies):
    scores = {split: list(accuracies) for split in ("train", "test")}
    return History(loss=scores, accuracy=scores)


@pytest.fixture
def curves():
    yield plots.learning_curves
    plt.close("all")


@pytest.mark.parametrize(("accuracies", "drawn"), [((0.1, 0.9, 0.95), [90, 95]), ((0.8, 0.9), [80, 90])])
def test_accuracy_is_drawn_in_percent_from_the_first_epoch_on_or_one_epoch_from_its_start(curves, accuracies, drawn):
    axes = curves({"network": history(*accuracies)}).axes
    assert list(axes[1].lines[0].get_ydata()) == pytest.approx(drawn)


def test_a_kind_of_network_has_one_colour_in_every_figure(curves):
    figure = curves({"MLP": history(0.1, 0.9, 0.95), "dense": history(0.1, 0.8, 0.9)})
    train, test, *_ = lines = figure.axes[0].lines
    assert [line.get_color() for line in lines[2:]] == [plots.COLOURS["dense"]] * 2
    assert train.get_color() == test.get_color() != plots.COLOURS["dense"]
    assert (train.get_linestyle(), test.get_linestyle()) == ("--", "-")


def test_labels_that_are_no_kind_of_network_have_colours_of_their_own():
    given = plots.colours(["published", *map(str, range(9))])
    assert len(set(given.values())) == 10
    assert len(plots.colours(map(str, range(20)))) == 20


def test_band_reaches_from_the_least_to_the_most_that_recorded_runs_measured(curves):
    _, ax = plt.subplots()
    plots.band(ax, pd.DataFrame(), "red")
    assert not ax.collections, "nothing is recorded"
    plots.band(ax, pd.DataFrame({1.0: [3, 5], 2.0: [4, 9]}), "red")
    points = ax.collections[0].get_paths()[0].vertices
    assert {tuple(map(float, point)) for point in points} == {(1, 3), (1, 5), (2, 4), (2, 9)}


def test_dots_of_recorded_runs_stand_in_the_rows_of_this_runs_labels(curves):
    _, ax = plt.subplots()
    plots.dots(ax, {"new": 1.0, "known": 2.0}, pd.DataFrame({"known": [3, 4], "other": [5, 6]}), "red")
    drawn = {(x, row) for line in ax.lines for x, row in zip(*line.get_data(orig=True), strict=True)}
    assert drawn == {(1, "new"), (2, "known"), (3, "known"), (4, "known")}

"""One style for every figure of the series, and the figures that more than one notebook draws.

Train is dashed and test is solid, everywhere. Colours are Okabe & Ito's palette, which colour-blind readers
tell apart.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from cycler import cycler
from IPython.display import Image, display
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image as pillow

from lowrank_helpers.training import History

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES = {"train": "--", "test": "-"}
SPLIT_COLOURS = {"train": PALETTE[5], "test": PALETTE[0]}  # for bars, which have no line style
PANEL = (4.2, 3.1)  # inches, width and height of one panel
RESOLUTION = 180  # dots per inch: crisp at twice the size shown
SHOWN_RESOLUTION = 90

mpl.rcParams.update(
    {
        "axes.prop_cycle": cycler(color=PALETTE),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.titlesize": "medium",
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "legend.fontsize": "small",
        "figure.constrained_layout.use": True,
        "savefig.facecolor": "white",
    }
)


def panels(
    n_columns: int = 1, n_rows: int = 1, *, panel: tuple[float, float] = PANEL, **options: Any
) -> tuple[Figure, Any]:
    """Return a figure of equal panels, each of a size in inches, and its axes as ``plt.subplots`` does."""
    width, height = panel
    with plt.ioff():
        return plt.subplots(n_rows, n_columns, figsize=(width * n_columns, height * n_rows), **options)


def show(figure: Figure, alt: str) -> None:
    """Display a figure and close it.

    Parameters
    ----------
    alt : str
        Says what the figure shows, for readers who cannot see it.
    """
    png, width, height = drawn(figure)
    display(Image(png, format="png", width=width, height=height, alt=alt))


def drawn(figure: Figure) -> tuple[bytes, int, int]:
    """Draw a figure and close it: return its PNG, and the width and height in pixels to show it at."""
    full, buffer = io.BytesIO(), io.BytesIO()
    figure.savefig(full, dpi=RESOLUTION)
    plt.close(figure)
    # A palette of 256 colours takes a quarter of the space, and no eye sees it in a plot.
    pillow.open(full).convert("RGB").quantize(256, method=pillow.Quantize.FASTOCTREE).save(buffer, "png", optimize=True)
    width, height = (round(inches * SHOWN_RESOLUTION) for inches in figure.get_size_inches())
    return buffer.getvalue(), width, height


def learning_curves(
    histories: Mapping[str, Sequence[History]], *, against: str = "epoch", log_loss: bool = False
) -> Figure:
    """Plot loss and accuracy, train and test, of one or more trainings, from the end of the first epoch on.

    Parameters
    ----------
    histories : mapping of str to sequence of History
        By label, one history a seed; each label has one colour.
    against : {"epoch", "seconds"}
        The horizontal axis: epochs, or seconds of training without evaluation.
    log_loss : bool
        Logarithmic loss axis, where the training loss gets tiny.
    """
    figure, (loss_axes, accuracy_axes) = panels(2)
    for colour, (label, seeds) in zip(PALETTE, histories.items(), strict=False):
        for history in seeds:
            x: Sequence[float] = history.epochs if against == "epoch" else history.seconds
            for split, style in LINE_STYLES.items():
                accuracy = [100 * share for share in history.accuracy[split]]
                loss_axes.plot(x[1:], history.loss[split][1:], style, color=colour, linewidth=1.2)
                accuracy_axes.plot(x[1:], accuracy[1:], style, color=colour, linewidth=1.2)
        accuracy_axes.plot([], [], color=colour, label=label)
    for split, style in LINE_STYLES.items():
        accuracy_axes.plot([], [], style, color="black", label=split)
    x_label = "epoch" if against == "epoch" else "training time (s)"
    loss_axes.set(xlabel=x_label, ylabel="cross-entropy (nats)", title="Loss", yscale="log" if log_loss else "linear")
    accuracy_axes.set(xlabel=x_label, ylabel="accuracy (%)", title="Accuracy")
    if against == "epoch":
        for axes in (loss_axes, accuracy_axes):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside right center")  # inside it would cover one curve or another
    return figure

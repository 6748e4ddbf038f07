"""One style for every figure of the series, on seaborn's, and the figures that more than one notebook draws.

Train is dashed and test is solid, everywhere. Colours are seaborn's ``colorblind``, which colour-blind readers tell
apart. Importing this module changes no setting of Matplotlib's: a notebook's :class:`Run` calls :func:`use_style`.
"""

import io
from collections.abc import Iterable, Mapping
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import Image, display
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.rcsetup import cycler
from matplotlib.ticker import MaxNLocator
from PIL import Image as pillow

from lowrank_helpers.training import History

# Light blue before its turn: what is sixth otherwise looks like the second.
PALETTE: tuple[str, ...] = tuple(sns.color_palette("colorblind").as_hex()[i] for i in (0, 1, 2, 3, 4, 9, 5, 6, 7, 8))
# One colour a kind of network in the whole series. Orange is low rank from the start.
COLOURS = {
    "dense": PALETTE[0],
    "all weights": PALETTE[0],
    "sufficient": PALETTE[1],
    "from scratch": PALETTE[1],
    "LoRA": PALETTE[1],
    "published": PALETTE[2],
    "small": PALETTE[7],
    "narrow": PALETTE[3],
    "cut and tuned": PALETTE[4],
    "smallest, cut and tuned": PALETTE[6],
}
LINE_STYLES: dict[str, Any] = {"train": "--", "test": "-"}
SPLIT_COLOURS = {"train": PALETTE[5], "test": PALETTE[0]}  # for bars, which have no line style
PANEL = (4.2, 3.1)  # inches, width and height of one panel
RESOLUTION = 180  # dots per inch: crisp at twice the size shown
SHOWN_RESOLUTION = 90
BAND = 0.15  # opacity of what recorded runs measured

STYLE = sns.axes_style("ticks") | {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.min_exponent": 3,  # 1, 10 and 100 are plain numbers on logarithmic axes
    "axes.grid": True,
    "axes.prop_cycle": cycler(color=PALETTE),
    "axes.titlesize": "medium",
    "grid.alpha": 0.3,
    "grid.color": "#b0b0b0",
    "legend.frameon": False,
    "legend.fontsize": "small",
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "white",
}


def use_style() -> None:
    """Give all figures that this process draws from now on the series' style."""
    plt.rcParams.update(STYLE)


def colours(labels: Iterable[str]) -> dict[str, str]:
    """Return a colour for each label: its own in ``COLOURS``, else the palette's next one that is free."""
    labels = list(labels)
    taken = {COLOURS[label] for label in labels if label in COLOURS}
    free = cycle(colour for colour in PALETTE if colour not in taken)
    return {label: COLOURS.get(label) or next(free) for label in labels}


def panels(
    n_columns: int = 1, n_rows: int = 1, *, panel: tuple[float, float] = PANEL, **options: Any
) -> tuple[Figure, Any]:
    """Return a figure of equal panels, each of a size in inches, and its axes as ``plt.subplots`` does."""
    width, height = panel
    with plt.ioff():
        return plt.subplots(n_rows, n_columns, figsize=(width * n_columns, height * n_rows), **options)


def show(figure: Figure, alt: str, key: str = "") -> None:
    """Display a figure and close it.

    Parameters
    ----------
    alt : str
        Says what the figure shows, for readers who cannot see it.
    key : str
        The item, such as ``5.2``, beside which the report's index shows this figure, 420 pixels wide: best one panel.
    """
    png, width, height = drawn(figure)
    image = Image(png, format="png", width=width, height=height, alt=alt)
    display(image, metadata={"lowrank": {"figure": key}} if key else {})


def drawn(figure: Figure) -> tuple[bytes, int, int]:
    """Draw a figure and close it: return its PNG, and the width and height in pixels to show it at."""
    figure.set_dpi(RESOLUTION)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # once, where savefig lays a figure out twice
    plt.close(figure)
    # A palette of 256 colours takes a quarter of the space, and no eye sees it in a plot.
    picture = pillow.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    buffer = io.BytesIO()
    picture.quantize(256, method=pillow.Quantize.FASTOCTREE).save(buffer, "png")
    width, height = (round(inches * SHOWN_RESOLUTION) for inches in figure.get_size_inches())
    return buffer.getvalue(), width, height


def learning_curves(histories: Mapping[str, History], *, against: str = "epoch", log_loss: bool = False) -> Figure:
    """Plot loss and accuracy, train and test, of trainings by label, from the first score after the start on.

    Where that is the only one, the start is drawn too, as one point makes no line.

    Parameters
    ----------
    against : {"epoch", "seconds"}
        The horizontal axis: epochs, or seconds of training without evaluation.
    log_loss : bool
        Logarithmic loss axis, where the training loss gets tiny.
    """
    figure, axes = panels(2)
    colour = colours(histories)
    for label, history in histories.items():
        n_scores = len(history.loss["train"])
        shown = slice(0 if n_scores == 2 else 1, None)
        x = (range(n_scores) if against == "epoch" else history.seconds)[shown]
        for split, style in LINE_STYLES.items():
            axes[0].plot(x, history.loss[split][shown], style, color=colour[label])
            axes[1].plot(x, [100 * share for share in history.accuracy[split][shown]], style, color=colour[label])
    for ax, title in zip(axes, ("Loss", "Accuracy"), strict=True):
        ax.set(xlabel="epoch" if against == "epoch" else "training time (s)", title=title)
        if against == "epoch":
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set(ylabel="cross-entropy (nats)", yscale="log" if log_loss else "linear")
    axes[1].set(ylabel="accuracy (%)")
    lines = [Line2D([], [], color=colour[label]) for label in histories]
    styles = [Line2D([], [], color="black", linestyle=line) for line in LINE_STYLES.values()]
    figure.legend(lines + styles, [*histories, *LINE_STYLES], loc="outside right center")
    return figure


def band(ax: Axes, recorded: pd.DataFrame, colour: str) -> None:
    """Shade what recorded runs measured, from the least to the most, behind the line of one run.

    ``recorded`` has a row a run and a column a place on the x axis.
    """
    if len(recorded):
        ax.fill_between(recorded.columns, recorded.min(), recorded.max(), color=colour, alpha=BAND, linewidth=0)


def dots(ax: Axes, values: Mapping[str, float], recorded: pd.DataFrame, colour: str, label: str = "") -> None:
    """Mark one run's values, a row a label, over small points for those that recorded runs measured.

    ``recorded`` has a row a run and a column a label.
    """
    for row in recorded.columns.intersection([*values]):
        ax.plot(recorded[row], [row] * len(recorded), ".", color=colour, alpha=3 * BAND, markersize=3)
    ax.plot([*values.values()], [*values], "o", color=colour, label=label)

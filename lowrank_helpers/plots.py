"""One style for every figure of the series, on seaborn's, and the figures that more than one notebook draws.

Train is dashed and test is solid, everywhere. Colours are seaborn's ``colorblind``, which colour-blind readers tell
apart. Importing this module changes no setting of Matplotlib's: a notebook's :class:`Run` calls :func:`use_style`.
"""

import io
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import Image, display
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image as pillow

from lowrank_helpers.statistics import interval
from lowrank_helpers.training import SCORED_EACH_TIME, History

# Light blue before its turn: what is sixth otherwise looks like the second.
PALETTE: tuple[str, ...] = tuple(sns.color_palette("colorblind").as_hex()[i] for i in (0, 1, 2, 3, 4, 9, 5, 6, 7, 8))
LINE_STYLES: dict[str, Any] = {"train": "--", "test": "-"}
SPLIT_COLOURS = {"train": PALETTE[5], "test": PALETTE[0]}  # for bars, which have no line style
PANEL = (4.2, 3.1)  # inches, width and height of one panel
RESOLUTION = 180  # dots per inch: crisp at twice the size shown
SHOWN_RESOLUTION = 90
BAND = 0.15  # opacity of an interval

STYLE = sns.axes_style("ticks") | {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.prop_cycle": plt.cycler(color=PALETTE),
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


def style() -> AbstractContextManager:
    """Return a context in which figures have the series' style."""
    return plt.rc_context(STYLE)


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
        The item, such as ``5.2``, that the report's index shows this figure for: best one panel with few words, as
        it is shown 420 pixels wide there.
    """
    png, width, height = drawn(figure)
    image = Image(png, format="png", width=width, height=height, alt=alt)
    display(image, metadata={"lowrank": {"figure": key}} if key else {})


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
    """Plot loss and accuracy, train and test, of one or more trainings, from the first score after the start on.

    Where that is the only one, the start is drawn too, as one point makes no line.

    Of several seeds the mean is drawn with its 95 % interval (Student's t) as a band.

    Parameters
    ----------
    histories : mapping of str to sequence of History
        By label, one history a seed; each label has one colour.
    against : {"epoch", "seconds"}
        The horizontal axis: epochs, or seconds of training without evaluation (mean of the seeds).
    log_loss : bool
        Logarithmic loss axis, where the training loss gets tiny.
    """
    scores = pd.concat([_scores(label, seeds, against) for label, seeds in histories.items()])
    figure, axes = panels(2)
    colours = dict(zip(histories, PALETTE, strict=False))
    for ax, measure in zip(axes, ("loss", "accuracy"), strict=True):
        band_over_seeds(ax, scores, x=against, y=measure, hue="label", palette=colours)
        ax.set(xlabel="epoch" if against == "epoch" else "training time (s)", title=measure.capitalize())
        if against == "epoch":
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set(ylabel="cross-entropy (nats)", yscale="log" if log_loss else "linear")
    axes[1].set(ylabel="accuracy (%)")
    lines = [plt.Line2D([], [], color=colour) for colour in colours.values()]
    styles = [plt.Line2D([], [], color="black", linestyle=line) for line in LINE_STYLES.values()]
    sampled = any("train" in history.whole for seeds in histories.values() for history in seeds)
    train = f"train\n({SCORED_EACH_TIME:,} images)" if sampled else "train"
    figure.legend(lines + styles, [*colours, train, "test"], loc="outside right center")
    return figure


def band_over_seeds(ax: plt.Axes, table: pd.DataFrame, *, x: str, y: str, **options: Any) -> None:
    """Draw the mean of a column over seeds with its 95 % interval, a line style a split if there is a column ``split``.

    Parameters
    ----------
    table : DataFrame
        One row a seed and ``x``, at least; further options are those of seaborn's ``lineplot``, such as ``hue``.
    """
    if "split" in table:
        options = {"style": "split", "dashes": {"train": (4, 2), "test": "", "validation": (1, 1)}} | options
    sns.lineplot(
        table, x=x, y=y, ax=ax, errorbar=_limits, err_kws={"alpha": BAND, "linewidth": 0}, legend=False, **options
    )


def _limits(values: pd.Series) -> tuple[float, float]:
    """Return the limits of the mean's interval; of one value that value, which has none."""
    found = interval(values)
    return (found.low, found.high) if found.n > 1 else (found.mean, found.mean)


def _scores(label: str, seeds: Sequence[History], against: str) -> pd.DataFrame:
    """Return the scores of trainings that differ in their seed alone, one row a seed, score and split."""
    x = seeds[0].epochs if against == "epoch" else np.mean([history.seconds for history in seeds], axis=0)
    shown = slice(0 if len(x) == 2 else 1, None)
    rows = [
        pd.DataFrame(
            {
                "label": label,
                "split": split,
                against: x[shown],
                "loss": history.loss[split][shown],
                "accuracy": 100 * np.array(history.accuracy[split][shown]),
            }
        )
        for history in seeds
        for split in LINE_STYLES
    ]
    return pd.concat(rows)

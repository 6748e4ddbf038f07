"""A panel to play with in JupyterLab: cut a layer's matrix at a rank, and see what is left of it and of the network.

Where nobody can move a slider, in a run or a report, it is a figure of the same at three ranks.
"""

import io
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cache

import ipywidgets
import numpy as np
import torch
from IPython.display import display
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image
from torch import Tensor, nn

from lowrank_helpers import plots
from lowrank_helpers.factorization import SVD, optimal_errors
from lowrank_helpers.models import linear_layers
from lowrank_helpers.series.settings import Settings
from lowrank_helpers.training import evaluate

Splits = Mapping[str, tuple[Tensor, Tensor]]

N_IMAGES = 1000  # of each split: enough to see a curve's shape, few enough to draw one in a second
N_RANKS = 14  # on the accuracy curve, evenly spaced on a logarithmic axis
PIXELS = 256  # at most, of a matrix's picture along each side
PANEL = (3.0, 2.7)  # inches
SCREEN_RESOLUTION = 100  # dots per inch


def explore(model: nn.Module, splits: Splits, *, base: nn.Module | None = None, precision: str = "float32") -> None:
    """Show each layer's matrix cut at a rank: sliders in JupyterLab, three ranks of the first layer in a run.

    Parameters
    ----------
    model : nn.Module
        Trained; its ``nn.Linear`` layers are what is cut, one at a time.
    splits : mapping of str to (Tensor, Tensor)
        Images (n, n_inputs) and labels (n,) by name, as ``Dataset.splits()`` gives them; accuracy is on 1,000 of each.
    base : nn.Module, optional
        Of the same structure. The matrix that is cut is then the update W − W_base, and the network shown is the
        base plus what is left of it.
    precision : {"float32", "bfloat16"}
        Of the matrix products when accuracy is measured.
    """
    cuts = Cuts(model, splits, base, precision)
    if Settings.inherited().run_folder:
        layer = next(iter(cuts.layers))
        ranks = cuts.ranks(layer)[2::4][:3]
        plots.show(static_figure(cuts, layer, ranks), alt=_alt(cuts, layer, ranks))
    else:
        display(interactive_panel(cuts))


class Cuts:
    """What becomes of a network when one layer's matrix is cut at a rank; computed once a layer, then looked up."""

    def __init__(self, model: nn.Module, splits: Splits, base: nn.Module | None, precision: str) -> None:
        self.model, self.precision = model, precision
        self.splits = {name: _thinned(*split) for name, split in splits.items()}
        self.layers = linear_layers(model)
        self.base = linear_layers(base) if base else {}
        self.svd, self.accuracies = cache(self._svd), cache(self._accuracies)

    def _svd(self, layer: str) -> SVD:
        return SVD.of(self.layers[layer].weight.detach() - self._offset(layer))

    def _offset(self, layer: str) -> Tensor:
        """Return what the matrix that is cut is added to: nothing, or the base's weight."""
        weight = self.layers[layer].weight.detach()
        return self.base[layer].weight.detach() if self.base else torch.zeros_like(weight)

    def ranks(self, layer: str) -> list[int]:
        """Return the ranks at which accuracy is measured, from 1 to the full rank."""
        return [int(rank) for rank in np.unique(np.geomspace(1, self.full_rank(layer), N_RANKS).round())]

    def full_rank(self, layer: str) -> int:
        """Return min(n, m) of the layer's matrix."""
        return len(self.svd(layer).s)

    def matrix(self, layer: str, rank: int) -> np.ndarray:
        """Return the layer's matrix, or its update, at that rank, thinned to what a picture of it can show."""
        factors = self.svd(layer).factors(rank)
        B, C = (factor[:: 1 + len(factor) // PIXELS] for factor in (factors.B, factors.C.T))
        return (B @ C.T).cpu().numpy()

    def errors(self, layer: str) -> Tensor:
        """Return the relative Frobenius errors at ranks 0 … full."""
        errors = optimal_errors(self.svd(layer).s)
        return (errors / errors[0]).cpu()

    @torch.no_grad()
    def _accuracies(self, layer: str) -> dict[str, list[float]]:
        """Measure, by split, the accuracy of the network at each of ``ranks(layer)``."""
        network = deepcopy(self.model)
        weight = linear_layers(network)[layer].weight
        accuracies: dict[str, list[float]] = {name: [] for name in self.splits}
        for rank in self.ranks(layer):
            weight.copy_(self._offset(layer) + self.svd(layer).factors(rank).product)
            for name, (images, labels) in self.splits.items():
                accuracies[name].append(evaluate(network, images, labels, self.precision).accuracy)
        return accuracies


def _thinned(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    step = max(1, len(labels) // N_IMAGES)
    return images[::step][:N_IMAGES], labels[::step][:N_IMAGES]


def static_figure(cuts: Cuts, layer: str, ranks: Sequence[int]) -> Figure:
    """Draw what the panel shows, for three ranks of a layer: curves above, the cuts and the whole matrix below."""
    figure = Figure(figsize=(3 * PANEL[0], 2 * PANEL[1]))
    axes = figure.subplot_mosaic("AAAABBBBCCCC;DDDEEEFFFGGG")
    curves, matrices = [axes[key] for key in "ABC"], [axes[key] for key in "DEFG"]
    _draw_curves(curves, cuts, layer)
    scale = _scale(cuts, layer)
    for rank, colour, matrix_axes in zip(ranks, plots.PALETTE[2:], matrices, strict=False):
        for curve_axes in curves:
            curve_axes.axvline(rank, color=colour)
        _draw_matrix(matrix_axes, cuts.matrix(layer, rank), scale, f"rank {rank}").axes.title.set_color(colour)
    full = cuts.full_rank(layer)
    _draw_matrix(matrices[-1], cuts.matrix(layer, full), scale, f"rank {full}: whole")
    return figure


class _Picture:
    """The panel's figure of one layer. Drawn once; a rank redraws only what it changes, to be there at once."""

    def __init__(self, cuts: Cuts, layer: str) -> None:
        self.cuts, self.layer = cuts, layer
        figure = Figure(figsize=(3 * PANEL[0], 2 * PANEL[1]), dpi=SCREEN_RESOLUTION)
        axes = figure.subplots(2, 3)
        _draw_curves(axes[0], cuts, layer)
        scale = _scale(cuts, layer)
        self.whole = cuts.matrix(layer, cuts.full_rank(layer))
        _draw_matrix(axes[1, 0], self.whole, scale, f"{layer}, whole")
        self.left = _draw_matrix(axes[1, 1], self.whole, scale, "its part of rank r")
        self.lost = _draw_matrix(axes[1, 2], self.whole, scale, "what is cut away")
        self.marks = [curve_axes.axvline(1, color=plots.PALETTE[2]) for curve_axes in axes[0]]
        self.moving: list[Artist] = [self.left, self.lost, *self.marks]
        for artist in self.moving:
            artist.set_animated(True)
        self.canvas = FigureCanvasAgg(figure)
        self.canvas.draw()
        self.background = self.canvas.copy_from_bbox(figure.bbox)

    def at(self, rank: int) -> bytes:
        """Return the picture at that rank, as a PNG."""
        left = self.cuts.matrix(self.layer, rank)
        self.left.set_data(left)
        self.lost.set_data(self.whole - left)
        for mark in self.marks:
            mark.set_xdata([rank, rank])
        self.canvas.restore_region(self.background)
        for artist in self.moving:
            artist.draw(self.canvas.get_renderer())
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(self.canvas.buffer_rgba())).convert("RGB").save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()


def interactive_panel(cuts: Cuts) -> ipywidgets.Widget:
    """Return the panel: a choice of layer, a slider for the rank, the picture and its numbers."""
    layer = ipywidgets.Dropdown(options=list(cuts.layers), description="layer")
    rank = ipywidgets.SelectionSlider(options=[1], description="rank r", layout={"width": "30em"})
    picture, numbers = ipywidgets.Image(format="png"), ipywidgets.Label()
    pictures: dict[str, _Picture] = {}

    def choose_layer(*_: object) -> None:
        name = layer.value
        if name not in pictures:
            pictures[name] = _Picture(cuts, name)
        ranks = cuts.ranks(name)
        rank.options = ranks
        rank.value = ranks[len(ranks) // 2]
        choose_rank()

    def choose_rank(*_: object) -> None:
        picture.value = pictures[layer.value].at(rank.value)
        numbers.value = _caption(cuts, layer.value, rank.value)

    choose_layer()
    layer.observe(choose_layer, names="value")
    rank.observe(choose_rank, names="value")
    return ipywidgets.VBox([ipywidgets.HBox([layer, rank]), numbers, picture])


def _draw_curves(axes: Sequence[Axes], cuts: Cuts, layer: str) -> None:
    """Draw a layer's spectrum, error and accuracy against the rank."""
    spectrum, error, accuracy = axes
    s = cuts.svd(layer).s.cpu()
    spectrum.semilogy(range(1, len(s) + 1), s.numpy(), color=plots.PALETTE[0])
    spectrum.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_locator=NullLocator())
    spectrum.set(
        title=f"Spectrum of {layer}", ylabel="singular value", ylim=(max(s[-1].item(), s[0].item() * 1e-3), None)
    )
    error.plot(range(len(s) + 1), 100 * cuts.errors(layer).numpy(), color=plots.PALETTE[0])
    error.set(title="What is cut away", ylabel="relative Frobenius error (%)")
    for i, (name, shares) in enumerate(cuts.accuracies(layer).items()):
        style = plots.LINE_STYLES.get(name, "-")
        colour = plots.PALETTE[0 if name in plots.LINE_STYLES else i]
        accuracy.plot(cuts.ranks(layer), [100 * share for share in shares], style, color=colour, label=name)
    accuracy.set(title="The network with this layer cut", ylabel="accuracy (%)")
    accuracy.legend()
    for curve_axes in axes:
        curve_axes.set(xlabel="rank r", xscale="log")


def _draw_matrix(axes: Axes, matrix: np.ndarray, scale: float, title: str) -> AxesImage:
    axes.set(title=title, xticks=[], yticks=[])
    return axes.imshow(matrix, cmap="RdBu", vmin=-scale, vmax=scale, aspect="auto", interpolation="nearest")


def _scale(cuts: Cuts, layer: str) -> float:
    """Return where the colours end: at the 99th percentile of the whole matrix, so that most of it shows."""
    return float(np.quantile(np.abs(cuts.matrix(layer, cuts.full_rank(layer))), 0.99))


def _caption(cuts: Cuts, layer: str, rank: int) -> str:
    """Say what a cut at one of ``cuts.ranks(layer)`` does."""
    at = cuts.ranks(layer).index(rank)
    shares = ", ".join(f"{name} {100 * curve[at]:.1f} %" for name, curve in cuts.accuracies(layer).items())
    return f"rank {rank} of {cuts.full_rank(layer)} · error {100 * cuts.errors(layer)[rank]:.0f} % · accuracy: {shares}"


def _alt(cuts: Cuts, layer: str, ranks: Sequence[int]) -> str:
    cut = "; ".join(_caption(cuts, layer, rank) for rank in ranks)
    return f"Spectrum, error and accuracy against the rank for {layer}, and its matrix whole and cut: {cut}"

"""A panel to play with in JupyterLab: truncate a layer's matrix at a rank, and see what is left of the network.

In a run or a report, where nobody can move a slider, it is a figure of the same at three ranks.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cache
from typing import Any

import ipywidgets
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
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
SIZE = (9.0, 5.4)  # inches


def explore(model: nn.Module, splits: Splits, *, base: nn.Module | None = None, precision: str = "float32") -> None:
    """Show a layer's matrix truncated at a rank: sliders in JupyterLab, three ranks of the first in a run.

    Parameters
    ----------
    model : nn.Module
        Trained; its ``nn.Linear`` layers are truncated, one at a time.
    splits : mapping of str to (Tensor, Tensor)
        Images (n, n_inputs) and labels (n,) by name, as ``Dataset.splits()`` gives them; accuracy is on 1,000 of each.
    base : nn.Module, optional
        Of the same structure. Then the update W − W_base is truncated, and the network is the base plus what is left.
    precision : {"float32", "bfloat16"}
        Of the matrix products when accuracy is measured.
    """
    layers = list(linear_layers(model))
    truncations = cache(lambda layer: Truncations(model, layer, splits, base, precision))
    if Settings.inherited().run_dir:
        first = truncations(layers[0])
        ranks = [first.ranks[min(at, len(first.ranks) - 1)] for at in (2, 6, 10)]
        alt = f"Spectrum, error and accuracy against the rank for {layers[0]}, and its matrix whole and truncated: "
        plots.show(figure(first, ranks), alt + "; ".join(map(first.caption, ranks)))
        return

    def show(layer: str, cut: int) -> None:
        chosen = truncations(layer)
        rank = chosen.ranks[min(cut, len(chosen.ranks)) - 1]
        print(chosen.caption(rank))
        plots.show(figure(chosen, [rank]), chosen.caption(rank))

    ipywidgets.interact(show, layer=layers, cut=ipywidgets.IntSlider(N_RANKS // 2, 1, N_RANKS))


class Truncations:
    """What becomes of a network when the matrix of one layer is truncated.

    Attributes
    ----------
    ranks : list of int
        At which the accuracy is measured, from 1 to the full rank.
    errors : Tensor, shape (full rank + 1,)
        Relative Frobenius errors at ranks 0, 1, ….
    accuracies : dict of str to list of float
        By split, one at each of ``ranks``.
    """

    def __init__(
        self, model: nn.Module, layer: str, splits: Splits, base: nn.Module | None = None, precision: str = "float32"
    ) -> None:
        network = deepcopy(model)
        weight = linear_layers(network)[layer].weight.detach()
        start = linear_layers(base)[layer].weight.detach() if base else torch.zeros_like(weight)
        self.layer, self.svd = layer, SVD.of(weight - start)
        self.full_rank = len(self.svd.s)
        errors = optimal_errors(self.svd.s).cpu()
        self.errors = errors / errors[0]
        self.ranks = [int(rank) for rank in np.unique(np.geomspace(1, self.full_rank, N_RANKS).round())]
        self.accuracies: dict[str, list[float]] = {name: [] for name in splits}
        for rank in self.ranks:
            weight.copy_(start + self.svd.factors(rank).product)
            for name, (images, labels) in splits.items():
                step = max(1, len(labels) // N_IMAGES)
                some = slice(None, step * N_IMAGES, step)
                self.accuracies[name].append(evaluate(network, images[some], labels[some], precision).accuracy)

        limit = np.quantile(np.abs(self.matrix(self.full_rank)), 0.99)  # beside the few largest, others would be pale
        self.colours: dict[str, Any] = {"cmap": "RdBu", "vmin": -limit, "vmax": limit}

    def matrix(self, rank: int) -> np.ndarray:
        """Return the matrix, or the update, at that rank, thinned to what a picture of it can show."""
        factors = self.svd.factors(rank)
        B, C = (factor[:: 1 + len(factor) // PIXELS] for factor in (factors.B, factors.C.T))
        return (B @ C.T).cpu().numpy()

    def caption(self, rank: int) -> str:
        """Say what one of ``ranks`` does to the matrix and to the network."""
        at = self.ranks.index(rank)
        shares = ", ".join(f"{name} {100 * curve[at]:.1f} %" for name, curve in self.accuracies.items())
        return f"rank {rank} of {self.full_rank} · error {100 * self.errors[rank]:.0f} % · accuracy: {shares}"


def figure(truncations: Truncations, ranks: Sequence[int]) -> Figure:
    """Draw a layer's curves with a line at each of up to three ranks; below, its matrix at these and whole."""
    figure = Figure(figsize=SIZE)
    keys = "DEF"[: len(ranks)] + "G"
    axes = figure.subplot_mosaic("AAAABBBBCCCC;" + "".join(key * (12 // len(keys)) for key in keys))
    curves = [axes[key] for key in "ABC"]
    _draw_curves(curves, truncations)
    colours = [*plots.PALETTE[2 : 2 + len(ranks)], "black"]
    for key, rank, colour in zip(keys, [*ranks, truncations.full_rank], colours, strict=True):
        axes[key].imshow(truncations.matrix(rank), aspect="auto", interpolation="nearest", **truncations.colours)
        axes[key].set(xticks=[], yticks=[])
        axes[key].set_title(f"rank {rank}" + (": whole" if key == "G" else ""), color=colour)
        for curve in curves if key != "G" else []:
            curve.axvline(rank, color=colour)
    return figure


def _draw_curves(axes: Sequence[Axes], truncations: Truncations) -> None:
    """Draw a layer's spectrum, error and accuracy against the rank."""
    spectrum, error, accuracy = axes
    s = truncations.svd.s.cpu().numpy()
    spectrum.semilogy(range(1, len(s) + 1), s)
    spectrum.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_locator=NullLocator())
    spectrum.set(
        title=f"Spectrum of {truncations.layer}", ylabel="singular value", ylim=(max(s[-1], s[0] * 1e-3), None)
    )
    error.plot(range(len(s) + 1), 100 * truncations.errors)
    error.set(title="What is cut away", ylabel="relative Frobenius error (%)")
    for i, (name, shares) in enumerate(truncations.accuracies.items()):
        colour = plots.PALETTE[0 if name in plots.LINE_STYLES else i]
        style = plots.LINE_STYLES.get(name, "-")
        accuracy.plot(truncations.ranks, [100 * share for share in shares], style, color=colour, label=name)
    accuracy.set(title="The network with this layer cut", ylabel="accuracy (%)")
    accuracy.legend()
    for curve in axes:
        curve.set(xlabel="rank r", xscale="log")

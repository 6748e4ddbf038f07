"""An explorer: choose a layer, a way of cutting it and a rank, and see at once what is left of the network.

Everything that it shows is measured beforehand and lies within one piece of HTML. So it works in JupyterLab, in a page
opened from a file and on a phone, with no kernel behind it.
"""

import base64
import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from IPython.display import HTML, display
from torch import Tensor, nn

from lowrank_helpers.calibration import output_fisher, output_moments
from lowrank_helpers.data import Dataset
from lowrank_helpers.factorization import Decomposition
from lowrank_helpers.layers import decompose
from lowrank_helpers.models import linear_layers
from lowrank_helpers.training import Split, predict, sample

TEMPLATES = Path(__file__).parent / "templates" / "lowrank"
N_IMAGES = 500  # of each split: enough to see a curve's shape
N_RANKS = 9  # of each layer, evenly spaced on a logarithmic axis
MOST = 256  # the largest of them; nothing happens beyond it
N_POINTS = 60  # of a spectrum, likewise
N_DIGITS = 16  # whose answers are shown
N_DIRECTIONS = 6


def show(model: nn.Sequential, data: Dataset) -> None:
    """Display the explorer of a multilayer perceptron.

    Parameters
    ----------
    model : nn.Sequential
        Trained, as :func:`~lowrank_helpers.models.mlp` builds it. Its ``nn.Linear`` layers are cut one at a time, by
        the truncated SVD and by the activation-aware and the Fisher-weighted one.
    data : Dataset
        On the network's device. ``N_IMAGES`` training and test images give the accuracies; layers are fitted to these
        training images, and the digits shown are test images.
    """
    text = html.escape(json.dumps(measured(model, data), separators=(",", ":")))
    style, script = ((TEMPLATES / f"explorer.{kind}").read_text() for kind in ("css", "js"))
    page = f'<style>{style}</style><div class="explorer" data-measured="{text}"></div><script>{script}</script>'
    display(HTML(page), metadata={"lowrank": {"explorer": True, "unchecked": True}})


@torch.no_grad()
def measured(model: nn.Sequential, data: Dataset) -> dict[str, Any]:
    """Return all that the explorer shows, as JSON has it."""
    samples = {split: sample(*data.splits()[split], N_IMAGES) for split in ("train", "test")}
    layers, (images, _), (digits, labels) = linear_layers(model), *samples.values()
    moments = output_moments(model, images, layers)
    fisher = output_fisher(model, images, layers, logits=True)
    cuts = {
        "truncated SVD": decompose(model),
        "activation-aware SVD": decompose(model, moments),
        "Fisher-weighted SVD": decompose(model, moments, fisher),
    }
    return {
        "digits": [_picture(image, image.min(), image.max()) for image in digits[:N_DIGITS]],
        "labels": labels[:N_DIGITS].tolist(),
        "layers": {
            name: _of_layer(model, name, {kind: svds[name] for kind, svds in cuts.items()}, samples) for name in layers
        },
    }


def _of_layer(
    model: nn.Sequential, name: str, svds: Mapping[str, Decomposition], samples: Mapping[str, Split]
) -> dict[str, Any]:
    """Return what each way of cutting a layer leaves of it and of the network, and what its directions see."""
    at = [key for key, _ in model.named_children()].index(name)
    weight, after = linear_layers(model)[name].weight, model[at + 1 :]
    inputs = {split: predict(model[:at], images) for split, (images, _) in samples.items()}
    whole, images = inputs["test"] @ weight.T, samples["test"][0]
    ranks = _spaced(min(MOST, *weight.shape), N_RANKS)

    def cut(svd: Decomposition) -> dict[str, Any]:
        accuracy: dict[str, list[float]] = {split: [] for split in samples}
        found: dict[str, Any] = {"matrix": [], "outputs": [], "accuracy": accuracy, "answers": []}
        for rank in ranks:
            factors = svd.factors(rank)
            outputs = {split: x @ factors.C.T @ factors.B.T for split, x in inputs.items()}
            answers = {split: predict(after, y).argmax(dim=1) for split, y in outputs.items()}
            for split, (_, labels) in samples.items():
                accuracy[split].append(_percent((answers[split] == labels).float().mean()))
            found["matrix"].append(_percent(torch.dist(weight, factors.product) / weight.norm()))
            found["outputs"].append(_percent(torch.dist(whole, outputs["test"]) / whole.norm()))
            found["answers"].append(answers["test"][:N_DIGITS].tolist())
        leading = svd.factors(min(N_DIRECTIONS, *weight.shape)).C
        seen = (images - images.mean(dim=0)).T @ (inputs["test"] @ leading.T)  # images, weighted by what excites each
        spectrum = [[i, float(f"{svd.s[i - 1].item():.3g}")] for i in _spaced(len(svd.s), N_POINTS)]
        return found | {
            "spectrum": spectrum,
            "directions": [_picture(x, -x.abs().max(), x.abs().max()) for x in seen.T],
        }

    return {"shape": list(weight.shape), "ranks": ranks, "cuts": {kind: cut(svd) for kind, svd in svds.items()}}


def _spaced(most: int, n: int) -> list[int]:
    return [int(i) for i in np.unique(np.geomspace(1, most, n).round())]


def _percent(share: Tensor) -> float:
    return round(100 * share.item(), 1)


def _picture(pixels: Tensor, least: Tensor, most: Tensor) -> str:
    """Return an image's bytes as text, 0 for the least number and 255 for the most."""
    return base64.b64encode((255 * (pixels - least) / (most - least)).round().byte().cpu().numpy().tobytes()).decode()

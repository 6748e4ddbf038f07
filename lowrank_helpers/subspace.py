"""Training in a random subspace: d numbers decide all weights of a network."""

from collections.abc import Sequence
from copy import deepcopy

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call


class SubspaceModel(nn.Module):
    """A network whose weights are θ₀ + P·z: θ₀ and P are fixed and random, only z is trained.

    Li et al. 2018 (arXiv 1804.08838, equation 2) call the smallest dimension of z that still solves a task the
    task's *intrinsic dimension*. P here is the sparsest of random projections: each weight follows one entry of z,
    with a random sign, and the columns are scaled to length 1. They are orthonormal, as the paper asks, and P·z
    costs one look-up a weight instead of a D×d matrix.

    Parameters
    ----------
    model : nn.Module
        Gives the structure and θ₀, in any precision; a copy of it is kept, frozen.
    dimension : int
        Length d of z, from 1 to the number of weights.
    seed : int
        Draws P.

    Attributes
    ----------
    z : Parameter of shape (dimension,)
        Zero at first, so that training starts from θ₀; float32, whatever the precision of θ₀.

    Examples
    --------
    >>> model = SubspaceModel(nn.Linear(784, 10), 50, seed=0)
    >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ['z']
    """

    followed: Tensor
    entry: Tensor

    def __init__(self, model: nn.Module, dimension: int, *, seed: int) -> None:
        super().__init__()
        device = next((parameter.device for parameter in model.parameters()), None)
        sizes = [parameter.numel() for parameter in model.parameters()]
        if not 1 <= dimension <= sum(sizes):
            raise ValueError(f"dimension {dimension} is impossible for {sum(sizes):,} weights; allowed: 1 to that")
        generator = torch.Generator().manual_seed(seed)
        followed = torch.randint(dimension, (sum(sizes),), generator=generator)
        sign = torch.randint(2, (sum(sizes),), generator=generator).float().mul_(2).sub_(1)
        followers = torch.bincount(followed, minlength=dimension).clamp_min(1)
        self.model = deepcopy(model).requires_grad_(False)
        self.z = nn.Parameter(torch.zeros(dimension, device=device))
        self.register_buffer("followed", followed.to(device))
        self.register_buffer("entry", (sign / followers.sqrt()[followed]).to(device))

    def weights(self) -> dict[str, Tensor]:
        """Return θ₀ + P·z by parameter name, in the network's shapes."""
        # Not z[followed]: on the CPU its gradient takes six times as long.
        moved = self.z.index_select(0, self.followed) * self.entry
        pieces = moved.split([parameter.numel() for parameter in self.model.parameters()])
        named = self.model.named_parameters()
        return {
            name: theta + piece.view_as(theta).to(theta) for (name, theta), piece in zip(named, pieces, strict=True)
        }

    def forward(self, x: Tensor) -> Tensor:
        """Map as the network does at the weights that z stands for."""
        outputs: Tensor = functional_call(self.model, self.weights(), (x,))
        return outputs


def intrinsic_dimension(dimensions: Sequence[int], scores: Sequence[float], target: float) -> float:
    """Return the smallest dimension whose score reaches a target (Li et al. 2018, section 2).

    Between the two dimensions where the score first crosses the target it is interpolated, linearly in log d. It is NaN
    where the dimensions do not bracket the target: the first reaches it, or none does.

    Parameters
    ----------
    dimensions, scores : sequence of int, sequence of float
        Of the subspaces tried, rising, and what training in each reached, such as the accuracy.
    target : float
        In the unit of the scores; the paper takes 90 % of what the network reaches with all its weights.

    Raises
    ------
    ValueError
        The dimensions do not rise, or the scores are not as many.

    Examples
    --------
    >>> round(intrinsic_dimension([10, 100, 1000], [0.2, 0.8, 1.0], target=0.9))  # halfway from 100, in log d
    316
    """
    if len(dimensions) != len(scores) or (np.diff(dimensions) <= 0).any():
        raise ValueError(f"dimensions {list(dimensions)} must rise, with a score each, not {len(scores)}")
    reached = np.asarray(scores) >= target
    above = int(reached.argmax())
    if above == 0:  # also where none reaches it
        return float("nan")
    two = slice(above - 1, above + 1)
    return float(np.exp(np.interp(target, scores[two], np.log(dimensions[two]))))

"""Iterative magnitude pruning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vardrop.errors import InvalidValueError
from vardrop.methods.base import Method, Paper, check_range
from vardrop.noise import Layout, MaskedWeights, Noise


@dataclass(frozen=True)
class MagnitudePruning(Method):
    """Magnitude pruning: train, drop the smallest weights of each layer, train the rest, in rounds; no way back.

    After round ``k = 1 .. rounds`` the share ``1 - (1 - sparsity)^(k / rounds)`` of each layer's weights is dead:
    every round drops the same share of what lives. The paper sets a threshold by hand for each layer, its quality
    parameter times the standard deviation of the weights; here it is the one that gives the sparsity.
    A threshold given to :func:`vardrop.prune` is another sparsity.

    Args:
        sparsity: share of dead weights in each layer at the end, in [0, 1).
        start: epoch of the first round, from 0; plain training before it.
        every: epochs of retraining after each round, at least 1.
        rounds: their number, at least 1.

    Raises:
        InvalidValueError: a field is outside its range; the message names it.

    Source: arXiv:1506.02626, section 3.

    >>> net = vd.convert(torch.nn.Linear(10, 2), vd.MagnitudePruning(sparsity=0.9))
    >>> vd.prune(net).alive
    2
    """

    paper: ClassVar[Paper] = Paper(
        "han2015learning",
        "Learning both Weights and Connections for Efficient Neural Networks",
        "Han, Song and Pool, Jeff and Tran, John and Dally, William J.",
        2015,
        "1506.02626",
    )
    sparsity: float = 0.9
    start: int = 5
    every: int = 5
    rounds: int = 5

    def __post_init__(self) -> None:
        check_range(self, "sparsity", above=0.0, below=1.0, closed=True, closed_below=False)
        check_range(self, "start", above=0, closed=True)
        check_range(self, "every", above=1, closed=True)
        check_range(self, "rounds", above=1, closed=True)

    def noise(self, weight: Tensor, layout: Layout) -> Noise:
        return MaskedWeights(torch.ones_like(weight, dtype=torch.bool))

    def sparsity_at(self, epoch: int) -> float:
        """The share of dead weights during an epoch."""
        done = min(self.rounds, (epoch - self.start) // self.every + 1) if epoch >= self.start else 0
        return 1.0 - float((1.0 - self.sparsity) ** (done / self.rounds))

    def step(self, noise: Noise, weight: Tensor, epoch: int) -> None:
        if epoch < 0:
            raise InvalidValueError(
                "MagnitudePruning prunes by the epoch, and none has begun: call elbo.step_epoch() at the start of each"
            )
        wanted = self.sparsity_at(epoch)
        if dead_at(wanted, weight) > (0 if noise.mask is None else int((~noise.mask).sum())):
            noise.mask = self.score(noise, weight) >= wanted

    def score(self, noise: Noise, weight: Tensor) -> Tensor:
        """The share of the layer's weights that are smaller; what died is the smallest."""
        size = weight.detach().abs()
        size = size if noise.mask is None else size.masked_fill(~noise.mask, -1.0)
        ranks = torch.empty(size.numel(), dtype=torch.float64, device=size.device)
        order = size.flatten().argsort(stable=True)
        ranks[order] = torch.arange(size.numel(), dtype=torch.float64, device=size.device)
        return (ranks / size.numel()).view_as(size)

    def cutoff(self, threshold: float | None = None) -> float:
        value = self.sparsity if threshold is None else threshold
        if not 0.0 <= value < 1.0:
            raise InvalidValueError(f"threshold={value}: must be a sparsity, in [0, 1)")
        return value


def dead_at(sparsity: float, weight: Tensor) -> int:
    """How many of the ranks ``0/n, 1/n, ...`` lie below `sparsity`."""
    return math.ceil(sparsity * weight.numel())

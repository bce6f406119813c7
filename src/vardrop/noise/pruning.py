"""Weights and units without noise that carry a mask while they train."""

from __future__ import annotations

import torch
from torch import Tensor

from vardrop.lrt import Operation
from vardrop.noise.base import Layout, Noise
from vardrop.noise.gate import Gate, Place


class MaskedWeights(Noise):
    """No noise: the layer computes from its living weights in every pass; dead ones get no gradient.

    Args:
        mask: what lives at first, where training itself marks the dead: averages of a model keep step with its buffers
            by their order, so that none may come later.
    """

    def __init__(self, mask: Tensor | None = None) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, operation: Operation, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return operation(x, self.sample_weight(weight), bias)

    def sample_weight(self, weight: Tensor) -> Tensor:
        return self.masked(weight)


class SplicedWeights(MaskedWeights):
    """Dead weights take no part in the output, but get the gradient that they would have got alive.

    Args:
        mask: what lives at first.

    Attributes:
        low: a living weight dies below it.
        high: a dead weight lives again from it on.
        steps: training steps seen.
    """

    low: Tensor
    high: Tensor
    steps: Tensor

    def __init__(self, mask: Tensor, low: Tensor, high: Tensor) -> None:
        super().__init__(mask)
        self.register_buffer("low", low)
        self.register_buffer("high", high)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=low.device))

    def sample_weight(self, weight: Tensor) -> Tensor:
        if self.mask is not None and self.training:
            return weight - (weight * ~self.mask).detach()
        return self.masked(weight)


class MaskedUnits(Gate):
    """No noise: the weights that read or make a unit live and die together, and a dead unit keeps its bias."""

    ones: Tensor

    def __init__(self, weight: Tensor, layout: Layout, place: Place) -> None:
        super().__init__(weight, layout, place)
        self.register_buffer("ones", self.filled(weight, 1.0), persistent=False)

    def mean(self) -> Tensor:
        return self.ones

    def forward(self, operation: Operation, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return operation(x, self.masked(weight), bias)

    def gated_table(self, weight: Tensor) -> Tensor:
        return self.masked(weight)

    def folded(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.masked(weight), bias

    def groups_of(self, weight: Tensor) -> Tensor:
        """The weights of each unit, ``(units, weights of a unit)``."""
        if self.axis == 0:
            return weight.flatten(1)
        grouped = weight.reshape(self.groups, weight.shape[0] // self.groups, self.units // self.groups, -1)
        return grouped.transpose(1, 2).flatten(2).flatten(0, 1)

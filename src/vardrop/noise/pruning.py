"""Weights without noise that carry a mask while they train."""

from __future__ import annotations

import torch
from torch import Tensor

from vardrop.lrt import Operation
from vardrop.noise.base import Noise


class MaskedWeights(Noise):
    """No noise: the layer computes from its living weights in every pass; dead ones get no gradient."""

    def forward(self, operation: Operation, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return operation(x, self.masked(weight), bias)


class SplicedWeights(MaskedWeights):
    """Dead weights take no part in the output, but get the gradient that they would have got alive.

    Attributes:
        low: a living weight dies below it.
        high: a dead weight lives again from it on.
        steps: training steps seen.
    """

    low: Tensor
    high: Tensor
    steps: Tensor

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.register_buffer("low", low)
        self.register_buffer("high", high)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=low.device))

    def forward(self, operation: Operation, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.mask is not None and self.training:
            dead = ~self.mask
            weight = weight - (weight * dead).detach()
            return operation(x, weight, bias)
        return super().forward(operation, x, weight, bias)

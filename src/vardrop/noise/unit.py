"""Noise on the units that flow into a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from vardrop.lrt import Operation
from vardrop.noise.base import Noise


class BernoulliNoise(Noise):
    """Each input is dropped with probability `rate`, the others are scaled by ``1 / (1 - rate)``.

    Args:
        rate: probability of dropping.
        in_axis: the axis of the weight that counts inputs; a whole weight is drawn with some of them at zero.
    """

    def __init__(self, rate: float, *, in_axis: int = 1) -> None:
        super().__init__()
        self.rate = rate
        self.in_axis = in_axis

    def forward(self, operation: Operation, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.active:
            kept = torch.rand(x.shape, device=x.device, generator=self.generator) >= self.rate
            x = x * kept / (1.0 - self.rate)
        return operation(x, self.masked(weight), bias)

    def sample_weight(self, weight: Tensor) -> Tensor:
        weight = self.masked(weight)
        if not self.active:
            return weight
        shape = [size if axis == self.in_axis else 1 for axis, size in enumerate(weight.shape)]
        kept = torch.rand(shape, device=weight.device, generator=self.generator) >= self.rate
        return weight * kept / (1.0 - self.rate)

"""Noise on the units that flow into a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from vardrop.lrt import Operation
from vardrop.noise.base import Noise


class BernoulliNoise(Noise):
    """Each input is dropped with probability `rate`, the others are scaled by ``1 / (1 - rate)``."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, operation: Operation, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.active:
            kept = torch.rand(x.shape, device=x.device, generator=self.generator) >= self.rate
            x = x * kept / (1.0 - self.rate)
        return operation(x, self.masked(weight), bias)

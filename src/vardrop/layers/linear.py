"""The noisy dense layer."""

from __future__ import annotations

import torch.nn.functional
from torch import Tensor, nn

from vardrop.layers.base import run
from vardrop.noise import Gate, Layout, Noise


class NoisyLinear(nn.Linear):
    """``nn.Linear`` whose weight is a posterior mean, its spread in ``noise``; ``gate`` multiplies units."""

    noise: Noise
    gate: Gate

    @property
    def layout(self) -> Layout:
        return Layout()

    def forward(self, input: Tensor) -> Tensor:
        return run(self, torch.nn.functional.linear, input)

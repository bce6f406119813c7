"""The noisy dense layer."""

from __future__ import annotations

import torch.nn.functional
from torch import Tensor, nn

from vardrop.noise import Layout, Noise


class NoisyLinear(nn.Linear):
    """``nn.Linear`` whose weight is a posterior mean; ``noise`` holds the rest."""

    noise: Noise

    @property
    def layout(self) -> Layout:
        return Layout()

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.noise(torch.nn.functional.linear, input, self.weight, self.bias)
        return output

"""Noisy convolutions and transposed convolutions in one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional
from torch import Tensor, nn

from vardrop.layers.base import run
from vardrop.noise import Gate, Layout, Noise


class _NoisyConv(nn.modules.conv._ConvNd):
    noise: Noise
    gate: Gate

    @property
    def layout(self) -> Layout:
        return Layout(groups=self.groups)

    def forward(self, input: Tensor) -> Tensor:
        return run(self, self._conv_forward, input)


class NoisyConv1d(_NoisyConv, nn.Conv1d):
    """``nn.Conv1d`` whose weight is a posterior mean, its spread in ``noise``; ``gate`` multiplies units."""


class NoisyConv2d(_NoisyConv, nn.Conv2d):
    """``nn.Conv2d`` whose weight is a posterior mean, its spread in ``noise``; ``gate`` multiplies units."""


class NoisyConv3d(_NoisyConv, nn.Conv3d):
    """``nn.Conv3d`` whose weight is a posterior mean, its spread in ``noise``; ``gate`` multiplies units."""


class _NoisyConvTranspose(nn.modules.conv._ConvTransposeNd):
    noise: Noise
    gate: Gate
    _transposed: Callable[..., Tensor]
    _dimensions: int

    @property
    def layout(self) -> Layout:
        return Layout(out_axis=1, in_axis=0, groups=self.groups)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        output_padding = self._output_padding(
            input,
            output_size,
            list(self.stride),
            list(self.padding),  # type: ignore[arg-type]
            list(self.kernel_size),
            self._dimensions,
            list(self.dilation),
        )

        def operation(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return type(self)._transposed(
                x, weight, bias, self.stride, self.padding, output_padding, self.groups, self.dilation
            )

        return run(self, operation, input)


class NoisyConvTranspose1d(_NoisyConvTranspose, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` whose weight is a posterior mean, its spread in ``noise``; ``gate`` multiplies units."""

    _transposed = staticmethod(torch.nn.functional.conv_transpose1d)
    _dimensions = 1


class NoisyConvTranspose2d(_NoisyConvTranspose, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` whose weight is a posterior mean, its spread in ``noise``; ``gate`` multiplies units."""

    _transposed = staticmethod(torch.nn.functional.conv_transpose2d)
    _dimensions = 2


class NoisyConvTranspose3d(_NoisyConvTranspose, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` whose weight is a posterior mean, its spread in ``noise``; ``gate`` multiplies units."""

    _transposed = staticmethod(torch.nn.functional.conv_transpose3d)
    _dimensions = 3

"""The one hot operation: a linear map or convolution whose weights are Gaussian.

Every layer hands over its plain operation ``operation(x, weight, bias)``, which is linear in the weight, so the same
few lines serve dense, convolutional and transposed layers with any stride, dilation, groups and padding mode:
padding copies entries or sets zeros, and both commute with squaring.

The variance path runs in float32 or better under any autocast: ``exp(-20)`` is zero in float16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Operation = Callable[[Tensor, Tensor, Tensor | None], Tensor]

VARIANCE_FLOOR = 1e-16
"""Least variance under the square root, whose slope at an exact zero would turn a zero gradient into NaN.

Convolutions by Winograd's algorithm or by Fourier transforms even give variances a little below zero.
"""


def at_least_float32(x: Tensor) -> Tensor:
    """`x` itself, or its float32 copy where its dtype is narrower."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def source(generator: torch.Generator | None) -> dict[str, Any]:
    """The argument of torch's random functions for `generator`.

    No argument for no generator: with one, even ``None``, they do not compile for sizes that vary.
    """
    return {} if generator is None else {"generator": generator}


def output_moments(
    operation: Operation, x: Tensor, mean: Tensor, variance: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Mean and variance of ``operation(x, w, bias)`` for independent weights ``w ~ N(mean, variance)``.

    The bias shifts the mean and never enters the variance.
    """
    output_mean = operation(x, mean, bias)
    with torch.autocast(x.device.type, enabled=False):
        squared_input = at_least_float32(x).square()
        output_variance = operation(squared_input, at_least_float32(variance).to(squared_input.dtype), None)
    return output_mean, output_variance


def local_sample(
    operation: Operation,
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    bias: Tensor | None,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One draw of the output by local reparameterisation (arXiv:1506.02557, section 2.3).

    Exact for a linear map, with fresh weights for each row of its input, so positions of a sequence each have their
    own. For a convolution the positions of one channel share the kernel, and their covariance is set to zero, as
    everybody does; :func:`weight_sample` keeps it.
    """
    output_mean, output_variance = output_moments(operation, x, mean, variance, bias)
    std = output_variance.clamp_min(VARIANCE_FLOOR).sqrt()
    draw = torch.randn(std.shape, dtype=std.dtype, device=std.device, **source(generator))
    return (output_mean + std * draw).to(output_mean.dtype)


def weight_sample(
    operation: Operation,
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    bias: Tensor | None,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One draw of the output with one draw of the weights for the whole minibatch: the exact law of the model."""
    return operation(x, draw_weight(mean, variance, generator=generator), bias)


def draw_weight(mean: Tensor, variance: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """One draw of independent weights ``w ~ N(mean, variance)``, in the dtype of `mean`."""
    std = at_least_float32(variance).clamp_min(VARIANCE_FLOOR).sqrt()
    draw = torch.randn(std.shape, dtype=std.dtype, device=std.device, **source(generator))
    return (mean + std * draw).to(mean.dtype)

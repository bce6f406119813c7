"""Mean and variance of a linear map or convolution whose weights are independent Gaussians."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as nnF
from torch import Tensor

from vardrop.functional._dtype import precise


def linear_moments(x: Tensor, mean: Tensor, log_std: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Moments of ``x w^T + bias`` for ``w ~ N(mean, exp(2 log_std))``: the local reparameterisation.

    Args:
        x: ``(*, in)``.
        mean: ``(out, in)``.
        log_std: ``(out, in)``.
        bias: ``(out,)``; it shifts the mean and never enters the variance.

    Returns:
        Mean and variance, each ``(*, out)``; the variance in float32 or better.

    Source: arXiv:1506.02557, section 2.3.

    >>> from vardrop import functional as F
    >>> mean, variance = F.linear_moments(torch.ones(1, 3), torch.ones(2, 3), torch.zeros(2, 3))
    >>> mean.tolist(), variance.tolist()
    ([[3.0, 3.0]], [[3.0, 3.0]])
    """
    return _moments(nnF.linear, x, mean, log_std, bias)


def conv2d_moments(
    x: Tensor,
    mean: Tensor,
    log_std: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """Moments at each position of a 2-d convolution with Gaussian weights, without covariances of positions.

    Args:
        x: ``(N, in, height, width)``.
        mean: ``(out, in / groups, kernel, kernel)``.
        log_std: of the shape of `mean`.
        bias: ``(out,)``.

    Returns:
        Mean and variance, each of the shape of the output.

    Source: arXiv:1701.05369, section 4.3.

    >>> from vardrop import functional as F
    >>> x, weight = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3)
    >>> F.conv2d_moments(x, weight, torch.zeros_like(weight))[1]
    tensor([[[[9.]]]])
    """

    def operation(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return nnF.conv2d(x, weight, bias, stride, padding, dilation, groups)

    return _moments(operation, x, mean, log_std, bias)


def _moments(
    operation: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    x: Tensor,
    mean: Tensor,
    log_std: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    output_mean = operation(x, mean, bias)
    with torch.autocast(x.device.type, enabled=False):
        x, log_std = precise(x, log_std)
        return output_mean, operation(x.square(), torch.exp(2.0 * log_std), None).clamp_min(0.0)  # see VARIANCE_FLOOR

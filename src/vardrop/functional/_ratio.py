"""The exact log-uniform and the ARD divergence as one fused function of ``t = mean / std``.

With ``y = 1 / (1 + t^2)`` the exact KL is ``log(1 + t^2) / 2 + (1 - y) value(y)``, and its derivative by the mean is
that of ARD times ``slope(y)``; both factors are smooth on [0, 1], so one rational fit each serves every alpha, with no
branch. They were fitted to 25 digits of ``2 * integral of Dawson's function``; the tests compare with quadrature.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LARGEST_RATIO = 1e18
VALUE_NUMERATOR = (
    0.6351814332117858,
    16.850123864932275,
    106.32853521821436,
    5778.951037875148,
    36282.179367656,
    443186.9382498261,
    2733969.29661124,
    -2921573.095360912,
    -297768.78282261116,
)
VALUE_DENOMINATOR = (
    1.0,
    27.102494563222404,
    185.8489479424521,
    9304.82569841104,
    62417.55674398387,
    807983.3211721331,
    3981228.2571029076,
    13745624.2888546,
    5697159.269920322,
)
SLOPE_NUMERATOR = (
    0.999999920077754,
    -6.6639635949413005,
    380.21644275416304,
    2428.2242840446293,
    57528.31633711918,
    746894.9887629517,
    2302126.46102424,
    83982707.87742598,
    15510.193283455605,
)
SLOPE_DENOMINATOR = (
    1.0,
    -8.664150260169523,
    391.64795350044193,
    1647.271751993255,
    54137.69358278711,
    498655.4574836536,
    4301166.300919709,
    22675386.159147676,
    59576184.469372645,
)


class RatioKL(torch.autograd.Function):
    """Elementwise KL in nats of `mean` and `log_std`, alike in shape and dtype; ``exact`` adds what ARD leaves out.

    Only the inputs are kept for the backward pass, and every pass but the first works in place.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(mean: Tensor, log_std: Tensor, exact: bool) -> Tensor:
        squared = _ratio(mean, torch.exp(-log_std)).square_()
        if not exact:
            return squared.log1p_().mul_(0.5)
        y = (squared + 1.0).reciprocal_()
        value = _polynomial(VALUE_NUMERATOR, y).div_(_polynomial(VALUE_DENOMINATOR, y)).mul_(1.0 - y)
        return value.add_(squared.log1p_(), alpha=0.5)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.exact = inputs[2]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        mean, log_std = ctx.saved_tensors
        inverse_std = torch.exp(-log_std)
        t = _ratio(mean, inverse_std)
        y = t.square().add_(1.0).reciprocal_()
        by_t = t * y
        if ctx.exact:
            by_t.mul_(_polynomial(SLOPE_NUMERATOR, y)).div_(_polynomial(SLOPE_DENOMINATOR, y))
        by_t.mul_(gradient)
        return by_t * inverse_std, t.mul_(by_t).neg_(), None


def _ratio(mean: Tensor, inverse_std: Tensor) -> Tensor:
    """``mean / std``, held where its square still fits into float32."""
    return (mean * inverse_std).clamp_(-LARGEST_RATIO, LARGEST_RATIO)


def _polynomial(coefficients: tuple[float, ...], y: Tensor) -> Tensor:
    total = coefficients[-1] * y
    for coefficient in coefficients[-2:0:-1]:
        total.add_(coefficient).mul_(y)
    return total.add_(coefficients[0])

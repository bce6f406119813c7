"""KL of a Gaussian weight posterior to a Student-t prior: no closed form, so a quadrature."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vardrop.errors import InvalidValueError
from vardrop.functional._dtype import aligned

STEP = 0.5
LARGEST_SECOND_MOMENT = 1e4
LEAST_B = 1e-30
"""Below it ``w^2 / b`` may pass what float32 holds."""


def student_t_kl(mean: Tensor, log_std: Tensor, a: float, b: float, *, draw: Tensor | None = None) -> Tensor:
    """KL to the Student-t prior whose precision is Gamma(a, b) distributed, nats.

    The expectation ``E log(1 + w^2 / 2b)`` is a trapezoidal sum over the integral form of the logarithm,
    exact to ``2e-8 (a + 1/2)`` nats for ``mean^2 + std^2 <= 1e4 max(1, b)``, and beyond too large by at most
    ``0.036 (a + 1/2) sqrt(min(1, b))``. With
    a standard normal `draw` it is the unbiased one-sample estimate instead, for a hundredth of the time.

    Raises:
        InvalidValueError: unless ``a > 0`` and ``b >= 1e-30``.

    Source: arXiv:1811.00596, appendix C.

    >>> from vardrop import functional as F
    >>> F.student_t_kl(torch.tensor([0.0]), torch.tensor([0.0]), a=1.0, b=0.5)
    tensor([0.0744])
    """
    if not a > 0.0:
        raise InvalidValueError(f"a={a}: the Student-t prior needs a > 0")
    if not b >= LEAST_B:
        raise InvalidValueError(f"b={b}: the quadrature needs b >= {LEAST_B:g}")
    mean, log_std = aligned(mean, log_std)
    if draw is None:
        log_shrink = _log_shrink(mean, log_std, b)
        inside = mean * torch.exp(log_shrink), log_std + log_shrink
        expectation: Tensor = _ExpectedLog.apply(*inside, b)[0] - 2.0 * log_shrink  # type: ignore[no-untyped-call]
    else:
        expectation = torch.log1p((mean + torch.exp(log_std) * draw).square() / (2.0 * b))
    log_norm = math.lgamma(a + 0.5) - math.lgamma(a) - 0.5 * math.log(2.0 * math.pi * b)
    return (a + 0.5) * expectation - log_std - (0.5 * math.log(2.0 * math.pi * math.e) + log_norm)


def _log_shrink(mean: Tensor, log_std: Tensor, b: float) -> Tensor:
    """Log of the factor on ``w``, at most 1, that brings its second moment to where the quadrature is exact.

    ``log(1 + w^2 / 2b)`` grows by twice this again, but for what the 1 still counts there.
    """
    size = torch.hypot(mean, torch.exp(log_std.clamp(0.0, 80.0)))
    return (0.5 * math.log(LARGEST_SECOND_MOMENT * max(1.0, b)) - torch.log(size)).clamp(max=0.0)


class _ExpectedLog(torch.autograd.Function):
    """``E log(1 + w^2 / 2b)`` for ``w ~ N(mean, std^2)``; the derivatives are summed beside the value.

    ``log(1 + z) = integral over s > 0 of (1 - exp(-s z)) exp(-s) / s``, taken in ``x = log s``, where a
    Gaussian expectation of ``exp(-s w^2 / 2b)`` is elementary.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(mean: Tensor, log_std: Tensor, b: float) -> tuple[Tensor, Tensor, Tensor]:
        variance, squared = torch.exp(2.0 * log_std), mean.square()
        value, by_mean, by_log_std = (torch.zeros_like(variance + squared) for _ in range(3))
        for s, weight in _nodes(b):
            d = variance * (s / b)
            r = (d + 1.0).reciprocal_()
            exponent = squared * r * (-0.5 * s / b) - 0.5 * torch.log1p(d)
            kept = torch.exp(exponent)
            value -= weight * torch.expm1(exponent)
            common = kept * r * weight
            by_mean += common * (s / b)
            by_log_std += common * d * (1.0 - squared * r * (s / b))
        return value, by_mean * mean, by_log_std

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:2], *output[1:])
        ctx.b = inputs[2]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *unused: Tensor) -> tuple[Tensor, Tensor, None]:
        mean, log_std, by_mean, by_log_std = ctx.saved_tensors
        if torch.is_grad_enabled():  # they may be derived again
            by_mean, by_log_std = _slopes(mean, log_std, ctx.b)
        return gradient * by_mean, gradient * by_log_std, None


def _slopes(mean: Tensor, log_std: Tensor, b: float) -> tuple[Tensor, Tensor]:
    """The derivatives that ``_ExpectedLog`` sums in place, in steps that can be derived."""
    variance, squared = torch.exp(2.0 * log_std), mean.square()
    by_mean = by_log_std = torch.zeros_like(variance + squared)
    for s, weight in _nodes(b):
        d = variance * (s / b)
        r = (d + 1.0).reciprocal()
        common = torch.exp(squared * r * (-0.5 * s / b) - 0.5 * torch.log1p(d)) * r * weight
        by_mean = by_mean + common * (s / b)
        by_log_std = by_log_std + common * d * (1.0 - squared * r * (s / b))
    return by_mean * mean, by_log_std


def _nodes(b: float) -> list[tuple[float, float]]:
    """Nodes ``s`` and weights of the trapezoidal rule in ``log s``."""
    first = math.log(min(1.0, b) / LARGEST_SECOND_MOMENT) - 18.0
    count = math.ceil((4.0 - first) / STEP)
    points = (math.exp(4.0 - STEP * index) for index in range(count + 1))
    return [(s, STEP * math.exp(-s)) for s in points]

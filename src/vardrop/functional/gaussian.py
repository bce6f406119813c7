"""Divergences of a Gaussian weight posterior ``N(mean, std^2)`` to the priors of the family, in nats."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LARGEST_RATIO = 1e18
VALUE_P = (0.6351814332117858, 16.850123864932275, 106.32853521821436, 5778.951037875148, 36282.179367656,
           443186.9382498261, 2733969.29661124, -2921573.095360912, -297768.78282261116)
VALUE_Q = (1.0, 27.102494563222404, 185.8489479424521, 9304.82569841104, 62417.55674398387, 807983.3211721331,
           3981228.2571029076, 13745624.2888546, 5697159.269920322)
SLOPE_P = (0.999999920077754, -6.6639635949413005, 380.21644275416304, 2428.2242840446293, 57528.31633711918,
           746894.9887629517, 2302126.46102424, 83982707.87742598, 15510.193283455605)
SLOPE_Q = (1.0, -8.664150260169523, 391.64795350044193, 1647.271751993255, 54137.69358278711, 498655.4574836536,
           4301166.300919709, 22675386.159147676, 59576184.469372645)


def _horner(coefficients: tuple[float, ...], y: Tensor) -> Tensor:
    total = coefficients[-1] * y
    for coefficient in coefficients[-2:0:-1]:
        total.add_(coefficient).mul_(y)
    return total.add_(coefficients[0])


class _LogUniformKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean: Tensor, log_std: Tensor) -> Tensor:
        inverse_std = torch.exp(-log_std)
        t = (mean * inverse_std).clamp_(-LARGEST_RATIO, LARGEST_RATIO)
        t_squared = t.square()
        y = (1.0 + t_squared).reciprocal_()
        value = _horner(VALUE_P, y).div_(_horner(VALUE_Q, y)).mul_(1.0 - y)
        value.add_(t_squared.log1p_(), alpha=0.5)
        ctx.save_for_backward(t, y, inverse_std)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        t, y, inverse_std = ctx.saved_tensors
        common = _horner(SLOPE_P, y).div_(_horner(SLOPE_Q, y)).mul_(y).mul_(t).mul_(grad)
        return common * inverse_std, common.mul_(t).neg_()


def log_uniform_kl(mean: Tensor, log_std: Tensor, form: str = "exact") -> Tensor:
    mean, log_std = torch.broadcast_tensors(mean.float() if mean.dtype != torch.float64 else mean, log_std)
    if form == "exact":
        return _LogUniformKL.apply(mean, log_std)
    r = (mean * torch.exp(-log_std)).square()
    return 0.5 * torch.log1p(r) + 0.63576 * torch.sigmoid(1.48695 * torch.log(r.clamp_min(1e-30)) - 1.8732)


def ard_kl(mean: Tensor, log_std: Tensor) -> Tensor:
    return 0.5 * torch.log1p((mean * torch.exp(-log_std)).square())


def vbd_kl(mean: Tensor, log_std: Tensor, low: float = 0.0, high: float = float("inf")) -> Tensor:
    return ard_kl(mean, log_std)


def log_alpha(mean: Tensor, log_std: Tensor) -> Tensor:
    return 2.0 * (log_std - mean.abs().clamp_min(torch.finfo(mean.dtype).tiny).log())

"""The families of gates: how the multiplier of a unit is drawn, and what it is at test time."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus

from vardrop import functional as F
from vardrop.lrt import at_least_float32
from vardrop.noise.base import Layout
from vardrop.noise.gate import Gate, Place, broadcast


class TruncatedLogNormalGate(Gate):
    """``log theta ~ N(mu, exp(2 log_sigma))`` cut to ``[low, high]`` (arXiv:1705.07283).

    Args:
        mu, log_sigma: first values.
        low, high: the interval.
        shared: one draw for the whole minibatch rather than one for each example.
    """

    def __init__(
        self,
        weight: Tensor,
        layout: Layout,
        place: Place,
        *,
        mu: float,
        log_sigma: float,
        low: float,
        high: float,
        shared: bool,
    ) -> None:
        super().__init__(weight, layout, place)
        self.low, self.high, self.shared = low, high, shared
        self.mu = nn.Parameter(self.filled(weight, mu))
        self.log_sigma = nn.Parameter(self.filled(weight, log_sigma))

    def mean(self) -> Tensor:
        return F.truncated_lognormal_mean(self.mu, self.log_sigma, self.low, self.high)

    def sample(self, rows: int) -> Tensor:
        u = self.uniform(1 if self.shared else rows, self.mu)
        return self.quick(F.truncated_lognormal_icdf, u, self.mu, self.log_sigma, self.low, self.high)


class BetaBernoulliGate(Gate):
    """``z ~ Bernoulli(pi)`` with ``pi ~ Kumaraswamy(a, b)``, both relaxed (arXiv:1805.10896, equations 13 to 15).

    `pi` is drawn once for a minibatch, `z` for each example.

    Args:
        a, b: first values of the posterior's parameters, above 0; stored as ``raw_a, raw_b``, their inverse softplus.
        temperature: of the relaxed Bernoulli variable.
    """

    def __init__(self, weight: Tensor, layout: Layout, place: Place, *, a: float, b: float, temperature: float) -> None:
        super().__init__(weight, layout, place)
        self.temperature = temperature
        self.raw_a = nn.Parameter(inverse_softplus(self.filled(weight, a)))
        self.raw_b = nn.Parameter(inverse_softplus(self.filled(weight, b)))

    @property
    def a(self) -> Tensor:
        """First parameter of the posterior of each unit."""
        return softplus(at_least_float32(self.raw_a))

    @property
    def b(self) -> Tensor:
        """Second parameter of the posterior of each unit."""
        return softplus(at_least_float32(self.raw_b))

    def mean(self) -> Tensor:
        return F.kumaraswamy_mean(self.a, self.b)

    def sample(self, rows: int) -> Tensor:
        a, b = self.a, self.b
        logit_pi = F.kumaraswamy_logit_icdf(self.uniform(1, a), a, b)
        return torch.sigmoid((logit_pi + torch.logit(self.uniform(rows, a))) / self.temperature)


class AdditiveGate(Gate):
    """``mean + exp(log_std) * eps`` with a learned mean and spread for each unit (arXiv:1811.07533, equation 19).

    Args:
        log_std: first value of ``log_std``.
        spread: standard deviation of the first means around one.
    """

    def __init__(self, weight: Tensor, layout: Layout, place: Place, *, log_std: float, spread: float) -> None:
        super().__init__(weight, layout, place)
        start = self.filled(weight, 1.0)
        self.center = nn.Parameter(start + spread * torch.randn_like(start))
        self.log_std = nn.Parameter(self.filled(weight, log_std))

    def mean(self) -> Tensor:
        return at_least_float32(self.center)

    def log_alpha(self, weight: Tensor) -> Tensor:
        return F.log_alpha(self.center, self.log_std)

    def sample(self, rows: int) -> Tensor:
        return self.mean() + torch.exp(at_least_float32(self.log_std)) * self.normal(rows, self.center)


class MultiplicativeGate(Gate):
    """``1 + sqrt(alpha) * eps`` with alpha shared by a layer or of each unit (arXiv:1506.02557, section 3.2).

    Each element has a draw of its own: the positions of a unit do not share one.

    Args:
        log_alpha: first value of log alpha.
        sharing: who shares one alpha.
        learned: a Parameter if true, otherwise a constant buffer.
    """

    def __init__(
        self,
        weight: Tensor,
        layout: Layout,
        place: Place,
        *,
        log_alpha: float,
        sharing: Literal["layer", "unit"],
        learned: bool,
    ) -> None:
        super().__init__(weight, layout, place)
        start = self.filled(weight, log_alpha)[: 1 if sharing == "layer" else self.units].clone()
        if learned:
            self.shared_log_alpha = nn.Parameter(start)
        else:
            self.register_buffer("shared_log_alpha", start)

    def mean(self) -> Tensor:
        return torch.ones_like(self.log_alpha(self.shared_log_alpha))

    def log_alpha(self, weight: Tensor) -> Tensor:
        return at_least_float32(self.shared_log_alpha).expand(self.units)

    def sample(self, rows: int) -> Tensor:
        log_alpha = self.log_alpha(self.shared_log_alpha)
        return 1.0 + torch.exp(0.5 * log_alpha) * self.normal(rows, log_alpha)

    def gated(self, value: Tensor, dim: int) -> Tensor:
        if not self.active:
            return super().gated(value, dim)
        with torch.autocast(value.device.type, enabled=False):
            std = torch.exp(0.5 * self.log_alpha(self.shared_log_alpha))
            factor = 1.0 + broadcast(std[None], value, dim) * torch.randn(value.shape, **self._kind(value))
            if self.mask is not None:
                factor = factor.masked_fill(~broadcast(self.mask[None], value, dim), 0.0)
        return value * factor.to(value.dtype)


class ConcreteGate(Gate):
    """Relaxed Bernoulli dropout at one learned rate for the layer, scaled to keep the mean (arXiv:1705.07832).

    Args:
        logit_rate: first value of the logit of the probability of dropping.
        temperature: of the relaxation.
    """

    def __init__(self, weight: Tensor, layout: Layout, place: Place, *, logit_rate: float, temperature: float) -> None:
        super().__init__(weight, layout, place)
        self.temperature = temperature
        self.logit_rate = nn.Parameter(self.filled(weight, logit_rate)[:1].clone())

    def mean(self) -> Tensor:
        return torch.ones_like(at_least_float32(self.logit_rate)).expand(self.units)

    def sample(self, rows: int) -> Tensor:
        logit = at_least_float32(self.logit_rate)
        noisy = (logit + torch.logit(self.uniform(rows, logit))) / self.temperature
        return torch.exp(logsigmoid(-noisy) + softplus(logit))


def inverse_softplus(x: Tensor) -> Tensor:
    """The number whose softplus is `x`, above 0."""
    return x + torch.log(-torch.expm1(-x))

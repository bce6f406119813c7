"""Gates: multiplicative noise on the units that flow into a layer or out of it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from vardrop import functional as F
from vardrop.functional.kumaraswamy import CLIP
from vardrop.lrt import Operation, at_least_float32
from vardrop.noise.base import Layout, Noise

Place = Literal["input", "output"]


class Gate(Noise):
    """One multiplier for each unit; a noisy pass draws it, a quiet pass takes its test-time value.

    Draws are shared by all positions of a unit. The first dimension of a batch counts examples.

    Args:
        weight: the host's weight.
        layout: the axes and groups of that weight.
        place: whether the units are the layer's inputs or its outputs (bias included).

    Attributes:
        mask: boolean, of shape ``(units,)``.
        units: their number.
    """

    def __init__(self, weight: Tensor, layout: Layout, place: Place) -> None:
        super().__init__()
        self.place: Place = place
        self.axis = layout.in_axis if place == "input" else layout.out_axis
        self.groups = layout.groups
        self.units: int = weight.shape[self.axis] * (layout.groups if self.axis == 1 else 1)

    def mean(self) -> Tensor:
        """The test-time multiplier of each unit, ``(units,)``, as if all were alive."""
        raise NotImplementedError(f"{type(self).__name__} must give its test-time multiplier")

    def sample(self, rows: int) -> Tensor:
        """A draw for each of `rows` examples, ``(rows, units)``, or ``(1, units)`` where they share it."""
        raise NotImplementedError(f"{type(self).__name__} must draw its multiplier")

    def multiplier(self, value: Tensor, dim: int) -> Tensor:
        """Multipliers ``(examples or 1, units)`` for `value`, whose units are counted by its negative `dim`."""
        return self.sample(_examples(value, dim)) if self.active else self.mean()[None]

    def forward(self, operation: Operation, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        dim = 1 - weight.dim()
        if self.place == "input":
            return operation(self.gated(x, dim), weight, bias)
        return self.gated(operation(x, weight, bias), dim)

    def gated(self, value: Tensor, dim: int) -> Tensor:
        """`value` times its multipliers; its units are counted by the negative `dim`."""
        with torch.autocast(value.device.type, enabled=False):
            factor = self.multiplier(value, dim)
            if self.mask is not None:
                factor = factor.masked_fill(~self.mask, 0.0)
        return value * broadcast(factor, value, dim).to(value.dtype)

    def mask_shape(self, weight: Tensor) -> torch.Size:
        return torch.Size((self.units,))

    def on_weights(self, mask: Tensor, weight: Tensor) -> Tensor:
        return self.spread(mask, weight)

    def folded(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        factor = self.mean() if self.mask is None else self.mean().masked_fill(~self.mask, 0.0)
        if bias is not None and self.place == "output":
            bias = _times(bias, factor)
        return _times(weight, self.spread(factor, weight)), bias

    def spread(self, values: Tensor, weight: Tensor) -> Tensor:
        """Values of the units, ``(units,)``, for the weights that read or make them; broadcasts to `weight`."""
        ones = (1,) * (weight.dim() - 2)
        if self.axis == 0:
            return values.reshape(-1, 1, *ones)
        rows = values.reshape(self.groups, -1).repeat_interleave(weight.shape[0] // self.groups, dim=0)
        return rows.reshape(*rows.shape, *ones)

    def filled(self, weight: Tensor, value: float) -> Tensor:
        """`value` for each unit, in float32 or better, where `weight` lies."""
        return torch.full(
            (self.units,), value, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device
        )

    def sum_alive(self, each: Tensor) -> Tensor:
        """Sum of one number for each unit over the living units."""
        return (each if self.mask is None else each.masked_fill(~self.mask, 0.0)).sum()

    def normal(self, rows: int, like: Tensor) -> Tensor:
        """Standard normal draws ``(rows, units)`` of the kind of `like`, in float32 or better."""
        kind = torch.promote_types(like.dtype, torch.float32)
        return torch.randn(rows, self.units, dtype=kind, device=like.device, generator=self.generator)

    def uniform(self, rows: int, like: Tensor) -> Tensor:
        """Uniform draws ``(rows, units)`` in [1e-6, 1 - 1e-6] of the kind of `like`, in float32 or better."""
        kind = torch.promote_types(like.dtype, torch.float32)
        draw = torch.rand(rows, self.units, dtype=kind, device=like.device, generator=self.generator)
        return draw.clamp(CLIP, 1.0 - CLIP)


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
        return F.truncated_lognormal_icdf(u, self.mu, self.log_sigma, self.low, self.high)


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
        return nn.functional.softplus(at_least_float32(self.raw_a))

    @property
    def b(self) -> Tensor:
        """Second parameter of the posterior of each unit."""
        return nn.functional.softplus(at_least_float32(self.raw_b))

    def mean(self) -> Tensor:
        return F.kumaraswamy_mean(self.a, self.b)

    def sample(self, rows: int) -> Tensor:
        a, b = self.a, self.b
        logit_pi = F.kumaraswamy_logit_icdf(self.uniform(1, a), a, b)
        return torch.sigmoid((logit_pi + torch.logit(self.uniform(rows, a))) / self.temperature)


def inverse_softplus(x: Tensor) -> Tensor:
    """The number whose softplus is `x`, above 0."""
    return x + torch.log(-torch.expm1(-x))


def broadcast(factor: Tensor, value: Tensor, dim: int) -> Tensor:
    """`factor`, ``(examples or 1, units)``, made to multiply `value`, whose units are counted by the negative `dim`."""
    lead = [1] * (value.dim() + dim)
    lead[:1] = [len(factor)] * len(lead[:1])
    return factor.reshape(*lead, factor.shape[1], *[1] * (-dim - 1))


def _examples(value: Tensor, dim: int) -> int:
    """How many examples `value` holds: one where its first dimension is that of its units."""
    return value.shape[0] if value.dim() + dim > 0 else 1


def _times(weight: Tensor, factor: Tensor) -> Tensor:
    """The product in the type of `weight`; what is multiplied by zero is a plain zero, without a sign."""
    return (weight * factor).to(weight.dtype).masked_fill(factor == 0.0, 0.0)

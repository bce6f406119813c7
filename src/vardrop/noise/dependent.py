"""The gate of dependent beta-Bernoulli dropout: which units are on depends on the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from vardrop import functional as F
from vardrop.lrt import at_least_float32
from vardrop.noise.base import Layout
from vardrop.noise.gate import Gate, Place
from vardrop.noise.gates import BetaBernoulliGate

EDGE = 1e-6
VARIANCE_EPSILON = 1e-3
LEAST_PROBABILITY = 1e-12

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a layer, by place and by name."""


class DependentGate(Gate):
    """``z ~ Bernoulli(pi * clip(scale * (x - m) / s + beta))`` (arXiv:1805.10896, equations 20 to 25).

    `x` is the unit itself, its mean over positions where it has some; `m` and `s` are its mean and standard deviation,
    of the batch in training and running ones else. ``beta ~ N(shift, exp(2 log_std))`` and `pi` are drawn once for a
    minibatch, `z` for each example. The posterior of `pi` is frozen. No gradient flows through the gate into `x`.

    Args:
        shift: first mean of beta.
        log_std: first log standard deviation of beta.
        temperature: of the relaxed Bernoulli variable.
        momentum: share of a batch in the running statistics.
        threshold: a unit whose multiplier is not above it is off for that input.

    Attributes:
        peak: the largest value of the clipped term that recent training batches gave, before clipping.
    """

    a: Tensor
    b: Tensor
    running_mean: Tensor
    running_var: Tensor
    peak: Tensor

    def __init__(
        self,
        weight: Tensor,
        layout: Layout,
        place: Place,
        *,
        shift: float,
        log_std: float,
        temperature: float,
        momentum: float,
        threshold: float,
    ) -> None:
        super().__init__(weight, layout, place)
        self.temperature, self.momentum, self.threshold = temperature, momentum, threshold
        self.scale = nn.Parameter(self.filled(weight, 1.0))
        self.shift = nn.Parameter(self.filled(weight, shift))
        self.log_std = nn.Parameter(self.filled(weight, log_std))
        for name, start in (("a", 1.0), ("b", 1.0), ("running_mean", 0.0), ("running_var", 1.0), ("peak", 1.0)):
            self.register_buffer(name, self.filled(weight, start))

    def take_over(self, first: BetaBernoulliGate, least_a: float) -> None:
        """Freezes the posterior of `pi` that the `first` stage found; its dead units get `least_a` and stay dead."""
        with torch.no_grad():
            self.a.copy_(first.a if first.mask is None else first.a.masked_fill(~first.mask, least_a))
            self.b.copy_(first.b)
        self.mask = first.mask
        self.on, self.generator = first.on, first.generator

    def mean(self) -> Tensor:
        """``E pi``: the part of the multiplier that does not depend on the input."""
        return F.kumaraswamy_mean(self.a, self.b)

    def multiplier(self, value: Tensor, dim: int) -> Tensor:
        x = pooled(at_least_float32(value.detach()), dim).reshape(-1, self.units)
        level = self.scale * self._normalised(x)
        if self.training and len(x):
            self._record(level + self.shift)
        if not self.active:
            multiplier = self.mean() * (level + self.shift).clamp(EDGE, 1.0 - EDGE)
            return multiplier.masked_fill(multiplier <= self.threshold, 0.0)
        beta = self.shift + torch.exp(self.log_std) * self.normal(1, self.shift)
        log_pi = F.kumaraswamy_log_icdf(self.uniform(1, self.a), self.a, self.b)
        log_phi = log_pi + torch.log((level + beta).clamp(EDGE, 1.0 - EDGE))
        logit_phi = log_phi - torch.log(-torch.expm1(log_phi))
        return torch.sigmoid((logit_phi + torch.logit(self.uniform(len(x), x))) / self.temperature)

    def _normalised(self, x: Tensor) -> Tensor:
        mean, variance = self.running_mean, self.running_var
        if self.training and len(x) > 1:
            mean, variance = x.mean(0), x.var(0, correction=0)
            with torch.no_grad():
                for running, now in ((self.running_mean, mean), (self.running_var, variance)):
                    running.lerp_(now.to(running.dtype), self.momentum)
        return (x - mean) * (variance + VARIANCE_EPSILON).rsqrt()

    @torch.no_grad()
    def _record(self, level: Tensor) -> None:
        top = level.amax(0).to(self.peak.dtype)
        self.peak.copy_(torch.maximum(top, torch.lerp(self.peak, top, self.momentum)))

    @torch.no_grad()
    def remainder(self, weight: Tensor) -> InputGate:
        """What is left to compute for each input once ``E pi`` and the dead units are folded into `weight`."""
        gate = InputGate((self.units, *[1] * (weight.dim() - 2)), self.place)
        probability = self.mean().clamp_min(LEAST_PROBABILITY)
        gain = self.scale * (self.running_var + VARIANCE_EPSILON).rsqrt()
        shift = self.shift - gain * self.running_mean
        if self.place == "output":  # what reaches the gate is folded already
            gain = gain / probability
        values = (gain, shift, self.threshold / probability)
        for tensor, value in zip((gate.scale, gate.shift, gate.floor), values, strict=True):
            tensor.data = value.reshape(tensor.shape).to(weight)
        return gate


class InputGate(nn.Module):
    """A plain gate that depends on its input: ``x * clip(scale * mean(x) + shift)``, zero where that is too small.

    The mean is over the positions of a unit; the clip is to ``[1e-6, 1 - 1e-6]``. Clipped values that are not above
    `floor` count as zero.

    Args:
        shape: ``(units, 1, ...)`` with a one for each dimension of positions.
        place: whether the units are the inputs or the outputs of the layer it hangs on.
    """

    floor: Tensor

    def __init__(self, shape: tuple[int, ...], place: Place) -> None:
        super().__init__()
        self.place: Place = place
        self.scale = nn.Parameter(torch.zeros(shape))
        self.shift = nn.Parameter(torch.ones(shape))
        self.register_buffer("floor", torch.zeros(shape))

    def opening(self, x: Tensor) -> Tensor:
        """The multiplier of each unit for each example of `x`, broadcastable to it."""
        level = pooled(at_least_float32(x), -self.scale.dim()) * self.scale + self.shift
        opening = level.clamp(EDGE, 1.0 - EDGE)
        return opening.masked_fill(opening <= self.floor, 0.0).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.opening(x)

    def extra_repr(self) -> str:
        return f"{len(self.scale)} units, place={self.place!r}"

    def hang_on(self, layer: nn.Module) -> None:
        """Makes the plain `layer` apply this gate in every pass."""
        layer.gate = self
        if self.place == "input":
            layer.register_forward_pre_hook(_gate_inputs, with_kwargs=True)
        else:
            layer.register_forward_hook(_gate_outputs)


def with_first(change: Callable[[Tensor], Tensor], inputs: tuple[Any, ...], named: dict[str, Any]) -> Inputs:
    """The arguments of a layer, the first one changed, whether it was given by place or by name."""
    if inputs:
        return (change(inputs[0]), *inputs[1:]), named
    name = next(iter(named))
    return inputs, {**named, name: change(named[name])}


def pooled(value: Tensor, dim: int) -> Tensor:
    """The mean of `value` over positions: all dimensions but the first and the negative `dim` that counts units."""
    positions = [place for place in range(1, value.dim()) if place != value.dim() + dim]
    return value.mean(positions, keepdim=True) if positions else value


def _gate_inputs(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Inputs:
    return with_first(cast(InputGate, layer.gate), inputs, named)


def _gate_outputs(layer: nn.Module, inputs: Any, output: Tensor) -> Any:
    gate: Any = layer.gate
    return gate(output)

"""Gaussian noise on weights. The layer's own ``weight`` is the posterior mean; the noise holds the spread."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vardrop import functional as F
from vardrop import fused
from vardrop.lrt import Operation, at_least_float32, draw_weight, local_sample, weight_sample
from vardrop.noise.base import Layout, Noise

Sampling = Literal["local", "weight"]
Sharing = Literal["layer", "input", "output", "weight"]


class WeightNoise(Noise):
    """A Gaussian posterior over each weight, sampled at the layer's output (``local``) or in the weights themselves."""

    def __init__(self, sampling: Sampling) -> None:
        super().__init__()
        self.sampling: Sampling = sampling

    def mean(self, weight: Tensor) -> Tensor:
        """Posterior mean of each weight: what it is in a quiet pass."""
        return weight

    def variance(self, weight: Tensor) -> Tensor:
        """Posterior variance of each weight; broadcasts to `weight`."""
        raise NotImplementedError(f"{type(self).__name__} must give the variance of its weights")

    def log_alpha(self, weight: Tensor) -> Tensor:
        """``log(variance / mean^2)`` of each weight, for reports and pruning rules."""
        raise NotImplementedError(f"{type(self).__name__} must give the log alpha of its weights")

    def noisy_mean(self, weight: Tensor, variance: Tensor) -> Tensor:
        """The mean of each weight in a noisy pass."""
        return self.mean(weight)

    def moments(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of each weight in a noisy pass, zero where it is dead."""
        variance = self.variance(weight)
        return self.masked(self.noisy_mean(weight, variance)), self.masked(variance)

    def sample_weight(self, weight: Tensor) -> Tensor:
        if not self.active:
            return self.masked(self.mean(weight))
        variance = self.variance(weight)
        return self.masked(draw_weight(self.noisy_mean(weight, variance), variance, generator=self.generator))

    def folded(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.masked(self.mean(weight)), bias

    def forward(self, operation: Operation, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.active:
            return operation(x, self.masked(self.mean(weight)), bias)
        mean, variance = self.moments(weight)
        if self.sampling == "weight":
            return weight_sample(operation, x, mean, variance, bias, generator=self.generator)
        if self.fast is None or torch.compiler.is_compiling():
            return local_sample(operation, x, mean, variance, bias, generator=self.generator)
        variance = variance.to(self.fast.narrow(weight))
        compiled = self.fast.compiled
        return fused.local_sample(operation, x, mean, variance, bias, compiled=compiled, generator=self.generator)


class AdditiveNoise(WeightNoise):
    """``w = mean + exp(log_std) * eps``: the additive form, whose gradient in the mean is free of noise.

    Args:
        weight: the host's weight, the posterior mean; any shape.
        init_log_std: first value of ``log_std``.
        init_spread: standard deviation of those first values around `init_log_std`.
        sampling: ``"local"`` or ``"weight"``.
        clip_log_alpha: weights whose log alpha has reached it take no part in the noisy mean, their noise stays.
    """

    def __init__(
        self,
        weight: Tensor,
        init_log_std: float,
        *,
        init_spread: float = 0.0,
        sampling: Sampling = "local",
        clip_log_alpha: float | None = None,
    ) -> None:
        super().__init__(sampling)
        self.clip_log_alpha = clip_log_alpha
        self._price: tuple[Tensor, tuple[int, ...]] | None = None
        start = torch.full_like(at_least_float32(weight.detach()), init_log_std)
        if init_spread:
            start += init_spread * torch.randn_like(start)
        self.log_std = nn.Parameter(start)

    def variance(self, weight: Tensor) -> Tensor:
        return torch.exp(2.0 * at_least_float32(self.log_std))

    def log_alpha(self, weight: Tensor) -> Tensor:
        return F.log_alpha(weight, self.log_std)

    def moments(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        fast = self.fast
        joined = self.compiled and self.sampling == "local" and self.method.kl_is_short and torch.is_grad_enabled()
        if fast is None or not joined:
            return super().moments(weight)
        clip, dtype = self.clip_log_alpha, fast.narrow(weight)
        mean, variance, price = fused.weigh(weight, self.log_std, self.mask, self.method, clip, dtype)
        if mean.requires_grad:
            self._price = (price, self._state_of(weight))
            # after the backward comes a step, and fused ones do not raise the tensors' versions
            mean.register_hook(self._forget)
        return mean, variance

    def _forget(self, gradient: Tensor) -> None:
        self._price = None

    def take_price(self, weight: Tensor) -> Tensor | None:
        """The KL that the last fast pass found on its way, once, and only while nothing has changed since."""
        if self._price is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        (price, state), self._price = self._price, None
        return price if state == self._state_of(weight) else None

    def resized(self, weight: Tensor, layout: Layout) -> None:
        self._price = None

    def _state_of(self, weight: Tensor) -> tuple[int, ...]:
        tensors = [tensor for tensor in (weight, self.log_std, self.mask) if tensor is not None]
        return tuple(number for tensor in tensors for number in (id(tensor), tensor._version))

    def noisy_mean(self, weight: Tensor, variance: Tensor) -> Tensor:
        if self.clip_log_alpha is None:
            return weight
        squared_bound = math.exp(-self.clip_log_alpha) * variance.detach()
        return weight * (at_least_float32(weight.detach()).square() > squared_bound)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_price": None}


class MultiplicativeNoise(WeightNoise):
    """``w = mean * (1 + sqrt(alpha) * eps)`` with alpha shared by a layer, an input, an output, or by no one.

    Args:
        weight: the host's weight, the posterior mean; any shape.
        layout: the axes and groups of that weight.
        log_alpha: first value of log alpha.
        sharing: who shares one alpha.
        learned: a Parameter if true, otherwise a constant buffer.
        sampling: ``"local"`` or ``"weight"``.
    """

    def __init__(
        self,
        weight: Tensor,
        layout: Layout,
        *,
        log_alpha: float,
        sharing: Sharing,
        learned: bool,
        sampling: Sampling = "local",
    ) -> None:
        super().__init__(sampling)
        self.sharing = sharing
        reference = at_least_float32(weight.detach())
        start = torch.full(_shared_shape(weight, layout, sharing), log_alpha, dtype=reference.dtype)
        start = start.to(weight.device)
        if learned:
            self.shared_log_alpha = nn.Parameter(start)
        else:
            self.register_buffer("shared_log_alpha", start)
        self.resized(weight, layout)

    def resized(self, weight: Tensor, layout: Layout) -> None:
        groups = self.shared_log_alpha.shape[0]
        self.repeats = weight.shape[0] // groups if groups > 1 else 1

    def log_alpha(self, weight: Tensor) -> Tensor:
        return self.spread(self.shared_log_alpha, weight)

    def variance(self, weight: Tensor) -> Tensor:
        alpha = at_least_float32(self.shared_log_alpha).exp()
        return self.spread(alpha, weight) * at_least_float32(weight).square()

    def spread(self, shared: Tensor, weight: Tensor) -> Tensor:
        """Values that belong to the shared alphas, one for each weight."""
        each = shared if self.repeats == 1 else shared.repeat_interleave(self.repeats, dim=0)
        return each.expand(weight.shape)


class ZeroMeanNoise(WeightNoise):
    """``w = weight * eps``: the mean is zero, and the host's own weight is the standard deviation, of either sign.

    This is :class:`MultiplicativeNoise` in the limit of an infinite alpha, with ``sqrt(alpha)`` taken into the weight.
    """

    def mean(self, weight: Tensor) -> Tensor:
        return torch.zeros_like(weight)

    def variance(self, weight: Tensor) -> Tensor:
        return at_least_float32(weight).square()

    def log_alpha(self, weight: Tensor) -> Tensor:
        return torch.full_like(at_least_float32(weight.detach()), math.inf)


def _shared_shape(weight: Tensor, layout: Layout, sharing: Sharing) -> tuple[int, ...]:
    """Shape of the shared alphas; axis 1 counts within a group, so there every group has its own."""
    ones = (1,) * weight.dim()
    if sharing == "layer":
        return ones
    if sharing == "weight":
        return tuple(weight.shape)
    axis = layout.in_axis if sharing == "input" else layout.out_axis
    shape = (*ones[:axis], weight.shape[axis], *ones[axis + 1 :])
    return (layout.groups, *shape[1:]) if axis == 1 else shape

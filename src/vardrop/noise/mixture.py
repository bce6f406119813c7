"""Weights that gather around few values while they train, and are those values once pruned."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from vardrop.fused import joint_and_distance, mixture_log_density
from vardrop.lrt import at_least_float32
from vardrop.noise.pruning import MaskedWeights


class SharedWeights(MaskedWeights):
    """Weights under a mixture of Gaussians, whose component 0 has its mean and its share pinned.

    Unpruned, and in training mode, a weight is what it is. In eval mode each living weight of a pruned layer is the
    mean of its likeliest component but the one at zero.

    Args:
        weight: the host's weight; the first means lie evenly over its range.
        components: their number without the one at zero.
        zero_share: the share of the component at zero, in (0, 1).
        std: first standard deviation of every component.

    Attributes:
        means: those of the free components, ``(components,)``.
        log_precisions: ``-2 log std`` of all components, the one at zero first, ``(1 + components,)``.
        logits: of the shares of the free components among them, ``(components,)``.
    """

    of_layer: ClassVar[frozenset[str]] = frozenset({"means", "log_precisions", "logits"})

    def __init__(self, weight: Tensor, *, components: int, zero_share: float, std: float) -> None:
        super().__init__()
        self.zero_share = zero_share
        start = at_least_float32(weight.detach())
        steps = torch.linspace(0.0, 1.0, components, dtype=start.dtype, device=start.device)
        self.means = nn.Parameter(torch.lerp(start.min(), start.max(), steps))
        self.log_precisions = nn.Parameter(start.new_full((1 + components,), -2.0 * math.log(std)))
        self.logits = nn.Parameter(start.new_zeros(components))

    def log_joint(self, weight: Tensor) -> Tensor:
        """``log(share of the component * its density at the weight)``, ``(1 + components, *weight.shape)``."""
        joint, _ = joint_and_distance(at_least_float32(weight).flatten(), *self._components())
        return joint.view(-1, *weight.shape)

    def log_density(self, weight: Tensor) -> Tensor:
        """Log-density of the mixture at each weight, nats, in the shape of `weight`."""
        if self.compiled:
            return mixture_log_density(at_least_float32(weight), *self._components())
        return torch.logsumexp(self.log_joint(weight), dim=0)

    def _components(self) -> tuple[Tensor, Tensor, Tensor]:
        """Means, log-precisions and log-shares of all components."""
        shares = math.log1p(-self.zero_share) + torch.log_softmax(at_least_float32(self.logits), dim=0)
        shares = nn.functional.pad(shares, (1, 0), value=math.log(self.zero_share))
        means = nn.functional.pad(at_least_float32(self.means), (1, 0))
        return means, at_least_float32(self.log_precisions), shares

    def sample_weight(self, weight: Tensor) -> Tensor:
        return self.masked(weight) if self.training else self.settled(weight)

    def settled(self, weight: Tensor) -> Tensor:
        """Every living weight at the mean of its likeliest free component, the dead ones at zero; all, once pruned."""
        if self.mask is None:
            return weight
        return self.masked(self.means[self.log_joint(weight)[1:].argmax(dim=0)].to(weight.dtype))

    def folded(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.settled(weight), bias

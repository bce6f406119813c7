"""Soft weight-sharing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from vardrop.errors import InvalidValueError
from vardrop.lrt import at_least_float32
from vardrop.methods.base import Method, Paper, check_range
from vardrop.noise import Layout, Noise, SharedWeights

ZERO_PRECISION, FREE_PRECISION = (5000.0, 2.0), (250.0, 0.1)
"""Shape and rate of the Gamma hyper-priors of the precision of the component at zero, and of the others."""


@dataclass(frozen=True)
class SoftWeightSharing(Method):
    """Soft weight-sharing: weights gather around the means of a Gaussian mixture; those around its zero die. No noise.

    For trained nets and long runs: after few epochs the weights have not gathered, and the step to the means costs
    accuracy. The mixture is learned together with the weights; the paper has one for the whole net, here each layer
    has its own. The price is ``tau`` times the negative log-density of the weights and of the precisions
    under their Gamma hyper-priors. A weight lives where the likeliest of the free components beats the one at zero;
    in a pruned net it is the mean of that component. A threshold given to :func:`vardrop.prune` is in nats of their
    log-odds.

    Args:
        components: of the mixture, without the one at zero, at least 1.
        zero_share: the share of the one at zero, in (0, 1); not learned.
        tau: factor on the price, at least 0; the authors' code has 0.003.
        init_std: first standard deviation of every component, above 0.
        means_lr: Adam's learning rate of the means in ``vardrop.parameter_groups`` and on the command line; the
            authors' weights learn at 5e-4.
        precisions_lr: that of the log-precisions.
        shares_lr: that of the logits of the free components' shares.

    Raises:
        InvalidValueError: a field is outside its range; the message names it.

    Source: arXiv:1702.04008, section 3; first values, hyper-priors and learning rates are those of its authors' code.

    >>> net = vd.convert(torch.nn.Linear(4, 2), vd.SoftWeightSharing(components=2))
    >>> _ = vd.prune(net, threshold=-float("inf"))
    >>> len(vd.strip(net).weight.unique())
    2
    """

    paper: ClassVar[Paper] = Paper(
        "ullrich2017soft",
        "Soft Weight-Sharing for Neural Network Compression",
        "Ullrich, Karen and Meeds, Edward and Welling, Max",
        2017,
        "1702.04008",
    )
    components: int = 16
    zero_share: float = 0.99
    tau: float = 0.005
    init_std: float = 0.25
    means_lr: float = 1e-4
    precisions_lr: float = 3e-3
    shares_lr: float = 3e-3

    def __post_init__(self) -> None:
        check_range(self, "components", above=1, closed=True)
        check_range(self, "zero_share", above=0.0, below=1.0)
        check_range(self, "tau", above=0.0, closed=True)
        for name in ("init_std", "means_lr", "precisions_lr", "shares_lr"):
            check_range(self, name, above=0.0)

    def noise(self, weight: Tensor, layout: Layout) -> Noise:
        return SharedWeights(weight, components=self.components, zero_share=self.zero_share, std=self.init_std)

    def learning_rates(self, noise: Noise) -> dict[str, float]:
        return {"means": self.means_lr, "log_precisions": self.precisions_lr, "logits": self.shares_lr}

    def kl(self, noise: Noise, weight: Tensor) -> Tensor:
        shared = cast(SharedWeights, noise)
        with torch.autocast(weight.device.type, enabled=False):
            weights = shared.masked(shared.log_density(weight)).sum()
            log_precisions = at_least_float32(shared.log_precisions)
            zero = _log_gamma_density(log_precisions[:1], *ZERO_PRECISION)
            free = _log_gamma_density(log_precisions[1:], *FREE_PRECISION)
            return -self.tau * (weights + zero + free)

    def score(self, noise: Noise, weight: Tensor) -> Tensor:
        joint = cast(SharedWeights, noise).log_joint(weight.detach().double()).detach()
        return joint[1:].amax(dim=0) - joint[0]

    def cutoff(self, threshold: float | None = None) -> float:
        value = 0.0 if threshold is None else threshold
        if math.isnan(value):
            raise InvalidValueError(f"threshold={value}: must be a number")
        return value


def _log_gamma_density(log_value: Tensor, shape: float, rate: float) -> Tensor:
    """Sum of the log-densities of Gamma(shape, rate) at ``exp(log_value)``."""
    constant = shape * math.log(rate) - math.lgamma(shape)
    return ((shape - 1.0) * log_value - rate * log_value.exp() + constant).sum()

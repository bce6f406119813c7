"""Variational Bayesian dropout on units."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, cast

from torch import Tensor

from vardrop import functional as F
from vardrop.methods.base import GateMethod, Paper, check_range
from vardrop.methods.vbd import VBD
from vardrop.noise import AdditiveGate, Layout, Noise


@dataclass(frozen=True)
class StructuredVBD(GateMethod):
    """Variational Bayesian dropout on units: a Gaussian multiplier for each, dead at log alpha >= 0.

    The KL is that of :class:`VBD`, ``log(1 + mean^2 / std^2) / 2`` a unit; at test time a unit is multiplied by its
    mean. Each example has a draw of its own, each flattened input a multiplier of its own, and units die by
    :func:`vardrop.prune` alone; the authors' code shares a draw within a minibatch and a channel's multiplier among its
    flattened inputs, and masks while it trains. On a convolution's output the multiplier acts before the activation,
    in equation 19 after it.

    Args:
        init_log_std: first value of log std.
        init_spread: standard deviation of the first means around one.

    Raises:
        InvalidValueError: a field is outside its range; the message names it.

    Source: arXiv:1811.07533, equation 19; first values and threshold are those of its authors' code.

    >>> net = vd.convert(torch.nn.Linear(4, 2), vd.StructuredVBD())
    >>> vd.kl(net).item() > 0
    True
    """

    paper: ClassVar[Paper] = VBD.paper
    threshold: float = 0.0
    init_log_std: float = -4.5
    init_spread: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "init_spread", above=0.0, closed=True)

    def noise(self, weight: Tensor, layout: Layout) -> Noise:
        return AdditiveGate(weight, layout, self.placed(weight), log_std=self.init_log_std, spread=self.init_spread)

    def kl(self, noise: Noise, weight: Tensor) -> Tensor:
        gate = cast(AdditiveGate, noise)
        return gate.sum_alive(F.ard_kl(gate.center, gate.log_std))

    def score(self, noise: Noise, weight: Tensor) -> Tensor:
        gate = cast(AdditiveGate, noise)
        return -F.log_alpha(gate.center.detach().double(), gate.log_std.detach().double())

    def cutoff(self, threshold: float | None = None) -> float:
        return math.nextafter(-super().cutoff(threshold), math.inf)

"""Dependent beta-Bernoulli dropout: the second stage of :class:`BetaBernoulli`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, cast

from torch import Tensor

from vardrop import functional as F
from vardrop.methods.base import GateMethod, Method, Paper, check_range
from vardrop.methods.beta_bernoulli import LEAST, BetaBernoulli
from vardrop.noise import BetaBernoulliGate, DependentGate, Layout, Noise


@dataclass(frozen=True)
class DependentBetaBernoulli(GateMethod):
    """Dependent beta-Bernoulli dropout: units switch off input by input, dead where no recent input switched them on.

    The second stage of a run with :class:`BetaBernoulli`: convert its trained net again. The posterior of each unit's
    probability stays frozen; ``beta ~ N(0, prior_std^2)`` is what is learned and paid for. At test time a unit is
    multiplied by ``E pi * clip(scale * (x - mean) / std + E beta)``, zero where that is not above the threshold.

    Args:
        prior_std: standard deviation of the prior of beta, above 0.
        init_shift: first posterior mean of beta.
        init_std: first posterior standard deviation of beta, above 0.
        temperature: of the relaxed on-off variable, above 0.
        momentum: share of a batch in the running statistics of the units, in (0, 1].
        place: stays that of the first stage.

    Raises:
        InvalidValueError: a field is outside its range; the message names it.

    A gate looks at the mean of an example over all its positions, as the paper does in convolutions; in a linear layer
    of a sequence too, so that every step sees the later ones: not for causal models.

    The relaxed variable is one with the joint probability, as in the paper; the product of two that its authors' code
    draws is left out.

    Source: arXiv:1805.10896, section 4.2.

    >>> net = vd.convert(torch.nn.Linear(4, 2), vd.BetaBernoulli())
    >>> net = vd.convert(net, vd.DependentBetaBernoulli())
    >>> vd.convert(torch.nn.Linear(4, 2), vd.DependentBetaBernoulli())
    Traceback (most recent call last):
    vardrop.errors.ConversionError: DependentBetaBernoulli is the second stage of BetaBernoulli, of which ...
    """

    paper: ClassVar[Paper] = BetaBernoulli.paper
    follows: ClassVar[type[Method] | None] = BetaBernoulli
    threshold: float = 1e-3
    prior_std: float = math.sqrt(5.0)
    init_shift: float = 1.0
    init_std: float = 1.0
    temperature: float = 0.1
    momentum: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("prior_std", "init_std", "temperature"):
            check_range(self, field, above=0.0)
        check_range(self, "momentum", above=0.0, below=1.0, closed_below=True)

    def noise(self, weight: Tensor, layout: Layout) -> Noise:
        return DependentGate(
            weight,
            layout,
            self.placed(weight),
            shift=self.init_shift,
            log_std=math.log(self.init_std),
            temperature=self.temperature,
            momentum=self.momentum,
            threshold=self.threshold,
        )

    def continues(self, noise: Noise, first: Noise) -> None:
        cast(DependentGate, noise).take_over(cast(BetaBernoulliGate, first), LEAST)

    def kl(self, noise: Noise, weight: Tensor) -> Tensor:
        gate = cast(DependentGate, noise)
        return gate.sum_alive(F.normal_kl(gate.shift, gate.log_std, self.prior_std**2))

    def score(self, noise: Noise, weight: Tensor) -> Tensor:
        gate = cast(DependentGate, noise)
        probability = F.kumaraswamy_mean(gate.a.detach().double(), gate.b.detach().double())
        return probability * gate.peak.double().clamp(0.0, 1.0)

    def cutoff(self, threshold: float | None = None) -> float:
        return math.nextafter(super().cutoff(threshold), math.inf)

"""Concrete dropout."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, cast

from torch import Tensor
from torch.nn.functional import softplus

from vardrop.lrt import at_least_float32
from vardrop.methods.base import Method, Paper, check_range
from vardrop.noise import ConcreteGate, Layout, Noise


@dataclass(frozen=True)
class ConcreteDropout(Method):
    """Concrete dropout: the inputs of a layer are dropped at one learned rate p; nothing dies.

    Convolutions drop whole channels. Up to a constant the KL of a layer with weights W and K inputs is
    ``length_scale^2 |W|^2 / (2 (1 - p)) - K H(p)``, H the entropy in nats, so it may be below zero.

    Args:
        init_rate: first rate, in (0, 1).
        length_scale: of the Gaussian prior N(0, 1 / length_scale^2) of the weights, at least 0.
        temperature: of the relaxation, above 0; ``None`` for 0.1, and 2/3 in convolutions, as the authors do.

    Raises:
        InvalidValueError: a field is outside its range; the message names it.

    Source: arXiv:1705.07832.

    >>> net = vd.convert(torch.nn.Linear(4, 2), vd.ConcreteDropout(init_rate=0.5))
    >>> torch.sigmoid(net.gate.logit_rate).item()
    0.5
    """

    paper: ClassVar[Paper] = Paper(
        "gal2017concrete", "Concrete Dropout", "Gal, Yarin and Hron, Jiri and Kendall, Alex", 2017, "1705.07832"
    )
    init_rate: float = 0.1
    length_scale: float = 1e-4
    temperature: float | None = None

    def __post_init__(self) -> None:
        check_range(self, "init_rate", above=0.0, below=1.0)
        check_range(self, "length_scale", above=0.0, closed=True)
        if self.temperature is not None:
            check_range(self, "temperature", above=0.0)

    @property
    def on_units(self) -> bool:
        return True

    def noise(self, weight: Tensor, layout: Layout) -> Noise:
        usual = 0.1 if weight.dim() == 2 else 2.0 / 3.0
        return ConcreteGate(
            weight,
            layout,
            "input",
            logit_rate=math.log(self.init_rate) - math.log1p(-self.init_rate),
            temperature=usual if self.temperature is None else self.temperature,
        )

    def kl(self, noise: Noise, weight: Tensor) -> Tensor:
        gate = cast(ConcreteGate, noise)
        logit = at_least_float32(gate.logit_rate)
        rate = logit.sigmoid()
        minus_entropy = -rate * softplus(-logit) - (1.0 - rate) * softplus(logit)
        energy = 0.5 * self.length_scale**2 * at_least_float32(weight).square().sum()
        return (energy * (1.0 + logit.exp()) + gate.units * minus_entropy).sum()

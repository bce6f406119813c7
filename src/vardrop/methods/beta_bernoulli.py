"""Beta-Bernoulli dropout."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from vardrop import functional as F
from vardrop.methods.base import GateMethod, Paper, check_range
from vardrop.noise import BetaBernoulliGate, Layout, Noise

LEAST_RAW, GREATEST_RAW_B = -10.0, 50.0
LEAST = math.log1p(math.exp(LEAST_RAW))


@dataclass(frozen=True)
class BetaBernoulli(GateMethod):
    """Beta-Bernoulli dropout: each unit has a learned probability of being on, dead where its mean is below 0.001.

    The prior of that probability is Beta(alpha / K, 1), its posterior Kumaraswamy(a, b); at test time a unit is
    multiplied by ``E pi``. Before each training pass a and b are put back above softplus(-10), and b below 50.

    Args:
        alpha_over_k: the prior's parameter, above 0; smaller compresses more.
        init_a: first value of a; the default is the authors' for LeNets, they take 2.127 for VGG.
        init_b: first value of b.
        temperature: of the relaxed on-off variable, above 0.

    Raises:
        InvalidValueError: a field is outside its range; the message names it.

    Source: arXiv:1805.10896, section 4.1.

    >>> net = vd.convert(torch.nn.Linear(4, 2), vd.BetaBernoulli())
    >>> vd.kl(net).item() > 0
    True
    """

    paper: ClassVar[Paper] = Paper(
        "lee2018adaptive",
        "Adaptive Network Sparsification with Dependent Variational Beta-Bernoulli Dropout",
        "Lee, Juho and Kim, Saehoon and Yoon, Jaehong and Lee, Hae Beom and Yang, Eunho and Hwang, Sung Ju",
        2018,
        "1805.10896",
    )
    threshold: float = 1e-3
    alpha_over_k: float = 1e-4
    init_a: float = 0.3133
    init_b: float = 1.0
    temperature: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("alpha_over_k", "temperature"):
            check_range(self, field, above=0.0)
        check_range(self, "init_a", above=LEAST)
        check_range(self, "init_b", above=LEAST, below=GREATEST_RAW_B)

    def noise(self, weight: Tensor, layout: Layout) -> Noise:
        return BetaBernoulliGate(
            weight, layout, self.placed(weight), a=self.init_a, b=self.init_b, temperature=self.temperature
        )

    def kl(self, noise: Noise, weight: Tensor) -> Tensor:
        gate = cast(BetaBernoulliGate, noise)
        return gate.sum_alive(F.kumaraswamy_beta_kl(gate.a, gate.b, self.alpha_over_k))

    def score(self, noise: Noise, weight: Tensor) -> Tensor:
        gate = cast(BetaBernoulliGate, noise)
        return F.kumaraswamy_mean(gate.a.detach().double(), gate.b.detach().double())

    def project(self, noise: Noise) -> None:
        gate = cast(BetaBernoulliGate, noise)
        with torch.no_grad():
            gate.raw_a.data.clamp_(min=LEAST_RAW)
            gate.raw_b.data.clamp_(LEAST_RAW, GREATEST_RAW_B)

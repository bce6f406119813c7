"""Automatic relevance determination by empirical Bayes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vardrop import functional as F
from vardrop.methods.additive import AdditiveMethod
from vardrop.methods.base import Paper, RuleName


@dataclass(frozen=True)
class ARD(AdditiveMethod):
    """ARD dropout: each weight's Gaussian prior has the precision that the ELBO likes best; dead at |mean| < 0.01.

    The KL is ``log(1 + mean^2 / std^2) / 2`` a weight.

    Raises:
        InvalidValueError: a field is outside its range; the message names it.

    Source: arXiv:1811.00596, section 2, equation 1.

    >>> net = vd.convert(torch.nn.Linear(4, 2), vd.ARD())
    >>> vd.kl(net).item() > 0
    True
    """

    paper: ClassVar[Paper] = Paper(
        "kharitonov2018variational",
        "Variational Dropout via Empirical Bayes",
        "Kharitonov, Valery and Molchanov, Dmitry and Vetrov, Dmitry",
        2018,
        "1811.00596",
    )
    rule: RuleName | None = "magnitude"
    init_spread: float = 0.1

    def divergence(self, mean: Tensor, log_std: Tensor) -> Tensor:
        return F.ard_kl(mean, log_std)

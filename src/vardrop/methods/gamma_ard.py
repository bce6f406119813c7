"""ARD with a Gamma hyper-prior, whose shape sets how sparse the net becomes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from vardrop import functional as F
from vardrop.methods.additive import AdditiveMethod
from vardrop.methods.ard import ARD
from vardrop.methods.base import Paper, RuleName, check_range
from vardrop.noise import AdditiveNoise, Noise


@dataclass(frozen=True)
class GammaARD(AdditiveMethod):
    """ARD with a Gamma(a, b) hyper-prior on each precision: a larger `a` compresses more; dead at |mean| < 0.01.

    Below ``a = 1`` the objective rewards unbounded noise, so before each pass log std is put back under its
    ceiling.

    Args:
        a: shape of the Gamma prior, above 1/2.
        b: rate of the Gamma prior, above 0.
        max_log_std: ceiling of log std.

    Raises:
        InvalidValueError: a field is outside its range; the message names it.

    Source: arXiv:1811.00596, section 4 and appendix B.

    >>> vd.GammaARD(a=0.5)
    Traceback (most recent call last):
    vardrop.errors.InvalidValueError: GammaARD(a=0.5): must satisfy 0.5 < a < inf
    """

    paper: ClassVar[Paper] = ARD.paper
    rule: RuleName | None = "magnitude"
    init_spread: float = 0.1
    a: float = 0.51
    b: float = 1e-8
    max_log_std: float = -4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "a", above=0.5)
        check_range(self, "b", above=0.0)

    def divergence(self, mean: Tensor, log_std: Tensor) -> Tensor:
        return F.gamma_ard_kl(mean, log_std, self.a, self.b)

    def project(self, noise: Noise) -> None:
        with torch.no_grad():
            cast(AdditiveNoise, noise).log_std.data.clamp_(max=self.max_log_std)

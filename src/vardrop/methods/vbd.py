"""Variational Bayesian dropout on weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, cast, get_args

from torch import Tensor

from vardrop import functional as F
from vardrop.errors import InvalidValueError
from vardrop.methods.additive import AdditiveMethod
from vardrop.methods.base import Paper, RuleName, check_choice
from vardrop.noise import Layout, MultiplicativeNoise, Noise
from vardrop.noise.weight import Sharing


@dataclass(frozen=True)
class VBD(AdditiveMethod):
    """Variational Bayesian dropout: a hierarchical prior whose variance is fitted; dead at log alpha >= 3.

    With an alpha of its own for each weight (to compress) the posterior is additive and the objective is that of
    :class:`ARD`; with a shared alpha (to regularise) it is multiplicative, and alpha is not bounded.

    Args:
        alpha: ``"weight"`` to compress; ``"layer"``, ``"input"`` or ``"output"`` to regularise.
        init_log_alpha: first value of a shared log alpha.
        low: least prior variance, at least 0.
        high: greatest prior variance, above `low`.

    Raises:
        InvalidValueError: a field is outside its range; the message names it.

    Source: arXiv:1811.07533, equations 17 and 18.

    >>> net = vd.convert(torch.nn.Linear(4, 2), vd.VBD())
    >>> vd.kl(net).item() > 0
    True
    """

    paper: ClassVar[Paper] = Paper(
        "liu2019variational",
        "Variational Bayesian Dropout with a Hierarchical Prior",
        "Liu, Yuhang and Dong, Wenyong and Zhang, Lei and Gong, Dong and Shi, Qinfeng",
        2019,
        "1811.07533",
    )
    rule: RuleName | None = "log_alpha"
    alpha: Literal["weight", "layer", "input", "output"] = "weight"
    init_log_alpha: float = -3.0
    low: float = 0.0
    high: float = math.inf

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "alpha", get_args(Sharing))
        if not 0.0 <= self.low < self.high:
            raise InvalidValueError(f"VBD(low={self.low}, high={self.high}): must satisfy 0 <= low < high")
        if self.alpha != "weight" and self.train_clip:
            raise InvalidValueError(f'VBD(alpha={self.alpha!r}, train_clip=True): train_clip needs alpha="weight"')
        if self.alpha != "weight" and (self.low, self.high) != (0.0, math.inf):
            raise InvalidValueError(
                f"VBD(alpha={self.alpha!r}, low={self.low}, high={self.high}): bounds on the prior variance "
                'need alpha="weight"'
            )

    def divergence(self, mean: Tensor, log_std: Tensor) -> Tensor:
        return F.vbd_kl(mean, log_std, self.low, self.high)

    def noise(self, weight: Tensor, layout: Layout) -> Noise:
        if self.alpha == "weight":
            return super().noise(weight, layout)
        return MultiplicativeNoise(
            weight,
            layout,
            log_alpha=self.init_log_alpha,
            sharing=self.alpha,
            learned=True,
            sampling=self.sampling,
        )

    def kl(self, noise: Noise, weight: Tensor) -> Tensor:
        if self.alpha == "weight":
            return super().kl(noise, weight)
        shared = cast(MultiplicativeNoise, noise)
        each = F.ard_kl_from_log_alpha(shared.shared_log_alpha)
        return shared.masked(shared.spread(each, weight)).sum()

"""Dynamic network surgery."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from vardrop.errors import InvalidValueError
from vardrop.methods.base import Method, Paper, check_range
from vardrop.noise import Layout, Noise, SplicedWeights


@dataclass(frozen=True)
class DynamicNetworkSurgery(Method):
    """Dynamic network surgery: weights below one threshold die, above a second one they come back, as training goes.

    For trained nets: with ``t = mean|w| + c std|w|`` of the layer at its conversion, a weight is dead below
    ``a = (1 - margin) t``, alive from ``b = (1 + margin) t`` on, and stays as it was between. All weights get the
    gradient of the pruned net, the dead ones too. The masks change at training step ``i`` with probability
    ``(1 + gamma i)^(-power)``.
    A threshold given to :func:`vardrop.prune` is a factor on both thresholds.

    Args:
        c: sets the sparsity; the larger, the fewer weights live.
        margin: half the relative width of the band between the thresholds, in [0, 1).
        gamma: how fast the changes of the masks become rare, at least 0.
        power: the exponent of that, at least 0.

    Raises:
        InvalidValueError: a field is outside its range; the message names it.

    Source: arXiv:1608.04493, equations 3 and 4 and section 3.3; the numbers are choices of this library.

    >>> net = vd.convert(torch.nn.Linear(10, 2), vd.DynamicNetworkSurgery(c=0.0))
    >>> 0 < vd.prune(net).alive < 20
    True
    """

    paper: ClassVar[Paper] = Paper(
        "guo2016dynamic",
        "Dynamic Network Surgery for Efficient DNNs",
        "Guo, Yiwen and Yao, Anbang and Chen, Yurong",
        2016,
        "1608.04493",
    )
    c: float = 1.0
    margin: float = 0.1
    gamma: float = 1e-4
    power: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.c):
            raise InvalidValueError(f"DynamicNetworkSurgery(c={self.c}): must be a finite number")
        check_range(self, "margin", above=0.0, below=1.0, closed=True, closed_below=False)
        check_range(self, "gamma", above=0.0, closed=True)
        check_range(self, "power", above=0.0, closed=True)

    def noise(self, weight: Tensor, layout: Layout) -> Noise:
        size = weight.detach().abs()
        middle = (size.mean() + self.c * size.std(correction=0)).clamp_min(torch.finfo(size.dtype).tiny)
        mask = torch.ones_like(weight, dtype=torch.bool)
        return SplicedWeights(mask, (1.0 - self.margin) * middle, (1.0 + self.margin) * middle)

    def step(self, noise: Noise, weight: Tensor, epoch: int) -> None:
        spliced = cast(SplicedWeights, noise)
        chance = (1.0 + self.gamma * int(spliced.steps)) ** -self.power
        spliced.steps += 1
        if torch.rand((), generator=noise.generator, device=weight.device) < chance:
            mask = self.score(noise, weight) >= 1.0
            if mask.any():
                noise.mask = mask

    def score(self, noise: Noise, weight: Tensor) -> Tensor:
        """The size of each weight over the threshold that it has to reach: `a` for the living, `b` for the dead."""
        spliced = cast(SplicedWeights, noise)
        size = weight.detach().double().abs()
        low, high = spliced.low.double(), spliced.high.double()
        return size / low if noise.mask is None else size / torch.where(noise.mask, low, high)

    def cutoff(self, threshold: float | None = None) -> float:
        value = 1.0 if threshold is None else threshold
        if not 0.0 < value < math.inf:
            raise InvalidValueError(f"threshold={value}: must be a finite factor on the thresholds, above 0")
        return value

"""Noise on the units that flow into a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from vardrop.lrt import Operation, source
from vardrop.noise.base import Noise


class BernoulliNoise(Noise):
    """Each input is dropped with probability `rate`, the others are scaled by ``1 / (1 - rate)``.

    Args:
        rate: probability of dropping.
        in_axis: the axis of the weight that counts inputs; a whole weight is drawn with some of them at zero.
    """

    def __init__(self, rate: float, *, in_axis: int = 1) -> None:
        super().__init__()
        self.rate = rate
        self.in_axis = in_axis

    @property
    def drawn(self) -> bool:
        """Whether inputs can go at all: at a rate of 0 no draw is made."""
        return self.active and self.rate > 0.0

    def forward(self, operation: Operation, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.drawn:
            examples = x.shape[0] if x.dim() >= weight.dim() else 1
            x = x * (self.kept(x.shape, x, examples).to(x.dtype) / (1.0 - self.rate))
        return operation(x, self.masked(weight), bias)

    def sample_weight(self, weight: Tensor) -> Tensor:
        weight = self.masked(weight)
        if not self.drawn:
            return weight
        shape = torch.Size(size if axis == self.in_axis else 1 for axis, size in enumerate(weight.shape))
        return weight * (self.kept(shape, weight, 1).to(weight.dtype) / (1.0 - self.rate))

    def kept(self, shape: torch.Size, like: Tensor, examples: int) -> Tensor:
        """Which inputs are kept, of this `shape`, where `like` lies; so many `examples` lie in it one after another."""
        return torch.rand(shape, device=like.device, **source(self.generator)) >= self.rate


class AdversarialNoise(BernoulliNoise):
    """Bernoulli noise that keeps what it drew in a first pass, and in a second one draws the worst near it.

    Args:
        budget: share of the inputs of an example that may differ between the passes, in [0, 1].
        weight: factor on the loss of the second pass.
    """

    def __init__(self, rate: float, *, in_axis: int, budget: float, weight: float) -> None:
        super().__init__(rate, in_axis=in_axis)
        self.budget, self.weight = budget, weight
        self.first: list[Tensor] | None = None
        self.second: list[Tensor] = []
        self._examples: list[int] = []

    @property
    def drawn(self) -> bool:
        """Whether noise is on: the second pass drops inputs even where the first one's rate is 0."""
        return self.active

    def kept(self, shape: torch.Size, like: Tensor, examples: int) -> Tensor:
        if self.second:
            return self.second.pop(0)
        drawn = super().kept(shape, like, examples)
        if self.first is None:
            return drawn
        self.first.append(drawn.to(like.dtype).requires_grad_())
        self._examples.append(examples)
        return self.first[-1]

    def begin(self) -> None:
        """From now on what is drawn is kept, in ``first``."""
        self.first, self.second, self._examples = [], [], []

    def turn(self, gradients: list[Tensor]) -> None:
        """The next draws are those of the first pass but for the inputs whose change raises the loss the most.

        `gradients` are those of the loss in ``first``, which is forgotten.
        """
        drawn, self.first = self.first or [], None
        triples = zip(drawn, gradients, self._examples, strict=True)
        self.second = [worst_near(mask.detach(), gradient, self.budget, rows) for mask, gradient, rows in triples]


def worst_near(mask: Tensor, gradient: Tensor, budget: float, examples: int) -> Tensor:
    """The `mask` of zeros and ones, changed where a loss with this `gradient` in it rises the most.

    In each of the `examples` no more than the share `budget` of the entries changes, rounded down, and none that
    would lower the loss to first order (arXiv:1707.03631, algorithm 1).
    """
    gain = (gradient * (1.0 - 2.0 * mask)).reshape(examples, -1)
    best = gain.topk(int(budget * gain.shape[1]), dim=1, sorted=False)
    rows = mask.reshape(examples, -1)
    now = rows.gather(1, best.indices)
    return rows.scatter(1, best.indices, torch.where(best.values > 0, 1.0 - now, now)).view_as(mask)

"""Noise on the units that flow into a layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from vardrop import fused
from vardrop.errors import TrainingError
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
            x = self.thinned(x, x.shape, x.shape[0] if x.dim() >= weight.dim() else 1)
        return operation(x, self.masked(weight), bias)

    def sample_weight(self, weight: Tensor) -> Tensor:
        weight = self.masked(weight)
        if not self.drawn:
            return weight
        shape = torch.Size(size if axis == self.in_axis else 1 for axis, size in enumerate(weight.shape))
        return self.thinned(weight, shape, 1)

    def factors_of_sequences(self, sequences: int, weight: Tensor) -> Tensor | None:
        return self.factors(torch.Size((sequences, weight.shape[1])), weight) if self.drawn else None

    def thinned(self, value: Tensor, shape: torch.Size, examples: int) -> Tensor:
        """`value` with inputs dropped; they are counted by `shape`, so many `examples` one after another."""
        return value * self.factors(shape, value)

    def factors(self, shape: torch.Size, like: Tensor) -> Tensor:
        """What inputs of this `shape` are multiplied with: 0, or ``1 / (1 - rate)``; in the dtype of `like`."""
        if self.compiled and shape == like.shape and fused.is_worth_drawing(like.numel()):
            return fused.dropout_factors(like, self.rate, self.generator)
        kept = torch.rand(shape, device=like.device, **source(self.generator)) >= self.rate
        return kept.to(like.dtype) * (1.0 / (1.0 - self.rate))


@dataclass(frozen=True)
class FirstPass:
    """What a first pass did to the inputs of a layer: `product` is `value` times `factors`.

    `version` is that of `value`, and so many `examples` lie in it one after another.
    """

    value: Tensor
    version: int
    factors: Tensor
    product: Tensor
    examples: int


class AdversarialNoise(BernoulliNoise):
    """Bernoulli noise that keeps what it drew in a first pass, and in a second one draws the worst near it.

    Args:
        budget: share of the inputs of an example that may differ between the passes, in [0, 1].
        weight: factor on the loss of the second pass.
    """

    def __init__(self, rate: float, *, in_axis: int, budget: float, weight: float) -> None:
        super().__init__(rate, in_axis=in_axis)
        self.budget, self.weight = budget, weight
        self.first: list[FirstPass] | None = None
        self.second: list[Tensor] = []

    @property
    def drawn(self) -> bool:
        """Whether noise is on: the second pass drops inputs even where the first one's rate is 0."""
        return self.active

    def thinned(self, value: Tensor, shape: torch.Size, examples: int) -> Tensor:
        if self.second:
            return value * self.second.pop(0)
        factors = self.factors(shape, value)
        return value * factors if self.first is None else self._recorded(value, factors, examples)

    def _recorded(self, value: Tensor, factors: Tensor, examples: int) -> Tensor:
        """The product, kept in ``first``; a compiled graph would hand out one that the loss does not depend on."""
        product = value * factors
        if not product.requires_grad:
            product.requires_grad_()
        assert self.first is not None
        self.first.append(FirstPass(value.detach(), value._version, factors, product, examples))
        return product

    def factors_of_sequences(self, sequences: int, weight: Tensor) -> Tensor | None:
        return None  # the worst mask is found for the whole minibatch

    def begin(self) -> None:
        """From now on what is drawn is kept, in ``first``."""
        _stay_uncompiled()
        self.first, self.second = [], []

    def turn(self, gradients: list[Tensor]) -> None:
        """The next draws are those of the first pass but for the inputs whose change raises the loss the most.

        `gradients` are those of the loss in the products of ``first``, which is forgotten.

        Raises:
            TrainingError: inputs were changed in place since.
        """
        passes, self.first = self.first or [], None
        for done, gradient in zip(passes, gradients, strict=True):
            if done.value._version != done.version:
                raise TrainingError(
                    "the inputs of a layer with adversarial dropout were changed in place after its pass"
                )
            slope = (gradient * done.value).sum_to_size(done.factors.shape)
            self.second.append(worst_near(done.factors, slope, self.budget, done.examples, on=1.0 / (1.0 - self.rate)))


@cache
def _stay_uncompiled() -> None:
    """Not a decorator: that would load torch's compiler, which takes a second, with this package."""
    recorded = torch.compiler.disable(AdversarialNoise._recorded)
    AdversarialNoise._recorded = recorded  # type: ignore[method-assign]


def worst_near(factors: Tensor, gradient: Tensor, budget: float, examples: int, *, on: float = 1.0) -> Tensor:
    """The `factors`, 0 or `on`, changed where a loss with this `gradient` in them rises the most.

    In each of the `examples` no more than the share `budget` of the entries changes, rounded down, and none that
    would lower the loss to first order (arXiv:1707.03631, algorithm 1).
    """
    if not factors.numel():
        return factors
    gain = torch.where(factors == 0.0, gradient, -gradient).reshape(examples, -1)
    best = gain.topk(math.floor(budget * gain.shape[1] + 1e-9), dim=1, sorted=False)
    rows = factors.reshape(examples, -1)
    now = rows.gather(1, best.indices)
    turned = torch.where(now == 0.0, on, 0.0).to(now.dtype)
    return rows.scatter(1, best.indices, torch.where(best.values > 0, turned, now)).view_as(factors)

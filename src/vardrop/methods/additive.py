"""The shared half of every method with the additive posterior ``w = mean + std * eps``, one std per weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

from torch import Tensor

from vardrop.errors import InvalidValueError
from vardrop.methods.base import WeightMethod, check_range
from vardrop.noise import AdditiveNoise, Layout, Noise


@dataclass(frozen=True)
class AdditiveMethod(WeightMethod):
    """A Gaussian posterior per weight; a subclass says what it costs.

    Args:
        init_log_std: first value of log std.
        init_spread: standard deviation of the first values around it.
        train_clip: leave the means of weights that are dead by log alpha out of the noisy pass, their noise stays;
            the authors of sparse VD did so on MNIST (in convolutions the noise went too), and it is what makes their
            nets so sparse. In eval mode those means are there until :func:`vardrop.prune`: prune before you evaluate.
    """

    kl_is_short: ClassVar[bool] = True
    init_log_std: float = -5.0
    init_spread: float = 0.0
    train_clip: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "init_spread", above=0.0, closed=True)
        if self.train_clip and self.rule != "log_alpha":
            raise InvalidValueError(
                f"{type(self).__name__}(train_clip=True, rule={self.rule!r}): needs rule='log_alpha'"
            )

    def divergence(self, mean: Tensor, log_std: Tensor) -> Tensor:
        """KL to the prior of each weight, nats, elementwise."""
        raise NotImplementedError(f"{type(self).__name__} must say its divergence")

    def noise(self, weight: Tensor, layout: Layout) -> Noise:
        return AdditiveNoise(
            weight,
            self.init_log_std,
            init_spread=self.init_spread,
            sampling=self.sampling,
            clip_log_alpha=-self.cutoff() if self.train_clip else None,
        )

    def kl(self, noise: Noise, weight: Tensor) -> Tensor:
        additive = cast(AdditiveNoise, noise)
        price = additive.take_price(weight)
        return noise.masked(self.divergence(weight, additive.log_std)).sum() if price is None else price

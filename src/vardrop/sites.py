"""The one walk over a model: where its noise sits. KL, pruning, summaries and storage all use it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

from torch import Tensor, nn

from vardrop.methods.base import Method
from vardrop.noise import Noise, noises_of


class Site(NamedTuple):
    """One noisy weight of a converted model, its layer, its noise, and the method that made the noise.

    `name` is that of the layer, and where `parameter` is not simply ``weight``, that too: ``lstm.weight_hh_l0``.
    """

    name: str
    layer: nn.Module
    noise: Noise
    method: Method
    parameter: str = "weight"

    @property
    def weight(self) -> Tensor:
        """The noisy weight: the posterior mean."""
        return cast(Tensor, getattr(self.layer, self.parameter))


def sites(model: nn.Module) -> Iterator[Site]:
    """The noisy weights of `model` in order, each noise once, with its parameters in their domain.

    >>> net = vd.convert(torch.nn.Sequential(torch.nn.Linear(4, 2)), vd.ARD())
    >>> [site.name for site in vd.sites(net)]
    ['0']
    """
    seen: set[Noise] = set()
    for name, layer in model.named_modules():
        for parameter, noise in noises_of(layer).items():
            if noise in seen:
                continue
            seen.add(noise)
            method = cast(Method, noise.method)
            method.project(noise)
            full = name if parameter == "weight" else f"{name}.{parameter}".lstrip(".")
            yield Site(full, layer, noise, method, parameter)

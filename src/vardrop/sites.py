"""The one walk over a model: where its noise sits. KL, pruning, summaries and storage all use it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

from torch import Tensor, nn

from vardrop.methods.base import Method
from vardrop.noise import Noise


class Site(NamedTuple):
    """A layer of a converted model, its noise, and the method that made the noise."""

    name: str
    layer: nn.Module
    noise: Noise
    method: Method

    @property
    def weight(self) -> Tensor:
        """The layer's weight: the posterior mean."""
        return cast(Tensor, self.layer.weight)


def sites(model: nn.Module) -> Iterator[Site]:
    """The noisy layers of `model` in order, each noise once, with its parameters in their domain.

    >>> net = vd.convert(torch.nn.Sequential(torch.nn.Linear(4, 2)), vd.ARD())
    >>> [site.name for site in vd.sites(net)]
    ['0']
    """
    seen: set[Noise] = set()
    for name, layer in model.named_modules():
        noise = layer._modules.get("noise")
        if isinstance(noise, Noise) and noise not in seen:
            seen.add(noise)
            method = cast(Method, noise.method)
            method.project(noise)
            yield Site(name, layer, noise, method)

"""Where a net keeps what it knows: in the means of its weights, or in their spreads."""

from __future__ import annotations

from copy import deepcopy
from typing import Literal

import torch
from torch import nn

from vardrop.errors import InvalidValueError
from vardrop.methods import VarianceNetwork
from vardrop.noise import AdditiveNoise, Noise
from vardrop.noise.weight import WeightNoise
from vardrop.sites import Site, sites


def ablate(
    model: nn.Module, site: str, part: Literal["means", "spreads"], *, generator: torch.Generator | None = None
) -> nn.Module:
    """A copy of `model` in which one noisy weight has lost its means, or the places of its standard deviations.

    A net that predicts as well without the means of a layer keeps nothing in them; one that fails when the standard
    deviations of a layer change places keeps what it knows there. The rest of the posterior stays: without its means a
    weight keeps its variances, and the other way round, whatever the parameterisation.

    Args:
        model: a converted model with Gaussian noise at `site`.
        site: a name that :func:`vardrop.sites` gives.
        part: ``"means"`` sets the means to zero; ``"spreads"`` permutes the standard deviations of the living weights.
        generator: source of the permutation.

    Raises:
        InvalidValueError: there is no such site or part, or the noise of the site is not Gaussian on weights.

    Source: arXiv:1803.03764.

    >>> net = vd.convert(torch.nn.Linear(4, 2, bias=False), vd.ARD())
    >>> vd.ablate(net.eval(), "", "means")(torch.ones(1, 4))
    tensor([[0., 0.]], grad_fn=<MmBackward0>)
    """
    if part not in ("means", "spreads"):
        raise InvalidValueError(f"part={part!r}: must be 'means' or 'spreads'")
    copy = deepcopy(model)
    found = {each.name: each for each in sites(copy)}
    known = ", ".join(repr(name) for name, each in found.items() if isinstance(each.noise, WeightNoise))
    if site not in found or not isinstance(found[site].noise, WeightNoise):
        raise InvalidValueError(f"site={site!r}: must be one with Gaussian noise on weights; the model has: {known}")
    noise = _with_free_moments(copy, found[site])
    with torch.no_grad():
        if part == "means":
            found[site].weight.zero_()
        else:
            living = noise.log_std.new_ones(noise.log_std.shape, dtype=torch.bool) if noise.mask is None else noise.mask
            spreads = noise.log_std[living]
            device = "cpu" if generator is None else generator.device
            order = torch.randperm(len(spreads), generator=generator, device=device)
            noise.log_std[living] = spreads[order.to(spreads.device)]
    return copy


@torch.no_grad()
def _with_free_moments(model: nn.Module, site: Site) -> AdditiveNoise:
    """The noise of `site` in `model`, made one whose means and standard deviations do not hang together."""
    old, weight = site.noise, site.weight
    if isinstance(old, AdditiveNoise):
        return old
    assert isinstance(old, WeightNoise)
    noise = AdditiveNoise(weight, 0.0, sampling=old.sampling)
    noise.log_std.copy_(0.5 * old.variance(weight).log())
    weight.copy_(old.mean(weight))
    noise.mask, noise.on, noise.generator = old.mask, old.on, old.generator
    noise.method = VarianceNetwork(parameterisation="additive", sampling=old.sampling)
    _replace(model, old, noise.train(old.training))
    return noise


def _replace(model: nn.Module, old: Noise, new: Noise) -> None:
    for holder in model.modules():
        for name, module in holder._modules.items():
            if module is old:
                holder._modules[name] = new

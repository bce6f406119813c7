"""Marking what is dead, and taking the marks off again."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vardrop.errors import ConversionError, EmptyLayerWarning, InvalidValueError
from vardrop.sites import Site, sites


@dataclass(frozen=True)
class LayerCount:
    """Live and total weights of one layer."""

    alive: int
    total: int


@dataclass(frozen=True)
class Pruned:
    """What :func:`prune` left alive, layer by layer."""

    layers: dict[str, LayerCount]

    @property
    def alive(self) -> int:
        """Live weights in all layers."""
        return sum(count.alive for count in self.layers.values())

    @property
    def total(self) -> int:
        """Weights in all layers."""
        return sum(count.total for count in self.layers.values())

    @property
    def compression(self) -> float:
        """``|W| / |W != 0|`` over the weights of the converted layers, biases not counted (arXiv:1811.00596).

        One for a model without converted layers.
        """
        return self.total / self.alive if self.alive else 1.0

    def __str__(self) -> str:
        rows = [f"{name}: {count.alive} of {count.total} weights" for name, count in self.layers.items()]
        return "\n".join([*rows, f"compression {self.compression:.1f}x"])


def prune(
    model: nn.Module,
    threshold: float | None = None,
    *,
    on_empty: Literal["keep-best", "refuse"] = "keep-best",
) -> Pruned:
    """Marks the dead weights of `model` in place by each method's own rule; :func:`unprune` takes it back.

    Args:
        model: a converted model.
        threshold: in place of each method's own, in the units of its rule.
        on_empty: what to do with a layer whose last weight would die: keep its best one and warn, or refuse.

    Returns:
        Live and total weights per layer.

    Raises:
        ConversionError: the model is not converted.
        InvalidValueError: a threshold is given but no method of the model has a rule; a parameter is not finite; a
            layer would be emptied and `on_empty` is ``"refuse"``.

    >>> net = vd.convert(torch.nn.Linear(8, 4), vd.ARD())
    >>> vd.prune(net, threshold=0.0).compression
    1.0
    """
    if on_empty not in ("keep-best", "refuse"):
        raise InvalidValueError(f"on_empty={on_empty!r}: must be 'keep-best' or 'refuse'")
    masks = {site: _mask(site, threshold, on_empty) for site in _converted(model)}
    if threshold is not None and all(mask is None for mask in masks.values()):
        names = sorted({type(site.method).__name__ for site in masks})
        raise InvalidValueError(f"threshold={threshold}: {', '.join(names)} has no pruning rule")
    for site, mask in masks.items():
        site.noise.mask = mask
    return count_alive(model)


def unprune(model: nn.Module) -> nn.Module:
    """Takes all marks off `model` in place, so that every weight is alive again, and returns it.

    >>> net = vd.convert(torch.nn.Linear(8, 4), vd.ARD())
    >>> _ = vd.prune(net, threshold=0.1)
    >>> vd.summary(vd.unprune(net)).rows[0].alive
    32
    """
    for site in _converted(model):
        site.noise.mask = None
    return model


def count_alive(model: nn.Module) -> Pruned:
    """Live and total weights of each layer of a converted `model`, as marked at present."""
    return Pruned(
        {
            site.name: LayerCount(
                site.weight.numel() if site.noise.mask is None else int(site.noise.mask.sum()),
                site.weight.numel(),
            )
            for site in sites(model)
        }
    )


def would_live(model: nn.Module) -> Pruned:
    """Like :func:`prune` by each method's own rule, but only counts: nothing is marked."""
    counts = {}
    for site in sites(model):
        scores = site.method.score(site.noise, site.weight)
        total = site.weight.numel()
        alive = total if scores is None else max(1, int((scores >= site.method.cutoff()).sum()))
        counts[site.name] = LayerCount(alive, total)
    return Pruned(counts)


def _mask(site: Site, threshold: float | None, on_empty: str) -> Tensor | None:
    scores = site.method.score(site.noise, site.weight)
    if scores is None:
        return None
    if torch.isnan(scores).any() or not torch.isfinite(site.weight).all():
        raise InvalidValueError(f"layer {site.name!r}: its weights or noise are not finite, so no rule can judge them")
    mask = scores >= site.method.cutoff(threshold)
    if not mask.any():
        message = f"layer {site.name!r}: all {mask.numel()} weights are dead by the rule of {site.method}"
        if on_empty == "refuse":
            raise InvalidValueError(f"{message}; lower the bar, or pass on_empty='keep-best'")
        warnings.warn(f"{message}; the best one is kept", EmptyLayerWarning, stacklevel=3)
        mask.view(-1)[scores.argmax()] = True
    return mask


def _converted(model: nn.Module) -> list[Site]:
    found = list(sites(model))
    if not found:
        raise ConversionError("the model has no noisy layer: call vardrop.convert(model, method) first")
    return found

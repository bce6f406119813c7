"""Marking what is dead, and taking the marks off again."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from vardrop.errors import EmptyLayerWarning, InvalidValueError
from vardrop.sites import Site, sites, sites_of_converted


@dataclass(frozen=True)
class LayerCount:
    """What lives and what there was in one noisy place: weights, or the units of a gate."""

    alive: int
    total: int
    counts: Literal["weights", "units"] = "weights"


@dataclass(frozen=True)
class Pruned:
    """What :func:`prune` left alive.

    Attributes:
        layers: weights or units, by the name of each site.
        alive: weights of the converted layers that live and neither read nor make a dead unit of a gate there.
        total: weights of the converted layers.
    """

    layers: dict[str, LayerCount]
    alive: int
    total: int

    @property
    def compression(self) -> float:
        """``|W| / |W != 0|`` over the weights of the converted layers, biases not counted (arXiv:1811.00596).

        Infinite where all are dead, one for a model without converted layers.
        """
        if not self.alive:
            return math.inf if self.total else 1.0
        return self.total / self.alive

    @property
    def units(self) -> str:
        """The living units of all gates in order, such as ``"294-110-71"``; empty without gates."""
        return "-".join(str(count.alive) for count in self.layers.values() if count.counts == "units")

    def against(self, whole: Pruned) -> Pruned:
        """The same living weights and units, counted against the totals of the net before it was shrunk."""
        layers = {name: replace(count, total=whole.layers[name].total) for name, count in self.layers.items()}
        return Pruned(layers, self.alive, whole.total)

    def __str__(self) -> str:
        rows = [f"{name}: {count.alive} of {count.total} {count.counts}" for name, count in self.layers.items()]
        rows += [f"units {self.units}"] if self.units else []
        return "\n".join([*rows, f"compression {self.compression:.1f}x"])


def prune(
    model: nn.Module,
    threshold: float | None = None,
    *,
    on_empty: Literal["keep-best", "refuse"] = "keep-best",
) -> Pruned:
    """Marks the dead weights and units of `model` in place by each method's own rule; :func:`unprune` takes it back.

    Args:
        model: a converted model.
        threshold: in place of each method's own, in the units of its rule; where methods with other rules meet in one
            model, give each its own when it is made, as in ``vd.SparseVD(threshold=2.5)``.
        on_empty: what to do with a layer whose last weight or unit would die: keep its best one and warn, or refuse.

    Returns:
        Live and total weights, and units of gates, per layer.

    Raises:
        ConversionError: the model is not converted.
        InvalidValueError: a threshold is no number, or no method of the model has a rule for it; a parameter is not
            finite; a layer would be emptied and `on_empty` is ``"refuse"``.

    >>> net = vd.convert(torch.nn.Linear(8, 4), vd.ARD())
    >>> vd.prune(net, threshold=0.0).compression
    1.0
    """
    if on_empty not in ("keep-best", "refuse"):
        raise InvalidValueError(f"on_empty={on_empty!r}: must be 'keep-best' or 'refuse'")
    if isinstance(threshold, bool) or not isinstance(threshold, int | float | None):
        raise InvalidValueError(f"threshold={threshold!r}: must be a number")
    masks = {site: _mask(site, threshold, on_empty) for site in sites_of_converted(model)}
    for name in _spare_the_last(masks):
        _complain(f"layer {name!r}: noise and gate leave no weight together", on_empty)
    if threshold is not None and all(mask is None for mask in masks.values()):
        names = sorted({type(site.method).__name__ for site in masks})
        raise InvalidValueError(f"threshold={threshold}: {', '.join(names)} has no pruning rule")
    for site, mask in masks.items():
        site.noise.mask = mask
    return count_alive(model)


def unprune(model: nn.Module) -> nn.Module:
    """Takes all marks off `model` in place, so that every weight is alive again, and returns it.

    Raises:
        ConversionError: the model is not converted.

    >>> net = vd.convert(torch.nn.Linear(8, 4), vd.ARD())
    >>> _ = vd.prune(net, threshold=0.1)
    >>> vd.summary(vd.unprune(net)).rows[0].alive
    32
    """
    for site in sites_of_converted(model):
        site.noise.mask = None
    return model


def count_alive(model: nn.Module) -> Pruned:
    """What lives in a converted `model`, as marked at present."""
    return _count({site: site.noise.mask for site in sites(model)})


def would_live(model: nn.Module) -> Pruned:
    """Like :func:`prune` by each method's own rule, but only counts: nothing is marked.

    Of a method that marks while it trains, what is marked by now counts.
    """
    masks: dict[Site, Tensor | None] = {}
    for site in sites(model):
        if site.noise.mask is not None and site.method.steps:
            masks[site] = site.noise.mask
            continue
        scores = site.method.score(site.noise, site.weight)
        masks[site] = None if scores is None else _living(scores, site.method.cutoff())
    _spare_the_last(masks)
    return _count(masks)


def _count(masks: Mapping[Site, Tensor | None]) -> Pruned:
    found: dict[str, LayerCount] = {}
    weights: dict[Tensor, Tensor] = {}
    for site, mask in masks.items():
        total = site.noise.mask_shape(site.weight).numel()
        found[site.name] = LayerCount(total if mask is None else int(mask.sum()), total, site.counts)
        living = weights.setdefault(site.weight, torch.ones_like(site.weight, dtype=torch.bool))
        if mask is not None:
            living &= site.noise.on_weights(mask, site.weight)
    return Pruned(
        found,
        alive=sum(int(living.sum()) for living in weights.values()),
        total=sum(living.numel() for living in weights.values()),
    )


def _mask(site: Site, threshold: float | None, on_empty: str) -> Tensor | None:
    scores = site.method.score(site.noise, site.weight)
    if scores is None:
        return None
    noise_is_nan = any(torch.isnan(parameter).any() for parameter in site.noise.parameters())
    if noise_is_nan or torch.isnan(scores).any() or not torch.isfinite(site.weight).all():
        raise InvalidValueError(f"layer {site.name!r}: its weights or noise are not finite, so no rule can judge them")
    cutoff = site.method.cutoff(threshold)
    if scores.numel() and not (scores >= cutoff).any():
        dead = f"all {scores.numel()} {site.counts} are dead by the rule of {type(site.method).__name__}"
        _complain(f"layer {site.name!r}: {dead}", on_empty)
    return _living(scores, cutoff)


def _living(scores: Tensor, cutoff: float) -> Tensor:
    """What reaches the cutoff; the best one where nothing does."""
    mask = scores >= cutoff
    if not mask.any():
        _revive_best(mask, scores)
    return mask


def _revive_best(mask: Tensor, scores: Tensor) -> None:
    """Marks the element of the highest score as alive, if there is any element."""
    if scores.numel():
        mask[torch.unravel_index(scores.argmax(), mask.shape)] = True


def _spare_the_last(masks: Mapping[Site, Tensor | None]) -> list[str]:
    """Where noise and gate of a layer leave no weight together, the best one of a living unit is marked alive.

    Returns the names of these layers.
    """
    gates = {site.weight: site for site in masks if site.counts == "units"}
    spared = []
    for site, mask in masks.items():
        gate = gates.get(site.weight, site)
        units = masks[gate]
        scores = site.method.score(site.noise, site.weight)
        if gate is site or mask is None or units is None or scores is None:
            continue
        open_ = gate.noise.on_weights(units, site.weight)
        if not (mask & open_).any():
            _revive_best(mask, scores.masked_fill(~open_, -math.inf))
            spared.append(site.name)
    return spared


def _complain(message: str, on_empty: str) -> None:
    if on_empty == "refuse":
        raise InvalidValueError(f"{message}; lower the bar, or pass on_empty='keep-best'")
    warnings.warn(
        f"{message}; the best one is kept (a longer warm-up of the KL, more epochs or a trained start leave more)",
        EmptyLayerWarning,
        stacklevel=4,
    )

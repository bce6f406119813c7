"""The one walk over a model: where its noise sits. KL, pruning, summaries and storage all use it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, cast

from torch import Tensor, nn

from vardrop.errors import InvalidValueError
from vardrop.methods.base import Method
from vardrop.noise import Gate, Noise

SLOTS = ("noise", "gate")


class Site(NamedTuple):
    """A place of a converted model that is noisy: the weights of a layer, or the units that a gate multiplies.

    Attributes:
        name: that of the layer; for a gate its own, such as ``"0.gate"``.
        layer: the layer.
        noise: the noise on its weights, or the gate.
        method: the method that made the noise.
    """

    name: str
    layer: nn.Module
    noise: Noise
    method: Method

    @property
    def weight(self) -> Tensor:
        """The layer's weight: the posterior mean."""
        return cast(Tensor, self.layer.weight)

    @property
    def counts(self) -> Literal["weights", "units"]:
        """What lives and dies here."""
        return "units" if isinstance(self.noise, Gate) else "weights"


def sites(model: nn.Module) -> Iterator[Site]:
    """The noisy places of `model` in order, each noise once, with its parameters in their domain.

    A layer with noise on its weights and a gate on its units gives two.

    >>> net = vd.convert(torch.nn.Sequential(torch.nn.Linear(4, 2)), (vd.BetaBernoulli(), vd.ARD()))
    >>> [site.name for site in vd.sites(net)]
    ['0', '0.gate']
    """
    seen: set[Noise] = set()
    for name, layer in model.named_modules():
        for slot, noise in noises(layer).items():
            if noise not in seen:
                seen.add(noise)
                method = cast(Method, noise.method)
                method.project(noise)
                yield Site(name if slot == "noise" else f"{name}.{slot}".lstrip("."), layer, noise, method)


def noises(layer: nn.Module) -> dict[str, Noise]:
    """The noise and the gate that hang on `layer`, as far as it has them; the noise acts first."""
    found = {slot: layer._modules.get(slot) for slot in SLOTS}
    return {slot: noise for slot, noise in found.items() if isinstance(noise, Noise)}


def folded(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the plain layer that computes what the noisy `layer` computes in a quiet pass."""
    weight, bias = cast(Tensor, layer.weight), cast(Tensor | None, layer.bias)
    for noise in noises(layer).values():
        weight, bias = noise.folded(weight, bias)
    return weight, bias


def parameter_groups(model: nn.Module, *, lr: float = 1e-3, gate_lr: float = 1e-2) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser: all trainable parameters of `model`, its gates at their own learning rate.

    An optimiser's weight decay acts on the model's own parameters and leaves out those of noise, which pay their KL.

    Args:
        model: a converted model, or a plain one, which has no gates.
        lr: learning rate of everything but gates.
        gate_lr: learning rate of gates.

    Returns:
        Up to three groups, each ``{"params": [...], "lr": ...}``, those of noise with ``"weight_decay": 0.0``: the
        model's own parameters, the noise on weights, the gates. Every trainable parameter is in one of them once.

    Raises:
        InvalidValueError: a learning rate is not a finite number, at least 0.

    Source: arXiv:1805.10896, section 5, where the weights learn at a tenth of the gates' rate.

    >>> net = vd.convert(torch.nn.Linear(8, 4), vd.BetaBernoulli())
    >>> [len(group["params"]) for group in vd.parameter_groups(net)]
    [2, 2]
    """
    for name, rate in (("lr", lr), ("gate_lr", gate_lr)):
        if not 0.0 <= rate < math.inf:
            raise InvalidValueError(f"{name}={rate}: must be a finite number, at least 0")
    counted = {parameter: site.counts for site in sites(model) for parameter in site.noise.parameters()}
    members: dict[str, list[nn.Parameter]] = {"own": [], "weights": [], "units": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            members[counted.get(parameter, "own")].append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": members["own"], "lr": lr},
        {"params": members["weights"], "lr": lr, "weight_decay": 0.0},
        {"params": members["units"], "lr": gate_lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]

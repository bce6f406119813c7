"""The one walk over a model: where its noise sits. KL, pruning, summaries and storage all use it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, Literal, NamedTuple, cast

from torch import Tensor, nn

from vardrop.errors import ConversionError, InvalidValueError
from vardrop.methods.base import Method
from vardrop.noise import Gate, Noise, child, noises_of
from vardrop.refusals import check_model

SLOTS = ("noise", "gate")


class Held(NamedTuple):
    """One noise of a layer: the submodule it is, such as ``"noise.weight_hh_l0"``, and the parameter it acts on."""

    slot: str
    parameter: str
    noise: Noise


class Site(NamedTuple):
    """A noisy place of a converted model: a weight of a layer, or the units that a gate multiplies.

    Attributes:
        name: that of the layer, followed by that of the weight where it is not simply ``weight``, such as
            ``"lstm.weight_hh_l0"``; for a gate its own, such as ``"0.gate"``.
        layer: the layer.
        noise: the noise on the weight, or the gate.
        method: the method that made the noise.
        parameter: the name of the weight in its layer.
    """

    name: str
    layer: nn.Module
    noise: Noise
    method: Method
    parameter: str = "weight"

    @property
    def weight(self) -> Tensor:
        """The noisy weight: the posterior mean."""
        return tensor_of(self.layer, self.parameter)

    @property
    def counts(self) -> Literal["weights", "units"]:
        """What lives and dies here."""
        return "units" if isinstance(self.noise, Gate) else "weights"


def sites(model: nn.Module) -> Iterator[Site]:
    """The noisy places of `model` in order, each noise once, with its parameters in their domain.

    A layer with noise on its weights and a gate on its units gives two.

    Raises:
        InvalidValueError: `model` is no module.

    >>> net = vd.convert(torch.nn.Sequential(torch.nn.Linear(4, 2)), (vd.BetaBernoulli(), vd.ARD()))
    >>> [site.name for site in vd.sites(net)]
    ['0', '0.gate']
    """
    check_model(model)
    seen: set[Noise] = set()
    for name, layer in model.named_modules():
        for slot, parameter, noise in noises(layer):
            if noise not in seen:
                seen.add(noise)
                method = cast(Method, noise.method)
                method.project(noise)
                own = slot.removeprefix("noise").removeprefix(".")
                yield Site(f"{name}.{own}".strip("."), layer, noise, method, parameter)


def sites_of_converted(model: nn.Module) -> list[Site]:
    """The :func:`sites` of `model`.

    Raises:
        ConversionError: there are none.
    """
    found = list(sites(model))
    if not found:
        raise ConversionError("the model has no noisy layer: call vardrop.convert(model, method) first")
    return found


@contextmanager
def batched(model: nn.Module) -> Iterator[None]:
    """For passes of `model` under ``torch.func.vmap``: the plain path, parameters in their domain once and for all."""
    before = [(site.noise, site.noise.fast, site.noise.projected) for site in sites(model)]
    for noise, _, _ in before:
        noise.fast, noise.projected = None, True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            yield
    finally:
        for noise, fast, projected in before:
            noise.fast, noise.projected = fast, projected


def noises(layer: nn.Module) -> list[Held]:
    """The noises that hang on `layer`, and last its gate, as far as it has them; a noise acts before the gate."""
    own = isinstance(child(layer, "noise"), nn.ModuleDict)
    held = [
        Held(f"noise.{name.removesuffix('.weight')}" if own else "noise", name, noise)
        for name, noise in noises_of(layer).items()
    ]
    gate = child(layer, "gate")
    return [*held, Held("gate", "weight", gate)] if isinstance(gate, Gate) else held


def tensor_of(layer: nn.Module, parameter: str) -> Tensor:
    """The weight or bias of `layer` called so, or with a dot in its name that of a child."""
    return cast(Tensor, attrgetter(parameter)(layer))


def folded(layer: nn.Module) -> dict[str, Tensor]:
    """Weights and bias, by name, of the plain layer that computes what the noisy `layer` does in a quiet pass."""
    bias = cast(Tensor | None, getattr(layer, "bias", None)) if "gate" in layer._modules else None
    found: dict[str, Tensor] = {}
    for _, parameter, noise in noises(layer):
        found[parameter], bias = noise.folded(found.get(parameter, tensor_of(layer, parameter)), bias)
    return found if bias is None else {**found, "bias": bias}


def parameter_groups(model: nn.Module, *, lr: float = 1e-3, gate_lr: float = 1e-2) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser: all trainable parameters of `model`, its gates at their own learning rate.

    An optimiser's weight decay acts on the model's own parameters and leaves out those of noise, which pay their KL.

    Args:
        model: a converted model, or a plain one, which has no gates.
        lr: learning rate of everything but gates.
        gate_lr: learning rate of gates.

    Returns:
        Groups, each ``{"params": [...], "lr": ...}``, those of noise with ``"weight_decay": 0.0``: the model's own
        parameters, the noise on weights, the gates, and one for each learning rate that a method itself gives to
        parameters of its noise. Every trainable parameter is in one of them once.

    Raises:
        InvalidValueError: a learning rate is not a finite number, at least 0.

    Source: arXiv:1805.10896, section 5, where the weights learn at a tenth of the gates' rate.

    >>> net = vd.convert(torch.nn.Linear(8, 4), vd.BetaBernoulli())
    >>> [len(group["params"]) for group in vd.parameter_groups(net)]
    [2, 2]
    """
    for name, rate in (("lr", lr), ("gate_lr", gate_lr)):
        if not (isinstance(rate, int | float) and 0.0 <= rate < math.inf):
            raise InvalidValueError(f"{name}={rate!r}: must be a finite number, at least 0")
    members: dict[tuple[str, float], list[nn.Parameter]] = {
        ("own", lr): [],
        ("weights", lr): [],
        ("units", gate_lr): [],
    }
    kinds: dict[Tensor, tuple[str, float]] = {}
    for site in sites(model):
        rates = site.method.learning_rates(site.noise)
        for name, parameter in site.noise.named_parameters():
            kinds[parameter] = (site.counts, rates.get(name, gate_lr if site.counts == "units" else lr))
    for parameter in model.parameters():
        if parameter.requires_grad:
            members.setdefault(kinds.get(parameter, ("own", lr)), []).append(parameter)
    return [
        {"params": found, "lr": rate} | ({} if kind == "own" else {"weight_decay": 0.0})
        for (kind, rate), found in members.items()
        if found
    ]

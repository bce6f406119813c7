"""A plain copy of a converted model, seen to compute the same before anything is made of it."""

from __future__ import annotations

import warnings
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from vardrop.errors import CompactionWarning, GraphError
from vardrop.modes import in_eval_mode
from vardrop.refusals import check_model
from vardrop.sites import noises, sites
from vardrop.surgery.convert import strip
from vardrop.surgery.cut import equal, run, stacked
from vardrop.surgery.graph import as_arguments

Model = TypeVar("Model", bound=nn.Module)


def copy_of(model: Model) -> Model:
    """A copy of `model`, also of one that keeps tensors it computed, which torch does not copy."""
    check_model(model)
    kept = (leaf for module in model.modules() for leaf in tree_leaves(list(vars(module).values())))
    memo = {id(leaf): leaf.detach().clone() for leaf in kept if isinstance(leaf, Tensor) and not leaf.is_leaf}
    return deepcopy(model, memo)


def plain_copy(model: nn.Module, example_inputs: Any) -> nn.Module:
    """A copy of `model` without noise, in its mode, that gives the same outputs on the example in eval mode.

    Raises:
        GraphError: it does not, because a weight with noise is used outside the layer that has the noise, or because
            torch's own encoder treats padding in another way without noise.

    Warns:
        CompactionWarning: the model holds what it knows in the variances of its noise.
    """
    copy = copy_of(model)
    noisy = list(sites(copy))
    if not noisy:
        return copy
    for kind in dict.fromkeys(type(site.method).__name__ for site in noisy if site.method.by_ensemble):
        warnings.warn(
            f"{kind} holds what a net knows in the variances of its weights, and a plain net has none: it gives the "
            "outputs of eval mode, which may be chance; vardrop.predict on the converted model uses them",
            CompactionWarning,
            stacklevel=3,
        )
    for site in noisy:
        site.noise.on = False
    inputs = as_arguments(example_inputs)
    with in_eval_mode(copy):
        try:
            expected = run(copy_of(copy), inputs)  # a pass may leave its traces in the model
            strip(copy)
            found = run(copy_of(copy), inputs)
        except Exception:
            found = expected = []  # what does not run is named by whatever runs it next
            strip(copy)
        differs = not equal(expected, found) and equal(found, run(copy_of(copy), inputs))
    if differs:
        raise GraphError(f"without its noise the model gives other outputs: {_why_other(model, inputs, expected)}")
    return copy


def _why_other(model: nn.Module, inputs: tuple[Any, ...], expected: Any) -> str:
    name = _used_elsewhere(model, inputs, expected)
    if name is not None:
        return (
            f"the weight of layer {name!r} is also used outside its layer, tied to another one or read in a forward; "
            f"leave that layer out with exclude={name!r}, and convert anew"
        )
    if any(isinstance(module, nn.TransformerEncoder) for module in model.modules()):
        return (
            "in eval mode torch's TransformerEncoder zeroes padded positions, which it does not with noise in its "
            "layers; mask them before they are read, as before a sum over positions"
        )
    return "a weight that has noise or a gate is also used outside its layer, tied to another one or read in a forward"


def _used_elsewhere(model: nn.Module, inputs: tuple[Any, ...], expected: Any) -> str | None:
    """The layer without whose noise alone the model gives something else than `expected`."""
    noisy: list[str] = [name for name, layer in model.named_modules() if noises(layer)]
    for name in noisy:
        copy = copy_of(model).eval()
        for site in sites(copy):
            site.noise.on = False
        strip(copy.get_submodule(name))
        if not equal(expected, run(copy, inputs)):
            return name
    return None


def trained_alone(plain: nn.Module, arguments: tuple[Any, ...]) -> list[str]:
    """The layers with parameters that run in training but not in eval mode; none where one of the two cannot run."""
    ran = {mode: _layers_run(plain, arguments, mode) for mode in (False, True)}
    return [name for name in ran[True] if name not in ran[False]] if ran[False] else []


def _layers_run(plain: nn.Module, arguments: tuple[Any, ...], training: bool) -> list[str]:
    """The layers with parameters that run in a pass in training or in eval mode; none where there can be no pass."""
    for sample in (arguments, tree_map(stacked, arguments, arguments)):
        copy = copy_of(plain).train(training)
        ran: list[str] = []
        for name, layer in copy.named_modules():
            if next(layer.parameters(recurse=False), None) is not None:
                layer.register_forward_hook(lambda *_, name=name, ran=ran: ran.append(name))
        try:
            with torch.random.fork_rng(devices=[]):
                run(copy, sample)
        except Exception:  # such as batch-norm on one example in training
            continue
        return ran
    return []  # what does not run at all is told by the tracing

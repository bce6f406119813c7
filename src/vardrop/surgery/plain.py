"""A plain copy of a converted model, seen to compute the same before anything is made of it."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vardrop.errors import GraphError
from vardrop.modes import in_eval_mode
from vardrop.sites import noises, sites
from vardrop.surgery.convert import strip
from vardrop.surgery.cut import equal, run
from vardrop.surgery.graph import as_arguments

Model = TypeVar("Model", bound=nn.Module)


def copy_of(model: Model) -> Model:
    """A copy of `model`, also of one that keeps tensors it computed, which torch does not copy."""
    kept = (leaf for module in model.modules() for leaf in tree_leaves(list(vars(module).values())))
    memo = {id(leaf): leaf.detach().clone() for leaf in kept if isinstance(leaf, Tensor) and not leaf.is_leaf}
    return deepcopy(model, memo)


def plain_copy(model: nn.Module, example_inputs: Any) -> nn.Module:
    """A copy of `model` without noise, in its mode, that gives the same outputs on the example in eval mode.

    Raises:
        GraphError: it does not, because a weight with noise is used outside the layer that has the noise.
    """
    copy = copy_of(model)
    noisy = list(sites(copy))
    if not noisy:
        return copy
    for site in noisy:
        site.noise.on = False
    inputs = as_arguments(example_inputs)
    with in_eval_mode(copy):
        try:
            expected = run(copy, inputs)
            strip(copy)
            found = run(copy, inputs)
        except Exception:
            found = expected = []  # what does not run is named by whatever runs it next
            strip(copy)
        differs = not equal(expected, found) and equal(found, run(copy, inputs))
    if differs:
        name = _used_elsewhere(model, inputs, expected)
        which = "a weight that has noise or a gate" if name is None else f"the weight of layer {name!r}"
        raise GraphError(
            f"without its noise the model gives other outputs: {which} is also used outside its layer, tied to another "
            f"one or read in a forward; leave that layer out with exclude={name or ''!r}, and convert anew"
        )
    return copy


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

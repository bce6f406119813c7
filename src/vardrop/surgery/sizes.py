"""The sizes of a network's layers as plain data, and the way back: a net built anew takes up the sizes of a cut one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from vardrop.layers import is_conv1d
from vardrop.noise import Layout
from vardrop.sites import noises, tensor_of
from vardrop.surgery.reading import RESIZABLE

DIMENSIONS = """
    in_features out_features in_channels out_channels groups num_features num_parameters input_size hidden_size
    num_embeddings embedding_dim padding_idx nx nf
"""


def sizes(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The sizes of every layer of `model` that can be cut, by name; ready for JSON.

    >>> from vardrop.surgery.sizes import sizes
    >>> sizes(torch.nn.Sequential(torch.nn.Linear(4, 2)))
    {'0': {'type': 'Linear', 'in_features': 4, 'out_features': 2, 'bias': True}}
    """
    return {name: _dimensions(layer) for name, layer in model.named_modules() if resizable(layer)}


def resizable(layer: nn.Module) -> type[nn.Module] | None:
    """The class that can be cut that `layer` is, or descends from."""
    return next((kind for kind in type(layer).__mro__ if kind in RESIZABLE or is_conv1d(kind)), None)


def kind_of(layer: nn.Module) -> str:
    """The name of the class that can be cut that `layer` is, or descends from."""
    return (resizable(layer) or type(layer)).__name__


def resize(model: nn.Module, layers: Mapping[str, Mapping[str, Any]], state: Mapping[str, Tensor]) -> None:
    """Gives the layers of `model`, and the noise on them, the sizes of a cut one, in place.

    Args:
        model: as it was before the cut.
        layers: told by :func:`sizes` of the cut model.
        state: of the cut model; only shapes and types are taken up, values where they differ are left open.
    """
    modules = dict(model.named_modules())
    for name, layer in layers.items():
        module = modules[name]
        for key in DIMENSIONS.split():
            if key in layer and getattr(module, key) != layer[key]:
                setattr(module, key, layer[key])
        bias = state.get(f"{name}.bias" if name else "bias")
        if bias is not None and module._parameters.get("bias", bias) is None:
            like = module.get_parameter("weight")
            module.bias = nn.Parameter(torch.empty_like(bias, device=like.device), requires_grad=like.requires_grad)
    make_room(model, state)
    tell_noise(model)


def make_room(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Makes room in `model` for tensors of other shapes and types; a parameter stays the one it is, and tied."""
    owners = dict(model.named_modules(remove_duplicate=False))
    for name, tensor in model.state_dict(keep_vars=True).items():
        stored = state.get(name)
        if stored is None or (stored.shape == tensor.shape and stored.dtype == tensor.dtype):
            continue
        room = torch.empty_like(stored, device=tensor.device)
        if isinstance(tensor, nn.Parameter):
            tensor.data = room
        else:
            parent, _, attribute = name.rpartition(".")
            setattr(owners[parent], attribute, room)


def tell_noise(model: nn.Module) -> None:
    """Lets all noise in `model` take up the sizes of its host."""
    for layer in model.modules():
        for held in noises(layer):
            held.noise.resized(tensor_of(layer, held.parameter), cast(Layout, layer.layout))


def _dimensions(layer: nn.Module) -> dict[str, Any]:
    return {
        "type": kind_of(layer),
        **{name: getattr(layer, name) for name in DIMENSIONS.split() if hasattr(layer, name)},
        "bias": getattr(layer, "bias", None) is not None,
    }

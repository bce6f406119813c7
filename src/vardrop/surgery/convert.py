"""The way in and the way back: a plain network becomes noisy, a noisy one becomes plain again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from vardrop.errors import ConversionError, InvalidValueError, UnsupportedLayerError
from vardrop.layers import NOISY, UNSUPPORTED, noisy_class, noisy_parameters, plain_class
from vardrop.methods.base import Method
from vardrop.noise import Layout, Noise, noises_of
from vardrop.sites import sites

Patterns = str | Sequence[str]


def convert(
    model: nn.Module,
    method: Method | Mapping[str, Method],
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
) -> nn.Module:
    """Makes the layers of `model` noisy in place and returns it; trained weights become the posterior means.

    Parameters keep their identity and names, so optimisers, hooks and dense checkpoints made earlier stay valid. Make
    the optimiser that is to train the noise after this call, so that it sees the new parameters.

    Args:
        model: any module built of Linear, Conv1d/2d/3d, ConvTranspose1d/2d/3d, RNN, LSTM, GRU, Embedding and
            EmbeddingBag layers, among others.
        method: one method, or a dict from name patterns (``"features.*"``) to methods; the first match wins.
        include: name patterns of the layers to convert; all supported ones by default.
        exclude: name patterns of the layers to leave as they are.

    Raises:
        InvalidValueError: a pattern matches nothing, or `method` is not a method.
        UnsupportedLayerError: a named layer is of a kind that has no noisy form, or any is a subclass of one that
            has, or has an option that the noisy form does not know.
        ConversionError: the model is converted already, or nothing in it can be converted.

    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> net = vd.convert(net, {"0": vd.SparseVD(), "*": vd.ARD()})
    >>> [type(site.method).__name__ for site in vd.sites(net)]
    ['SparseVD', 'ARD']
    """
    chosen = _choose(model, method, _as_patterns(include), _as_patterns(exclude))
    shared: dict[Tensor, Noise] = {}
    for layer, layer_method in chosen.values():
        _make_noisy(layer, layer_method, shared)
    _close_fast_paths(model)
    return model


def strip(model: nn.Module) -> nn.Module:
    """Turns a converted `model` back into a plain one in place, dead weights at zero, and returns it.

    The result computes what the converted model computes in eval mode, and holds no class of this library.

    >>> net = vd.convert(torch.nn.Linear(8, 4), vd.ARD())
    >>> type(vd.strip(net))
    <class 'torch.nn.modules.linear.Linear'>
    """
    for layer in model.modules():
        plain = plain_class(type(layer))
        if plain is None:
            continue
        with torch.no_grad():
            for parameter, noise in noises_of(layer).items():
                weight = layer.get_parameter(parameter)
                weight.copy_(noise.masked(weight))
        for key, hook in list(layer._forward_pre_hooks.items()):
            if hook is _project:
                del layer._forward_pre_hooks[key]
        del layer.noise
        layer.__class__ = plain
    _open_fast_paths(model)
    return model


def _make_noisy(layer: nn.Module, method: Method, shared: dict[Tensor, Noise]) -> None:
    layer.__class__ = noisy_class(type(layer)) or type(layer)
    noises: dict[str, nn.Module] = {}
    for parameter in noisy_parameters(layer):
        weight = layer.get_parameter(parameter)
        if weight not in shared:
            shared[weight] = method.noise(weight, cast(Layout, layer.layout))
            shared[weight].method = method
            shared[weight].train(layer.training)
        noises[parameter] = shared[weight]
    layer.noise = noises["weight"] if noises.keys() == {"weight"} else nn.ModuleDict(noises).train(layer.training)
    if type(method).project is not Method.project:
        layer.register_forward_pre_hook(_project)


def _project(layer: nn.Module, inputs: Any) -> None:
    """Before a training pass the noise's parameters are put back into their domain.

    Doing it here rather than after the step serves every optimiser, and a second pass before the backward is harmless.
    """
    if layer.training:
        for noise in noises_of(layer).values():
            noise.method.project(noise)


def _choose(
    model: nn.Module,
    method: Method | Mapping[str, Method],
    include: tuple[str, ...] | None,
    exclude: tuple[str, ...] | None,
) -> dict[str, tuple[nn.Module, Method]]:
    """The layers to convert by name, each with its method; everything is checked here, before any change."""
    by_pattern = dict(method) if isinstance(method, Mapping) else {"*": method}
    for pattern, value in by_pattern.items():
        if not isinstance(value, Method):
            raise InvalidValueError(
                f"method={value!r} for layers {pattern!r}: must be a method such as vardrop.SparseVD(), "
                "or a dict from name patterns to methods"
            )
    if next(sites(model), None) is not None:
        raise ConversionError("the model is converted already: convert a plain one, or call vardrop.strip(model) first")
    layers = {name: layer for name, layer in model.named_modules() if next(layer.children(), None) is None}
    _check_patterns(include, layers, "include")
    _check_patterns(exclude, layers, "exclude")
    chosen: dict[str, tuple[nn.Module, Method]] = {}
    used: set[str] = set()
    for name, layer in layers.items():
        if (include is not None and not _matches(name, include)) or (exclude and _matches(name, exclude)):
            continue
        matching = [pattern for pattern in by_pattern if fnmatchcase(name, pattern)]
        if not matching:
            continue
        named = include is not None or matching[0] != "*"
        if _is_convertible(name, layer, named=named):
            used.add(matching[0])
            chosen[name] = (layer, by_pattern[matching[0]])
    unused = [pattern for pattern in by_pattern if pattern not in used]
    if unused and isinstance(method, Mapping):
        raise InvalidValueError(
            f"method pattern {unused[0]!r} matches no layer that can be converted; layers are: {_some(layers)}"
        )
    if not chosen:
        raise ConversionError(
            f"nothing to convert in {type(model).__name__}: it holds no layer of the kinds "
            f"{', '.join(kind.__name__ for kind in NOISY)} outside the excluded ones"
        )
    return chosen


def _is_convertible(name: str, layer: nn.Module, *, named: bool) -> bool:
    """Exact types only: a subclass may compute something else, so it is refused rather than taken over."""
    kind = next((kind for kind in NOISY if isinstance(layer, kind)), None)
    if kind is not None and any(isinstance(getattr(layer, w), UninitializedParameter) for w in noisy_parameters(layer)):
        raise ConversionError(f"layer {name!r} has no weight yet: run one batch through the model first")
    if noisy_class(type(layer)) is not None:
        check = UNSUPPORTED.get(type(layer))
        fault = check(layer) if check else None
        if fault is not None:
            raise UnsupportedLayerError(
                f"layer {name!r} is a {type(layer).__name__}: {fault}, or leave it out with exclude={name!r}"
            )
        return True
    own = kind is not None and not type(layer).__module__.startswith("torch.nn.")
    if own or (named and next(layer.parameters(), None) is not None):
        what = f"a subclass of {kind.__name__}, which may compute something else" if kind else "not supported"
        raise UnsupportedLayerError(
            f"layer {name!r} is a {type(layer).__name__}, {what}; supported are exactly "
            f"{', '.join(kind.__name__ for kind in NOISY)}; leave it out with exclude={name!r}"
        )
    return False


def _as_patterns(patterns: Patterns | None) -> tuple[str, ...] | None:
    return (patterns,) if isinstance(patterns, str) else None if patterns is None else tuple(patterns)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check_patterns(patterns: tuple[str, ...] | None, layers: Mapping[str, nn.Module], argument: str) -> None:
    for pattern in patterns or ():
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise InvalidValueError(f"{argument}={pattern!r} matches no layer; layers are: {_some(layers)}")


def _some(layers: Mapping[str, nn.Module]) -> str:
    names = [name or "(the model itself)" for name in layers]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _close_fast_paths(model: nn.Module) -> None:
    """A torch encoder layer in eval mode may compute from its weights directly and never call its noisy sublayers.

    Where a sublayer has a forward hook, it calls them.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and next(sites(module), None) is not None:
            module.linear1.register_forward_hook(_call_me)


def _open_fast_paths(model: nn.Module) -> None:
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if hook is _call_me:
                del module._forward_hooks[key]


def _call_me(layer: nn.Module, inputs: Any, output: Any) -> None:
    """Changes nothing; being there is enough."""

"""The way in and the way back: a plain network becomes noisy, a noisy one becomes plain again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from vardrop.errors import ConversionError, InvalidValueError, UnsupportedLayerError
from vardrop.layers import (
    NOISY,
    UNSUPPORTED,
    layout_of,
    noisy_class,
    noisy_parameters,
    plain_class,
    shows_units,
    takes_gates,
)
from vardrop.methods.base import GateMethod, Method
from vardrop.noise import DependentGate, Gate, Noise
from vardrop.refusals import check_model
from vardrop.sites import SLOTS, folded, noises, sites, tensor_of

Patterns = str | Sequence[str]
Choice = Method | tuple[Method, ...]


def convert(
    model: nn.Module,
    method: Choice | Mapping[str, Choice],
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
) -> nn.Module:
    """Makes the layers of `model` noisy in place and returns it; trained weights become the posterior means.

    Parameters keep their identity and names, so optimisers, hooks and dense checkpoints made earlier stay valid. Make
    the optimiser that is to train the noise after this call, so that it sees the new parameters.

    A model whose gates are beta-Bernoulli is converted once more, to their dependent second stage.

    Gates on outputs do not know which layer gives the outputs of the model, but in an ``nn.Sequential``: leave such a
    convolution out of another module, or gate its inputs, or outputs of the model may die.

    Args:
        model: any module built of Linear, Conv1d/2d/3d, ConvTranspose1d/2d/3d, RNN, LSTM, GRU, Embedding,
            EmbeddingBag and MultiheadAttention layers, among others.
        method: one method; a tuple of two, one on units and one on weights; or a dict from name patterns
            (``"features.*"``) to these, of which the first match wins.
        include: name patterns of the layers to convert; all supported ones by default.
        exclude: name patterns of the layers to leave as they are.

    Raises:
        InvalidValueError: a pattern matches nothing, or `method` is not a method.
        UnsupportedLayerError: a layer named by `include`, or one with parameters that a pattern matches, is of a kind
            that has no noisy form, or no form with a gate; or any is a subclass of one that has, or has an option that
            the noisy form does not know.
        ConversionError: the model is converted already, nothing in it can be converted, or a layer that is to have
            a gate shares its weight with another, or has the outputs of the net for its units.

    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> net = vd.convert(net, {"0": vd.SparseVD(), "*": vd.ARD()})
    >>> [type(site.method).__name__ for site in vd.sites(net)]
    ['SparseVD', 'ARD']
    """
    check_model(model)
    given = method if isinstance(method, Mapping) else {"*": method}
    by_pattern = {pattern: _as_methods(pattern, value) for pattern, value in given.items()}
    chosen = _choose(model, by_pattern, _as_patterns(include, "include"), _as_patterns(exclude, "exclude"))
    if any(method.follows for methods in by_pattern.values() for method in methods):
        _advance(model, chosen)
    else:
        attach(model, chosen)
    return model


def attach(model: nn.Module, chosen: Mapping[str, tuple[Method, ...]]) -> None:
    """Makes the layers called so noisy, each by its methods; all was checked before."""
    shared: dict[tuple[str, Tensor], Noise] = {}
    for name, methods in chosen.items():
        _make_noisy(model.get_submodule(name), methods, shared)
    _close_fast_paths(model)


def strip(model: nn.Module) -> nn.Module:
    """Turns a converted `model` back into a plain one in place, dead weights at zero, and returns it.

    The result computes what the converted model computes in eval mode. It holds no class of this library, but for the
    small plain modules of gates that depend on their input.

    Raises:
        ConversionError: a layer has been parametrized since its conversion.

    >>> net = vd.convert(torch.nn.Linear(8, 4), vd.ARD())
    >>> type(vd.strip(net))
    <class 'torch.nn.modules.linear.Linear'>
    """
    for name, layer in model.named_modules():
        if noises(layer) and plain_class(type(layer)) is None:
            raise ConversionError(
                f"layer {name!r} has become a {type(layer).__name__} since it was converted: remove what parametrizes "
                "it first, with torch.nn.utils.parametrize.remove_parametrizations"
            )
    for layer in model.modules():
        plain = plain_class(type(layer))
        if plain is None:
            continue
        with torch.no_grad():
            for parameter, value in folded(layer).items():
                tensor_of(layer, parameter).copy_(value)
        for key, hook in list(layer._forward_pre_hooks.items()):
            if hook is _project:
                del layer._forward_pre_hooks[key]
        gate = layer._modules.get("gate")
        for slot in SLOTS:
            layer._modules.pop(slot, None)
        layer.__class__ = plain
        if isinstance(gate, DependentGate):
            gate.remainder(tensor_of(layer, "weight")).hang_on(layer)
    _open_fast_paths(model)
    return model


def _make_noisy(layer: nn.Module, methods: tuple[Method, ...], shared: dict[tuple[str, Tensor], Noise]) -> None:
    layer.__class__ = noisy_class(type(layer)) or type(layer)
    for method in methods:
        slot = "gate" if method.on_units else "noise"
        made: dict[str, nn.Module] = {}
        for parameter in noisy_parameters(layer):
            weight = tensor_of(layer, parameter)
            if (slot, weight) not in shared:
                noise = method.noise(weight, layout_of(layer, parameter))
                noise.method = method
                shared[slot, weight] = noise.train(layer.training)
            made[parameter.removesuffix(".weight")] = shared[slot, weight]
        alone = made.keys() == {"weight"}
        setattr(layer, slot, made["weight"] if alone else nn.ModuleDict(made).train(layer.training))
    if any(type(method).project is not Method.project for method in methods):
        layer.register_forward_pre_hook(_project)


def _project(layer: nn.Module, inputs: Any) -> None:
    """Before a training pass the noise's parameters are put back into their domain.

    Doing it here rather than after the step serves every optimiser, and a second pass before the backward is harmless.
    """
    if layer.training and not torch.compiler.is_exporting():
        for _, _, noise in noises(layer):
            if not noise.projected:
                noise.method.project(noise)


def _choose(
    model: nn.Module,
    by_pattern: Mapping[str, tuple[Method, ...]],
    include: tuple[str, ...] | None,
    exclude: tuple[str, ...] | None,
) -> dict[str, tuple[Method, ...]]:
    """The layers to convert by name, each with its methods; everything is checked here, before any change."""
    layers = _candidates(model, by_pattern)
    if include == ():
        raise InvalidValueError("include=[]: must name layers; None takes all that have a noisy form")
    _check_patterns(include, layers, "include")
    _check_patterns(exclude, layers, "exclude")
    chosen: dict[str, tuple[Method, ...]] = {}
    used: set[str] = set()
    for name, layer in layers.items():
        if (include is not None and not _matches(name, include)) or (exclude and _matches(name, exclude)):
            continue
        matching = [pattern for pattern in by_pattern if fnmatchcase(name, pattern)]
        if not matching:
            continue
        named = include is not None or matching[0] != "*"
        itself = include is not None and name in include
        methods = by_pattern[matching[0]]
        gated = any(method.on_units for method in methods)
        if noises(layer) or _is_convertible(name, layer, gated=gated, named=named, itself=itself):
            used.add(matching[0])
            chosen[name] = tuple(_placed(model, name, layer, method) for method in methods)
    if not by_pattern:
        raise InvalidValueError("method={}: must name a method for some layer, such as {'*': vardrop.SparseVD()}")
    unused = [pattern for pattern in by_pattern if pattern not in used]
    if unused and list(by_pattern) != ["*"]:
        taken = [name for name in chosen if fnmatchcase(name, unused[0])]
        first = next((pattern for name in taken for pattern in by_pattern if fnmatchcase(name, pattern)), None)
        if first is not None:
            raise InvalidValueError(
                f"method pattern {unused[0]!r}: pattern {first!r}, which comes before it, takes all its layers; put it "
                "first"
            )
        raise InvalidValueError(
            f"method pattern {unused[0]!r} matches no layer that can be converted; layers are: {_some(layers)}"
        )
    _check_ties(model, chosen)
    if not chosen:
        all_gated = all(any(method.on_units for method in methods) for methods in by_pattern.values())
        where = " among the included ones" if include is not None else ""
        where += " outside the excluded ones" if exclude else ""
        raise ConversionError(
            f"nothing to convert in {type(model).__name__}: there is no layer of the kinds {_known(all_gated)}{where}; "
            f"layers are: {_some(layers)}"
        )
    return chosen


def _check_ties(model: nn.Module, chosen: Mapping[str, tuple[Method, ...]]) -> None:
    """Raises where a weight would have noise in one layer that holds it, and other noise or none in another."""
    first: dict[Tensor, str] = {}
    for name, methods in chosen.items():
        layer = model.get_submodule(name)
        for weight in (tensor_of(layer, parameter) for parameter in noisy_parameters(layer)):
            other = first.setdefault(weight, name)
            if chosen[other] != methods:
                raise InvalidValueError(
                    f"layers {other!r} and {name!r} share a weight but are given different methods: give them one"
                )
    converted = {module for name in chosen for module in model.get_submodule(name).modules()}
    for name, module in model.named_modules():
        for parameter in () if module in converted else module._parameters.values():
            if parameter is not None and parameter in first:
                held = [first[parameter], *([name] if _is_one_layer(module) and name else [])]
                raise ConversionError(
                    f"layer {first[parameter]!r} shares its weight with {name or type(module).__name__!r}, which stays "
                    f"plain, so that what dies could not leave: leave both out, with exclude={held}"
                )


def _candidates(model: nn.Module, by_pattern: Mapping[str, tuple[Method, ...]]) -> dict[str, nn.Module]:
    """The layers that could be converted: plain ones, or for a second stage those with the noise of the first."""
    methods = [method for given in by_pattern.values() for method in given]
    second = next((method for method in methods if method.follows), None)
    if second is None or second.follows is None:
        attentions = [layer for layer in model.modules() if isinstance(layer, nn.MultiheadAttention)]
        inner = {child for layer in attentions for child in layer.children()}
        if next(sites(model), None) is not None:
            raise ConversionError(
                "the model is converted already: convert a plain one, or call vardrop.strip(model), which drops the "
                "noise; what joined it since is converted alone, as in vardrop.convert(model.head, method)"
            )
        return {name: layer for name, layer in model.named_modules() if _is_one_layer(layer) and layer not in inner}
    own, first = type(second).__name__, second.follows
    if any(type(method) is not type(second) for method in methods):
        raise InvalidValueError(f"{own} is a second stage and is given alone, without methods of the first")
    found = {
        name: layer
        for name, layer in model.named_modules()
        if shows_units(layer) and any(type(noise.method) is first for _, _, noise in noises(layer))
    }
    if not found:
        raise ConversionError(
            f"{own} is the second stage of {first.__name__}, of which the model has no trained gates: call "
            f"vardrop.convert(model, vardrop.{first.__name__}()) and train it first"
        )
    return found


def _is_one_layer(module: nn.Module) -> bool:
    return noisy_class(type(module)) is not None or not _children(module)


def _children(module: nn.Module) -> list[str]:
    """The names of what hangs on `module` and is neither its own part nor a parametrization."""
    own = {"parametrizations"} | ({"out_proj"} if isinstance(module, nn.MultiheadAttention) else set())
    return [name for name, _ in module.named_children() if name not in own]


def _advance(model: nn.Module, chosen: Mapping[str, tuple[Method, ...]]) -> None:
    """Puts the gates of the second stage in the place of those of the first."""
    for name, (method,) in chosen.items():
        layer = model.get_submodule(name)
        first = cast(Gate, layer.gate)
        gate_method = replace(cast(GateMethod, method), place=first.place)
        gate = gate_method.noise(cast(Tensor, layer.weight), layout_of(layer, "weight"))
        gate_method.continues(gate, first)
        gate.method = gate_method
        layer.gate = gate.train(layer.training)


def _as_methods(pattern: str, value: Choice) -> tuple[Method, ...]:
    """One or two methods, the one on weights first."""
    _check_pattern(pattern, "method")
    methods = value if isinstance(value, tuple) else (value,)
    for method in methods:
        if not isinstance(method, Method):
            raise InvalidValueError(
                f"method={method!r} for layers {pattern!r}: must be a method such as vardrop.SparseVD(), "
                "a tuple of two, or a dict from name patterns to methods"
            )
    on_units = [method.on_units for method in methods]
    if len(methods) != len(set(on_units)) or not methods:
        names = ", ".join(type(method).__name__ for method in methods) or "nothing"
        raise InvalidValueError(
            f"layers {pattern!r} are given {names}: a layer takes one method on weights, one on units, or one of each"
        )
    return tuple(sorted(methods, key=lambda method: method.on_units))


def _placed(model: nn.Module, name: str, layer: nn.Module, method: Method) -> Method:
    """`method` itself, or with its gate at the inputs of the layer whose outputs are the net's."""
    if not method.on_units:
        return method
    tied = [other for other, module in model.named_modules() if module is not layer and _holds(module, layer.weight)]
    if tied:
        raise ConversionError(
            f"layer {name!r} shares its weight with {tied[0]!r}, so the multipliers of its units cannot be folded into "
            f"it: leave both out, with exclude={[name, *tied]}"
        )
    outputs = isinstance(method, GateMethod) and method.placed(cast(Tensor, layer.weight)) == "output"
    if not isinstance(method, GateMethod) or not outputs or _last(model) is not layer:
        return method
    if method.place == "output":
        raise ConversionError(
            f"layer {name!r} is the last one, its outputs are those of the net and cannot be removed: "
            f"leave it out with exclude={name!r}, or gate its inputs with place='input'"
        )
    return replace(method, place="input")


def _holds(module: nn.Module, weight: Any) -> bool:
    return any(parameter is weight for parameter in module._parameters.values())


def _last(model: nn.Module) -> nn.Module:
    """The layer whose outputs are certainly those of `model`; in other models than sequential ones it is not known."""
    while type(model) is nn.Sequential:
        trained = [child for child in model if next(child.parameters(), None) is not None]
        if not trained:
            break
        model = trained[-1]
    return model


def _is_convertible(name: str, layer: nn.Module, *, gated: bool, named: bool, itself: bool) -> bool:
    """Exact types only: a subclass may compute something else, so it is refused rather than taken over."""
    kind = next((kind for kind in NOISY if isinstance(layer, kind) and (takes_gates(kind) or not gated)), None)
    weights = [tensor_of(layer, parameter) for parameter in noisy_parameters(layer)] if kind is not None else []
    if any(isinstance(weight, UninitializedParameter) for weight in weights):
        raise ConversionError(f"layer {name!r} has no weight yet: run one batch through the model first")
    if kind is not None and (is_parametrized(layer) or not all(isinstance(w, nn.Parameter) for w in weights)):
        raise UnsupportedLayerError(
            f"layer {name!r} computes its weight anew for each pass, by a hook or a parametrization: remove that first "
            f"(remove_weight_norm, prune.remove, remove_parametrizations), or leave it out with exclude={name!r}"
        )
    if not all(weight.is_floating_point() for weight in weights):
        raise UnsupportedLayerError(
            f"layer {name!r} has weights of type {weights[0].dtype}: must be real; leave it out with exclude={name!r}"
        )
    if takes_gates(type(layer)) or (noisy_class(type(layer)) is not None and not gated):
        check = UNSUPPORTED.get(type(layer))
        fault = (check(layer) if check else None) or _hung_on(layer)
        if fault is not None:
            raise UnsupportedLayerError(
                f"layer {name!r} is a {type(layer).__name__}: {fault}, or leave it out with exclude={name!r}"
            )
        return True
    own = kind is not None and not type(layer).__module__.startswith("torch.nn.")
    if own or itself or (named and next(layer.parameters(), None) is not None):
        what = f"a subclass of {kind.__name__}, which may compute something else" if kind else "not supported"
        if gated and noisy_class(type(layer)) is not None:
            what = "whose units have no gate, though its weights can have noise"
        known = _known(gated)
        raise UnsupportedLayerError(
            f"layer {name!r} is a {type(layer).__name__}, {what}; supported are exactly {known}; "
            f"leave it out with exclude={name!r}"
        )
    return False


def _hung_on(layer: nn.Module) -> str | None:
    """What somebody hung on `layer` that its noisy form would pass over, and what would be right."""
    if "forward" in vars(layer):
        return "it has a forward of its own, which takes the place of its class's: remove that"
    children = _children(layer)
    return f"it has the child {children[0]!r}, which a noisy layer does not know: remove that" if children else None


def _known(gated: bool) -> str:
    return ", ".join(kind.__name__ for kind in NOISY if takes_gates(kind) or not gated)


def _as_patterns(patterns: Patterns | None, argument: str) -> tuple[str, ...] | None:
    if patterns is None:
        return None
    found = tuple(patterns) if isinstance(patterns, Iterable) and not isinstance(patterns, str) else (patterns,)
    for pattern in found:
        _check_pattern(pattern, argument)
    return found


def _check_pattern(pattern: Any, argument: str) -> None:
    if not isinstance(pattern, str):
        raise InvalidValueError(f"{argument}: {pattern!r} is no name pattern of layers, such as '0' or 'features.*'")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check_patterns(patterns: tuple[str, ...] | None, layers: Mapping[str, nn.Module], argument: str) -> None:
    for pattern in patterns or ():
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise InvalidValueError(f"{argument}={pattern!r} matches no layer; layers are: {_some(layers)}")


def _some(layers: Mapping[str, nn.Module]) -> str:
    """The layers with parameters of their own, or all where there are none, at most a dozen of them."""
    own = [name for name, layer in layers.items() if next(layer.parameters(recurse=False), None) is not None]
    names = [name or "(the model itself)" for name in own or layers]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _close_fast_paths(model: nn.Module) -> None:
    """A torch encoder layer in eval mode may compute from its weights directly and never call its noisy sublayers.

    Where a sublayer has a forward hook, it calls them. Around it, a torch encoder packs a padded batch into a nested
    tensor, which only that direct computation understands.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and next(sites(module), None) is not None:
            module.linear1.register_forward_hook(_call_me)
        if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor and next(sites(module), None):
            module.use_nested_tensor = False
            module.register_forward_hook(_stay_padded)
    alone = isinstance(model, nn.Linear | nn.MultiheadAttention) and next(sites(model), None) is not None
    if alone and _call_me not in model._forward_hooks.values():  # it may be part of an encoder layer
        model.register_forward_hook(_call_me)


def _open_fast_paths(model: nn.Module) -> None:
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if hook in (_call_me, _stay_padded):
                del module._forward_hooks[key]
            if hook is _stay_padded:
                cast(nn.TransformerEncoder, module).use_nested_tensor = True


def _call_me(layer: nn.Module, inputs: Any, output: Any) -> None:
    """Changes nothing; being there is enough."""


def _stay_padded(encoder: nn.Module, inputs: Any, output: Any) -> None:
    """Changes nothing; it marks an encoder that would pack padded batches."""

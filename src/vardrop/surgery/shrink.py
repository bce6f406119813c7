"""Shrinking while training: dead units leave a converted model for good, and the optimiser forgets them with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from vardrop.errors import ConversionError, EmptyLayerWarning, GraphError, InvalidValueError
from vardrop.methods import Method
from vardrop.noise import Gate
from vardrop.sites import noises, sites, sites_of_converted, tensor_of
from vardrop.surgery.cut import count_anew, laid_like, left_behind, living_groups, living_part, prove, stays_whole
from vardrop.surgery.graph import Graph, as_arguments
from vardrop.surgery.plain import copy_of, plain_copy, trained_alone
from vardrop.surgery.plan import Alive, Plan
from vardrop.surgery.prune import prune
from vardrop.surgery.reading import Follower, Layer
from vardrop.surgery.sizes import tell_noise

Cut = Callable[[Tensor], Tensor]


def shrink(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    example_inputs: Any,
    *,
    on_unknown: str = "refuse",
) -> Plan:
    """Takes the dead units out of a converted `model` that goes on training, in place, so that it costs less.

    What is dead is told by the marks of :func:`prune` where there are some, and else by each method's own rule. A unit
    goes if its gate is dead, if all weights that make it or all that read it are dead, as in :func:`compact`, or if it
    is a constant then that moves exactly into a bias. Single dead weights of living units stay, and may come back; what
    goes does not, and neither does what it paid: the KL falls by its share. In eval mode the pruned model gives the
    same outputs before and after; what dead units still added in a noisy pass is gone.

    Parameters that lose units are new, smaller ones without hooks, in the groups of the optimiser where the old ones
    were; its state for them, and gradients, are cut to match. Layers without a bias get none: a constant in front of
    them stays. The net must run through the same layers in training as in eval mode.

    Nothing is cut while marks or rules leave a layer without a living weight or unit; the notes of the plan then say
    so. A weight that is exactly zero counts as dead, marked or not.

    Args:
        model: converted; shrink before you wrap it for several processes.
        optimizer: any whose state for a parameter is of that parameter's shape or a scalar, such as Adam; a sequence
            of them where several train the model.
        example_inputs: one tensor, or a tuple with the arguments of the model's forward.
        on_unknown: ``"refuse"`` raises at an operation without a rule, ``"keep"`` keeps all units around it.

    Returns:
        What was done; ``print`` shows it layer by layer.

    Raises:
        ConversionError: the model is not converted, is wrapped, or has noise or a method that cannot be cut.
        GraphError: the model cannot be cut exactly, as for :func:`compact`.
        InvalidValueError: an optimiser is another model's, or keeps state of another shape; none has a parameter that
            is to be trained and loses units; a parameter is not finite.

    After an error model and optimiser are unharmed.

    Source: the units that die are those of arXiv:1805.10896 and arXiv:1705.07283; removing them early is a choice of
    this library.

    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    >>> net = vd.convert(net, vd.ARD())
    >>> optimizer = torch.optim.Adam(net.parameters())
    >>> with torch.no_grad():
    ...     _ = net[0].weight.fill_(1.0)[:5].zero_(), net[2].weight.fill_(1.0)
    >>> print(vd.shrink(net, optimizer, torch.randn(1, 4)))
    layer  inputs  units   folded  stays though constant
    0      4       8 -> 3
    2      8 -> 3  2       5
    parameters: 58 -> 23
    >>> net[0].noise.log_std.shape, vd.kl(net).requires_grad
    (torch.Size([3, 4]), True)
    """
    _check_model(model)
    optimizers = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    for each in optimizers:
        _check_optimizer(model, each)
    whole = sum(parameter.numel() for parameter in model.parameters())
    marked, complaint = _marked(model)
    if complaint is not None:
        return Plan((), (f"nothing is cut: {complaint}",), whole, whole)
    arguments = as_arguments(example_inputs)
    plain = plain_copy(marked, arguments)
    _check_training(plain, arguments)
    done, graph, alive = prove(plain, arguments, on_unknown, new_biases=False)
    cuts = dict(_cuts(model, graph, alive))
    _check_trained(cuts, optimizers)
    empty = _emptied(marked, cuts)
    if empty is not None:
        note = f"nothing is cut: what is dead leaves {empty!r} without a living weight"
        return Plan((), (note,), whole, whole)
    with torch.no_grad():
        small = {name: laid_like(cut(tensor), tensor) for name, (tensor, cut) in cuts.items()}
        for name, added in _constants(marked, graph, alive):
            bias = small[name] if name in small else tensor_of(model, name)
            bias += added.to(bias)
        _replace(model, optimizers, cuts, small)
    for part in graph.parts:
        if isinstance(part, Layer):
            if not stays_whole(part, alive):
                count_anew(model, part, alive)
        elif part.counts is not None:
            setattr(model.get_submodule(part.name), part.counts, int(alive.units[part.ids].sum()))
    tell_noise(model)
    return done


def _check_model(model: nn.Module) -> None:
    found = sites_of_converted(model)
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ConversionError(
            f"the model is wrapped in {type(model).__name__}: shrink the model inside and wrap it anew"
        )
    for site in found:
        obstacle = why_whole(site.method)
        if obstacle is not None:
            rest = "" if site.method.by_ensemble else "; call vardrop.compact after the training"
            raise ConversionError(f"layer {site.name!r}: {obstacle}{rest}")


def _check_training(plain: nn.Module, arguments: tuple[Any, ...]) -> None:
    """Raises where a layer runs in training alone: what it reads is not seen in the pass by which the net is cut."""
    for name in trained_alone(plain, arguments):
        raise GraphError(
            f"layer {name!r} runs in training but not in eval mode, so what it reads of other layers cannot be told: "
            "call vardrop.compact after the training"
        )


def why_whole(method: Method) -> str | None:
    """Why a net under `method` cannot shrink while it trains; ``None`` where it can."""
    own = type(method).__name__
    if method.steps:
        return f"{own} moves its marks itself while it trains, so no unit is dead for good"
    if method.by_ensemble:
        return f"{own} holds what it knows in variances, so no unit is dead by its mean"
    return None


def _check_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    """Raises unless `optimizer` trains `model` and keeps state that can be cut."""
    if not isinstance(optimizer, Optimizer):
        raise InvalidValueError(f"optimizer={optimizer!r:.80}: must be the torch.optim.Optimizer that trains the model")
    names = {parameter: name for name, parameter in model.named_parameters()}
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if names.keys().isdisjoint(trained):
        raise InvalidValueError(f"optimizer {type(optimizer).__name__} holds no parameter of the model")
    for parameter in trained:
        for key, value in optimizer.state.get(parameter, {}).items():
            leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
            if any(leaf.numel() > 1 and (leaf is not value or leaf.shape != parameter.shape) for leaf in leaves):
                raise InvalidValueError(
                    f"optimizer {type(optimizer).__name__} keeps {key!r} for {names.get(parameter, 'a parameter')!r} "
                    "in another shape than the parameter's, which cannot be cut with it: use one such as Adam or SGD"
                )


def _check_trained(cuts: Mapping[str, tuple[Tensor, Cut]], optimizers: Sequence[Optimizer]) -> None:
    """Raises where a parameter loses units that none of the `optimizers` has: another one would train the old one."""
    trained = {parameter for each in optimizers for group in each.param_groups for parameter in group["params"]}
    for name, (tensor, _) in cuts.items():
        if tensor.requires_grad and tensor not in trained:
            raise InvalidValueError(
                f"{name!r} loses units but is in no optimizer given: give all that train the model, as a list, or "
                "freeze it by requires_grad_(False)"
            )


def _marked(model: nn.Module) -> tuple[nn.Module, str | None]:
    """A copy of `model` where all sites bear marks, those they have or else those of their rule.

    And what there is to complain of where a rule would leave a site nothing.
    """
    marked = copy_of(model)
    kept = {site.name: site.noise.mask for site in sites(marked)}
    if any(mask is None for mask in kept.values()):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", EmptyLayerWarning)
            prune(marked)
        if caught:
            return marked, str(caught[0].message).partition(";")[0]
        for site in sites(marked):
            if kept[site.name] is not None:
                site.noise.mask = kept[site.name]
    return marked, None


def _cuts(model: nn.Module, graph: Graph, alive: Alive) -> Iterator[tuple[str, tuple[Tensor, Cut]]]:
    """Every parameter and buffer of `model` that loses units, by name, and how it is cut; equal shapes alike."""
    state = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for part in graph.parts:
        if isinstance(part, Layer) and not stays_whole(part, alive):
            inputs, outputs = alive.units[part.inputs], alive.units[part.outputs]
            of_weight = partial(living_part, layer=part, alive=alive)
            if part.bias is not None and not outputs.all():
                yield part.bias, (state[part.bias], partial(_select, living=outputs, dim=0))
            yield part.weight, (state[part.weight], of_weight)
            living = {"input": inputs, "output": outputs}
            yield from _noise_cuts(model, part.weight, of_weight, living, living_groups(part, alive))
        elif isinstance(part, Follower) and not alive.units[part.ids].all():
            units = alive.units[part.ids]
            for name, dim in part.tensors.items():
                if name in state:  # what strip adds for an input-dependent gate is not there
                    along = partial(_select, living=units, dim=dim)
                    yield name, (state[name], along)
                    yield from _noise_cuts(model, name, along, {"output": units}, 1)


def _noise_cuts(
    model: nn.Module, weight: str, of_weight: Cut, living: Mapping[str, Tensor], groups: int
) -> Iterator[tuple[str, tuple[Tensor, Cut]]]:
    """How the tensors of the noise on `weight` are cut with it; a gate by which units stay at its place."""
    owner, _, parameter = weight.rpartition(".")
    layer = model.get_submodule(owner)
    for held in noises(layer):
        if held.parameter != parameter:
            continue
        host = tensor_of(layer, parameter).shape
        for key, tensor in chain(held.noise.named_parameters(), held.noise.named_buffers()):
            name = f"{owner}.{held.slot}.{key}".lstrip(".")
            if tensor.numel() == 1 or key in held.noise.of_layer:
                continue
            if not isinstance(held.noise, Gate):
                _check_spreads(name, tensor, host)
                yield name, (tensor, partial(_along, host=host, of_weight=of_weight, groups=groups))
            elif (units := living.get(held.noise.place)) is not None:
                if tensor.shape != units.shape:
                    raise ConversionError(f"{name} has shape {tuple(tensor.shape)}: must hold a number for each unit")
                yield name, (tensor, partial(_select, living=units, dim=0))


def _check_spreads(name: str, tensor: Tensor, host: torch.Size) -> None:
    fits = tensor.dim() == len(host) and host[0] % len(tensor) == 0
    if not fits or any(own not in (1, size) for own, size in zip(tensor.shape[1:], host[1:], strict=True)):
        raise ConversionError(f"{name} has shape {tuple(tensor.shape)}: must spread over a weight of {tuple(host)}")


def _along(tensor: Tensor, host: torch.Size, of_weight: Cut, groups: int) -> Tensor:
    """A tensor that spreads over a weight of the shape `host`, cut with it; its rows may be those of groups."""
    rows = len(tensor)
    small = of_weight(tensor.repeat_interleave(host[0] // rows, dim=0).expand(host))
    left = {1: 1, host[0]: len(small)}.get(rows, groups)
    small = small[:: len(small) // left]
    for dim in range(1, tensor.dim()):
        small = small[(slice(None),) * dim + (slice(tensor.shape[dim] if tensor.shape[dim] == 1 else None),)]
    return small


def _select(tensor: Tensor, living: Tensor, dim: int) -> Tensor:
    return tensor.index_select(dim, living.nonzero()[:, 0].to(tensor.device))


def _emptied(marked: nn.Module, cuts: Mapping[str, tuple[Tensor, Cut]]) -> str | None:
    """The first noisy weight of which no living element would stay, so that no rule could judge what does."""
    living: dict[str, Tensor] = {}
    for name, layer in marked.named_modules():
        for held in noises(layer):
            weight = tensor_of(layer, held.parameter)
            full = f"{name}.{held.parameter}".lstrip(".")
            alive = living.setdefault(full, torch.ones(weight.shape, dtype=torch.bool))
            if held.noise.mask is not None:
                alive &= held.noise.on_weights(held.noise.mask, weight).cpu()
    for name, alive in living.items():
        if not (cuts[name][1](alive) if name in cuts else alive).any():
            return name
    return None


def _constants(marked: nn.Module, graph: Graph, alive: Alive) -> Iterator[tuple[str, Tensor]]:
    """What the constants that go add to each bias: its name, and float64 for the units that stay."""
    for part in graph.layers:
        if part.bias is not None and not stays_whole(part, alive):
            owner, _, parameter = part.weight.rpartition(".")
            weight = _quiet_weight(marked.get_submodule(owner), parameter)
            yield part.bias, left_behind(weight, part, alive)[alive.units[part.outputs]]


def _quiet_weight(layer: nn.Module, parameter: str) -> Tensor:
    """The weight of a noisy or plain `layer` in a quiet pass, before a gate multiplies its outputs."""
    weight = tensor_of(layer, parameter)
    for held in noises(layer):
        if held.parameter == parameter and not (isinstance(held.noise, Gate) and held.noise.place == "output"):
            weight = held.noise.folded(weight, None)[0]
    return weight


def _replace(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    cuts: Mapping[str, tuple[Tensor, Cut]],
    small: dict[str, Tensor],
) -> None:
    """Puts the small tensors in the places of the large ones, in `model` and in the `optimizers`."""
    new: dict[Tensor, nn.Parameter] = {}
    for name, (tensor, cut) in cuts.items():
        path, _, attribute = name.rpartition(".")
        value = small[name]
        if isinstance(tensor, nn.Parameter):
            value = new[tensor] = nn.Parameter(value, requires_grad=tensor.requires_grad)
            if tensor.grad is not None:
                value.grad = laid_like(cut(tensor.grad), tensor)
            for each in optimizers:
                if tensor in each.state:
                    each.state[value] = {
                        key: laid_like(cut(kept), tensor) if isinstance(kept, Tensor) and kept.numel() > 1 else kept
                        for key, kept in each.state.pop(tensor).items()
                    }
        setattr(model.get_submodule(path), attribute, value)
    for group in (group for each in optimizers for group in each.param_groups):
        group["params"][:] = [new.get(parameter, parameter) for parameter in group["params"]]

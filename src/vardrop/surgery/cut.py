"""The cut itself: smaller parameters in the same modules, proved on a copy before the model is touched."""

from __future__ import annotations

import traceback
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves, tree_map

from vardrop.errors import GraphError
from vardrop.layers import is_conv1d
from vardrop.modes import copied
from vardrop.surgery.graph import Graph, as_arguments, read
from vardrop.surgery.layer_rules import canonical, contribution
from vardrop.surgery.plan import Alive, Plan, describe, folded, solve
from vardrop.surgery.reading import Follower, Layer


def plan(model: nn.Module, example_inputs: Any, *, on_unknown: str = "refuse") -> Plan:
    """What :func:`cut` would do; `model` is left as it is.

    The cut is made on a copy and compared with the model on the example, on a random input of the same shape, and,
    where the model takes them, on a batch of one and on a large one.

    Args:
        model: a network of torch.nn layers whose weights hold zeros.
        example_inputs: one tensor, or a tuple with the arguments of the model's forward.
        on_unknown: ``"refuse"`` raises at an operation without a rule, ``"keep"`` keeps all units around it.

    Raises:
        GraphError: the model cannot be traced, holds an operation without a rule, states sizes in its code
            that the cut changes, or does not give the same outputs after the cut.
        InvalidValueError: `on_unknown` is something else.

    >>> from vardrop.surgery.cut import plan
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    >>> net = net.requires_grad_(False)
    >>> net[0].weight[:5] = 0
    >>> print(plan(net, torch.randn(1, 4)))
    layer  inputs  units   folded  stays though constant
    0      4       8 -> 3
    2      8 -> 3  2       5
    parameters: 58 -> 23
    """
    return prove(model, as_arguments(example_inputs), on_unknown)[0]


def cut(model: nn.Module, example_inputs: Any, *, on_unknown: str = "refuse") -> Plan:
    """Takes out of `model`, in place, all units that no output depends on, and returns what was done.

    In eval mode the outputs stay the same to float accuracy, for every input whose shape differs from the
    example's in the batch size alone. Modules keep their classes and names; their parameters are new and
    smaller. Arguments and errors are those of :func:`plan`; after an error the model is unharmed.

    >>> from vardrop.surgery.cut import cut
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    >>> net = net.requires_grad_(False)
    >>> net[0].weight[:5] = 0
    >>> done = cut(net, torch.randn(1, 4))
    >>> net
    Sequential(
      (0): Linear(in_features=4, out_features=3, bias=True)
      (1): Tanh()
      (2): Linear(in_features=3, out_features=2, bias=True)
    )
    """
    done, graph, alive = prove(model, as_arguments(example_inputs), on_unknown)
    _apply(model, graph, alive)
    return done


def prove(
    model: nn.Module, inputs: tuple[Any, ...], on_unknown: str, *, new_biases: bool = True
) -> tuple[Plan, Graph, Alive]:
    """What :func:`cut` would do, seen on a copy to leave the outputs as they are.

    Unless there may be `new_biases`, layers without one take up no constants, so that their readers stay.
    """
    graph = read(model, inputs, on_unknown=on_unknown, new_biases=new_biases)
    alive = solve(graph)
    try:
        small = model if alive.units.all() else _compare(model, inputs, graph, alive)
    except GraphError:
        if on_unknown == "refuse" or not graph.fixed_sizes:
            raise
        graph = read(model, inputs, on_unknown=on_unknown, keep_fixed_sizes=True, new_biases=new_biases)
        alive = solve(graph)
        small = _compare(model, inputs, graph, alive)
    return Plan(describe(graph, alive), graph.notes, _count(model), _count(small)), graph, alive


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _apply(model: nn.Module, graph: Graph, alive: Alive) -> None:
    with torch.no_grad():
        for part in graph.parts:
            if isinstance(part, Layer):
                _cut_layer(model, part, alive)
            else:
                _cut_follower(model, part, alive)


def _cut_layer(model: nn.Module, layer: Layer, alive: Alive) -> None:
    if stays_whole(layer, alive):
        return
    weight = _get(model, layer.weight)
    added = left_behind(weight, layer, alive)
    bias = _get(model, layer.bias) if layer.bias else None
    if bias is not None or added.any():
        full = added if bias is None else bias.cpu().double() + added
        name = layer.bias or layer.weight.removesuffix("weight") + "bias"
        _put(model, name, full[alive.units[layer.outputs]], weight if bias is None else bias)
    _put(model, layer.weight, living_part(weight, layer, alive), weight)
    count_anew(model, layer, alive)


def stays_whole(layer: Layer, alive: Alive) -> bool:
    """Whether no unit of `layer` goes."""
    return bool(alive.units[layer.inputs].all() and alive.units[layer.outputs].all())


def left_behind(weight: Tensor, layer: Layer, alive: Alive) -> Tensor:
    """What the constants that go add to the bias of `layer`, through its `weight`: float64, ``(outputs,)``."""
    weights = canonical(weight.cpu(), layer.groups, layer.transposed)
    return contribution(weights, torch.where(folded(layer, alive), layer.const, 0.0))


def living_part(weight: Tensor, layer: Layer, alive: Alive) -> Tensor:
    """What stays of a tensor of the shape of the weight of `layer`; on the CPU."""
    weights = canonical(weight.cpu(), layer.groups, layer.transposed)
    inputs, outputs = alive.units[layer.inputs], alive.units[layer.outputs]
    small = _living(weights, inputs.view(layer.groups, -1), outputs.view(layer.groups, -1))
    rows = (small.transpose(1, 2) if layer.transposed else small).flatten(0, 1)
    return rows.reshape(*rows.shape[:2], *weight.shape[2:])


def living_groups(layer: Layer, alive: Alive) -> int:
    """How many groups of `layer` stay."""
    return int(alive.units[layer.outputs].view(layer.groups, -1).any(1).sum())


def count_anew(model: nn.Module, layer: Layer, alive: Alive) -> None:
    """Sets the numbers of units that the module behind `layer` tells."""
    inputs, outputs = alive.units[layer.inputs], alive.units[layer.outputs]
    owner: Any = _owner(model, layer.weight)
    counts = int(inputs.sum()), int(outputs.sum())
    if isinstance(owner, nn.Linear):
        owner.in_features, owner.out_features = counts
    elif any(map(is_conv1d, type(owner).__mro__)):
        owner.nf = counts[1]
        if hasattr(owner, "nx"):
            owner.nx = counts[0]
    elif isinstance(owner, _ConvNd):
        owner.in_channels, owner.out_channels, owner.groups = *counts, living_groups(layer, alive)
    elif isinstance(owner, nn.RNNBase) and "weight_hh" in layer.weight:
        owner.hidden_size = counts[0]
    elif isinstance(owner, nn.RNNBase) and layer.weight.endswith("weight_ih_l0"):
        owner.input_size = counts[0]


def _living(weights: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
    """The part of a weight ``(groups, outputs, inputs, taps)`` that lives."""
    groups = outputs.any(1).nonzero()
    columns = inputs[groups[:, 0]].nonzero()[:, 1].view(len(groups), 1, -1)
    rows = outputs[groups[:, 0]].nonzero()[:, 1].view(len(groups), -1, 1)
    return weights[groups.view(-1, 1, 1), rows, columns]


def _cut_follower(model: nn.Module, follower: Follower, alive: Alive) -> None:
    living = alive.units[follower.ids]
    if living.all():
        return
    for name, dim in follower.tensors.items():
        tensor = _get(model, name)
        _put(model, name, tensor.index_select(dim, living.nonzero()[:, 0].to(tensor.device)), tensor)
    if follower.counts is not None:
        setattr(model.get_submodule(follower.name), follower.counts, int(living.sum()))


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _get(model: nn.Module, name: str) -> Tensor:
    return cast(Tensor, getattr(_owner(model, name), name.rpartition(".")[2]))


def _put(model: nn.Module, name: str, values: Tensor, like: Tensor) -> None:
    """Sets a parameter or buffer to `values`, of the kind and type of the tensor `like`."""
    owner, attribute = _owner(model, name), name.rpartition(".")[2]
    tensor = laid_like(values.to(like.dtype), like)
    if isinstance(like, nn.Parameter):
        setattr(owner, attribute, nn.Parameter(tensor, requires_grad=like.requires_grad))
    else:
        setattr(owner, attribute, tensor)


def laid_like(small: Tensor, large: Tensor) -> Tensor:
    """`small` on the device of `large`, in its order of dimensions in memory."""
    kinds = {4: torch.channels_last, 5: torch.channels_last_3d}
    kind = kinds.get(large.dim(), torch.contiguous_format)
    if not large.is_contiguous(memory_format=kind) or large.is_contiguous():
        kind = torch.contiguous_format
    return small.to(large.device).clone(memory_format=kind)


class _DoesNotRun(Exception):
    """The model does not run on its example."""


def _compare(model: nn.Module, inputs: tuple[Any, ...], graph: Graph, alive: Alive) -> nn.Module:
    """A cut copy of `model` that was seen to compute the same, in float64 where the model runs in it."""
    wide = tree_map(lambda leaf: leaf.double() if _is_float(leaf) else leaf, inputs)
    try:
        return _compare_copies(deepcopy(model).eval().double(), wide, graph, alive)
    except _DoesNotRun:
        return _compare_copies(deepcopy(model).eval(), inputs, graph, alive)


def _compare_copies(large: nn.Module, inputs: tuple[Any, ...], graph: Graph, alive: Alive) -> nn.Module:
    """Cuts a copy of `large` and holds the two together on all samples that `large` takes."""
    small = deepcopy(large)
    _apply(small, graph, alive)
    types = {tensor.dtype for tensor in (*large.parameters(), *large.buffers()) if tensor.is_floating_point()}
    coarsest = max((torch.finfo(dtype).eps for dtype in types), default=0.0)
    for sample in _samples(inputs):
        try:
            expected = run(large, sample)
        except Exception as error:
            if sample is inputs:
                raise _DoesNotRun from error
            continue
        try:
            found = run(small, sample)
        except Exception as error:
            raise GraphError(_explain_failure(error, graph, alive)) from error
        if not equal(expected, found, coarsest):
            raise GraphError(_explain_difference(large, sample, expected, graph, alive))
    return small


def _samples(inputs: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """The example, a random input of the same shape, one of its examples, and both as one batch, of 16 at least."""
    generator = torch.Generator().manual_seed(0)

    def random(leaf: Any) -> Any:
        return torch.randn(leaf.shape, generator=generator).to(leaf) if _is_float(leaf) else leaf

    other = tree_map(random, inputs)
    return [inputs, other, tree_map(_first, other), tree_map(stacked, inputs, other)]


def _first(leaf: Any) -> Any:
    return leaf[:1] if isinstance(leaf, Tensor) and leaf.ndim else leaf


def stacked(first: Any, second: Any) -> Any:
    """Both as one batch, of 16 at least."""
    if not isinstance(first, Tensor) or not first.ndim:
        return first
    return torch.cat([first, second] * max(1, 8 // max(1, len(first))))


def run(model: nn.Module, inputs: tuple[Any, ...]) -> list[Any]:
    """The outputs of `model`, without gradients, as a list of leaves; it gets copies of the `inputs`."""
    with torch.no_grad():
        return tree_leaves(model(*copied(inputs)))


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def equal(expected: list[Any], found: list[Any], rounding: float = 0.0) -> bool:
    """Whether two lists of outputs have the same shapes and, but for rounding, the same numbers.

    The `rounding` inside the net, relative, counts where it is coarser than that of the outputs.
    """
    pairs = [(_real(a), _real(b)) for a, b in zip(expected, found, strict=True) if isinstance(a, Tensor)]
    return all(a.shape == b.shape and (not _is_float(a) or _close(a, b, rounding)) for a, b in pairs)


def _real(leaf: Any) -> Any:
    return torch.view_as_real(leaf) if isinstance(leaf, Tensor) and leaf.is_complex() else leaf


def _close(expected: Tensor, found: Tensor, rounding: float) -> bool:
    """Equal to half of the digits of the type, measured against the largest output."""
    finite = expected[expected.isfinite()].abs()
    scale = max(finite.max().item() if finite.numel() else 0.0, 1e-4)
    tolerance = max(torch.finfo(expected.dtype).eps, rounding) ** 0.5 * scale
    return torch.allclose(found, expected, rtol=0.0, atol=tolerance, equal_nan=True)


def _explain_failure(error: Exception, graph: Graph, alive: Alive) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames]
    own = [place for place in range(len(frames)) if not _is_torch(frames[place].filename)]
    first = str(error).strip().partition("\n")[0] or type(error).__name__
    line = f"`{frames[own[-1]].line}` ({places[own[-1]]})"
    return _stated(graph, alive, places) or (
        f"after the cut the model fails in {line}: {first}; its code may rely on sizes that the cut changes"
    )


def _explain_difference(
    large: nn.Module, sample: tuple[Any, ...], expected: list[Any], graph: Graph, alive: Alive
) -> str:
    if not equal(expected, run(large, sample)):
        return (
            "the model gives other outputs each time in eval mode, so no cut can be checked: switch off what is random"
        )
    return _stated(graph, alive, []) or (
        "after the cut the model gives other outputs; its code may use the sizes of its tensors as numbers"
    )


def _stated(graph: Graph, alive: Alive, places: list[str]) -> str:
    """Names the reshapes that state a size which the cut has changed, the ones at `places` first of all."""
    changed = [fixed for fixed in graph.fixed_sizes if not alive.units[fixed.ids].all()]
    chosen = [fixed for fixed in changed if any(f"({place})" in fixed.line for place in places)] or changed
    if not chosen:
        return ""
    named = ", ".join(
        f"{fixed.line} states the size {fixed.size}, of which {int(alive.units[fixed.ids].sum())} are left"
        for fixed in chosen
    )
    return (
        f"{named}: write torch.flatten(x, 1) or nn.Flatten(), or -1 for that size; or pass on_unknown='keep' "
        "to keep these units"
    )


def _is_torch(path: str) -> bool:
    return Path(torch.__file__).parent in Path(path).parents

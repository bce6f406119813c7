"""How linear layers and convolutions read units and make units."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from vardrop.layers import is_conv1d
from vardrop.surgery.reading import Layer, Outcome, Reading, arguments, operation, shape
from vardrop.surgery.units import Value


@dataclass(frozen=True)
class _Call:
    """One call of a linear or convolution: its operands, where its channels are, what keeps constants in."""

    node: Node
    source: Node
    weight: Node
    bias: Node | None
    dim: int
    groups: int
    transposed: bool
    obstacle: str


def linear(reading: Reading, node: Node) -> Outcome:
    """``y = x W^T + b`` over the last dimension."""
    given = arguments(node)
    source: Node = given["input"]
    call = _Call(node, source, given["weight"], given["bias"], len(shape(source)) - 1, 1, False, "")
    return _read(reading, call)


def product(reading: Reading, node: Node) -> Outcome:
    """``y = b + x W``: the Conv1D of transformers; any other product of this kind reads all its units at once."""
    given = arguments(node)
    source, weight = given["mat1"], given["mat2"]
    name = reading.state_name(weight)
    if name is None or not reading.is_plain_call(node, name) or not is_conv1d(type(reading.owner(name))):
        return reading.stop(node)
    return _read(reading, _Call(node, source, weight, given["self"], 1, 1, True, ""))


def convolution(reading: Reading, node: Node) -> Outcome:
    """A convolution, plain or transposed; padding makes a constant channel differ at the borders."""
    given, name = arguments(node), operation(node)
    source: Node = given["input"]
    rank = int(name[-2])
    transposed = "transpose" in name
    obstacle = "a transposed convolution spreads it unevenly" if transposed else _padding(given, rank)
    dim = len(shape(source)) - 1 - rank
    call = _Call(node, source, given["weight"], given["bias"], dim, given["groups"], transposed, obstacle)
    return _read(reading, call)


def canonical(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    """Any layer's weight as ``(groups, outputs of a group, inputs of a group, taps)``."""
    split = weight.reshape(groups, len(weight) // groups, weight.shape[1], math.prod(weight.shape[2:]))
    return split.transpose(1, 2) if transposed else split


def contribution(weight: Tensor, const: Tensor) -> Tensor:
    """What constant inputs add to each output: ``sum_i const_i sum_taps weight_oi``; float64, ``(outputs,)``.

    Args:
        weight: as made by :func:`canonical`.
        const: the constants, one for each input, zero for the others.
    """
    by_group = const.view(len(weight), -1)
    used = (by_group != 0).any(0)
    return torch.einsum("goi,gi->go", weight[:, :, used].double().sum(-1), by_group[:, used]).flatten()


def _padding(given: dict[str, Any], rank: int) -> str:
    padding = given["padding"]
    if isinstance(padding, str):
        taps = shape(given["weight"])[-rank:]
        padded = padding == "same" and any(size > 1 for size in taps)
    else:
        padded = any(padding) if isinstance(padding, list | tuple) else bool(padding)
    return "zero padding cuts it off at the border" if padded else ""


def _read(reading: Reading, call: _Call) -> Outcome:
    why = reading.obstacle(call.weight) or (reading.obstacle(call.bias) if call.bias is not None else None)
    weight_name, bias_name = reading.state_name(call.weight), reading.state_name(call.bias)
    weight = reading.state(call.weight)
    if why is not None or weight is None or weight_name is None:
        return _keep(reading, call, why or "its weight changes during the pass")
    plain = reading.is_plain_call(call.node, weight_name)
    if call.groups > 1 and not plain:
        return _keep(reading, call, f"{weight_name} is called as a function with a fixed number of groups")
    value = reading.units(call.source, call.dim, f"{operation(call.node)} mixes another dimension than its units'")
    weights = canonical(weight, call.groups, call.transposed)
    reads = (weights != 0).any(-1)
    moves = value.known & ((value.const == 0) | (call.obstacle == ""))
    bias = reading.state(call.bias)
    made = contribution(weights, torch.where(moves, value.const, 0.0))
    made = made if bias is None else made + bias.double()
    varies = (reads & ~moves.view(call.groups, 1, -1)).any(-1).flatten()
    outputs = Value(call.dim, reading.classes.new(len(made)), torch.where(varies, torch.nan, made))
    owner, _, attribute = weight_name.rpartition(".")
    reading.parts.append(
        Layer(
            name=owner if plain or attribute == "weight" else weight_name,
            weight=weight_name,
            bias=bias_name,
            transposed=call.transposed,
            inputs=value.ids,
            outputs=outputs.ids,
            const=value.const,
            reads=reads,
            folds=moves & ((value.const == 0) | (bias is not None) | (plain and reading.new_biases)),
            obstacle=call.obstacle or "there is no bias to take it",
            makes=outputs.const,
        )
    )
    if call.groups > 1:
        blocks = zip(value.ids.view(call.groups, -1), outputs.ids.view(call.groups, -1), strict=True)
        reading.balance(f"the groups of {owner}", tuple(blocks), may_vanish=True)
    return outputs


def _keep(reading: Reading, call: _Call, why: str) -> Outcome:
    name = reading.state_name(call.weight) or operation(call.node)
    reading.notes.append(f"{name.removesuffix('.weight')} is kept as it is: {why}")
    return reading.stop(call.node, f"read by {name.removesuffix('.weight')}, which is kept as it is")

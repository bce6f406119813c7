"""How operations that move, merge, split or repeat dimensions carry units along."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from vardrop.surgery.reading import FixedSize, Outcome, Reading, arguments, line_of, operation, shape
from vardrop.surgery.units import Value


def reshape(reading: Reading, node: Node) -> Outcome:
    """Units are followed where their dimension stays, merges (flatten), or splits into an open number."""
    value, before, after = reading.value(node.args[0]), shape(cast(Node, node.args[0])), shape(node)
    if value is None or "dtype" in arguments(node):
        return reading.stop(node)
    stated = _stated_sizes(node)
    found = _merged(value, before, after) or _split(reading, value, before, after, stated)
    if found is None:
        return reading.stop(node)
    return _stated(reading, node, found, stated.get(found.dim))


def _stated(reading: Reading, node: Node, found: Value, size: int | None) -> Value | None:
    """Notes a size of the units' dimension that may be written as a number in the user's code."""
    if size is not None and reading.keep_fixed_sizes:
        return reading.stop(node)
    if size is not None:
        reading.fixed_sizes.append(FixedSize(f"{operation(node)} in {line_of(node)}", size, found.ids))
    return found


def _stated_sizes(node: Node) -> dict[int, int]:
    """The sizes in the arguments of a reshape, by dimension of the result."""
    given, name = arguments(node), operation(node)
    sizes = given.get("sizes") or given.get("shape") or given.get("size") or []
    start = given["dim"] % len(shape(given["self"])) if name == "unflatten" else 0
    return {start + place: size for place, size in enumerate(sizes) if size != -1}


def _merged(value: Value, before: torch.Size, after: torch.Size) -> Value | None:
    """The dimension of units stays alone, or merges with its neighbours into one."""
    count, lead, rest = len(value), prod(before[: value.dim]), prod(before[value.dim + 1 :])
    found: Value | None = None
    for dim, size in enumerate(after):
        own_lead, own_rest = prod(after[:dim]), prod(after[dim + 1 :])
        if lead % own_lead or rest % own_rest or size != lead // own_lead * count * (rest // own_rest):
            continue
        if found is None or size == count:
            found = value.take(torch.arange(size) // (rest // own_rest) % count, dim)
    return found


def _split(
    reading: Reading, value: Value, before: torch.Size, after: torch.Size, stated: Mapping[int, int]
) -> Value | None:
    """The dimension of units splits: each block of entries becomes one unit."""
    lead, rest = prod(before[: value.dim]), prod(before[value.dim + 1 :])
    for dim, size in enumerate(after):
        own_rest = prod(after[dim + 1 :])
        if prod(after[:dim]) != lead or own_rest % rest or size * own_rest != len(value) * rest or dim in stated:
            continue
        blocks, const = value.ids.view(size, -1), value.const.view(size, -1)
        for column in blocks.T[1:]:
            reading.classes.unite(blocks[:, 0], column)
        uniform = (const == const[:, :1]).all(1)
        return Value(dim, blocks[:, 0], torch.where(uniform, const[:, 0], torch.nan))
    return None


def permute(reading: Reading, node: Node) -> Outcome:
    """The dimension of units moves; where to is seen on a tensor whose sizes tell its dimensions apart."""
    value, ndim = reading.value(node.args[0]), len(shape(cast(Node, node.args[0])))
    if value is None:
        return reading.stop(node)
    marked = torch.empty(tuple(range(2, ndim + 2)), device="meta")
    moved = cast(Tensor, cast(Any, node.target)(marked, *node.args[1:], **node.kwargs))
    return Value(moved.shape.index(value.dim + 2), value.ids, value.const)


def expand(reading: Reading, node: Node) -> Outcome:
    """Other dimensions are repeated, or new ones are put in front."""
    value, before, after = reading.value(node.args[0]), shape(cast(Node, node.args[0])), shape(node)
    if value is None or after[value.dim - len(before)] != len(value):
        return reading.stop(node)
    dim = value.dim + len(after) - len(before)
    size = None if operation(node) == "repeat" else _stated_sizes(node).get(dim)
    return _stated(reading, node, value.take(slice(None), dim), size)


def part(reading: Reading, node: Node) -> Outcome:
    """A slice or selection of another dimension keeps the units; one of the units fixes their number."""
    given = arguments(node)
    value, ndim = reading.value(given["self"]), len(shape(given["self"]))
    dim = given["dim"] % ndim
    if value is None or dim == value.dim:
        return reading.stop(node)
    return value.take(slice(None), value.dim - (len(shape(node)) < ndim and dim < value.dim))

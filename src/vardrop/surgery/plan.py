"""Which units go: everything that no output depends on, as far as the layers stay valid."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from vardrop.surgery.graph import Graph
from vardrop.surgery.reading import Balance, Layer


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one layer.

    Attributes:
        name: the layer.
        inputs: input units before and after; the same as `units` for layers that work unit by unit.
        units: output units before and after.
        folded: constant input units that move into the bias.
        kept: why units that are constant, and so could have gone, stay: the reason and how many.
    """

    name: str
    inputs: tuple[int, int]
    units: tuple[int, int]
    folded: int
    kept: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Plan:
    """What :func:`cut` does to a network; ``print(plan)`` is a table.

    Attributes:
        layers: one entry for each layer, in the order of the pass.
        notes: layers that are kept as they are, and why.
        parameters_before: number of parameters of the network, shared ones once.
        parameters_after: the same after the cut.
    """

    layers: tuple[LayerPlan, ...]
    notes: tuple[str, ...]
    parameters_before: int
    parameters_after: int

    def __getitem__(self, name: str) -> LayerPlan:
        named = {layer.name: layer for layer in self.layers}
        if name not in named:
            raise KeyError(f"{name!r} is no layer of the plan; there are: {', '.join(named)}")
        return named[name]

    def __str__(self) -> str:
        rows = [("layer", "inputs", "units", "folded", "stays though constant")]
        for layer in self.layers:
            kept = "; ".join(f"{count}: {why}" for why, count in layer.kept)
            folded = str(layer.folded or "")
            rows.append((layer.name, _arrow(layer.inputs), _arrow(layer.units), folded, kept))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        total = _arrow((self.parameters_before, self.parameters_after))
        return "\n".join([*lines, *self.notes, f"parameters: {total}"])

    @property
    def obstacles(self) -> list[str]:
        """Why units stay that are nothing but constants, and layers as they are."""
        kept = (f"{layer.name}: {why}" for layer in self.layers for why, _ in layer.kept)
        return list(dict.fromkeys([*self.notes, *kept]))


@dataclass(frozen=True)
class Alive:
    """Which units stay.

    Attributes:
        units: for every unit of the graph, whether it stays.
        why: for each class that stays, the first reason found.
    """

    units: Tensor
    why: dict[int, str]


def solve(graph: Graph) -> Alive:
    """Marks what the outputs depend on, backwards and until nothing changes; the rest can go.

    A layer needs an input unit where a weight of one of its living outputs is not zero, unless the unit is a
    constant that folds into the bias. Layers keep one unit at least, groups and chunks equally many.
    """
    marks = _Marks(graph)
    for ids, why in graph.pins:
        marks.add(ids, why)
    while marks.propagate() or marks.even_out() or marks.spare_the_last():
        pass
    return Alive(marks.alive[graph.classes], marks.why)


class _Marks:
    """The classes marked alive so far."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.alive = torch.zeros(len(graph.classes), dtype=torch.bool)
        self.why: dict[int, str] = {}

    def lives(self, ids: Tensor) -> Tensor:
        return self.alive[self.graph.classes[ids]]

    def add(self, ids: Tensor, why: str) -> bool:
        """Whether any of the units is newly marked."""
        fresh = [root for root in self.graph.of(ids) if not self.alive[root]]
        self.alive[fresh] = True
        self.why.update(dict.fromkeys(fresh, why))
        return bool(fresh)

    def propagate(self) -> bool:
        """Marks the inputs that living outputs depend on."""
        changed = False
        place = "a live unit in the same place is read by"
        for layer in reversed(self.graph.layers):
            living = self.lives(layer.outputs).view(layer.groups, -1, 1)
            needs = (layer.reads & living).any(1).flatten() & ~layer.folds
            known = ~layer.const.isnan()
            changed |= self.add(layer.inputs[needs & known], f"{layer.name} cannot fold it: {layer.obstacle}")
            changed |= self.add(layer.inputs[needs & ~known], f"{place} {layer.name}")
        return changed

    def even_out(self) -> bool:
        """Revives dead units where blocks must keep equally many."""
        return any(self._even_out(balance) for balance in self.graph.balances)

    def _even_out(self, balance: Balance) -> bool:
        present = [
            block for block in balance.blocks if not balance.may_vanish or any(self.lives(row).any() for row in block)
        ]
        changed = False
        for row in zip(*present, strict=True):
            target = max(1, *(int(self.lives(ids).sum()) for ids in row))
            for ids in row:
                dead = ids[~self.lives(ids)]
                missing = target - (len(ids) - len(dead))
                changed |= self.add(dead[:missing], f"a filler that keeps {balance.name} equal")
        return changed

    def spare_the_last(self) -> bool:
        """Revives one unit of the last layer that would have none, a constant one by choice."""
        for layer in reversed(self.graph.layers):
            if len(layer.outputs) and not self.lives(layer.outputs).any():
                best = int(layer.makes.isnan().int().argmin())
                return self.add(layer.outputs[best : best + 1], f"the last unit of {layer.name}")
        return False


def describe(graph: Graph, alive: Alive) -> tuple[LayerPlan, ...]:
    """What happens to each layer of the graph, in the order of the pass."""
    plans = []
    for part in graph.parts:
        if isinstance(part, Layer):
            inputs, outputs = alive.units[part.inputs], alive.units[part.outputs]
            reasons = [alive.why[root] for root in graph.of(part.outputs[outputs & ~part.makes.isnan()])]
            count = int(folded(part, alive).sum())
            plans.append(LayerPlan(part.name, _counts(inputs), _counts(outputs), count, _tally(reasons)))
        else:
            units = _counts(alive.units[part.ids])
            plans.append(LayerPlan(part.name, units, units, 0, ()))
    return tuple(plans)


def folded(layer: Layer, alive: Alive) -> Tensor:
    """The constant inputs of `layer` that go and leave something in its bias."""
    living = alive.units[layer.outputs].view(layer.groups, -1, 1)
    read = (layer.reads & living).any(1).flatten()
    return read & ~alive.units[layer.inputs] & (layer.const != 0)


def _counts(living: Tensor) -> tuple[int, int]:
    return len(living), int(living.sum())


def _tally(reasons: Iterable[str]) -> tuple[tuple[str, int], ...]:
    counts: dict[str, int] = {}
    for reason in reasons:
        counts[reason] = counts.get(reason, 0) + 1
    return tuple(counts.items())


def _arrow(counts: tuple[int, int]) -> str:
    before, after = counts
    return f"{before:,}" if before == after else f"{before:,} -> {after:,}"

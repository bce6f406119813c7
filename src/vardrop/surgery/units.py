"""What is known of one tensor in a network: which dimension carries units, and which units are constants."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Value:
    """A tensor of a network, seen along the one dimension that carries units.

    Attributes:
        dim: the dimension that carries units.
        ids: the class of each entry along `dim`, shape ``(size of dim,)``; entries of one class stay or go
            together.
        const: the value of each entry where it is the same for every input and position, else NaN; float64.
    """

    dim: int
    ids: Tensor
    const: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def known(self) -> Tensor:
        """Which entries are constants."""
        return ~self.const.isnan()

    def take(self, entries: Tensor | slice, dim: int) -> Value:
        """The chosen entries, carried by dimension `dim`."""
        return Value(dim, self.ids[entries], self.const[entries])

    def varying(self) -> Value:
        """The same units, with nothing known of their values."""
        return Value(self.dim, self.ids, unknown(len(self)))


def unknown(count: int) -> Tensor:
    """`count` entries of which no value is known."""
    return torch.full((count,), torch.nan, dtype=torch.float64)


class Classes:
    """Disjoint sets of units: units in one set can only be removed together."""

    def __init__(self) -> None:
        self._parent: list[int] = []

    def new(self, count: int) -> Tensor:
        """`count` fresh classes."""
        start = len(self._parent)
        self._parent.extend(range(start, start + count))
        return torch.arange(start, start + count)

    def unite(self, first: Tensor, second: Tensor) -> None:
        """Puts each unit of `first` and its partner in `second` into one class."""
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            self._parent[self._root(a)] = self._root(b)

    def roots(self) -> Tensor:
        """For every unit ever made, the unit that stands for its class."""
        return torch.tensor([self._root(unit) for unit in range(len(self._parent))], dtype=torch.int64)

    def _root(self, unit: int) -> int:
        while self._parent[unit] != unit:
            self._parent[unit] = self._parent[self._parent[unit]]
            unit = self._parent[unit]
        return unit

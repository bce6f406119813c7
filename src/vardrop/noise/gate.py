"""Gates: multiplicative noise on the units that flow into a layer or out of it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from vardrop.functional.kumaraswamy import CLIP
from vardrop.lrt import Operation, source
from vardrop.noise.base import Layout, Noise

Place = Literal["input", "output"]


class Gate(Noise):
    """One multiplier for each unit; a noisy pass draws it, a quiet pass takes its test-time value.

    Draws are shared by all positions of a unit. The first dimension of a batch counts examples. The units of an
    embedding are its words (inputs) or its columns (outputs); there one draw serves the whole minibatch.

    Args:
        weight: the host's weight.
        layout: the axes and groups of that weight.
        place: whether the units are the layer's inputs or its outputs (bias included).

    Attributes:
        mask: boolean, of shape ``(units,)``.
        units: their number.
    """

    def __init__(self, weight: Tensor, layout: Layout, place: Place) -> None:
        super().__init__()
        self.place: Place = place
        self.resized(weight, layout)

    def resized(self, weight: Tensor, layout: Layout) -> None:
        self.axis = layout.in_axis if self.place == "input" else layout.out_axis
        self.groups = layout.groups
        self.units: int = weight.shape[self.axis] * (layout.groups if self.axis == 1 else 1)

    def mean(self) -> Tensor:
        """The test-time multiplier of each unit, ``(units,)``, as if all were alive."""
        raise NotImplementedError(f"{type(self).__name__} must give its test-time multiplier")

    def sample(self, rows: int) -> Tensor:
        """A draw for each of `rows` examples, ``(rows, units)``, or ``(1, units)`` where they share it."""
        raise NotImplementedError(f"{type(self).__name__} must draw its multiplier")

    def multiplier(self, value: Tensor, dim: int) -> Tensor:
        """Multipliers ``(examples or 1, units)`` for `value`, whose units are counted by its negative `dim`."""
        return self.sample(_examples(value, dim)) if self.active else self.mean()[None]

    def forward(self, operation: Operation, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        dim = 1 - weight.dim()
        if self.place == "input":
            return operation(self.gated(x, dim), weight, bias)
        return self.gated(operation(x, weight, bias), dim)

    def gated(self, value: Tensor, dim: int) -> Tensor:
        """`value` times its multipliers; its units are counted by the negative `dim`."""
        with torch.autocast(value.device.type, enabled=False):
            factor = self.open(self.multiplier(value, dim))
        return value * broadcast(factor, value, dim).to(value.dtype)

    def gated_table(self, weight: Tensor) -> Tensor:
        """The whole table `weight` times its multipliers: one draw for all that is looked up in it."""
        with torch.autocast(weight.device.type, enabled=False):
            factor = self.open(self.sample(1)[0] if self.active else self.mean())
        return weight * self.spread(factor, weight).to(weight.dtype)

    def open(self, factor: Tensor) -> Tensor:
        """`factor`, ``(..., units)``, with dead units at zero."""
        return factor if self.mask is None else factor.masked_fill(~self.mask, 0.0)

    def mask_shape(self, weight: Tensor) -> torch.Size:
        return torch.Size((self.units,))

    def on_weights(self, mask: Tensor, weight: Tensor) -> Tensor:
        return self.spread(mask, weight)

    def folded(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        factor = self.open(self.mean())
        if bias is not None and self.place == "output":
            bias = _times(bias, factor)
        return _times(weight, self.spread(factor, weight)), bias

    def spread(self, values: Tensor, weight: Tensor) -> Tensor:
        """Values of the units, ``(units,)``, for the weights that read or make them; broadcasts to `weight`."""
        ones = (1,) * (weight.dim() - 2)
        if self.axis == 0:
            return values.reshape(-1, 1, *ones)
        rows = values.reshape(self.groups, -1).repeat_interleave(weight.shape[0] // self.groups, dim=0)
        return rows.reshape(*rows.shape, *ones)

    def filled(self, weight: Tensor, value: float) -> Tensor:
        """`value` for each unit, in float32 or better, where `weight` lies."""
        return torch.full(
            (self.units,), value, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device
        )

    def sum_alive(self, each: Tensor) -> Tensor:
        """Sum of one number for each unit over the living units."""
        return (each if self.mask is None else each.masked_fill(~self.mask, 0.0)).sum()

    def normal(self, rows: int, like: Tensor) -> Tensor:
        """Standard normal draws ``(rows, units)`` of the kind of `like`, in float32 or better."""
        return torch.randn(rows, self.units, **self._kind(like))

    def uniform(self, rows: int, like: Tensor) -> Tensor:
        """Uniform draws ``(rows, units)`` in [1e-6, 1 - 1e-6] of the kind of `like`, in float32 or better."""
        return torch.rand(rows, self.units, **self._kind(like)).clamp(CLIP, 1.0 - CLIP)

    def _kind(self, like: Tensor) -> dict[str, Any]:
        return {
            "dtype": torch.promote_types(like.dtype, torch.float32),
            "device": like.device,
            **source(self.generator),
        }


def broadcast(factor: Tensor, value: Tensor, dim: int) -> Tensor:
    """`factor`, ``(examples or 1, units)``, made to multiply `value`, whose units are counted by the negative `dim`."""
    lead = [1] * (value.dim() + dim)
    lead[:1] = [len(factor)] * len(lead[:1])
    return factor.reshape(*lead, factor.shape[1], *[1] * (-dim - 1))


def _examples(value: Tensor, dim: int) -> int:
    """How many examples `value` holds: one where its first dimension is that of its units."""
    return value.shape[0] if value.dim() + dim > 0 else 1


def _times(weight: Tensor, factor: Tensor) -> Tensor:
    """The product in the type of `weight`; a zero in it has no sign."""
    product = (weight * factor).to(weight.dtype)
    return product.masked_fill(product == 0.0, 0.0)

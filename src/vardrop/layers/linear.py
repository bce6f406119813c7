"""Noisy dense layers."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch.nn.functional
from torch import Tensor, nn

from vardrop.layers.base import run
from vardrop.noise import Gate, Layout, Noise


class NoisyLinear(nn.Linear):
    """``nn.Linear`` whose weight is a posterior mean, its spread in ``noise``; ``gate`` multiplies units."""

    noise: Noise
    gate: Gate

    @property
    def layout(self) -> Layout:
        return Layout()

    def forward(self, input: Tensor) -> Tensor:
        return run(self, torch.nn.functional.linear, input)


class NoisyConv1D(nn.Module):
    """Base of the noisy form of transformers' ``Conv1D``: a dense layer whose weight is ``(inputs, outputs)``."""

    noise: Noise
    gate: Gate

    @property
    def layout(self) -> Layout:
        return Layout(out_axis=1, in_axis=0)

    def forward(self, x: Tensor) -> Tensor:
        return run(self, _transposed_linear, x)

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty_conv1d, (type(self).__bases__[-1],), vars(self).copy()


def _transposed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, weight.t(), bias)


def is_conv1d(kind: type[nn.Module]) -> bool:
    """Whether `kind` is transformers' ``Conv1D``, told by its name, so that transformers is not imported here."""
    return (kind.__module__, kind.__qualname__) == ("transformers.pytorch_utils", "Conv1D")


def _empty_conv1d(kind: type[nn.Module]) -> nn.Module:
    """What a pickle begins with: it finds a class by its name alone, and that of this one is made when needed."""
    noisy = noisy_conv1d(kind)  # type: ignore[arg-type]
    return noisy.__new__(noisy)


@cache
def noisy_conv1d(kind: type[nn.Module]) -> type[nn.Module]:
    """The noisy class of transformers' ``Conv1D``."""
    return type("NoisyConv1D", (NoisyConv1D, kind), {"__module__": __name__})

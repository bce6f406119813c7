"""The one way from a layer's input to its output."""

from __future__ import annotations

from functools import partial
from typing import cast

from torch import Tensor, nn

from vardrop.lrt import Operation


def run(layer: nn.Module, operation: Operation, x: Tensor) -> Tensor:
    """The plain `operation` of `layer` through its noise on weights and its gate on units, whichever it has."""
    for slot in ("noise", "gate"):
        module = layer._modules.get(slot)
        if module is not None:
            operation = partial(module, operation)
    return operation(x, cast(Tensor, layer.weight), cast(Tensor | None, layer.bias))

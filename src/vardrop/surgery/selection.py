"""Linear layers that read a part of their inputs: for inputs that no weight uses and that nothing before can leave out.

The pixels of an image are such inputs: compaction must keep them, since the net is still called with whole images.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from vardrop.errors import InvalidValueError
from vardrop.noise import InputGate, Inputs, with_first
from vardrop.sites import noises
from vardrop.surgery.plain import copy_of

WORTH_SELECTING = 20_000
"""Weights that a layer must save, so that reading them takes longer than to pick the inputs, at batch size 1 too."""


class InputSelection(nn.Module):
    """Some of the inputs, ``x[..., kept]``, in plain operations that `torch.export` and ONNX know.

    Args:
        kept: their places, in order, ``(inputs,)``.
    """

    kept: Tensor

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.register_buffer("kept", kept.to(torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(-1, self.kept)

    def extra_repr(self) -> str:
        return f"{len(self.kept)} inputs"

    def hang_on(self, layer: nn.Linear) -> None:
        """Makes the plain `layer` begin every pass with this."""
        layer.selection = self
        layer.register_forward_pre_hook(_select, prepend=True, with_kwargs=True)


def _select(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Inputs:
    return with_first(cast(InputSelection, layer.selection), inputs, named)


def select_inputs(model: nn.Module, *, least: int = WORTH_SELECTING) -> nn.Module:
    """A copy of a compacted `model` whose linear layers read only the inputs that some weight of theirs uses.

    A layer gets a smaller weight, and as a child ``selection`` an :class:`InputSelection` that picks its inputs; an
    input-dependent gate on them is cut along. Outputs are the same to float accuracy for finite inputs, unless the
    model's forward reads a layer's ``in_features``: that is the number of inputs picked.
    :func:`vardrop.save`, :func:`vardrop.load` and :func:`vardrop.export_onnx` know such layers.

    Args:
        model: plain, as :func:`vardrop.compact` gives it.
        least: weights that a layer must save at least, above 0.

    Raises:
        InvalidValueError: `least` is below 1, or a layer of `model` is noisy.

    Source: the papers count the inputs that are left among the units, such as 245 of 784 in arXiv:1705.07283; picking
    them is a choice of this library.

    >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 100))
    >>> net = net.requires_grad_(False)
    >>> net[1].weight[:, 200:] = 0
    >>> vd.select_inputs(net)
    Sequential(
      (0): Flatten(start_dim=1, end_dim=-1)
      (1): Linear(
        in_features=200, out_features=100, bias=True
        (selection): InputSelection(200 inputs)
      )
    )
    """
    if not isinstance(least, int) or least < 1:
        raise InvalidValueError(f"least={least!r}: must be a whole number, at least 1")
    small = copy_of(model)
    users = [parameter for layer in small.modules() for parameter in layer._parameters.values()]
    for name, layer in small.named_modules():
        if noises(layer):
            raise InvalidValueError(f"layer {name!r} is noisy: call vardrop.compact(model, example_inputs) first")
        tied = sum(parameter is layer._parameters.get("weight") for parameter in users) > 1
        if type(layer) is nn.Linear and "selection" not in layer._modules and not tied:
            used = layer.weight.detach().count_nonzero(dim=0) > 0
            if int((~used).sum()) * layer.out_features >= least:
                _cut(layer, used.nonzero()[:, 0] if used.any() else used.new_zeros(1, dtype=torch.int64))
    return small


def _cut(layer: nn.Linear, kept: Tensor) -> None:
    gate = layer._modules.get("gate")
    if isinstance(gate, InputGate) and gate.place == "input":
        gate.scale, gate.shift = _part(gate.scale, kept, 0), _part(gate.shift, kept, 0)
        gate.floor = gate.floor[kept]
    layer.weight = _part(cast(nn.Parameter, layer.weight), kept, 1)
    layer.in_features = len(kept)
    InputSelection(kept).hang_on(layer)


def _part(parameter: nn.Parameter, kept: Tensor, dim: int) -> nn.Parameter:
    return nn.Parameter(parameter.detach().index_select(dim, kept), requires_grad=parameter.requires_grad)

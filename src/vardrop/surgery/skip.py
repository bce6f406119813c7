"""Run-time skipping: what a dependent gate closes for the input at hand is not computed."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from vardrop.errors import ConversionError, InvalidValueError
from vardrop.noise import InputGate


class SkippingLinear(nn.Module):
    """A linear layer behind an input gate, for one example at a time, that reads its open inputs alone.

    The weight is kept as ``(in, out)``, so that the rows of open inputs lie together in memory. What is computed
    depends on the data, so it cannot be exported.

    Args:
        layer: a linear layer with an :class:`~vardrop.noise.InputGate` on its inputs.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.gate = cast(InputGate, layer.gate)
        self.selection = layer._modules.get("selection") or nn.Identity()
        self.register_buffer("weight", layer.weight.detach().T.contiguous())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        x = self.selection(x)
        if x.numel() != len(self.gate.scale):
            raise InvalidValueError(
                f"x has shape {tuple(x.shape)}: must be one example with {len(self.gate.scale)} units"
            )
        gated = (x * self.gate.opening(x)).flatten()
        open_units = gated.nonzero()[:, 0]
        if 2 * len(open_units) > len(gated):  # to gather most of the weight takes longer than to read it all
            y = gated @ self.weight
        else:
            y = gated[open_units] @ self.weight.index_select(0, open_units)
        return (y if self.bias is None else y + self.bias).reshape(*x.shape[:-1], -1)


def skip_closed_units(model: nn.Module) -> nn.Module:
    """Replaces, in place, each linear layer behind an input gate by a :class:`SkippingLinear`, and returns `model`.

    For serving one example at a time, where a matrix product takes as long as it takes to read the weight. It pays in
    layers of a thousand units and more of which most are closed; in small ones the choosing takes longer.

    Args:
        model: a compacted net from a run with :class:`vardrop.DependentBetaBernoulli`.

    Raises:
        ConversionError: `model` has no such layer.

    >>> from vardrop.surgery.skip import skip_closed_units
    >>> net = vd.convert(torch.nn.Sequential(torch.nn.Linear(8, 4)), vd.BetaBernoulli())
    >>> small = vd.strip(vd.convert(net, vd.DependentBetaBernoulli())).eval()
    >>> x = torch.randn(1, 8)
    >>> expected = small(x)
    >>> torch.allclose(skip_closed_units(small)(x), expected, atol=1e-6)
    True
    """
    found = [
        (owner, name, child)
        for owner in model.modules()
        for name, child in owner.named_children()
        if isinstance(child, nn.Linear) and isinstance(gate := child._modules.get("gate"), InputGate)
        if gate.place == "input"
    ]
    if not found:
        raise ConversionError(f"{type(model).__name__} has no linear layer with an input-dependent gate on its inputs")
    for owner, name, layer in found:
        setattr(owner, name, SkippingLinear(layer).train(layer.training))
    return model

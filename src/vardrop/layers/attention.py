"""Noisy attention: one draw of its projections for a minibatch, so every token is seen by the same attention.

The attention weights are a softmax of products of two noisy projections, so they are not Gaussian given the input and
local reparameterisation does not apply, as in recurrent layers (arXiv:1708.00077, section 3).
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from vardrop.noise import Layout, noises_of


class NoisyMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` whose projections are posterior means; ``noise`` holds the rest, by their names."""

    noise: nn.ModuleDict

    @property
    def layout(self) -> Layout:
        return Layout()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        drawn = {name: noise.sample_weight(attrgetter(name)(self)) for name, noise in noises_of(self).items()}
        out_proj = _with_weights(self.out_proj, nn.Linear, {"weight": drawn.pop("out_proj.weight")})
        attention = _with_weights(self, nn.MultiheadAttention, drawn)
        vars(attention)["_modules"] = {**self._modules, "out_proj": out_proj}
        return attention.forward(query, key, value, *args, **kwargs)


def _with_weights(layer: nn.Module, plain: type[nn.Module], weights: dict[str, Tensor]) -> nn.Module:
    """`layer` seen as a `plain` one with other weights; the layer itself is not touched, so passes may overlap."""
    view = plain.__new__(plain)
    vars(view).update(vars(layer), _parameters={**layer._parameters, **weights})
    return view

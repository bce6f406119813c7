"""Noisy recurrent layers: one draw of the weights serves all time steps and the whole minibatch.

Of Bernoulli dropout each sequence has a draw of its own, for all of its time steps (arXiv:1512.05287).

The output of step t depends on the same recurrent weights as its input, so it is not Gaussian given that input and
local reparameterisation does not apply (arXiv:1708.00077, section 3). The biases carry no noise.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from vardrop.layers.stepwise import sequences_in, stepwise
from vardrop.noise import Layout, noises_of


class _NoisyRecurrent(nn.RNNBase):
    noise: nn.ModuleDict
    _plain: ClassVar[type[nn.RNNBase]]

    @property
    def layout(self) -> Layout:
        return Layout()

    def forward(self, input: Any, hx: Any = None) -> Any:
        self._update_flat_weights()
        drawn = list(self._flat_weights)
        factors = {}
        for name, noise in noises_of(self).items():
            weight, place = getattr(self, name), self._flat_weights_names.index(name)
            own = noise.factors_of_sequences(sequences_in(self, input), weight)
            if own is None:
                drawn[place] = noise.sample_weight(weight)
            else:
                drawn[place], factors[name] = noise.masked(weight), own
        view = _with_weights(self, self._plain, drawn)
        return stepwise(view, input, hx, factors) if factors else view.forward(input, hx)


def _with_weights(layer: nn.RNNBase, plain: type[nn.RNNBase], weights: list[Tensor | None]) -> nn.RNNBase:
    """`layer` seen as its plain class with other weights; the layer itself is not touched, so passes may overlap."""
    view = plain.__new__(plain)
    vars(view).update(vars(layer), _flat_weights=weights)
    return view


class NoisyRNN(_NoisyRecurrent, nn.RNN):
    """``nn.RNN`` whose weights are posterior means; ``noise`` holds the rest, by the name of the weight."""

    _plain = nn.RNN


class NoisyLSTM(_NoisyRecurrent, nn.LSTM):
    """``nn.LSTM`` whose weights are posterior means; ``noise`` holds the rest, by the name of the weight."""

    _plain = nn.LSTM


class NoisyGRU(_NoisyRecurrent, nn.GRU):
    """``nn.GRU`` whose weights are posterior means; ``noise`` holds the rest, by the name of the weight."""

    _plain = nn.GRU


def unsupported_recurrence(layer: nn.RNNBase) -> str | None:
    """Why `layer` has no noisy form; ``None`` where it has."""
    if layer.proj_size > 0:
        return f"proj_size={layer.proj_size} is not supported, make it with proj_size=0"
    return None

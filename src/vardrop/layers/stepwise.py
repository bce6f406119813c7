"""A recurrent layer step by step, for noise that every sequence of a minibatch has of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear
from torch.nn.utils.rnn import PackedSequence

State = tuple[Tensor, ...]
"""Of all sequences, ``(sequences, hidden)`` each: the output, and of an LSTM its cells."""


def sequences_in(layer: nn.RNNBase, given: Tensor | PackedSequence) -> int:
    """How many sequences the input of `layer` holds."""
    if isinstance(given, PackedSequence):
        return int(given.batch_sizes[0])
    return given.shape[0 if layer.batch_first else 1] if given.dim() == 3 else 1


def stepwise(layer: nn.RNNBase, given: Any, hx: Any, factors: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """``layer(given, hx)``, with inputs and outputs that flow back multiplied by the `factors` of their sequence.

    Args:
        layer: an ``nn.RNN``, ``nn.LSTM`` or ``nn.GRU`` without projections.
        given: its input, of any form that it takes.
        hx: its first state, or ``None``.
        factors: by the name of a weight such as ``weight_hh_l0``, ``(sequences, inputs of that weight)``.

    Raises:
        ValueError: the input has another number of dimensions, or another type than the weights.
        RuntimeError: it has another width, or no step; or `hx` has another shape.
    """
    packed = given if isinstance(given, PackedSequence) else None
    unbatched = packed is None and given.dim() == 2
    if packed is None:
        if given.dim() not in (2, 3) or not given.numel():
            raise ValueError(f"input of shape {tuple(given.shape)}: must be 2-D or 3-D, with a step at least")
        x = given.unsqueeze(1) if unbatched else given.transpose(0, 1) if layer.batch_first else given
        sizes = [x.shape[1]] * len(x)
        data = x.flatten(0, 1)
    else:
        data, sizes = packed.data, packed.batch_sizes.tolist()
    layer.check_input(data, torch.tensor(sizes))
    first = _first_state(layer, data, hx, sizes[0], None if packed is None else packed.sorted_indices, unbatched)
    dtype = _dtype(layer, data)
    data, last = _layers(layer, data, sizes, first, factors)
    data, last = data.to(dtype), tuple(part.to(dtype) for part in last)
    if packed is None:
        y = data.unflatten(0, (len(sizes), sizes[0]))
        output: Any = y.squeeze(1) if unbatched else y.transpose(0, 1) if layer.batch_first else y
        last = tuple(part.squeeze(1) for part in last) if unbatched else last
    else:
        output = PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
        if packed.unsorted_indices is not None:
            last = tuple(part[:, packed.unsorted_indices] for part in last)
    return output, last if isinstance(layer, nn.LSTM) else last[0]


def _dtype(layer: nn.RNNBase, data: Tensor) -> torch.dtype:
    """That of the outputs which torch gives for steps of `data`."""
    if not torch.is_autocast_enabled(data.device.type):
        return data.dtype
    with torch.no_grad():
        return cast(torch.dtype, layer.forward(data[:1])[0].dtype)


def _first_state(
    layer: nn.RNNBase, data: Tensor, hx: Any, sequences: int, order: Tensor | None, unbatched: bool
) -> State:
    """Of all layers and directions, ``(layers * directions, sequences, hidden)`` each."""
    shape = (layer.num_layers * (2 if layer.bidirectional else 1), sequences, layer.hidden_size)
    if hx is None:
        return tuple(data.new_zeros(shape) for _ in range(2 if isinstance(layer, nn.LSTM) else 1))
    parts = hx if isinstance(layer, nn.LSTM) else (hx,)
    parts = tuple(part.unsqueeze(1) if unbatched else part for part in parts)
    for part in parts:
        if part.shape != shape:
            raise RuntimeError(f"hx has shape {tuple(part.shape)}: must be {shape}")
    return tuple(part if order is None else part[:, order] for part in parts)


def _layers(
    layer: nn.RNNBase, data: Tensor, sizes: Sequence[int], first: State, factors: Mapping[str, Tensor]
) -> tuple[Tensor, State]:
    """What the last layer gives, ``(steps of all sequences, directions * hidden)``, and the last states of all."""
    weights = dict(zip(layer._flat_weights_names, cast(list[Tensor], layer._flat_weights), strict=True))
    endings = ("", "_reverse") if layer.bidirectional else ("",)
    last: list[State] = []
    for depth in range(layer.num_layers):
        outputs = []
        for ending in endings:
            ih, hh = f"weight_ih_l{depth}{ending}", f"weight_hh_l{depth}{ending}"
            biases = [weights.get(f"bias_{kind}_l{depth}{ending}") for kind in ("ih", "hh")]
            kept = factors.get(ih)
            inputs = data if kept is None else data * torch.cat([kept[:size] for size in sizes])
            output, state = _run(
                layer,
                linear(inputs, weights[ih], biases[0]).split(list(sizes)),
                tuple(part[len(last)] for part in first),
                (weights[hh], biases[1], factors.get(hh)),
                reverse=bool(ending),
            )
            outputs.append(output)
            last.append(state)
        data = torch.cat(outputs, dim=1)
        if layer.dropout and depth < layer.num_layers - 1:
            data = dropout(data, layer.dropout, layer.training)
    return data, tuple(torch.stack(parts) for parts in zip(*last, strict=True))


def _run(
    layer: nn.RNNBase,
    inputs: Sequence[Tensor],
    state: State,
    recurrent: tuple[Tensor, Tensor | None, Tensor | None],
    *,
    reverse: bool,
) -> tuple[Tensor, State]:
    """One direction of one layer: its outputs, all steps one after the other, and its last state."""
    weight, bias, factors = recurrent
    outputs = [state[0]] * len(inputs)
    for step in reversed(range(len(inputs))) if reverse else range(len(inputs)):
        size = len(inputs[step])
        now = tuple(part[:size] for part in state)
        back = now[0] if factors is None else now[0] * factors[:size]
        new = _cell(layer, inputs[step], linear(back, weight, bias), now)
        outputs[step] = new[0]
        state = tuple(
            torch.cat([part, old[size:]]) if size < len(old) else part for part, old in zip(new, state, strict=True)
        )
    return torch.cat(outputs), state


def _cell(layer: nn.RNNBase, x: Tensor, back: Tensor, state: State) -> State:
    """The next state, where `x` and `back` are what the weights make of the input and of the state."""
    if isinstance(layer, nn.LSTM):
        enter, forget, candidate, leave = (x + back).chunk(4, dim=1)
        cell = forget.sigmoid() * state[1] + enter.sigmoid() * candidate.tanh()
        return leave.sigmoid() * cell.tanh(), cell
    if isinstance(layer, nn.GRU):
        (reset, update, new), (reset_back, update_back, new_back) = x.chunk(3, dim=1), back.chunk(3, dim=1)
        candidate = (new + (reset + reset_back).sigmoid() * new_back).tanh()
        share = (update + update_back).sigmoid()
        return ((1.0 - share) * candidate + share * state[0],)
    return ((x + back).tanh() if layer.nonlinearity == "tanh" else (x + back).relu(),)

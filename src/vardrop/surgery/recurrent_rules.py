"""How recurrent layers and embeddings read units and make units.

A recurrent layer is two linear maps to all its gates, one of its input and one of its own hidden units; what comes
after works unit by unit. So a hidden unit can go, with its rows in every gate, once no gate of a living unit and no
later layer reads it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from vardrop.surgery.reading import Follower, Layer, Outcome, Reading, arguments, operation, shape
from vardrop.surgery.units import Value, unknown


def recurrent(reading: Reading, node: Node) -> Outcome:
    """RNN, LSTM or GRU from a state of zeros; its layers and directions keep equally many units."""
    given = arguments(node)
    params: list[Node] = given.get("params", [])
    why = _obstacle(reading, node, given, params)
    if why is not None:
        reading.notes.append(f"{reading.caller(node) or operation(node)} is kept as it is: {why}")
        return reading.stop(node)
    layers, directions = given["num_layers"], 1 + given["bidirectional"]
    each = len(params) // (layers * directions)
    source = given["input"]
    last = len(shape(source)) - 1
    inputs = reading.units(source, last, "a recurrent layer mixes another dimension than its units'")
    blocks: list[Tensor] = []
    for layer in range(layers):
        for direction in range(directions):
            at = each * (layer * directions + direction)
            blocks.append(_gates(reading, params[at : at + each], inputs))
        inputs = _joined(blocks[-directions:])
    if len(blocks) > 1:
        reading.balance(f"the layers of {reading.caller(node)}", tuple((ids,) for ids in blocks), may_vanish=False)
    state = _joined(blocks[:1])
    if any(user.users and user.args[1] != 0 for user in node.users):
        for ids in blocks[1:]:
            reading.classes.unite(state.ids, ids)
    return [inputs, state, state]


def embedding(reading: Reading, node: Node) -> Outcome:
    """A lookup makes one unit of each column of its table."""
    given = arguments(node)
    table, name = reading.state(given["weight"]), reading.state_name(given["weight"])
    if table is None or name is None or not reading.is_plain_call(node, name) or reading.obstacle(given["weight"]):
        return reading.stop(node)
    const = torch.where((table == table[:1]).all(0), table[0].double(), torch.nan)
    made = Value(len(shape(node)) - 1, reading.classes.new(table.shape[1]), const)
    reading.parts.append(Follower(name.rpartition(".")[0], {name: 1}, made.ids, "embedding_dim"))
    return made


def _obstacle(reading: Reading, node: Node, given: dict[str, Any], params: list[Node]) -> str | None:
    """Why the hidden units of a recurrent layer cannot be cut; ``None`` where they can."""
    if "batch_sizes" in given:
        return "it reads packed sequences"
    states = given["hx"] if isinstance(given["hx"], list | tuple) else [given["hx"]]
    if any(operation(state) != "zeros" or reading.caller(state) != reading.caller(node) for state in states):
        return "its first state is given"
    for param in params:
        name = reading.state_name(param)
        if name is None or reading.state(param) is None or not reading.is_plain_call(node, name):
            return "its weights are not its own parameters"
        if cast(nn.RNNBase, reading.owner(name)).proj_size > 0:
            return "it has a projection"
        if (why := reading.obstacle(param)) is not None:
            return why
    return None


def _joined(blocks: list[Tensor]) -> Value:
    ids = torch.cat(blocks)
    return Value(2, ids, unknown(len(ids)))


def _gates(reading: Reading, params: list[Node], inputs: Value) -> Tensor:
    """Adds the two linear maps of one layer in one direction; the classes of its hidden units, ``(hidden size,)``."""
    biased = len(params) == 4
    weights = [cast(Tensor, reading.state(param)) for param in params[:2]]
    rows, hidden = weights[1].shape
    ids = reading.classes.new(hidden)
    for source, weight, param, bias in zip(
        (inputs, Value(2, ids, unknown(hidden))), weights, params, params[2:] if biased else (None, None), strict=False
    ):
        name = cast(str, reading.state_name(param))
        reading.parts.append(
            Layer(
                name=name,
                weight=name,
                bias=reading.state_name(bias),
                transposed=False,
                inputs=source.ids,
                outputs=ids.repeat(rows // hidden),
                const=source.const,
                reads=(weight != 0).unsqueeze(0),
                folds=source.known & (biased | (source.const == 0)),
                obstacle="there is no bias to take it",
                makes=unknown(rows),
            )
        )
    return ids

"""What hangs together in a network: which units can only be removed together, who reads them, what must stay.

The network is traced once by ``torch.export`` and read operation by operation: every tensor has one dimension
of units, each unit belongs to a class, and its value is known where it is the same for every input. General
dependency graphs answer which tensors share channels; cutting exactly also needs the constants that dead
channels leave behind batch norm and biases, and where zero padding forbids folding them, so the reading is
done here.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph as Traced
from torch.fx import Node
from torch.nn.utils.rnn import PackedSequence

from vardrop.errors import GraphError, InvalidValueError
from vardrop.modes import copied
from vardrop.refusals import does_not_run
from vardrop.surgery.reading import (
    Balance,
    FixedSize,
    Follower,
    Layer,
    Outcome,
    Reading,
    is_in_place,
    line_of,
    operation,
)
from vardrop.surgery.rules import MAKERS, RULES
from vardrop.surgery.units import Value


@dataclass(frozen=True)
class Graph:
    """What hangs together in a network; ``print(graph)`` shows it.

    Attributes:
        parts: layers that read and make units, and batch norms and other tensors that are cut along with
            units, in the order of the pass.
        balances: blocks that must keep equally many units.
        fixed_sizes: reshapes whose code may state the number of units.
        pins: units that stay, each with the reason.
        notes: layers that are kept as they are, and why.
        classes: for every unit, the unit that stands for its class.
    """

    parts: tuple[Layer | Follower, ...]
    balances: tuple[Balance, ...]
    fixed_sizes: tuple[FixedSize, ...]
    pins: tuple[tuple[Tensor, str], ...]
    notes: tuple[str, ...]
    classes: Tensor

    def __str__(self) -> str:
        members, pinned = self._coupled(), self._pinned()
        rows = []
        for classes, makers in members.items():
            names = " + ".join(layer.name for layer in makers)
            readers = [layer.name for layer in self.layers if not classes.isdisjoint(self.of(layer.inputs))]
            why = dict.fromkeys(reason for root, reason in pinned.items() if root in classes)
            row = f"{names}: {len(classes)} units"
            row += ", removable together" if len(makers) > 1 else ""
            row += f"; read by {', '.join(readers)}" if readers else ""
            rows.append(row + (f"; {len(classes & set(pinned))} stay: {', '.join(why)}" if why else ""))
        return "\n".join([*rows, *self.notes])

    @property
    def layers(self) -> list[Layer]:
        """The layers that read and make units."""
        return [part for part in self.parts if isinstance(part, Layer)]

    def of(self, ids: Tensor) -> list[int]:
        """The classes of some units."""
        return cast(list[int], self.classes[ids].tolist())

    def _pinned(self) -> dict[int, str]:
        pinned: dict[int, str] = {}
        for ids, why in self.pins:
            for root in self.of(ids):
                pinned.setdefault(root, why)
        return pinned

    def _coupled(self) -> dict[frozenset[int], list[Layer]]:
        """Layers whose units share classes, with the classes of all of them."""
        groups: list[tuple[set[int], list[Layer]]] = []
        for layer in self.layers:
            classes, makers = set(self.of(layer.outputs)), [layer]
            apart = []
            for other in groups:
                if classes.isdisjoint(other[0]):
                    apart.append(other)
                else:
                    classes, makers = classes | other[0], other[1] + makers
            groups = [*apart, (classes, makers)]
        return {frozenset(classes): makers for classes, makers in groups}


def graph(model: nn.Module, example_inputs: Any, *, on_unknown: str = "refuse") -> Graph:
    """Reads what hangs together in a plain `model`, which is left as it is.

    Args:
        model: a network of torch.nn layers.
        example_inputs: one tensor, or a tuple with the arguments of the model's forward.
        on_unknown: ``"refuse"`` raises at an operation without a rule, ``"keep"`` keeps all units around it.

    Raises:
        GraphError: the model cannot be traced, or holds an operation without a rule.
        InvalidValueError: `on_unknown` is something else.

    >>> from vardrop.surgery.graph import graph
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> print(graph(net, torch.randn(1, 4)))
    0: 8 units; read by 2
    2: 2 units; 2 stay: an output of the model
    """
    return read(model, as_arguments(example_inputs), on_unknown=on_unknown)


def as_arguments(example_inputs: Any) -> tuple[Any, ...]:
    """The positional arguments of the model's forward.

    Raises:
        InvalidValueError: one of them is an empty batch, on which nothing can be told.
    """
    given = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    for tensor in given:
        if isinstance(tensor, Tensor) and tensor.dim() and not len(tensor):
            raise InvalidValueError(f"example_inputs of shape {tuple(tensor.shape)}: must hold an example at least")
    return given


def as_batch(example_inputs: Any) -> tuple[Tensor, ...]:
    """`example_inputs` as a tuple of tensors with a batch of at least one.

    Raises:
        InvalidValueError: they are something else.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    batches = isinstance(inputs, tuple) and all(isinstance(x, Tensor) and x.dim() and len(x) for x in inputs)
    if not batches or not inputs:
        shown = type(inputs).__name__
        if isinstance(inputs, tuple):
            kinds = [str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in inputs]
            shown = f"({', '.join(kinds)})"
        raise InvalidValueError(
            f"example_inputs={shown}: must be a tensor or a tuple of tensors, each with a batch of at least one as its "
            "first dimension"
        )
    return inputs


def read(
    model: nn.Module,
    arguments: tuple[Any, ...],
    *,
    on_unknown: str,
    keep_fixed_sizes: bool = False,
    new_biases: bool = True,
) -> Graph:
    """Like :func:`graph`; with `keep_fixed_sizes` units stay where a reshape may state their number.

    Without `new_biases`, layers that have no bias take up no constants.
    """
    if on_unknown not in ("refuse", "keep"):
        raise InvalidValueError(f"on_unknown={on_unknown!r}: must be 'refuse' or 'keep'")
    model = deepcopy(model).eval()
    traced, names = _trace(model, arguments)
    reading = Reading(model, names, keep_fixed_sizes, new_biases)
    for node in traced.nodes:
        reading.env[node] = _visit(reading, node, on_unknown)
    return Graph(
        parts=tuple(reading.parts),
        balances=tuple(reading.balances),
        fixed_sizes=tuple(reading.fixed_sizes),
        pins=tuple(reading.pins),
        notes=tuple(dict.fromkeys(reading.notes)),
        classes=reading.classes.roots(),
    )


def _trace(model: nn.Module, arguments: tuple[Any, ...]) -> tuple[Traced, Mapping[str, str]]:
    """The operations of one pass, and the name of the parameter or buffer behind each placeholder."""
    packed: list[str] = []
    hooks = [
        module.register_forward_pre_hook(
            lambda _, given, name=name: packed.extend(name for x in given if isinstance(x, PackedSequence))
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.RNNBase)
    ]
    try:
        with torch.no_grad():
            model(*copied(arguments))
    except Exception as error:
        raise GraphError(does_not_run(model, arguments, error)) from error
    finally:
        for hook in hooks:
            hook.remove()
    try:
        with torch.no_grad(), quiet():
            program = torch.export.export(model, arguments, strict=False)
    except Exception as error:
        if packed:
            raise GraphError(
                f"layer {packed[0]!r} reads packed sequences, which torch.export cannot trace: cut the model with a "
                "forward that takes padded ones, or take its noise out by vardrop.strip alone"
            ) from error
        raise GraphError(
            f"{type(model).__name__} cannot be traced by torch.export, which follows no branch on the data and knows "
            "no inputs and outputs but tensors, also in tuples, lists and dicts: "
            f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        ) from error
    signature = program.graph_signature
    return program.graph, {**signature.inputs_to_parameters, **signature.inputs_to_buffers}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """torch.export and its ONNX exporter talk in warnings, in the log and on stderr; nothing of it helps a user."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _visit(reading: Reading, node: Node, on_unknown: str) -> Outcome:
    """What comes out of one operation."""
    if node.op == "output":
        for source in node.all_input_nodes:
            reading.pin(reading.value(source), "an output of the model")
    if node.op != "call_function":
        return None
    name = operation(node)
    if name == "getitem":
        parts = reading.env.get(cast(Node, node.args[0]))
        return parts[cast(int, node.args[1])] if isinstance(parts, list) else None
    if is_in_place(node):
        _refuse_lost_writes(reading, node)
    rule = RULES.get(name)
    carrying = any(reading.value(source) is not None for source in node.all_input_nodes)
    if getattr(node.target, "_schema", None) is None:  # a part of the model on its own, such as one under autocast
        carrying |= any(reading.state_name(source) is not None for source in node.all_input_nodes)
    if name.startswith("_assert") or not (carrying or rule in MAKERS):
        return None
    if rule is not None:
        return rule(reading, node)
    if on_unknown == "refuse":
        raise GraphError(
            f"compaction has no rule for the operation {name!r} in {line_of(node)}; pass on_unknown='keep' "
            "to keep all units that flow into it"
        )
    reading.notes.append(f"{name} in {line_of(node)} has no rule: all units that flow into it stay")
    return reading.stop(node)


def _refuse_lost_writes(reading: Reading, node: Node) -> None:
    """An in-place change reaches other views of the same memory, which a reading by values does not see."""
    written = _memory(cast(Node, node.args[0]))
    aliases = [other for other in reading.env if other is not node and _memory(other) is written]
    if not any(isinstance(reading.env[other], Value) for other in aliases):
        return
    if any(user not in reading.env and user is not node for other in aliases for user in other.users):
        raise GraphError(
            f"{line_of(node)} changes a tensor in place that is read again through another view; write it "
            "without the change in place"
        )


def _memory(node: Node) -> Node:
    """The node whose memory `node` shares."""
    while node.op == "call_function" and node.all_input_nodes:
        schema = getattr(node.target, "_schema", None)
        shares = schema is None or any(value.alias_info is not None for value in schema.returns)
        if not (shares or "dropout" in operation(node)):
            break
        node = node.all_input_nodes[0]
    return node

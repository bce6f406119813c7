"""The state of reading a network: what each operation found, kept where the rules can add to it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from vardrop.layers import is_conv1d
from vardrop.surgery.units import Classes, Value, unknown

Outcome = Value | list[Value | None] | None

LAYERS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
RECURRENT: tuple[type[nn.Module], ...] = (nn.RNN, nn.LSTM, nn.GRU)
RESIZABLE: tuple[type[nn.Module], ...] = (*LAYERS, *NORMS, *RECURRENT, nn.Embedding, nn.PReLU)
HOLDERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_RESIZABLE_BASES = {base for kind in (*RESIZABLE, *HOLDERS) for base in kind.__mro__}


@dataclass(frozen=True)
class Layer:
    """A linear or convolution that reads units and makes units.

    Attributes:
        name: the module's name, or the name of its weight where it is called as a function.
        weight, bias: names of the parameters; no bias where there is none.
        inputs, outputs: class of each input and output unit.
        const: value of each input unit where known, else NaN.
        reads: which outputs of a group have a weight on which of its inputs; shape ``(groups, outs, ins)``.
        folds: which constant inputs move exactly into the bias.
        obstacle: why the other constants do not.
        makes: value of each output unit where known, else NaN.
    """

    name: str
    weight: str
    bias: str | None
    transposed: bool
    inputs: Tensor
    outputs: Tensor
    const: Tensor
    reads: Tensor
    folds: Tensor
    obstacle: str
    makes: Tensor

    @property
    def groups(self) -> int:
        """Number of groups; a group's outputs read its own inputs only."""
        return len(self.reads)


@dataclass(frozen=True)
class Follower:
    """Tensors applied unit by unit that are cut with the units: batch norm, PReLU, a gain per channel."""

    name: str
    tensors: Mapping[str, int]
    ids: Tensor
    counts: str | None = None


@dataclass(frozen=True)
class Balance:
    """Blocks that must keep equally many units: the groups of a convolution, the parts of a chunk.

    Each block is a tuple of rows of units; row r keeps one count over all blocks. A block of a grouped
    convolution may go as a whole.
    """

    name: str
    blocks: tuple[tuple[Tensor, ...], ...]
    may_vanish: bool


@dataclass(frozen=True)
class FixedSize:
    """A reshape that states the size of the dimension that carries units as a number."""

    line: str
    size: int
    ids: Tensor


@dataclass
class Reading:
    """All that was found in one network so far.

    Attributes:
        model: the network.
        names: the parameter or buffer behind each placeholder of the traced graph.
        keep_fixed_sizes: whether units stay where a reshape states their number.
        new_biases: whether a layer without a bias may get one, to take up constants.
    """

    model: nn.Module
    names: Mapping[str, str]
    keep_fixed_sizes: bool = False
    new_biases: bool = True
    classes: Classes = field(default_factory=Classes)
    env: dict[Node, Outcome] = field(default_factory=dict)
    parts: list[Layer | Follower] = field(default_factory=list)
    balances: list[Balance] = field(default_factory=list)
    fixed_sizes: list[FixedSize] = field(default_factory=list)
    pins: list[tuple[Tensor, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._state: dict[str, Tensor] = {
            **dict(self.model.named_parameters(remove_duplicate=False)),
            **dict(self.model.named_buffers(remove_duplicate=False)),
        }
        self._modules: dict[str, nn.Module] = dict(self.model.named_modules(remove_duplicate=False))

    def value(self, node: Any) -> Value | None:
        """What is known of the tensor that `node` makes; None where it carries no units."""
        found = self.env.get(node) if isinstance(node, Node) else None
        return found if isinstance(found, Value) else None

    def pin(self, value: Value | None, why: str) -> None:
        """All units of `value` stay."""
        if value is not None:
            self.pins.append((value.ids, why))

    def balance(self, name: str, blocks: tuple[tuple[Tensor, ...], ...], *, may_vanish: bool) -> None:
        """The `blocks` must keep equally many units."""
        self.balances.append(Balance(name, blocks, may_vanish))

    def stop(self, node: Node, why: str = "") -> Value | None:
        """All units that flow into `node` stay; what comes out, returned here, carries none."""
        for source in node.all_input_nodes:
            self.pin(self.value(source), why or f"read by {operation(node)} in {line_of(node)}")
        return None

    def fixed(self, count: int, dim: int, why: str) -> Value:
        """The entries of a tensor whose size cannot change."""
        value = Value(dim, self.classes.new(count), unknown(count))
        self.pin(value, why)
        return value

    def units(self, source: Node, dim: int, why: str) -> Value:
        """The units that `source` carries in `dim`; where it carries them elsewhere they stay, for the reason `why`."""
        value = self.value(source)
        if value is not None and value.dim == dim:
            return value
        self.pin(value, why)
        return self.fixed(shape(source)[dim], dim, "not made by a layer that can be cut")

    def state_name(self, node: Any) -> str | None:
        """The name of the parameter or buffer behind `node`."""
        return self.names.get(node.name) if isinstance(node, Node) and node.op == "placeholder" else None

    def state(self, node: Any) -> Tensor | None:
        """The values of a parameter or buffer that no operation changes, on the CPU."""
        name = self.state_name(node)
        if name is None or any(is_in_place(user) for user in node.users):
            return None
        return self._state[name].detach().cpu()

    def obstacle(self, node: Any) -> str | None:
        """Why the parameter or buffer behind `node` cannot be cut; None where it can."""
        name = self.state_name(node)
        if name is None:
            return "its weight is computed, not a parameter"
        same = [other for other, tensor in self._state.items() if tensor is self._state[name]]
        if len({(self.owner(other), other.rpartition(".")[2]) for other in same}) > 1:
            return f"{' and '.join(same)} are one parameter"
        if self._state[name].is_complex():
            return f"{name} is complex"
        if len(node.users) > 1:
            return f"{name} is used {len(node.users)} times"
        owner = self.owner(name)
        if name.rpartition(".")[2] in owner._non_persistent_buffers_set:
            return f"{name} is in no state_dict, so that its cut could not be stored"
        known = all(base in _RESIZABLE_BASES for base in type(owner).__mro__ if base.__module__.startswith("torch.nn."))
        return None if known else f"{name} belongs to a {type(owner).__name__}"

    def owner(self, name: str) -> nn.Module:
        """The module that holds the parameter or buffer called `name`."""
        return self._modules[name.rpartition(".")[0]]

    def caller(self, node: Node) -> str:
        """The name of the innermost module whose forward runs `node`."""
        stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
        return next((path.split("@")[0] for path, _ in reversed(stack.values())), "")

    def is_plain_call(self, node: Node, name: str) -> bool:
        """Whether `node` is the forward of the torch.nn layer that owns the parameter called `name`."""
        owner = self.owner(name)
        return self._modules.get(self.caller(node)) is owner and is_cuttable(type(owner))


def is_cuttable(kind: type[nn.Module]) -> bool:
    """Whether layers of exactly this `kind` can lose inputs and units and stay valid."""
    return kind in (*LAYERS, *RECURRENT, nn.Embedding) or is_conv1d(kind)


def operation(node: Node) -> str:
    """The plain name of an operation: ``aten.relu_.default`` is ``relu``; others keep their full name."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return str(getattr(node.target, "__name__", node.target))
    namespace, _, name = schema.name.partition("::")
    if namespace != "aten":
        return str(schema.name)
    return str(name[:-1] if is_in_place(node) else name)


def is_in_place(node: Node) -> bool:
    """Whether the operation changes its first argument."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(arg.alias_info and arg.alias_info.is_write for arg in schema.arguments)


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of an aten operation by name, defaults included."""
    schema = cast(Any, node.target)._schema
    bound = {arg.name: arg.default_value for arg in schema.arguments}
    bound.update(zip((arg.name for arg in schema.arguments), node.args, strict=False))
    bound.update(node.kwargs)
    return bound


def shape(node: Node) -> torch.Size:
    """The shape of the tensor that `node` makes, for the example inputs."""
    return cast(Tensor, node.meta["val"]).shape


def line_of(node: Node) -> str:
    """The user's source line behind `node`, or its operation where that is not known."""
    frames = re.findall(r'File "(.*)", line (\d+), in .*\n\s*(.*)', node.meta.get("stack_trace") or "")
    own = [frame for frame in frames if "/torch/nn/" not in frame[0].replace("\\", "/")]
    if not own:
        return f"`{operation(node)}`"
    path, number, code = own[-1]
    return f"`{code.strip()}` ({Path(path).name}:{number})"

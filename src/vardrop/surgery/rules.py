"""What each operation does to units: one short rule for each kind of operation.

A rule looks up its inputs with ``reading.value`` and returns what is known of its output: a :class:`Value`, a list of
them for an operation with several outputs, or None where the output carries no units. An output that depends on units
must carry them itself, or its inputs must be pinned (``reading.stop``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from vardrop.surgery.layer_rules import convolution, linear
from vardrop.surgery.reading import NORMS, FixedSize, Follower, Outcome, Reading, arguments, line_of, operation, shape
from vardrop.surgery.units import Value, unknown

Rule = Callable[[Reading, Node], Outcome]


def barrier(reading: Reading, node: Node) -> Outcome:
    """Reads all units at once, so they stay."""
    return reading.stop(node)


def same(reading: Reading, node: Node) -> Outcome:
    """Units and constants pass unchanged."""
    return reading.value(node.args[0])


def dropout(reading: Reading, node: Node) -> Outcome:
    """Nothing happens in eval mode; dropout that is always on leaves no constants."""
    value = reading.value(node.args[0])
    return value.varying() if value is not None and arguments(node)["train"] else value


def elementwise(reading: Reading, node: Node) -> Outcome:
    """Units at the same place join one class; a unit is constant where all that it is made of is constant."""
    joined = _join(reading, node, shape(node), node.all_input_nodes)
    if joined is None:
        return None
    operands = {source: _constants(reading, source, joined, shape(node)) for source in node.all_input_nodes}
    columns = torch.stack(list(operands.values()))
    known = ~columns.isnan().any(0)
    const = torch.where(known, _evaluate(node, operands), torch.nan) if known.any() else joined.const
    if operation(node) == "mul":
        const = torch.where((columns == 0).any(0), 0.0, const)
    return Value(joined.dim, joined.ids, const)


def _join(reading: Reading, node: Node, made: torch.Size, sources: list[Node]) -> Value | None:
    """The units of an operation over `sources` that broadcast to the shape `made`: units that meet join one class."""
    carriers = [(source, value) for source in sources if (value := reading.value(source))]
    offsets = [(value.dim - len(shape(source)), len(value)) for source, value in carriers]
    lead = next((offset for offset, count in offsets if count == made[offset]), None)
    if lead is None:
        return reading.stop(node)
    ids: Tensor | None = None
    for source in sources:
        value, dim = reading.value(source), len(shape(source)) + lead
        meets = dim >= 0 and shape(source)[dim] == made[lead]
        if value is not None and not (meets and value.dim == dim):
            reading.pin(value, f"meets another dimension in {line_of(node)}")
            value = None
        if not meets or (value is None and made[lead] == 1):
            continue
        own = value or _operand(reading, node, source, dim)
        if ids is not None:
            reading.classes.unite(ids, own.ids)
        ids = own.ids
    return None if ids is None else Value(len(made) + lead, ids, unknown(len(ids)))


def _operand(reading: Reading, node: Node, source: Node, dim: int) -> Value:
    """A tensor without units that meets units: a parameter is cut along with them, any other keeps its size."""
    size, name = shape(source)[dim], reading.state_name(source)
    if name is None or reading.obstacle(source) is not None:
        return reading.fixed(size, dim, f"meets a tensor of fixed size in {line_of(node)}")
    value = Value(dim, reading.classes.new(size), unknown(size))
    reading.followers.append(Follower(name, {name: dim}, value.ids))
    return value


def _constants(reading: Reading, source: Node, joined: Value, made: torch.Size) -> Tensor:
    """The constants of one operand along the units of `joined`, NaN where not known."""
    dim = len(shape(source)) + joined.dim - len(made)
    value, state = reading.value(source), reading.state(source)
    if value is not None:
        return value.const if (value.dim, len(value)) == (dim, len(joined)) else unknown(len(joined))
    if state is None:
        return unknown(len(joined))
    rows = (state.movedim(dim, 0).reshape(state.shape[dim], -1) if dim >= 0 else state.reshape(1, -1)).double()
    return torch.where((rows == rows[:, :1]).all(1), rows[:, 0], torch.nan).expand(len(joined))


def _evaluate(node: Node, operands: Mapping[Node, Tensor]) -> Tensor:
    """Runs the operation itself on its operands' constants; what comes of unknown ones means nothing."""

    def entries(source: Node) -> Tensor:
        dtype = source.meta["val"].dtype
        const = operands[source].nan_to_num(0.0)
        return const.clone() if dtype.is_floating_point else const.to(dtype)

    args, kwargs = map_arg(node.args, entries), map_arg(node.kwargs, entries)
    return cast(Tensor, cast(Any, node.target)(*args, **kwargs)).cpu().double()


def prelu(reading: Reading, node: Node) -> Outcome:
    """A slope per channel is cut along with the channels."""
    value, slope = reading.value(node.args[0]), reading.state(node.args[1])
    if value is None or slope is None:
        return reading.stop(node)
    if slope.numel() > 1:
        name = cast(str, reading.state_name(node.args[1]))
        if value.dim != 1 or reading.obstacle(node.args[1]) is not None:
            return reading.stop(node)
        reading.followers.append(Follower(name.rpartition(".")[0], {name: 0}, value.ids, "num_parameters"))
    const = torch.where(value.const > 0, value.const, value.const * slope.double())
    return Value(value.dim, value.ids, const)


def norm(reading: Reading, node: Node) -> Outcome:
    """Batch or instance norm: an affine map of each channel; with batch statistics only a zero stays a constant."""
    given = arguments(node)
    value = reading.value(given["input"])
    nodes = {key: given[key] for key in ("weight", "bias", "running_mean", "running_var") if given[key] is not None}
    if value is None or value.dim != 1 or any(reading.obstacle(state) is not None for state in nodes.values()):
        return reading.stop(node)
    names = [cast(str, reading.state_name(state)) for state in nodes.values()]
    owner = names[0].rpartition(".")[0] if names else reading.caller(node)
    counts = "num_features" if isinstance(reading.model.get_submodule(owner), NORMS) else None
    reading.followers.append(Follower(owner, dict.fromkeys(names, 0), value.ids, counts))
    state = {key: cast(Tensor, reading.state(source)).double() for key, source in nodes.items()}
    weight = state.get("weight", torch.ones(len(value), dtype=torch.float64))
    bias = state.get("bias", torch.zeros(len(value), dtype=torch.float64))
    if given.get("training", given.get("use_input_stats")):
        const = torch.where((value.const == 0) | (weight == 0), bias, torch.nan)
    else:
        scaled = (value.const - state["running_mean"]) / (state["running_var"] + given["eps"]).sqrt()
        const = torch.where(weight == 0, bias, scaled * weight + bias)
    return Value(value.dim, value.ids, const)


def spatial(reading: Reading, node: Node) -> Outcome:
    """Pooling, padding and resizing treat each channel alone; what becomes of a constant is found by trying it."""
    value, before = reading.value(node.args[0]), shape(cast(Node, node.args[0]))
    if value is None or _reaches(node, value.dim, len(before)):
        return reading.stop(node)
    const = unknown(len(value))
    if value.known.any():
        sizes = [1 if dim == 0 else size for dim, size in enumerate(before)]
        sizes[value.dim] = -1
        columns = value.const[value.known].view(-1, *[1] * (len(before) - 1 - value.dim))
        made = cast(Any, node.target)(columns.expand(sizes).contiguous(), *node.args[1:], **node.kwargs)
        rows = (made if isinstance(made, Tensor) else made[0]).movedim(value.dim, 0).flatten(1)
        uniform = rows.amax(1) - rows.amin(1) <= 1e-12 * rows.abs().amax(1)
        const[value.known] = torch.where(uniform, rows[:, 0], torch.nan)
    out = Value(value.dim, value.ids, const)
    return out if isinstance(node.meta["val"], Tensor) else [out, out.varying()]


def _reaches(node: Node, dim: int, ndim: int) -> bool:
    """Whether a pooling, padding or resizing reaches into dimension `dim`."""
    name = operation(node)
    if name == "pad":
        amounts = cast(list[int], node.args[1])
        start = 2 * (ndim - 1 - dim)
        return any(amounts[start : start + 2])
    rank = int(next(char for char in reversed(name) if char.isdigit()))
    return dim >= ndim - rank


def reduction(reading: Reading, node: Node) -> Outcome:
    """A mean, sum or extreme over other dimensions keeps the units; over the units themselves it reads them all."""
    given = arguments(node)
    value, ndim = reading.value(given["self"]), len(shape(given["self"]))
    dims = given.get("dim")
    over = {dim % ndim for dim in ([dims] if isinstance(dims, int) else dims or range(ndim))}
    if value is None or value.dim in over or not isinstance(node.meta["val"], Tensor):
        return reading.stop(node)
    dim = value.dim if given["keepdim"] else value.dim - sum(other < value.dim for other in over)
    const = torch.where(value.const == 0, 0.0, torch.nan) if operation(node) == "sum" else value.const
    return Value(dim, value.ids, const)


def reshape(reading: Reading, node: Node) -> Outcome:
    """Units are followed where their dimension stays, merges (flatten), or splits into a number of units left open."""
    value, before, after = reading.value(node.args[0]), shape(cast(Node, node.args[0])), shape(node)
    if value is None or "dtype" in arguments(node):
        return reading.stop(node)
    stated = _stated_sizes(node)
    found = _merged(value, before, after) or _split(reading, value, before, after, stated)
    if found is None:
        return reading.stop(node)
    return _stated(reading, node, found, stated.get(found.dim))


def _stated(reading: Reading, node: Node, found: Value, size: int | None) -> Value | None:
    """Notes a size of the units' dimension that may be written as a number in the user's code."""
    if size is not None and reading.keep_fixed_sizes:
        return reading.stop(node)
    if size is not None:
        reading.fixed_sizes.append(FixedSize(f"{operation(node)} in {line_of(node)}", size, found.ids))
    return found


def _stated_sizes(node: Node) -> dict[int, int]:
    """The sizes in the arguments of a reshape, by dimension of the result."""
    given, name = arguments(node), operation(node)
    sizes = given.get("sizes") or given.get("shape") or given.get("size") or []
    start = given["dim"] % len(shape(given["self"])) if name == "unflatten" else 0
    return {start + place: size for place, size in enumerate(sizes) if size != -1}


def _merged(value: Value, before: torch.Size, after: torch.Size) -> Value | None:
    """The dimension of units stays alone, or merges with its neighbours into one."""
    count, lead, rest = len(value), prod(before[: value.dim]), prod(before[value.dim + 1 :])
    found: Value | None = None
    for dim, size in enumerate(after):
        own_lead, own_rest = prod(after[:dim]), prod(after[dim + 1 :])
        if lead % own_lead or rest % own_rest or size != lead // own_lead * count * (rest // own_rest):
            continue
        if found is None or size == count:
            found = value.take(torch.arange(size) // (rest // own_rest) % count, dim)
    return found


def _split(
    reading: Reading, value: Value, before: torch.Size, after: torch.Size, stated: Mapping[int, int]
) -> Value | None:
    """The dimension of units splits: each block of entries becomes one unit."""
    lead, rest = prod(before[: value.dim]), prod(before[value.dim + 1 :])
    for dim, size in enumerate(after):
        own_rest = prod(after[dim + 1 :])
        if prod(after[:dim]) != lead or own_rest % rest or size * own_rest != len(value) * rest or dim in stated:
            continue
        blocks, const = value.ids.view(size, -1), value.const.view(size, -1)
        for column in blocks.T[1:]:
            reading.classes.unite(blocks[:, 0], column)
        uniform = (const == const[:, :1]).all(1)
        return Value(dim, blocks[:, 0], torch.where(uniform, const[:, 0], torch.nan))
    return None


def permute(reading: Reading, node: Node) -> Outcome:
    """The dimension of units moves; where to is seen on a tensor whose sizes tell its dimensions apart."""
    value, ndim = reading.value(node.args[0]), len(shape(cast(Node, node.args[0])))
    if value is None:
        return reading.stop(node)
    marked = torch.empty(tuple(range(2, ndim + 2)), device="meta")
    moved = cast(Tensor, cast(Any, node.target)(marked, *node.args[1:], **node.kwargs))
    return Value(moved.shape.index(value.dim + 2), value.ids, value.const)


def expand(reading: Reading, node: Node) -> Outcome:
    """Other dimensions are repeated, or new ones are put in front."""
    value, before, after = reading.value(node.args[0]), shape(cast(Node, node.args[0])), shape(node)
    if value is None or after[value.dim - len(before)] != len(value):
        return reading.stop(node)
    dim = value.dim + len(after) - len(before)
    size = None if operation(node) == "repeat" else _stated_sizes(node).get(dim)
    return _stated(reading, node, value.take(slice(None), dim), size)


def part(reading: Reading, node: Node) -> Outcome:
    """A slice or selection of another dimension keeps the units; one of the units themselves keeps their number."""
    given = arguments(node)
    value, ndim = reading.value(given["self"]), len(shape(given["self"]))
    dim = given["dim"] % ndim
    if value is None or dim == value.dim:
        return reading.stop(node)
    return value.take(slice(None), value.dim - (len(shape(node)) < ndim and dim < value.dim))


def chunk(reading: Reading, node: Node) -> Outcome:
    """Equal parts stay equal; any other split of the units keeps their number."""
    given = arguments(node)
    value, parts = reading.value(given["self"]), cast(list[Tensor], node.meta["val"])
    if value is None:
        return reading.stop(node)
    if given["dim"] % len(shape(given["self"])) != value.dim:
        return [value] * len(parts)
    if operation(node) != "chunk" or len(value) % given["chunks"] or len(parts) != given["chunks"]:
        return reading.stop(node)
    blocks = [value.take(entries, value.dim) for entries in torch.arange(len(value)).chunk(len(parts))]
    reading.balance(f"the parts of {line_of(node)}", tuple((block.ids,) for block in blocks), may_vanish=False)
    return list(blocks)


def glu(reading: Reading, node: Node) -> Outcome:
    """``a * sigmoid(b)``: a unit and its gate go together."""
    value, ndim = reading.value(node.args[0]), len(shape(cast(Node, node.args[0])))
    if value is None or arguments(node)["dim"] % ndim != value.dim:
        return reading.stop(node)
    half = len(value) // 2
    reading.classes.unite(value.ids[:half], value.ids[half:])
    gated = value.const[:half] * value.const[half:].sigmoid()
    return Value(value.dim, value.ids[:half], torch.where(value.const[:half] == 0, 0.0, gated))


def concatenate(reading: Reading, node: Node) -> Outcome:
    """Along the units the lists are joined; along another dimension units at the same place join one class."""
    sources = cast(list[Node], node.args[0])
    values = [value for source in sources if (value := reading.value(source))]
    dim = arguments(node)["dim"] % len(shape(node))
    if all(value.dim != dim for value in values):
        return _aligned(reading, node, sources)
    if any(value.dim != dim for value in values):
        return reading.stop(node)
    why = f"joins a tensor of fixed size in {line_of(node)}"
    parts = [reading.value(source) or reading.fixed(shape(source)[dim], dim, why) for source in sources]
    return Value(dim, torch.cat([part.ids for part in parts]), torch.cat([part.const for part in parts]))


def _aligned(reading: Reading, node: Node, sources: list[Node]) -> Outcome:
    """Tensors put one after another along another dimension than the units'."""
    joined = _join(reading, node, shape(node), sources)
    if joined is None:
        return None
    columns = torch.stack([_constants(reading, source, joined, shape(node)) for source in sources])
    return Value(joined.dim, joined.ids, torch.where((columns == columns[0]).all(0), columns[0], torch.nan))


def _table(rules: Mapping[Rule, str]) -> Mapping[str, Rule]:
    return {name: rule for rule, names in rules.items() for name in names.split()}


RULES: Mapping[str, Rule] = _table(
    {
        linear: "linear",
        convolution: "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
        norm: "batch_norm instance_norm",
        prelu: "prelu",
        same: "clone contiguous detach alias",
        dropout: "dropout feature_dropout alpha_dropout feature_alpha_dropout",
        elementwise: "relu relu6 gelu silu mish elu selu celu leaky_relu hardtanh hardswish hardsigmoid sigmoid tanh "
        "log_sigmoid softplus softshrink hardshrink threshold clamp clamp_min clamp_max clip abs neg exp expm1 log "
        "log1p sqrt rsqrt square pow sin cos tan sinh cosh asinh atan erf reciprocal sign floor ceil round trunc add "
        "sub rsub mul div maximum minimum eq ne lt le gt ge where masked_fill lerp addcmul addcdiv to _to_copy "
        "nan_to_num logical_not logical_and logical_or isnan zeros_like ones_like",
        spatial: "max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices "
        "max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
        "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d pad upsample_nearest1d "
        "upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d "
        "_upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d",
        reduction: "mean sum amax amin",
        reshape: "view reshape _unsafe_view flatten unflatten squeeze unsqueeze",
        permute: "permute transpose swapaxes swapdims movedim moveaxis t numpy_T",
        expand: "expand repeat",
        part: "slice select narrow index_select",
        chunk: "chunk split split_with_sizes",
        glu: "glu",
        concatenate: "cat concat concatenate",
        barrier: "layer_norm group_norm rms_norm softmax log_softmax matmul bmm mm mv dot addmm baddbmm addbmm einsum "
        "bilinear scaled_dot_product_attention lstm gru rnn_tanh rnn_relu stack unbind topk sort argsort argmax argmin max "
        "min median prod cumsum cumprod norm linalg_vector_norm linalg_norm logsumexp var std var_mean std_mean all "
        "any index gather scatter take_along_dim masked_select roll flip pixel_shuffle pixel_unshuffle "
        "channel_shuffle cosine_similarity pairwise_distance cdist cross_entropy_loss nll_loss mse_loss l1_loss "
        "cross outer tril triu embedding one_hot fft_fft fft_ifft fft_rfft fft_irfft grid_sampler",
    }
)
"""The rule of each aten operation by its plain name. What is not here is refused, or kept whole if the user asks."""

"""What each operation does to units: one short rule for each kind of operation.

A rule looks up its inputs with ``reading.value`` and returns what is known of its output: a :class:`Value`, a
list of them for an operation with several outputs, or None where the output carries no units. An output that
depends on units must carry them itself, or its inputs must be pinned (``reading.stop``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from vardrop.surgery.attention_rules import attention
from vardrop.surgery.layer_rules import convolution, linear, product
from vardrop.surgery.reading import (
    NORMS,
    Follower,
    Outcome,
    Reading,
    arguments,
    line_of,
    operation,
    shape,
)
from vardrop.surgery.recurrent_rules import embedding, recurrent
from vardrop.surgery.shape_rules import expand, part, permute, reshape
from vardrop.surgery.units import Value, unknown

Rule = Callable[[Reading, Node], Outcome]


def barrier(reading: Reading, node: Node) -> Outcome:
    """Reads all units at once, so they stay."""
    return reading.stop(node)


def fresh(reading: Reading, node: Node) -> Outcome:
    """A new tensor of a size of its own, whatever the values of the one that it is made from."""
    return None


def same(reading: Reading, node: Node) -> Outcome:
    """Units and constants pass unchanged."""
    return reading.value(node.args[0])


def dropout(reading: Reading, node: Node) -> Outcome:
    """Nothing happens in eval mode; dropout that is always on leaves no constants."""
    value = reading.value(node.args[0])
    return value.varying() if value is not None and arguments(node)["train"] else value


def elementwise(reading: Reading, node: Node) -> Outcome:
    """Units at the same place join one class; a unit is constant where all that it is made of is constant."""
    sources = [source for source in node.all_input_nodes if isinstance(source.meta["val"], Tensor)]
    joined = _join(reading, node, shape(node), sources)
    if joined is None or len(sources) < len(node.all_input_nodes):  # a number read from the data is not known
        return joined
    operands = {source: _constants(reading, source, joined, shape(node)) for source in sources}
    columns = torch.stack(list(operands.values()))
    known = ~columns.isnan().any(0)
    const = torch.where(known, _evaluate(node, operands), torch.nan) if known.any() else joined.const
    if operation(node) in ("mul", "multiply"):
        const = torch.where((columns == 0).any(0), 0.0, const)
    return Value(joined.dim, joined.ids, const)


def like(reading: Reading, node: Node) -> Outcome:
    """Repeated to the shape of another tensor, whose units it joins."""
    first, other = cast(list[Node], node.args[:2])
    joined = _join(reading, node, shape(node), [first, other])
    return None if joined is None else Value(joined.dim, joined.ids, _constants(reading, first, joined, shape(node)))


def typed(reading: Reading, node: Node) -> Outcome:
    """Takes the type of another tensor, and nothing else of it."""
    value = reading.value(node.args[0])
    if value is None:
        return None
    const = value.const.nan_to_num(0.0).to(cast(Tensor, node.meta["val"]).dtype).double()
    return Value(value.dim, value.ids, torch.where(value.known, const, torch.nan))


def _join(reading: Reading, node: Node, made: torch.Size, sources: list[Node]) -> Value | None:
    """The units of an operation whose `sources` broadcast to the shape `made`; what meets joins one class."""
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
    """A tensor without units meets units: a parameter is cut along with them, any other keeps its size."""
    size, name = shape(source)[dim], reading.state_name(source)
    if name is None or reading.obstacle(source) is not None:
        return reading.fixed(size, dim, f"meets a tensor of fixed size in {line_of(node)}")
    value = Value(dim, reading.classes.new(size), unknown(size))
    reading.parts.append(Follower(name, {name: dim}, value.ids))
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
        reading.parts.append(Follower(name.rpartition(".")[0], {name: 0}, value.ids, "num_parameters"))
    const = torch.where(value.const > 0, value.const, value.const * slope.double())
    return Value(value.dim, value.ids, const)


def norm(reading: Reading, node: Node) -> Outcome:
    """Batch or instance norm, affine in each channel; by batch statistics only a zero stays a constant."""
    given = arguments(node)
    value = reading.value(given["input"])
    nodes = {key: given[key] for key in ("weight", "bias", "running_mean", "running_var") if given[key] is not None}
    if value is None or value.dim != 1 or any(reading.obstacle(state) is not None for state in nodes.values()):
        return reading.stop(node)
    names = [cast(str, reading.state_name(state)) for state in nodes.values()]
    owner = names[0].rpartition(".")[0] if names else reading.caller(node)
    counts = "num_features" if isinstance(reading.model.get_submodule(owner), NORMS) else None
    reading.parts.append(Follower(owner, dict.fromkeys(names, 0), value.ids, counts))
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
    """Pooling, padding and resizing treat each channel alone; what becomes of constants is seen by trying.

    On larger inputs too: what padding does to a constant may not show where all outputs lie at the border.
    """
    value, before = reading.value(node.args[0]), shape(cast(Node, node.args[0]))
    if value is None or _reaches(node, value.dim, len(before)):
        return reading.stop(node)
    const = unknown(len(value))
    if value.known.any():
        columns = value.const[value.known].view(-1, *[1] * (len(before) - 1 - value.dim))
        made = []
        for scale in (1, 3):
            sizes = [1 if dim == 0 else scale * size for dim, size in enumerate(before)]
            sizes[value.dim] = -1
            out = cast(Any, node.target)(columns.expand(sizes).contiguous(), *node.args[1:], **node.kwargs)
            made.append((out if isinstance(out, Tensor) else out[0]).movedim(value.dim, 0).flatten(1))
        rows = torch.cat(made, dim=1)
        uniform = rows.amax(1) - rows.amin(1) <= 1e-12 * rows.abs().amax(1)
        const[value.known] = torch.where(uniform, rows[:, 0], torch.nan)
    units = Value(value.dim, value.ids, const)
    return units if isinstance(node.meta["val"], Tensor) else [units, units.varying()]


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
    """A mean, sum or extreme over other dimensions keeps the units; over the units it reads them all."""
    given = arguments(node)
    value, ndim = reading.value(given["self"]), len(shape(given["self"]))
    dims = given.get("dim")
    over = {dim % ndim for dim in ([dims] if isinstance(dims, int) else dims or range(ndim))}
    if value is None or value.dim in over or not isinstance(node.meta["val"], Tensor):
        return reading.stop(node)
    dim = value.dim if given["keepdim"] else value.dim - sum(other < value.dim for other in over)
    const = torch.where(value.const == 0, 0.0, torch.nan) if operation(node) == "sum" else value.const
    return Value(dim, value.ids, const)


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
    """Along the units the lists are joined; along another dimension units at one place join one class."""
    sources = [source for source in cast(list[Node], node.args[0]) if shape(source) != (0,)]  # torch skips these
    values = [value for source in sources if (value := reading.value(source))]
    dim = (1 if operation(node) == "hstack" else arguments(node)["dim"]) % len(shape(node))
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


ELEMENTWISE = """
    relu relu6 gelu silu mish elu selu celu leaky_relu hardtanh hardswish hardsigmoid sigmoid tanh
    log_sigmoid softplus softshrink hardshrink threshold clamp clamp_min clamp_max clip abs neg exp expm1
    log log1p sqrt rsqrt square pow sin cos tan sinh cosh asinh atan erf reciprocal sign floor ceil round
    trunc add sub rsub mul div maximum minimum eq ne lt le gt ge where masked_fill lerp addcmul addcdiv to
    _to_copy nan_to_num logical_not logical_and logical_or isnan zeros_like ones_like
    full_like logit remainder fmod multiply subtract true_divide absolute negative arctan special_expit
    special_erf log2 log10 exp2 erfc atan2 float_power xlogy logaddexp fmax fmin hypot sgn frac deg2rad rad2deg
"""
SPATIAL = """
    max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d pad
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d
    upsample_trilinear3d upsample_bicubic2d
    _upsample_bilinear2d_aa _upsample_bicubic2d_aa
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
"""
BARRIERS = """
    layer_norm group_norm rms_norm softmax log_softmax matmul bmm mm mv dot baddbmm addbmm einsum
    bilinear stack unbind topk sort argsort argmax
    argmin max min median prod cumsum cumprod norm linalg_vector_norm linalg_norm logsumexp var std var_mean
    std_mean all any index gather scatter take_along_dim masked_select roll flip pixel_shuffle
    pixel_unshuffle channel_shuffle cosine_similarity pairwise_distance cdist cross_entropy_loss nll_loss
    mse_loss l1_loss cross outer tril triu one_hot fft_fft fft_ifft fft_rfft fft_irfft
    view_as reshape_as tile repeat_interleave unfold im2col col2im vstack dstack column_stack
    grid_sampler lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell
"""


def _table(rules: Mapping[Rule, str]) -> Mapping[str, Rule]:
    return {name: rule for rule, names in rules.items() for name in names.split()}


RULES: Mapping[str, Rule] = _table(
    {
        linear: "linear",
        product: "addmm",
        convolution: "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
        norm: "batch_norm instance_norm",
        prelu: "prelu",
        fresh: "new_zeros new_ones new_full new_empty",
        same: "clone contiguous detach alias",
        dropout: "dropout feature_dropout alpha_dropout feature_alpha_dropout",
        elementwise: ELEMENTWISE,
        spatial: SPATIAL,
        reduction: "mean sum amax amin",
        reshape: "view reshape _unsafe_view flatten unflatten squeeze unsqueeze",
        permute: "permute transpose swapaxes swapdims movedim moveaxis t numpy_T mT",
        expand: "expand broadcast_to repeat",
        like: "expand_as",
        typed: "type_as",
        part: "slice select narrow index_select",
        chunk: "chunk split split_with_sizes tensor_split",
        glu: "glu",
        concatenate: "cat concat concatenate hstack",
        recurrent: "lstm gru rnn_tanh rnn_relu",
        embedding: "embedding",
        attention: "scaled_dot_product_attention",
        barrier: BARRIERS,
    }
)
"""The rule of each aten operation by its plain name; what is not here is refused, or kept on request."""

MAKERS: tuple[Rule, ...] = (linear, product, convolution, embedding, recurrent)
"""The rules of operations that make units, whether or not their input carries any."""

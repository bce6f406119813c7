"""Site classes: what `convert` swaps a layer's class for. Each asks its noise and runs its own operation."""

from collections.abc import Callable
from typing import Any

from torch import nn

from vardrop.layers.attention import NoisyMultiheadAttention as NoisyMultiheadAttention
from vardrop.layers.conv import NoisyConv1d as NoisyConv1d
from vardrop.layers.conv import NoisyConv2d as NoisyConv2d
from vardrop.layers.conv import NoisyConv3d as NoisyConv3d
from vardrop.layers.conv import NoisyConvTranspose1d as NoisyConvTranspose1d
from vardrop.layers.conv import NoisyConvTranspose2d as NoisyConvTranspose2d
from vardrop.layers.conv import NoisyConvTranspose3d as NoisyConvTranspose3d
from vardrop.layers.embedding import NoisyEmbedding as NoisyEmbedding
from vardrop.layers.embedding import NoisyEmbeddingBag as NoisyEmbeddingBag
from vardrop.layers.embedding import unsupported_lookup
from vardrop.layers.linear import NoisyConv1D as NoisyConv1D
from vardrop.layers.linear import NoisyLinear as NoisyLinear
from vardrop.layers.linear import is_conv1d as is_conv1d
from vardrop.layers.linear import noisy_conv1d
from vardrop.layers.recurrent import NoisyGRU as NoisyGRU
from vardrop.layers.recurrent import NoisyLSTM as NoisyLSTM
from vardrop.layers.recurrent import NoisyRNN as NoisyRNN
from vardrop.layers.recurrent import unsupported_recurrence
from vardrop.noise import Layout

NOISY: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: NoisyLinear,
    nn.Conv1d: NoisyConv1d,
    nn.Conv2d: NoisyConv2d,
    nn.Conv3d: NoisyConv3d,
    nn.ConvTranspose1d: NoisyConvTranspose1d,
    nn.ConvTranspose2d: NoisyConvTranspose2d,
    nn.ConvTranspose3d: NoisyConvTranspose3d,
    nn.RNN: NoisyRNN,
    nn.LSTM: NoisyLSTM,
    nn.GRU: NoisyGRU,
    nn.Embedding: NoisyEmbedding,
    nn.EmbeddingBag: NoisyEmbeddingBag,
    nn.MultiheadAttention: NoisyMultiheadAttention,
}
"""From a plain layer's exact type to its noisy class; a class swap in either direction leaves the parameters alone."""

UNSUPPORTED: dict[type[nn.Module], Callable[[Any], str | None]] = {
    nn.LSTM: unsupported_recurrence,
    nn.Embedding: unsupported_lookup,
    nn.EmbeddingBag: unsupported_lookup,
}
"""Says of a plain layer which of its options its noisy class does not know, and what would be right."""


def noisy_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The noisy class of plain layers of exactly this `kind`; ``None`` where there is none."""
    return noisy_conv1d(kind) if is_conv1d(kind) else NOISY.get(kind)  # type: ignore[arg-type]


def plain_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class of the plain layers that became layers of the noisy class `kind`; ``None`` for any other class."""
    return kind.__bases__[-1] if kind in NOISY.values() or issubclass(kind, NoisyConv1D) else None


def noisy_parameters(layer: nn.Module) -> tuple[str, ...]:
    """The names of the parameters of a plain or noisy `layer` that carry noise."""
    if isinstance(layer, nn.RNNBase):
        return tuple(name for name in layer._flat_weights_names if name.startswith("weight"))
    if isinstance(layer, nn.MultiheadAttention):
        own = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return (*(name for name in own if layer._parameters[name] is not None), "out_proj.weight")
    return ("weight",)


def layout_of(layer: nn.Module, parameter: str) -> Layout:
    """The layout of the weight called so in a noisy `layer`."""
    layout: Layout = layer.layout  # type: ignore[assignment]
    recurrent = isinstance(layer, nn.RNNBase) and parameter.startswith("weight_hh")
    return layout._replace(recurrent=recurrent)


def takes_gates(kind: type[nn.Module]) -> bool:
    """Whether the units of plain layers of exactly this `kind` can have a gate."""
    return is_conv1d(kind) or (kind in NOISY and not issubclass(kind, (nn.RNNBase, nn.MultiheadAttention)))


def shows_units(layer: nn.Module) -> bool:
    """Whether the units of a plain or noisy `layer` are numbers in its input, rather than words looked up."""
    return not isinstance(layer, nn.Embedding | nn.EmbeddingBag)


def samples_outputs(layer: nn.Module) -> bool:
    """Whether local reparameterisation applies to a noisy `layer`; all others draw their weights."""
    return shows_units(layer) and not isinstance(layer, nn.RNNBase | nn.MultiheadAttention)

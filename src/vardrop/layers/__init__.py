"""Site classes: what `convert` swaps a layer's class for. Each asks its noise and runs its own operation."""

from torch import nn

from vardrop.layers.conv import NoisyConv1d as NoisyConv1d
from vardrop.layers.conv import NoisyConv2d as NoisyConv2d
from vardrop.layers.conv import NoisyConv3d as NoisyConv3d
from vardrop.layers.conv import NoisyConvTranspose1d as NoisyConvTranspose1d
from vardrop.layers.conv import NoisyConvTranspose2d as NoisyConvTranspose2d
from vardrop.layers.conv import NoisyConvTranspose3d as NoisyConvTranspose3d
from vardrop.layers.linear import NoisyLinear as NoisyLinear

NOISY: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: NoisyLinear,
    nn.Conv1d: NoisyConv1d,
    nn.Conv2d: NoisyConv2d,
    nn.Conv3d: NoisyConv3d,
    nn.ConvTranspose1d: NoisyConvTranspose1d,
    nn.ConvTranspose2d: NoisyConvTranspose2d,
    nn.ConvTranspose3d: NoisyConvTranspose3d,
}
"""From a plain layer's exact type to its noisy class; a class swap in either direction leaves the parameters alone."""

GATED = frozenset(NOISY)
"""The plain layers whose units can have a gate: each runs its one operation by :func:`vardrop.layers.base.run`."""

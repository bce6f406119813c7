"""What every noise shares: its two switches, noise and mask, and the call a layer makes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from vardrop.fused import Fast, compile_kernel
from vardrop.lrt import Operation


class Layout(NamedTuple):
    """Which axis of a weight counts outputs and which inputs, and into how many groups the layer is split.

    The inputs of a `recurrent` weight are the layer's own hidden units of the step before.
    """

    out_axis: int = 0
    in_axis: int = 1
    groups: int = 1
    recurrent: bool = False


class Noise(nn.Module):
    """Noise on the weights or the units of one layer.

    Attributes:
        on: ``True`` or ``False`` forces the noise; ``None`` follows ``training``, as dropout does.
        mask: boolean, of the shape :meth:`mask_shape`: what :func:`vardrop.prune` left alive; ``None`` while unpruned.
        generator: source of the draws; ``None`` for torch's default generator.
        fast: how the fast path computes; ``None`` for the plain reference.
        projected: whether a pass need not put the parameters into their domain.
        method: the frozen method that made this noise and prices it; set by :func:`vardrop.convert`.
    """

    of_layer: ClassVar[frozenset[str]] = frozenset()
    """Names of own tensors that describe the layer as a whole, and so stay when units leave it."""
    mask: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.on: bool | None = None
        self.generator: torch.Generator | None = None
        self.fast: Fast | None = None
        self.projected = False
        self.method: Any = None
        self.register_buffer("mask", None)

    @property
    def active(self) -> bool:
        """Whether the next call draws noise."""
        return self.training if self.on is None else self.on

    @property
    def compiled(self) -> bool:
        """Whether the fast path compiles its passes; it does not within ``torch.compile`` of a whole model."""
        return self.fast is not None and self.fast.compiled and not torch.compiler.is_compiling()

    def quick(self, formula: Callable[..., Tensor], *parts: Any) -> Tensor:
        """``formula(*parts)``, compiled with its backward where the fast path trains."""
        if not self.compiled or not torch.is_grad_enabled():
            return formula(*parts)
        # the compiler makes a variant for each size of a Parameter, but one for all sizes of a plain tensor
        tensors = (part.view_as(part) if isinstance(part, Tensor) else part for part in parts)
        return cast(Tensor, compile_kernel(formula)(*tensors))

    def forward(self, operation: Operation, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output for input `x`, where the layer computes ``operation(x, weight, bias)``."""
        raise NotImplementedError(f"{type(self).__name__} must say how it acts on a layer's operation")

    def sample_weight(self, weight: Tensor) -> Tensor:
        """The whole `weight` for one pass: a draw, or the mean where the noise is off; dead elements at zero.

        For layers that use a weight more than once in a pass, such as recurrent ones and embeddings.
        """
        raise NotImplementedError(f"{type(self).__name__} must say how it draws a whole weight")

    def factors_of_sequences(self, sequences: int, weight: Tensor) -> Tensor | None:
        """``(sequences, inputs)``: by what the inputs of a `weight` are multiplied at every step of each sequence.

        ``None`` where noise acts on the weight, the same for all sequences of a minibatch, or is off.
        """
        return None

    def log_alpha(self, weight: Tensor) -> Tensor | None:
        """``log(variance / mean^2)`` of each element, or ``None`` where the family has no such thing."""
        return None

    def mask_shape(self, weight: Tensor) -> torch.Size:
        """The shape of the mask: what lives and dies is a weight, unless a subclass says otherwise."""
        return weight.shape

    def on_weights(self, mask: Tensor, weight: Tensor) -> Tensor:
        """Which elements of `weight` live where `mask` tells what lives; broadcasts to `weight`."""
        return mask

    def masked(self, weight: Tensor) -> Tensor:
        """`weight` with its dead elements at zero."""
        return weight if self.mask is None else weight.masked_fill(~self.on_weights(self.mask, weight), 0.0)

    def folded(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the plain layer that computes what this one computes in a quiet pass."""
        return self.masked(weight), bias

    def resized(self, weight: Tensor, layout: Layout) -> None:
        """Takes up the sizes of its host, whose `weight` and `layout` are cut; its own tensors are cut already."""

    def extra_repr(self) -> str:
        return "" if self.method is None else repr(self.method)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """The mask comes and goes with the other tensors of this noise: a state without them leaves it alone."""
        own = self.state_dict().keys() - {"mask"}
        if not own or any(prefix + name in state_dict for name in own | {"mask"}):
            stored = state_dict.get(prefix + "mask")
            first = next(chain(self.parameters(), self.buffers()), stored)
            self.mask = None if stored is None else torch.ones_like(stored, device=cast(Tensor, first).device)
        super()._load_from_state_dict(state_dict, prefix, *args)


def child(layer: nn.Module, name: str) -> nn.Module | None:
    """The child of `layer` called `name`, also of a scripted one, whose children are no dict."""
    if name in layer._modules:
        return layer._modules[name]
    return None


def noises_of(layer: nn.Module) -> dict[str, Noise]:
    """The noises that hang on `layer` by the name of the parameter they act on; none on a plain layer.

    That on the weight of a child is held under the name of the child.
    """
    held = child(layer, "noise")
    named = {"weight": held}
    if isinstance(held, nn.ModuleDict):
        named = {f"{key}.weight" if key in layer._modules else key: noise for key, noise in held.items()}
    return {name: noise for name, noise in named.items() if isinstance(noise, Noise)}

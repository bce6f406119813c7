"""All divergences and gates are formed in float32 or better, whatever the inputs and the autocast."""

from __future__ import annotations

import torch
from torch import Tensor


def precise(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in their common dtype, at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor.is_floating_point():
            dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)


def aligned(*tensors: Tensor) -> tuple[Tensor, ...]:
    """:func:`precise`, broadcast to one shape."""
    return tuple(torch.broadcast_tensors(*precise(*tensors)))

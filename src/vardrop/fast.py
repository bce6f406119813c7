"""The one switch between the plain reference and the fast path."""

from __future__ import annotations

import warnings
from copy import deepcopy
from time import perf_counter
from typing import Literal

import torch
from torch import Tensor, nn

from vardrop.elbo import kl
from vardrop.errors import FastPathWarning, InvalidValueError
from vardrop.fused import Fast, compile_kernel, normal
from vardrop.sites import sites_of_converted

VARIANCES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def fast(
    model: nn.Module,
    on: bool = True,
    *,
    variance: Literal["auto", "float32", "bfloat16"] = "auto",
    compiled: bool = True,
) -> nn.Module:
    """Switches the fast path of a converted `model` on or off in place, and returns the model.

    The fast path draws from the same law as the plain one, but other numbers: its variances are those of the layer to
    the digits of `variance`, its noise, its masks and its passes over weights and outputs are compiled, as are the
    formulas of truncated log-normal gates, which then take one backward for each pass, without ``retain_graph``. The
    first training step pays for the compilation once: some seconds, with truncated log-normal gates up to a minute.
    Under ``torch.compile`` of the whole model the plain path is taken.

    Args:
        model: a converted model.
        on: ``False`` for the plain reference again.
        variance: dtype of the variance matmuls; ``"auto"`` is bfloat16 where the processor has instructions for it,
            else float32. Layers in float64 keep theirs.
        compiled: compile the elementwise passes, and long formulas of gates; where no compiler is present, they run
            uncompiled with a :class:`FastPathWarning`.

    Raises:
        ConversionError: the model is not converted.
        InvalidValueError: `variance` is something else.

    >>> net = vd.convert(torch.nn.Linear(8, 4), vd.ARD())
    >>> vd.fast(net, variance="float32", compiled=False)(torch.randn(2, 8)).shape
    torch.Size([2, 4])
    """
    if variance not in ("auto", *VARIANCES):
        raise InvalidValueError(f"variance={variance!r}: must be 'auto', 'float32' or 'bfloat16'")
    found = sites_of_converted(model)
    compiled = on and compiled and _can_compile(found[0].weight.device)
    for site in found:
        device = site.weight.device
        dtype = VARIANCES.get(variance, torch.bfloat16 if has_fast_bfloat16(device) else torch.float32)
        site.noise.fast = Fast(dtype, compiled) if on else None
    return model


def compile_seconds(model: nn.Module, x: Tensor) -> float:
    """Compiles what a training step on inputs like `x` needs, on a copy of `model`; the seconds it took."""
    copy = deepcopy(model).train()
    started = perf_counter()
    with torch.random.fork_rng():
        (copy(x).float().sum() + kl(copy)).backward()
    return perf_counter() - started


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether matmuls in bfloat16 are faster than in float32 on `device`."""
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _can_compile(device: torch.device) -> bool:
    key = torch.zeros(2, dtype=torch.int32, device=device)
    try:
        compile_kernel(normal)(16, key)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        warnings.warn(
            f"the fast path runs uncompiled, because torch.compile fails here: {reason}", FastPathWarning, stacklevel=3
        )
        return False
    return True

"""The fast twin of :mod:`vardrop.lrt`: the same draws at little more than the price of a plain layer.

Three things make it fast. The variance needs few digits, so its matmuls may run in bfloat16 while the mean stays as
it is. The elementwise passes over weights and outputs are compiled into one loop each, noise included. And one pass
over the weights gives the variance and the KL together, and one pass back adds the gradients of both; nothing of the
weights' size is kept in between but the parameters and the narrow variance.

The compiled noise is counter-based (Threefry-2x32 with 13 rounds, Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011) under a key from torch's generator, so the same seed gives the same run with any number of threads.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from vardrop.errors import TrainingError
from vardrop.lrt import VARIANCE_FLOOR, Operation, at_least_float32


class Priced(Protocol):
    """A method that prices each weight by its mean and log std; equal methods share their kernels."""

    def divergence(self, mean: Tensor, log_std: Tensor) -> Tensor: ...
    def __hash__(self) -> int: ...


ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
ROUNDS = 13
PARITY = 0x1BD11BDA
LARGEST_COUNT = 2**31 - 1
"""Elements that 32-bit counters can number."""
NEGLIGIBLE = -60.0
"""A log of a share that no float32 sum notices, beside a share near one."""
WORTH_COMPILING = 2**17
"""Elements from which a compiled pass of one or two operations is quicker than the operations, its call included."""
WORTH_DRAWING = 2**16
"""Elements from which a compiled mask of dropout is quicker than torch's operations, its call included."""
OPTIONS: dict[str, Any] = {"cpp.enable_floating_point_contract_flag": "fast"}
"""Lets the compiler join a product and a sum into one operation, which rounds once."""


@dataclass(frozen=True)
class Fast:
    """How the fast path computes.

    Args:
        variance_dtype: of the variance matmuls; a layer in float64 keeps its own.
        compiled: whether the elementwise passes, and long formulas of gates, are compiled.
    """

    variance_dtype: torch.dtype
    compiled: bool

    def narrow(self, like: Tensor) -> torch.dtype:
        """The dtype of the variance for weights `like` these."""
        return torch.float64 if like.dtype == torch.float64 else self.variance_dtype


def local_sample(
    operation: Operation,
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    bias: Tensor | None,
    *,
    compiled: bool,
    generator: torch.Generator | None = None,
) -> Tensor:
    """:func:`vardrop.lrt.local_sample` with the variance path in the dtype of `variance`."""
    output_mean = operation(x, mean, bias)
    with torch.autocast(x.device.type, enabled=False):
        squared: Tensor = _Square.apply(x, variance.dtype, compiled)  # type: ignore[no-untyped-call]
        output_variance = operation(squared, variance, None)
        compiled = compiled and output_mean.numel() <= LARGEST_COUNT
        if compiled:
            noise = draw_key(x.device, generator)
        else:
            wide = at_least_float32(output_variance).dtype
            noise = torch.randn(output_mean.shape, dtype=wide, device=x.device, generator=generator)
        sample: Tensor = _Sample.apply(output_mean, output_variance, noise, compiled)  # type: ignore[no-untyped-call]
    return sample


def weigh(
    mean: Tensor, log_std: Tensor, mask: Tensor | None, method: Priced, clip: float | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """One compiled pass over the weights: noisy mean, variance in `dtype`, and the KL summed over live weights.

    Both backwards, through the layer and through the KL, may run together or one after the other.
    """
    found: tuple[Tensor, Tensor, Tensor] = _Weigh.apply(mean, log_std, mask, method, clip, dtype)  # type: ignore[no-untyped-call]
    return found


def mixture_log_density(x: Tensor, means: Tensor, log_precisions: Tensor, log_shares: Tensor) -> Tensor:
    """Log-density in nats of ``sum_k share_k N(mean_k, 1 / precision_k)`` at each element of `x`, in its shape.

    Nothing of the size of `x` times the components is kept between the compiled pass and the one back.
    """
    found: Tensor = _MixtureLogDensity.apply(x, means, log_precisions, log_shares)  # type: ignore[no-untyped-call]
    return found


def joint_and_distance(x: Tensor, means: Tensor, log_precisions: Tensor, log_shares: Tensor) -> tuple[Tensor, Tensor]:
    """``log(share * density)`` of each component at each point and its distance in stds, ``(components, points)``."""
    distance = (x - means[:, None]) * (0.5 * log_precisions).exp()[:, None]
    peaks = log_shares + 0.5 * (log_precisions - math.log(2.0 * math.pi))
    return peaks[:, None] - 0.5 * distance.square(), distance


def draw_key(device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Two 32-bit words from torch's generator, under which compiled noise is drawn."""
    return torch.randint(-(2**31), 2**31, (2,), dtype=torch.int32, device=device, generator=generator)


def dropout_factors(like: Tensor, rate: float, generator: torch.Generator | None) -> Tensor:
    """For each element of `like` 0 with probability `rate`, else ``1 / (1 - rate)``, in one compiled pass."""
    told = torch.tensor(
        [rate, 1.0 / (1.0 - rate)], dtype=torch.promote_types(like.dtype, torch.float32), device=like.device
    )
    return _unflat(compile_kernel(_factors)(_flat(like, like), told, draw_key(like.device, generator)), like)


def is_worth_drawing(count: int) -> bool:
    """Whether a mask of so many elements is drawn quicker, and they can be numbered, by a compiled pass."""
    return WORTH_DRAWING <= count <= LARGEST_COUNT


def normal(count: int, key: Tensor) -> Tensor:
    """`count` standard normal float32 numbers that follow from the two 32-bit words of `key`, by Box and Muller."""
    first, second = _words(count, key)
    angle = (second >> 8).float() * (math.pi * 2.0**-23)
    return torch.sqrt(-2.0 * torch.log(_share_of_range(first))) * torch.cos(angle)


def uniform(count: int, key: Tensor) -> Tensor:
    """`count` uniform float32 numbers in (0, 1] that follow from the two 32-bit words of `key`."""
    return _share_of_range(_words(count, key)[0])


def _words(count: int, key: Tensor) -> tuple[Tensor, Tensor]:
    counter = torch.arange(count, dtype=torch.int32, device=key.device)
    return threefry(counter, torch.zeros_like(counter), key)


def _share_of_range(word: Tensor) -> Tensor:
    """The upper 24 bits of a 32-bit `word` as a number in (0, 1]: the greatest one rounds up."""
    return ((word >> 8) & 0xFFFFFF).float().add(0.5) * 2.0**-24


def _factors(like: Tensor, rate_and_scale: Tensor, key: Tensor) -> Tensor:
    rate, scale = rate_and_scale
    return torch.where(uniform(like.numel(), key) < rate, 0.0, scale).to(like.dtype)


def threefry(first: Tensor, second: Tensor, key: Tensor, rounds: int = ROUNDS) -> tuple[Tensor, Tensor]:
    """Threefry-2x32 of a two-word counter, all words int32 with the bits of unsigned ones."""
    keys = (key[0], key[1], key[0] ^ key[1] ^ PARITY)
    first, second = first + keys[0], second + keys[1]
    for number in range(rounds):
        first = first + second
        turn = ROTATIONS[number % 8]
        second = ((second << turn) | ((second >> (32 - turn)) & ((1 << turn) - 1))) ^ first
        if number % 4 == 3:
            block = number // 4 + 1
            first, second = first + keys[block % 3], second + keys[(block + 1) % 3] + block
    return first, second


class _Weigh(torch.autograd.Function):
    """Keeps only its inputs, and outside the graph's own store, so that a second backward finds them too."""

    @staticmethod
    def forward(
        ctx: Any,
        mean: Tensor,
        log_std: Tensor,
        mask: Tensor | None,
        method: Priced,
        clip: float | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.inputs = (mean, log_std, mask)
        ctx.versions = (mean._version, log_std._version)
        ctx.backward_kernel = _weigh_backward(method, clip)
        flat = [_flat(part, mean) for part in ctx.inputs]
        with torch.autocast(mean.device.type, enabled=False):
            noisy, variance, price = _weigh_forward(method, clip, dtype)(*flat)
        return mean.detach() if noisy is None else _unflat(noisy, mean), _unflat(variance, mean), price

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        mean, log_std, mask = ctx.inputs
        if (mean._version, log_std._version) != ctx.versions:
            raise TrainingError(
                "a noisy layer's weight or log_std was changed in place between its forward and its backward pass"
            )
        by_mean, by_variance, by_kl = gradients
        by_mean = torch.zeros_like(mean) if by_mean is None else by_mean
        by_variance = torch.zeros_like(mean, dtype=mean.dtype) if by_variance is None else by_variance
        by_kl = torch.zeros((), dtype=mean.dtype, device=mean.device) if by_kl is None else by_kl
        parts = [_flat(part, mean) for part in (mean, log_std, mask, by_mean, by_variance)]
        with torch.autocast(mean.device.type, enabled=False):
            by_log_std = ctx.backward_kernel(*parts, by_kl)
        return _unflat(parts[3], mean), _unflat(by_log_std, mean), None, None, None, None


class _Square(torch.autograd.Function):
    """``x^2`` in another dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, compiled: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.compiled = compiled
        return _elementwise(_square, x, dtype, compiled=compiled)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return _elementwise(_square_backward, x, gradient, compiled=ctx.compiled), None, None


class _Sample(torch.autograd.Function):
    """``mean + sqrt(variance) * draw``, where `noise` is the draw itself, or the key of a compiled one."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, variance: Tensor, noise: Tensor, compiled: bool) -> Tensor:
        ctx.compiled = compiled
        if compiled:
            flat = compile_kernel(_sample_compiled)(_flat(mean, mean), _flat(variance, mean), noise)
            sample, slope = (_unflat(part, mean) for part in flat)
        else:
            sample, slope = _sample(mean, variance, noise)
        ctx.save_for_backward(slope)
        return sample

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return gradient, _elementwise(_sample_backward, slope, gradient, compiled=ctx.compiled), None, None


class _MixtureLogDensity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *components: Tensor) -> Tensor:
        flat = compile_kernel(_mixture)(_flat(x, x), *(part.detach() for part in components))
        ctx.save_for_backward(x, *components, flat)
        return _unflat(flat, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        x, *components, flat = ctx.saved_tensors
        parts = (_flat(x, x), *(part.detach() for part in components), flat, _flat(gradient, x))
        with torch.autocast(x.device.type, enabled=False):
            by_x, *by_components = compile_kernel(_mixture_backward)(*parts)
        return _unflat(by_x, x), *by_components


def _mixture(x: Tensor, means: Tensor, log_precisions: Tensor, log_shares: Tensor) -> Tensor:
    joint, _ = joint_and_distance(x, means, log_precisions, log_shares)
    highest = joint.amax(dim=0)
    return highest + _share(joint - highest).sum(dim=0).log()


def _share(difference: Tensor) -> Tensor:
    """``exp`` of what is not positive, never so small that it is denormal, which slows a processor down."""
    return difference.clamp(min=NEGLIGIBLE).exp()


def _mixture_backward(
    x: Tensor, means: Tensor, log_precisions: Tensor, log_shares: Tensor, total: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    joint, distance = joint_and_distance(x, means, log_precisions, log_shares)
    weight = _share(joint - total) * gradient
    pull, root = weight * distance, (0.5 * log_precisions).exp()
    by_share = weight.sum(dim=1)
    by_log_precision = 0.5 * (by_share - (pull * distance).sum(dim=1))
    return -(root[:, None] * pull).sum(dim=0), root * pull.sum(dim=1), by_log_precision, by_share


def _elementwise(kernel: Callable[..., Tensor], x: Tensor, other: Tensor | torch.dtype, *, compiled: bool) -> Tensor:
    """``kernel(x, other)``, in one compiled pass where that is quicker."""
    if not compiled or x.numel() < WORTH_COMPILING:
        return kernel(x, other)
    second = _flat(other, x) if isinstance(other, Tensor) else other
    return _unflat(compile_kernel(kernel)(_flat(x, x), second), x)


def _sample(mean: Tensor, variance: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
    """The sample, and its derivative by the variance in the variance's dtype."""
    std = at_least_float32(variance).clamp_min(VARIANCE_FLOOR).sqrt()
    slope = torch.where(variance < VARIANCE_FLOOR, 0.0, 0.5 * draw / std)
    return (mean + std * draw).to(mean.dtype), slope.to(variance.dtype)


def _sample_compiled(mean: Tensor, variance: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    return _sample(mean, variance, normal(mean.numel(), key))


def _sample_backward(slope: Tensor, gradient: Tensor) -> Tensor:
    return (slope * gradient).to(slope.dtype)


def _square(x: Tensor, dtype: torch.dtype) -> Tensor:
    return at_least_float32(x).square().to(dtype)


def _square_backward(x: Tensor, gradient: Tensor) -> Tensor:
    return (2.0 * (x * gradient)).to(x.dtype)


@functools.cache
def _weigh_forward(method: Priced, clip: float | None, dtype: torch.dtype) -> Callable[..., Any]:
    def forward(mean: Tensor, log_std: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor, Tensor]:
        variance = torch.exp(-log_std).reciprocal().square()  # the divergences need the same exponential
        noisy = None if clip is None else mean * (at_least_float32(mean).square() > math.exp(-clip) * variance)
        price = method.divergence(mean, log_std)
        if mask is not None:
            noisy, variance, price = (mean if noisy is None else noisy) * mask, variance * mask, price * mask
        return noisy, variance.to(dtype), price.sum()

    return compile_kernel(forward)


@functools.cache
def _weigh_backward(method: Priced, clip: float | None) -> Callable[..., Any]:
    """Adds to the gradient of the mean in place; that of log std is new."""

    def backward(
        mean: Tensor, log_std: Tensor, mask: Tensor | None, into: Tensor, by_variance: Tensor, by_kl: Tensor
    ) -> Tensor:
        by_mean = into
        variance = torch.exp(2.0 * log_std)
        price_vjp: Callable[[Tensor], tuple[Tensor, Tensor]] = torch.func.vjp(method.divergence, mean, log_std)[1]
        price = by_kl.expand(mean.shape)
        if mask is not None:
            by_mean, by_variance, price = by_mean * mask, by_variance * mask, price * mask
        if clip is not None:
            by_mean = by_mean * (at_least_float32(mean).square() > math.exp(-clip) * variance)
        price_by_mean, price_by_log_std = price_vjp(price)
        into.copy_(by_mean + price_by_mean)
        return 2.0 * by_variance * variance + price_by_log_std

    return compile_kernel(backward)


@functools.cache
def compile_kernel(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel` compiled, for every length where its tensors have one axis: :func:`_flat` makes all shapes one.

    Past the compiler's bound of variants it runs as it is.

    Its code is copied, because the compiler bounds how many variants of one code it makes.
    """
    code, closure = kernel.__code__.replace(), kernel.__closure__
    own = types.FunctionType(code, kernel.__globals__, kernel.__name__, kernel.__defaults__, closure)
    return torch.compile(own, options=OPTIONS)


def _flat(part: Tensor | None, like: Tensor) -> Any:
    """`part` as one axis in the order in which `like` lies in memory; a copy only where it lies otherwise."""
    if part is None:
        return None
    if like.is_contiguous():
        return part.reshape(-1).detach()
    return part.permute(_order(like)).reshape(-1).detach()


def _unflat(flat: Tensor, like: Tensor) -> Tensor:
    """The reverse of :func:`_flat`, with the very strides of `like`: those of an axis of length one tell the layout."""
    if like.is_contiguous():
        return flat.as_strided(like.shape, like.stride())
    order = _order(like)
    if like.permute(order).is_contiguous():
        return flat.as_strided(like.shape, like.stride())
    laid = flat.view([like.shape[axis] for axis in order])
    return laid.permute(sorted(range(like.dim()), key=order.__getitem__))


def _order(like: Tensor) -> list[int]:
    """The axes of `like` from the slowest to the fastest in memory."""
    strides = like.stride()
    return sorted(range(like.dim()), key=strides.__getitem__, reverse=True)

"""The truncated log-normal noise of structured Bayesian pruning.

``log theta ~ N(mu, exp(2 log_sigma))`` cut to ``[low, high]``. As printed the formulas divide by ``Z``, the mass inside
the interval, which underflows a few sigma outside it. Here the interval's nearer end is mirrored to the top, and three
branches share the work: ``mu`` inside, up to three sigma beyond the top, and further out, where ``log theta`` falls off
exponentially from the top. Inputs of the branches not taken are replaced by harmless ones.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vardrop.errors import InvalidValueError
from vardrop.functional._dtype import precise

LOG_SQRT_TWO_PI = 0.5 * math.log(2.0 * math.pi)
LOG_SQRT_HALF_PI = 0.5 * math.log(0.5 * math.pi)
FAR = 3.0
LEVELS = 30
CLIP = 1e-6
LARGEST_SNR = 1e6


def truncated_lognormal_kl(mu: Tensor, log_sigma: Tensor, low: float = -20.0, high: float = 0.0) -> Tensor:
    """KL of the noise to the log-uniform prior on ``[exp(low), exp(high)]``, nats; at least 0.

    Args:
        mu: location of ``log theta`` before truncation, any shape; may lie far outside the interval.
        log_sigma: log of its scale.
        low: lower end of ``log theta``.
        high: upper end.

    Raises:
        InvalidValueError: unless ``low < high``.

    Source: arXiv:1705.07283, equation 17.

    >>> from vardrop import functional as F
    >>> F.truncated_lognormal_kl(torch.tensor([0.0]), torch.tensor([-5.0]))
    tensor([7.2699])
    """
    cut = _cut(mu, log_sigma, low, high)
    return torch.where(cut.inside, _kl_inside(cut), torch.where(cut.far, _kl_far(cut), _kl_near(cut)))


def truncated_lognormal_mean(mu: Tensor, log_sigma: Tensor, low: float = -20.0, high: float = 0.0) -> Tensor:
    """``E theta``: what a unit is multiplied by in a deterministic pass.

    Source: arXiv:1705.07283, equation 20.

    >>> from vardrop import functional as F
    >>> F.truncated_lognormal_mean(torch.tensor([0.0]), torch.tensor([-5.0]))
    tensor([0.9946])
    """
    dtype = precise(mu, log_sigma)[0].dtype
    return torch.exp(_log_moment(mu, log_sigma, low, high, 1)).to(dtype)


def truncated_lognormal_snr(mu: Tensor, log_sigma: Tensor, low: float = -20.0, high: float = 0.0) -> Tensor:
    """``E theta / std theta``, at most 1e6; formed in float64. A unit dies at 1 or below.

    Source: arXiv:1705.07283, equation 21.

    >>> from vardrop import functional as F
    >>> F.truncated_lognormal_snr(torch.tensor([0.0]), torch.tensor([-5.0]))
    tensor([246.6992])
    """
    dtype = precise(mu, log_sigma)[0].dtype
    first, second = (_log_moment(mu, log_sigma, low, high, order) for order in (1, 2))
    excess = torch.expm1(second - 2.0 * first).clamp_min(LARGEST_SNR**-2)
    return excess.rsqrt().to(dtype)


def truncated_lognormal_icdf(
    u: Tensor, mu: Tensor, log_sigma: Tensor, low: float = -20.0, high: float = 0.0
) -> Tensor:
    """``theta`` at the quantile `u`: the sampler, for uniform `u`, held in [1e-6, 1 - 1e-6].

    Source: arXiv:1705.07283, equation 19.

    >>> from vardrop import functional as F
    >>> F.truncated_lognormal_icdf(torch.tensor([0.5]), torch.tensor([-1.0]), torch.tensor([-5.0]))
    tensor([0.3679])
    """
    cut = _cut(mu, log_sigma, low, high)
    (u,) = precise(u)
    u = u.to(cut.sigma.dtype).clamp(CLIP, 1.0 - CLIP)
    u = torch.where(cut.mirrored, 1.0 - u, u)
    top = -cut.x
    near_top = top.clamp_min(-4.0)
    lower, upper = torch.special.ndtr(near_top - cut.width), torch.special.ndtr(near_top)
    middle = torch.special.ndtri((lower + u * (upper - lower)).clamp(1e-30, 1.0 - 6e-8))
    far_top = top.clamp_max(-4.0)
    tail = _tail_quantile(u, far_top)
    below_top = torch.where(top < -4.0, tail, middle - near_top) * cut.sigma
    below_top = below_top.clamp_max(0.0)
    below_top = torch.maximum(below_top, torch.full_like(below_top, low - high))
    return torch.exp(torch.where(cut.mirrored, low - below_top, high + below_top))


class _Cut(NamedTuple):
    """The truncated normal, mirrored so that `mu` is not below the interval's middle; `x = (mu - top) / sigma`."""

    mirrored: Tensor
    sigma: Tensor
    log_sigma: Tensor
    x: Tensor
    width: Tensor
    log_length: float

    @property
    def inside(self) -> Tensor:
        return self.x < 0.0

    @property
    def far(self) -> Tensor:
        return self.x >= FAR


def _cut(mu: Tensor, log_sigma: Tensor, low: float, high: float) -> _Cut:
    if not low < high:
        raise InvalidValueError(f"low={low}, high={high}: must satisfy low < high")
    mu, log_sigma = torch.broadcast_tensors(*precise(mu, log_sigma))
    mirrored = mu < 0.5 * (low + high)
    over = torch.where(mirrored, low - mu, mu - high)
    sigma = torch.exp(log_sigma)
    return _Cut(mirrored, sigma, log_sigma, over / sigma, (high - low) / sigma, math.log(high - low))


def _log_mills(x: Tensor) -> Tensor:
    """``log(sqrt(pi / 2) erfcx(x / sqrt 2))``: the log of the upper tail over the density, for ``x >= 0``."""
    return LOG_SQRT_HALF_PI + torch.log(torch.special.erfcx(x * math.sqrt(0.5)))


def _kl_inside(cut: _Cut) -> Tensor:
    """`mu` inside the interval: ``log Z`` from two log cdfs."""
    x = torch.where(cut.inside, cut.x, -1.0)
    top, bottom = -x, -x - cut.width
    log_z = _log_mass(top, bottom)
    top_term = top * torch.exp(-0.5 * top.square() - LOG_SQRT_TWO_PI - log_z)
    bottom_term = bottom * torch.exp(-0.5 * bottom.square() - LOG_SQRT_TWO_PI - log_z)
    entropy_part = cut.log_length - cut.log_sigma - LOG_SQRT_TWO_PI - 0.5
    return entropy_part - log_z - 0.5 * (bottom_term - top_term)


def _log_mass(top: Tensor, bottom: Tensor) -> Tensor:
    """Log of the normal mass of ``[bottom, top]`` for ``top > 0``; below -30 there is none."""
    above, below = torch.special.log_ndtr(top), torch.special.log_ndtr(bottom.clamp_min(-30.0))
    return above + torch.log(-torch.expm1(below - above))


def _kl_near(cut: _Cut) -> Tensor:
    """`mu` up to three sigma beyond the top: everything relative to the density at the top."""
    chosen = ~cut.inside & ~cut.far
    x = torch.where(chosen, cut.x, 1.0)
    width = torch.where(chosen, cut.width, 1.0)
    log_width = torch.where(chosen, cut.log_length - cut.log_sigma, 0.0)
    bottom = x + width
    fall = torch.exp(-0.5 * width * (x + bottom))
    r = torch.exp(_log_mills(x)) - fall * torch.exp(_log_mills(bottom))
    return log_width - 0.5 - torch.log(r) - 0.5 * x * (1.0 / r - x) + 0.5 * bottom * fall / r


def _kl_far(cut: _Cut) -> Tensor:
    """`mu` further beyond the top: an exponential fall, by the continued fraction of the Mills ratio."""
    x = torch.where(cut.far, cut.x, FAR)
    delta = _mills_excess(x)
    return (cut.log_length - cut.log_sigma) - 0.5 + torch.log(x + delta) - 0.5 * x * delta


def _mills_excess(x: Tensor) -> Tensor:
    """``1 / m(x) - x`` of the Mills ratio ``m``, without the cancellation."""
    value = x
    for level in range(LEVELS, 1, -1):
        value = x + level / value
    return 1.0 / value


def _log_moment(mu: Tensor, log_sigma: Tensor, low: float, high: float, order: int) -> Tensor:
    """``log E theta^order``, in float64: its normal is that of the posterior, moved up by ``order sigma^2``.

    While the moved normal has its peak inside the interval the plain formula holds; elsewhere both masses are taken
    relative to the density at the top, where ``order mu + (order sigma)^2 / 2`` cancels exactly.
    """
    mu, log_sigma = torch.broadcast_tensors(mu.double(), log_sigma.double())
    sigma = torch.exp(log_sigma)
    mirrored = mu < 0.5 * (low + high)
    centre = torch.where(mirrored, low + high - mu, mu)
    shift = torch.where(mirrored, -order * sigma, order * sigma)
    top, bottom = (high - centre) / sigma, (low - centre) / sigma
    plain = (top > 0.0) & (top - shift > 0.0) & (bottom - shift < 0.0)
    moved_mass = _log_mass(torch.where(plain, top - shift, 1.0), torch.where(plain, bottom - shift, -1.0))
    mass = _log_mass(torch.where(plain, top, 1.0), torch.where(plain, bottom, -1.0))
    by_mass = order * mu + 0.5 * (order * sigma).square() + moved_mass - mass
    relative = _log_relative_mass(top - shift, bottom - shift) - _log_relative_mass(top, bottom)
    return torch.where(plain, by_mass, torch.where(mirrored, order * low, order * high) + relative)


def _log_relative_mass(top: Tensor, bottom: Tensor) -> Tensor:
    """Log of the normal mass of ``[bottom, top]`` over the density at `top`, wherever the interval lies."""
    below, above = top < 0.0, bottom > 0.0
    across = ~below & ~above
    width = top - bottom
    under = _log_tail_mass(torch.where(below, -top, 1.0), width)
    over = _log_tail_mass(torch.where(above, bottom, 1.0), width) + 0.5 * width * torch.where(above, top + bottom, 0.0)
    inside_top, inside_bottom = torch.where(across, top, 1.0), torch.where(across, bottom, -1.0)
    inside = _log_mass(inside_top, inside_bottom) + 0.5 * inside_top.square() + LOG_SQRT_TWO_PI
    return torch.where(below, under, torch.where(above, over, inside))


def _log_tail_mass(x: Tensor, width: Tensor) -> Tensor:
    """Log of the normal mass of ``[x, x + width]`` over the density at `x`, for ``x > 0``."""
    near, far = _log_mills(x), _log_mills(x + width)
    fall = far - near - 0.5 * width * (2.0 * x + width)
    return near + torch.log(-torch.expm1(fall.clamp_max(-1e-30)))


def _tail_quantile(u: Tensor, top: Tensor) -> Tensor:
    """``z - top`` where ``log Phi(z) = log Phi(top) + log u``, for a `top` far down the tail, by Newton's method."""
    log_u = torch.log(u)
    goal = torch.special.log_ndtr(top) + log_u
    z = -torch.sqrt(top.square() - 2.0 * log_u)
    for _ in range(4):
        slope = torch.exp(-_log_mills(-z))
        z = z - (torch.special.log_ndtr(z) - goal) / slope
    return z - top

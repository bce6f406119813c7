"""The truncated log-normal noise of structured Bayesian pruning, formed in float64: one number for each unit.

``log theta ~ N(mu, exp(2 log_sigma))`` cut to ``[low, high]``. As printed the formulas divide by ``Z``, the
mass inside the interval, which underflows a few sigma outside it. Here every mass is taken relative to the
density at the point of the interval nearest to the peak, where nothing under- or overflows, through the Mills
ratio ``m(x)``: the upper tail of the normal over its density, so that ``1 / m(x) = x + excess(x)``. Inputs of
the branch not taken are replaced by harmless ones.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vardrop.errors import InvalidValueError
from vardrop.functional._dtype import aligned, precise

LOG_SQRT_HALF_PI = 0.5 * math.log(0.5 * math.pi)
SQRT_HALF = math.sqrt(0.5)
FAR = 10.0
LEVELS = 14
TAIL = 4.0
NEWTON_STEPS = 6
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
    dtype = precise(mu, log_sigma)[0].dtype
    cut = _cut(mu, log_sigma, low, high)
    kl = torch.where(cut.outside, _kl_outside(cut), _kl_inside(cut))
    return (torch.log(cut.width) - 0.5 + kl).to(dtype)


def truncated_lognormal_mean(mu: Tensor, log_sigma: Tensor, low: float = -20.0, high: float = 0.0) -> Tensor:
    """``E theta``: what a unit is multiplied by in a deterministic pass.

    Raises:
        InvalidValueError: unless ``low < high``.

    Source: arXiv:1705.07283, equation 20.

    >>> from vardrop import functional as F
    >>> F.truncated_lognormal_mean(torch.tensor([0.0]), torch.tensor([-5.0]))
    tensor([0.9946])
    """
    dtype = precise(mu, log_sigma)[0].dtype
    return torch.exp(_log_moment(mu, log_sigma, low, high, 1)).to(dtype)


def truncated_lognormal_snr(mu: Tensor, log_sigma: Tensor, low: float = -20.0, high: float = 0.0) -> Tensor:
    """``E theta / std theta``, at most 1e6; formed in float64. A unit dies at 1 or below.

    Raises:
        InvalidValueError: unless ``low < high``.

    Source: arXiv:1705.07283, equation 21.

    >>> from vardrop import functional as F
    >>> F.truncated_lognormal_snr(torch.tensor([0.0]), torch.tensor([-5.0]))
    tensor([246.6992])
    """
    dtype = precise(mu, log_sigma)[0].dtype
    first, second = (_log_moment(mu, log_sigma, low, high, order) for order in (1, 2))
    excess = torch.expm1(second - 2.0 * first).clamp_min(LARGEST_SNR**-2)
    return excess.rsqrt().to(dtype)


def truncated_lognormal_icdf(u: Tensor, mu: Tensor, log_sigma: Tensor, low: float = -20.0, high: float = 0.0) -> Tensor:
    """``theta`` at the quantile `u`: the sampler, for uniform `u`, held in [1e-6, 1 - 1e-6].

    Raises:
        InvalidValueError: unless ``low < high``.

    Source: arXiv:1705.07283, equation 19.

    >>> from vardrop import functional as F
    >>> F.truncated_lognormal_icdf(torch.tensor([0.5]), torch.tensor([-1.0]), torch.tensor([-5.0]))
    tensor([0.3679])
    """
    dtype = precise(u, mu, log_sigma)[0].dtype
    mirrored = mu < 0.5 * (low + high)
    cut = _cut(torch.where(mirrored, low + high - mu, mu), log_sigma, low, high)
    u = u.double().clamp(CLIP, 1.0 - CLIP)
    u = torch.where(mirrored, 1.0 - u, u)
    in_tail = cut.top < -TAIL
    below_top = torch.where(in_tail, _tail_quantile(u, cut, in_tail), _central_quantile(u, cut, in_tail))
    below_top = torch.exp(log_sigma.double()) * torch.minimum(below_top.clamp_min(0.0), cut.width)
    return torch.exp(torch.where(mirrored, low + below_top, high - below_top)).to(dtype)


class _Cut(NamedTuple):
    """The interval ``[bottom, top]`` in units of the normal; ``x`` is how far outside it the peak lies."""

    bottom: Tensor
    top: Tensor
    width: Tensor

    @property
    def outside(self) -> Tensor:
        return (self.bottom > 0.0) | (self.top < 0.0)

    @property
    def x(self) -> Tensor:
        return torch.where(self.outside, torch.maximum(self.bottom, -self.top), 1.0)


def _cut(mu: Tensor, log_sigma: Tensor, low: float, high: float) -> _Cut:
    if not low < high:
        raise InvalidValueError(f"low={low}, high={high}: must satisfy low < high")
    mu, log_sigma = aligned(mu.double(), log_sigma.double())
    inverse = torch.exp(-log_sigma)
    return _Cut((low - mu) * inverse, (high - mu) * inverse, (high - low) * inverse)


def _log_mills(x: Tensor) -> Tensor:
    """Log of the Mills ratio, ``x >= 0``."""
    return LOG_SQRT_HALF_PI + torch.log(torch.special.erfcx(x * SQRT_HALF))


def _excess(x: Tensor) -> Tensor:
    """``1 / m(x) - x``; far out by its continued fraction, free of the cancellation."""
    near = torch.exp(-_log_mills(x.clamp_max(FAR))) - x.clamp_max(FAR)
    far = x.clamp_min(FAR)
    value = far
    for level in range(LEVELS, 1, -1):
        value = far + level / value
    return torch.where(x < FAR, near, 1.0 / value)


def _log_share_beyond(cut: _Cut) -> Tensor:
    """Log of the tail beyond the farther end over the tail beyond the nearer end, for a peak outside."""
    share = _log_mills(cut.x + cut.width) - _log_mills(cut.x) - 0.5 * cut.width * (2.0 * cut.x + cut.width)
    return share.clamp_max(-1e-30)


def _central_mass(cut: _Cut) -> Tensor:
    """Normal mass over the density at the peak, for a peak inside."""
    top, bottom = torch.where(cut.outside, 1.0, cut.top), torch.where(cut.outside, -1.0, cut.bottom)
    return math.sqrt(0.5 * math.pi) * (torch.erf(top * SQRT_HALF) - torch.erf(bottom * SQRT_HALF))


def _log_mass(cut: _Cut) -> Tensor:
    """Log of the normal mass of the interval over the density at its point nearest to the peak."""
    outside = _log_mills(cut.x) + torch.log(-torch.expm1(_log_share_beyond(cut)))
    return torch.where(cut.outside, outside, torch.log(_central_mass(cut)))


def _kl_inside(cut: _Cut) -> Tensor:
    """KL but for ``log width - 1/2``, the peak inside."""
    top, bottom = torch.where(cut.outside, 1.0, cut.top), torch.where(cut.outside, -1.0, cut.bottom)
    mass = _central_mass(cut)
    ends = top * torch.exp(-0.5 * top.square()) - bottom * torch.exp(-0.5 * bottom.square())
    return 0.5 * ends / mass - torch.log(mass)


def _kl_outside(cut: _Cut) -> Tensor:
    """KL but for ``log width - 1/2``, the peak outside; every large term has been cancelled by hand."""
    x, far = cut.x, cut.x + cut.width
    log_share = _log_share_beyond(cut)
    excess, excess_far = _excess(torch.stack([x, far])).unbind()
    share, kept = torch.exp(log_share), -torch.expm1(log_share)
    by_ends: Tensor = share * (cut.width * (x + far) + far * excess_far) - x * excess
    return torch.log((x + excess) / kept) + 0.5 * by_ends / kept


def _log_moment(mu: Tensor, log_sigma: Tensor, low: float, high: float, order: int) -> Tensor:
    """``log E theta^order``, from the posterior's normal and the same moved up by ``order sigma^2``."""
    cut = _cut(mu, log_sigma, low, high)
    mu, log_sigma = aligned(mu.double(), log_sigma.double())
    shift = order * torch.exp(log_sigma)
    moved = _Cut(cut.bottom - shift, cut.top - shift, cut.width)
    zero = torch.zeros_like(shift)
    start, end = (torch.clamp(x, low - mu, high - mu) for x in (zero, order * torch.exp(2.0 * log_sigma)))
    densities = order * (mu + end) - 0.5 * (end - start) * (start + end) * torch.exp(-2.0 * log_sigma)
    return densities + _log_mass(moved) - _log_mass(cut)


def _central_quantile(u: Tensor, cut: _Cut, in_tail: Tensor) -> Tensor:
    """``top - z`` at the quantile, by the inverse of the normal cdf."""
    top = torch.where(in_tail, 0.0, cut.top)
    lower = torch.special.ndtr(torch.where(in_tail, -1.0, cut.bottom))
    z: Tensor = torch.special.ndtri(lower + u * (torch.special.ndtr(top) - lower))
    return top - z


def _tail_quantile(u: Tensor, cut: _Cut, in_tail: Tensor) -> Tensor:
    """``top - z`` at the quantile, for an interval down the lower tail, by Newton's method on the log cdf.

    The last step alone is differentiated: it carries the exact gradient.
    """
    x, width = torch.where(in_tail, -cut.top, TAIL), torch.where(in_tail, cut.width, 1.0)
    log_share = _log_share_beyond(_Cut(-x - width, -x, width))
    goal = torch.log(u + (1.0 - u) * torch.exp(log_share))
    fixed_x, fixed_goal = x.detach(), goal.detach()
    below = -2.0 * fixed_goal / (torch.sqrt(fixed_x.square() - 2.0 * fixed_goal) + fixed_x)
    fixed_start = _log_mills(fixed_x) + fixed_goal
    for _ in range(NEWTON_STEPS):
        log_mills = _log_mills(fixed_x + below)
        below = below + (log_mills - fixed_start - below * (fixed_x + 0.5 * below)) * torch.exp(log_mills)
    log_mills = _log_mills(x + below)
    residual: Tensor = log_mills - _log_mills(x) - below * (x + 0.5 * below) - goal
    return below + residual * torch.exp(log_mills.detach())

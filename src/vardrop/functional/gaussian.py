"""Divergences of a Gaussian weight posterior ``N(mean, std^2)`` to the family's priors, elementwise, nats.

Everything is a function of ``t = mean / std`` and never of ``log(mean^2)``, so values and gradients are
finite at ``mean = 0``, for ``std -> 0`` and for ``alpha = 1 / t^2 -> inf``.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from vardrop.errors import InvalidValueError
from vardrop.functional._dtype import aligned, precise
from vardrop.functional._ratio import LARGEST_RATIO, RatioKL

EULER = 0.5772156649015329
SIGMOID_FIT = (0.63576, 1.87320, 1.48695)
CUBIC_FIT = (1.161451241083230, -1.502041176441722, 0.586299206427007)
SMALLEST_SQUARED_RATIO = 1e-30
SMALLEST_LOG_STD = -80.0


def log_alpha(mean: Tensor, log_std: Tensor) -> Tensor:
    """``log alpha = 2 log std - 2 log |mean|``, the log dropout rate; for reports and rules, not for losses.

    Finite also at ``mean = 0``, where it is that of the smallest normal number.

    Source: arXiv:1701.05369, section 3.

    >>> from vardrop import functional as F
    >>> F.log_alpha(torch.tensor([1.0]), torch.tensor([1.5]))
    tensor([3.])
    """
    mean, log_std = precise(mean, log_std)
    return 2.0 * (log_std - mean.abs().clamp_min(torch.finfo(mean.dtype).tiny).log())


def log_uniform_kl(mean: Tensor, log_std: Tensor, form: Literal["exact", "sigmoid", "cubic"] = "exact") -> Tensor:
    """KL to the log-uniform prior ``p(|w|) ~ 1 / |w|``, normalised to vanish as ``alpha -> inf``.

    ``"exact"`` is ``2 * integral of Dawson's function from 0 to |mean| / (std sqrt 2)``, to 8e-9 of itself
    (gradient: 4e-8). ``"sigmoid"`` is the fit of arXiv:1701.05369, equation 14 (error up to 0.0094),
    ``"cubic"`` that of arXiv:1506.02557, appendix C, for ``alpha <= 1`` only (error up to 0.041); beyond, it
    stays at its value for 1.

    Args:
        mean: posterior means, any shape.
        log_std: logs of the posterior standard deviations; broadcasts with `mean`.
        form: which form.

    Returns:
        Nats, of the broadcast shape, in float32 or better.

    Raises:
        InvalidValueError: `form` is something else.

    Source: arXiv:1506.02557, section 3.3, and arXiv:1701.05369.

    >>> from vardrop import functional as F
    >>> F.log_uniform_kl(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0]))
    tensor([0.0000, 0.4267])
    """
    mean, log_std = aligned(mean, log_std)
    if form == "exact":
        return _ratio_kl(mean, log_std, exact=True)
    r = (mean * torch.exp(-log_std.clamp_min(SMALLEST_LOG_STD))).clamp(-LARGEST_RATIO, LARGEST_RATIO).square()
    if form == "sigmoid":
        k1, k2, k3 = SIGMOID_FIT
        bump = k1 * torch.sigmoid(k3 * torch.log(r.clamp_min(SMALLEST_SQUARED_RATIO)) - k2)
        return _ratio_kl(mean, log_std, exact=False) + bump
    if form == "cubic":
        return _cubic(r.clamp_min(1.0))
    raise InvalidValueError(f"form={form!r}: must be 'exact', 'sigmoid' or 'cubic'")


def log_uniform_kl_from_log_alpha(log_alpha: Tensor, form: Literal["exact", "sigmoid", "cubic"] = "exact") -> Tensor:
    """:func:`log_uniform_kl` of the rate ``alpha`` itself, for methods that share one among many weights.

    Raises:
        InvalidValueError: `form` is something else.

    Source: arXiv:1506.02557, section 3.3.

    >>> from vardrop import functional as F
    >>> F.log_uniform_kl_from_log_alpha(torch.tensor([0.0]))
    tensor([0.4267])
    """
    return log_uniform_kl(torch.ones_like(log_alpha), 0.5 * log_alpha, form)


def ard_kl(mean: Tensor, log_std: Tensor) -> Tensor:
    """KL to a zero-mean Gaussian prior with the best variance: ``log(1 + mean^2 / std^2) / 2``, nats.

    Source: arXiv:1811.00596, section 2, equation 1, and arXiv:1811.07533, equation 18.

    >>> from vardrop import functional as F
    >>> F.ard_kl(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0]))
    tensor([0.0000, 0.3466])
    """
    return _ratio_kl(*aligned(mean, log_std), exact=False)


def ard_kl_from_log_alpha(log_alpha: Tensor) -> Tensor:
    """:func:`ard_kl` of the rate itself: ``log(1 + 1 / alpha) / 2``, nats.

    Source: arXiv:1811.07533, equation 17.

    >>> from vardrop import functional as F
    >>> F.ard_kl_from_log_alpha(torch.tensor([0.0]))
    tensor([0.3466])
    """
    (log_alpha,) = precise(log_alpha)
    return 0.5 * torch.nn.functional.softplus(-log_alpha)


def vbd_kl(mean: Tensor, log_std: Tensor, low: float = 0.0, high: float = math.inf) -> Tensor:
    """KL to a zero-mean Gaussian prior with the best variance in ``[low, high]``, nats; ``ard_kl`` if free.

    Raises:
        InvalidValueError: unless ``0 <= low < high``.

    Source: arXiv:1811.07533, equations 11 to 15, with the interval kept.

    >>> from vardrop import functional as F
    >>> F.vbd_kl(torch.tensor([1.0]), torch.tensor([0.0]), low=0.0, high=1.0)
    tensor([0.5000])
    """
    if not 0.0 <= low < high:
        raise InvalidValueError(f"low={low}, high={high}: must satisfy 0 <= low < high")
    free = ard_kl(mean, log_std)
    if low == 0.0 and high == math.inf:
        return free
    mean, log_std = aligned(mean, log_std)
    second_moment = mean.square() + torch.exp(2.0 * log_std)
    bounds = torch.finfo(mean.dtype)
    best = second_moment.detach().clamp(max(low, bounds.tiny), min(high, bounds.max))
    held = 0.5 * torch.log(best) - log_std + 0.5 * (second_moment / best - 1.0)
    return torch.where((second_moment < low) | (second_moment > high), held, free)


def gamma_ard_kl(mean: Tensor, log_std: Tensor, a: float, b: float) -> Tensor:
    """Minus the regulariser of ARD with a Gamma(a, b) hyper-prior on the precision, constant included, nats.

    ``-log std + (a - 1/2) log(std^2 + mean^2 + 2 b) - C``. For ``a < 1`` it falls without bound as std grows.
    With ``b = 0`` the constant is infinite and its ``a log b`` is left out; then ``a > 1`` falls without
    bound at ``mean = 0`` as std shrinks, and is refused.

    Raises:
        InvalidValueError: unless ``a > 1/2``, ``b >= 0``, and ``b > 0`` where ``a > 1``.

    Source: arXiv:1811.00596, section 4 and appendix B.

    >>> from vardrop import functional as F
    >>> F.gamma_ard_kl(torch.tensor([0.1]), torch.tensor([-5.0]), a=0.51, b=1e-8)
    tensor([14.4506])
    """
    if not a > 0.5:
        raise InvalidValueError(f"a={a}: the Gamma prior needs a > 1/2, below it no precision is best")
    if not b >= 0.0 or (a > 1.0 and b == 0.0):
        raise InvalidValueError(f"b={b}: the Gamma prior needs b >= 0, and b > 0 where a > 1 (a={a})")
    mean, log_std = aligned(mean, log_std)
    constant = 1.0 - a - math.lgamma(a) + 0.5 * (2.0 * a - 1.0) * math.log(2.0 * a - 1.0)
    if b == 0.0:
        return (2.0 * a - 1.0) * ard_kl(mean, log_std) + 2.0 * (a - 1.0) * log_std - constant
    constant += a * math.log(b)
    rest = (mean.square() + 2.0 * b).clamp_min(torch.finfo(mean.dtype).tiny)
    return (a - 0.5) * torch.logaddexp(2.0 * log_std, torch.log(rest)) - log_std - constant


def normal_kl(mean: Tensor, log_std: Tensor, prior_variance: float | Tensor) -> Tensor:
    """KL to ``N(0, prior_variance)``, nats.

    Raises:
        InvalidValueError: if a `prior_variance` given as a number is not above 0.

    Source: arXiv:1312.6114, appendix B.

    >>> from vardrop import functional as F
    >>> F.normal_kl(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0]), prior_variance=1.0)
    tensor([0.0000, 0.5000])
    """
    if not isinstance(prior_variance, Tensor) and not prior_variance > 0.0:
        raise InvalidValueError(f"prior_variance={prior_variance}: must be above 0")
    mean, log_std = precise(mean, log_std)
    variance = torch.as_tensor(prior_variance, device=mean.device, dtype=mean.dtype)
    doubled = 2.0 * log_std - torch.log(variance)
    return 0.5 * (mean.square() / variance + torch.expm1(doubled) - doubled)


def _ratio_kl(mean: Tensor, log_std: Tensor, *, exact: bool) -> Tensor:
    result: Tensor = RatioKL.apply(mean, log_std, exact)  # type: ignore[no-untyped-call]
    return result


def _cubic(r: Tensor) -> Tensor:
    """The cubic fit at ``alpha = 1 / r``, for ``r >= 1``."""
    c1, c2, c3 = CUBIC_FIT
    alpha = r.reciprocal()
    return 0.5 * (EULER + math.log(2.0) + torch.log(r)) - alpha * (c1 + alpha * (c2 + alpha * c3))

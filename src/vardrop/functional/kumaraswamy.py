"""The Kumaraswamy posterior of a beta-Bernoulli gate."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vardrop.errors import InvalidValueError
from vardrop.functional._dtype import precise

EULER = 0.5772156649015329
CLIP = 1e-6


def kumaraswamy_beta_kl(a: Tensor, b: Tensor, alpha_over_k: float) -> Tensor:
    """KL of Kumaraswamy(a, b) to the prior Beta(alpha / K, 1), nats; once for each unit.

    ``(1 - k / a) (-gamma - psi(b + 1)) + log(a b / k) - 1 + 1 / b`` with ``k = alpha / K``.

    Args:
        a: positive, any shape.
        b: positive, of the same shape.
        alpha_over_k: the prior's parameter, above 0.

    Raises:
        InvalidValueError: unless ``alpha_over_k > 0``.

    Source: arXiv:1805.10896, equation 16, with alpha / K where the print has alpha.

    >>> from vardrop import functional as F
    >>> F.kumaraswamy_beta_kl(torch.tensor([1e-4]), torch.tensor([1.0]), alpha_over_k=1e-4).abs() < 1e-6
    tensor([True])
    """
    if not alpha_over_k > 0.0:
        raise InvalidValueError(f"alpha_over_k={alpha_over_k}: must be above 0")
    a, b = precise(a, b)
    pull: Tensor = -EULER - torch.special.digamma(b + 1.0)
    return (1.0 - alpha_over_k / a) * pull + torch.log(a) + torch.log(b) - math.log(alpha_over_k) - 1.0 + 1.0 / b


def kumaraswamy_mean(a: Tensor, b: Tensor) -> Tensor:
    """``E pi = b B(1 + 1 / a, b)``: the mean gate, formed in float64.

    Source: arXiv:1805.10896, equation 19.

    >>> from vardrop import functional as F
    >>> F.kumaraswamy_mean(torch.tensor([1.0]), torch.tensor([1.0]))
    tensor([0.5000])
    """
    dtype = precise(a, b)[0].dtype
    a, b = a.double(), b.double()
    inverse = 1.0 / a
    log_beta = torch.lgamma(1.0 + inverse) + torch.lgamma(b) - torch.lgamma(1.0 + inverse + b)
    return torch.exp(torch.log(b) + log_beta).to(dtype)


def kumaraswamy_log_icdf(u: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``log pi`` at the quantile `u`: finite where `pi` itself is too small for its dtype.

    Source: arXiv:1805.10896, equation 14.

    >>> from vardrop import functional as F
    >>> F.kumaraswamy_log_icdf(torch.tensor([0.5]), torch.tensor([1e-3]), torch.tensor([1.0]))
    tensor([-693.1472])
    """
    u, a, b = precise(u, a, b)
    return _log1mexp(torch.log(u.clamp(CLIP, 1.0 - CLIP)) / b) / a


def kumaraswamy_icdf(u: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``pi = (1 - u^(1/b))^(1/a)``: the sampler, for uniform `u`, held in [1e-6, 1 - 1e-6].

    Source: arXiv:1805.10896, equation 14.

    >>> from vardrop import functional as F
    >>> F.kumaraswamy_icdf(torch.tensor([0.25]), torch.tensor([1.0]), torch.tensor([1.0]))
    tensor([0.7500])
    """
    return torch.exp(kumaraswamy_log_icdf(u, a, b))


def kumaraswamy_logit_icdf(u: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``logit pi`` at the quantile `u`, formed from ``log pi`` and never from `pi`.

    Source: arXiv:1805.10896, equations 14 and 15.

    >>> from vardrop import functional as F
    >>> F.kumaraswamy_logit_icdf(torch.tensor([0.5]), torch.tensor([1.0]), torch.tensor([1.0]))
    tensor([0.])
    """
    log_pi = kumaraswamy_log_icdf(u, a, b)
    return log_pi - _log1mexp(log_pi.clamp_max(-torch.finfo(log_pi.dtype).tiny))


def _log1mexp(x: Tensor) -> Tensor:
    """``log(1 - exp(x))`` for ``x < 0``, exact at both ends."""
    near = x > -math.log(2.0)
    by_expm1 = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    return torch.where(near, by_expm1, torch.log1p(-torch.exp(torch.where(near, -1.0, x))))

"""How unsure an ensemble of draws is, in nats, and how much of that is for want of data.

Classification: `log_probabilities` are ``(samples, N, classes, *)``, such as ``vd.draws(net, x).log_softmax(dim=2)``.
Regression: `means` are ``(samples, N, *)``, such as ``vd.draws(net, x)``, each the mean of a Gaussian around which the
targets lie with `noise_variance`. All measures have the shape ``(N, *)`` if nothing else is said.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vardrop.errors import InvalidValueError
from vardrop.lrt import at_least_float32

ROUNDING = 1e-3
"""How far above 0 the log of a probability may come by rounding."""
SUM_ROUNDING = 0.05
"""How far from 1 the probabilities of all classes may sum, each rounded to bfloat16."""


def predictive_log_probabilities(log_probabilities: Tensor) -> Tensor:
    """Log of the mean probabilities, ``(N, classes, *)``: the prediction of the ensemble.

    Raises:
        InvalidValueError: they are not log probabilities ``(samples, N, classes, *)``.

    Source: arXiv:1506.02142, equation 6.

    >>> vd.uncertainty.predictive_log_probabilities(torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]]).log()).exp()
    tensor([[0.7500, 0.2500]])
    """
    log_probabilities = _checked(log_probabilities)
    return torch.logsumexp(log_probabilities, dim=0) - math.log(len(log_probabilities))


def predictive_entropy(log_probabilities: Tensor) -> Tensor:
    """Entropy of the mean probabilities: all uncertainty, that of the data and that of the weights.

    Raises:
        InvalidValueError: they are not log probabilities ``(samples, N, classes, *)``.

    Source: arXiv:1703.02910, section 3.

    >>> vd.uncertainty.predictive_entropy(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]).log())
    tensor([0.6931])
    """
    return _entropy(predictive_log_probabilities(log_probabilities), dim=1)


def expected_entropy(log_probabilities: Tensor) -> Tensor:
    """Mean entropy of the draws: the uncertainty of the data, which no more data would take away.

    Raises:
        InvalidValueError: they are not log probabilities ``(samples, N, classes, *)``.

    Source: arXiv:1703.02910, section 3.

    >>> vd.uncertainty.expected_entropy(torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]]).log())
    tensor([0.3466])
    """
    return _entropy(_checked(log_probabilities), dim=2).mean(dim=0)


def mutual_information(log_probabilities: Tensor) -> Tensor:
    """Mutual information of label and weights: how far the draws disagree, at least 0 and at most ``log samples``.

    It is the predictive minus the expected entropy, summed here from the divergences of the draws from their mean, of
    which none is negative, so that no digits are lost where both entropies are large.

    Raises:
        InvalidValueError: they are not log probabilities ``(samples, N, classes, *)``.

    Source: arXiv:1112.5745, equation 2, and arXiv:1703.02910, section 3.

    >>> vd.uncertainty.mutual_information(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]).log())
    tensor([0.6931])
    """
    mean = predictive_log_probabilities(log_probabilities)
    gap = _checked(log_probabilities) - mean.masked_fill(mean == -math.inf, 0.0)
    divergence = torch.where(gap == -math.inf, 0.0, gap.exp() * gap) - torch.expm1(gap)
    return (mean.exp() * divergence).mean(dim=0).sum(dim=1).clamp_min(0.0)


def variance(log_probabilities: Tensor) -> Tensor:
    """Variance over the draws of each class's probability, ``(N, classes, *)``.

    By the law of total variance it is that part of the label's variance ``p (1 - p)`` that is due to the weights.

    Raises:
        InvalidValueError: they are not log probabilities ``(samples, N, classes, *)``.

    Source: arXiv:1703.04977, section 2.

    >>> vd.uncertainty.variance(torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]]).log())
    tensor([[0.0625, 0.0625]])
    """
    return _checked(log_probabilities).exp().var(dim=0, correction=0)


def regression_moments(means: Tensor, noise_variance: Tensor | float) -> tuple[Tensor, Tensor]:
    """Predictive mean and variance: ``E[y] = E m`` and ``Var[y] = Var m + E noise_variance``, over the draws.

    Args:
        means: ``(samples, N, *)``.
        noise_variance: of the targets around their mean, above 0; a number, or broadcastable to `means`.

    Raises:
        InvalidValueError: `noise_variance` is not above 0 and finite.

    Source: arXiv:1703.04977, equation 9.

    >>> vd.uncertainty.regression_moments(torch.tensor([[1.0], [3.0]]), 0.5)
    (tensor([2.]), tensor([1.5000]))
    """
    means, noise = _gaussians(means, noise_variance)
    return means.mean(dim=0), means.var(dim=0, correction=0) + noise.mean(dim=0)


def regression_log_likelihood(means: Tensor, noise_variance: Tensor | float, y: Tensor) -> Tensor:
    """``log (1/S) sum_s N(y; means_s, noise_variance_s)``, elementwise, nats.

    Args:
        means: ``(samples, N, *)``.
        noise_variance: of the targets around their mean, above 0; a number, or broadcastable to `means`.
        y: targets ``(N, *)``.

    Raises:
        InvalidValueError: `noise_variance` is not above 0 and finite, or `y` is not of the shape of a draw.

    Source: arXiv:1506.02142, equation 8.

    >>> vd.uncertainty.regression_log_likelihood(torch.zeros(2, 1), 1.0, torch.zeros(1))
    tensor([-0.9189])
    """
    means, noise = _gaussians(means, noise_variance)
    if y.shape != means.shape[1:]:
        raise InvalidValueError(f"y has the shape {tuple(y.shape)}: must be that of a draw, {tuple(means.shape[1:])}")
    each = -0.5 * ((y - means).square() / noise + noise.log() + math.log(2.0 * math.pi))
    return torch.logsumexp(each, dim=0) - math.log(len(means))


def _entropy(log_probabilities: Tensor, dim: int) -> Tensor:
    each = log_probabilities.exp() * log_probabilities
    return -each.masked_fill(log_probabilities == -math.inf, 0.0).sum(dim=dim)


def _checked(log_probabilities: Tensor) -> Tensor:
    shape = tuple(log_probabilities.shape)
    if len(shape) < 3 or 0 in shape:
        raise InvalidValueError(
            f"log_probabilities have the shape {shape}: must be (samples, N, classes, *), not empty"
        )
    check_log_probabilities(log_probabilities, dim=2)
    return at_least_float32(log_probabilities)


def check_log_probabilities(log_probabilities: Tensor, *, dim: int) -> None:
    """Raises unless they are logs of probabilities that sum to one over dimension `dim`, as far as rounding lets them.

    Raises:
        InvalidValueError: they are something else, such as logits.
    """
    if log_probabilities.numel() == 0:
        return
    largest = float(log_probabilities.max())
    if not largest <= ROUNDING:
        raise InvalidValueError(f"log_probabilities hold {largest:.4g}: must be logs of probabilities, so at most 0")
    sums = at_least_float32(log_probabilities).logsumexp(dim=dim).exp()
    astray = sums[(sums - 1.0).abs() > SUM_ROUNDING]
    if astray.numel():
        raise InvalidValueError(
            f"log_probabilities are those of probabilities that sum to {float(astray[0]):.4g} over the classes: must "
            f"sum to 1, as logits do after log_softmax(dim={dim})"
        )


def _gaussians(means: Tensor, noise_variance: Tensor | float) -> tuple[Tensor, Tensor]:
    if means.dim() < 1 or len(means) < 1:
        raise InvalidValueError(
            f"means have the shape {tuple(means.shape)}: must be (samples, N, *), at least one draw"
        )
    means = at_least_float32(means)
    noise = torch.as_tensor(noise_variance, dtype=means.dtype, device=means.device)
    if not bool(((noise > 0.0) & noise.isfinite()).all()):
        raise InvalidValueError(f"noise_variance={noise_variance}: must be above 0 and finite")
    try:
        return means, noise.expand_as(means)
    except RuntimeError as error:
        raise InvalidValueError(
            f"noise_variance has the shape {tuple(noise.shape)}: must be broadcastable to that of means, "
            f"{tuple(means.shape)}"
        ) from error

"""How well predicted probabilities keep their word: proper scores, calibration, and telling strange inputs apart.

`log_probabilities` are ``(N, classes, *)`` and `y` their labels ``(N, *)``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vardrop import uncertainty
from vardrop.errors import InvalidValueError, MissingExtraError

BINS = 15


class Reliability(NamedTuple):
    """Predictions by their confidence, in bins of equal width over [0, 1].

    Attributes:
        counts: how many predictions lie in each bin, ``(bins,)``.
        confidence: their mean confidence; 0 in an empty bin.
        accuracy: the share of them that is correct; 0 in an empty bin.
    """

    counts: Tensor
    confidence: Tensor
    accuracy: Tensor


class Judged(NamedTuple):
    """What is known of each label predicted, in the order of the labels: ``(labels,)`` each, in nats where it applies.

    Attributes:
        confidence: the probability of the predicted class.
        correct: whether it is that of the label.
        nll: negative log-likelihood.
        brier: Brier score.
        entropy: predictive entropy.
        mutual_information: of label and weights.
    """

    confidence: Tensor
    correct: Tensor
    nll: Tensor
    brier: Tensor
    entropy: Tensor
    mutual_information: Tensor


def judge(log_probabilities: Tensor, y: Tensor) -> Judged:
    """Judges the ensemble of the draws ``(samples, N, classes, *)`` by the labels `y`, ``(N, *)``.

    Raises:
        InvalidValueError: the labels do not fit the log probabilities, or those are none.

    >>> draws = torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]]).log()
    >>> vd.metrics.judge(draws, torch.tensor([1])).brier
    tensor([1.1250])
    """
    mean = uncertainty.predictive_log_probabilities(log_probabilities)
    y = _labels(y, mean)
    best = mean.max(dim=1)
    found = (
        best.values.exp(),
        best.indices == y,
        nll(mean, y),
        brier(mean, y),
        uncertainty.predictive_entropy(log_probabilities),
        uncertainty.mutual_information(log_probabilities),
    )
    return Judged(*(each.flatten() for each in found))


def nll(log_probabilities: Tensor, y: Tensor) -> Tensor:
    """Negative log-likelihood of each label, ``(N, *)``, nats; infinite where a label was thought impossible.

    Raises:
        InvalidValueError: a label is no class; torch's -100 for "leave out" is none either. Or the log probabilities
            are none, as logits are.

    >>> vd.metrics.nll(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([0]))
    tensor([0.6931])
    """
    y = _labels(y, log_probabilities)
    return F.nll_loss(log_probabilities, y, reduction="none")


def brier(log_probabilities: Tensor, y: Tensor) -> Tensor:
    """Squared distance of the probabilities from the label, summed over classes, ``(N, *)``; between 0 and 2.

    Raises:
        InvalidValueError: a label is no class, or the log probabilities are none, as logits are.

    Source: Brier, "Verification of forecasts expressed in terms of probability", 1950.

    >>> vd.metrics.brier(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([0]))
    tensor([0.5000])
    """
    y = _labels(y, log_probabilities)
    target = F.one_hot(y, log_probabilities.shape[1]).movedim(-1, 1)
    return (log_probabilities.exp() - target).square().sum(dim=1)


def _labels(y: Tensor, log_probabilities: Tensor) -> Tensor:
    """The labels `y` as class numbers, one for each prediction."""
    shape, classes = log_probabilities.shape, log_probabilities.shape[1] if log_probabilities.dim() > 1 else 0
    if not classes or y.shape != shape[:1] + shape[2:]:
        raise InvalidValueError(
            f"labels of shape {tuple(y.shape)} for log-probabilities of shape {tuple(shape)}: must be (N, *) for "
            "(N, classes, *)"
        )
    uncertainty.check_log_probabilities(log_probabilities, dim=1)
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise InvalidValueError(f"labels of type {y.dtype}: must be whole numbers, the classes")
    y = y.long()
    astray = y[(y < 0) | (y >= classes)]
    if astray.numel():
        raise InvalidValueError(f"label {int(astray[0])}: must lie in 0 to {classes - 1}, the classes")
    return y


def calibration_error(confidence: Tensor, correct: Tensor, *, bins: int = BINS) -> float:
    """Expected calibration error: the mean gap of confidence and accuracy over bins of equal width, a fraction.

    Args:
        confidence: the probability of each predicted class, ``(labels,)``.
        correct: whether it was right.
        bins: their number.

    Raises:
        MissingExtraError: the extra ``metrics`` is not installed.
        InvalidValueError: a confidence is outside [0, 1], there are none or not as many as `correct`, or `bins` is no
            whole number above 0.

    Source: arXiv:1706.04599, equation 3, computed by torchmetrics.

    >>> round(vd.metrics.calibration_error(torch.tensor([0.9, 0.9]), torch.tensor([True, False])), 4)
    0.4
    """
    need()
    from torchmetrics.functional.classification import binary_calibration_error

    confidence, correct = _binnable(confidence, correct, bins)
    return float(binary_calibration_error(confidence, correct.long(), n_bins=bins, norm="l1"))


def reliability(confidence: Tensor, correct: Tensor, *, bins: int = BINS) -> Reliability:
    """The reliability diagram behind :func:`calibration_error`.

    Raises:
        InvalidValueError: as :func:`calibration_error`.

    Source: arXiv:1706.04599, section 2.

    >>> vd.metrics.reliability(torch.tensor([0.9, 0.8]), torch.tensor([True, False]), bins=2).accuracy
    tensor([0.0000, 0.5000], dtype=torch.float64)
    """
    confidence, correct = _binnable(confidence, correct, bins)
    edges = torch.linspace(0.0, 1.0, bins + 1, dtype=torch.float64, device=confidence.device)
    index = torch.bucketize(confidence, edges, right=True) - 1
    counts = torch.bincount(index, minlength=bins)
    sums = (torch.bincount(index, each.double(), minlength=bins) for each in (confidence, correct))
    return Reliability(counts, *(each / counts.clamp_min(1) for each in sums))


def ood_auroc(inside: Tensor, outside: Tensor) -> float:
    """How well a score tells strange inputs from known ones: the chance that it is larger for a strange one.

    Args:
        inside: scores of known inputs, such as their predictive entropy, any shape.
        outside: scores of strange inputs.

    Raises:
        MissingExtraError: the extra ``metrics`` is not installed.
        InvalidValueError: there are no scores of one kind, or some that are not numbers.

    Source: arXiv:1610.02136, section 2, computed by torchmetrics.

    >>> vd.metrics.ood_auroc(torch.tensor([0.1, 0.2]), torch.tensor([0.2, 0.9]))
    0.875
    """
    need()
    from torchmetrics.functional.classification import binary_auroc

    for name, scores in (("inside", inside), ("outside", outside)):
        if scores.numel() == 0 or bool(scores.isnan().any()):
            raise InvalidValueError(f"{name}: must be scores without NaN, at least one")
    strange = torch.cat([torch.zeros(inside.numel()), torch.ones(outside.numel())]).long().to(inside.device)
    ranks = torch.cat([inside.flatten(), outside.flatten()]).unique(return_inverse=True)[1]
    return float(binary_auroc(ranks.double() / len(ranks), strange))  # in [0, 1], which it takes as they are


def need() -> None:
    """Raises :class:`MissingExtraError` unless torchmetrics is installed.

    >>> vd.metrics.need()
    """
    try:
        import torchmetrics.functional.classification  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("calibration error and area under the ROC curve", "metrics") from error


def _binnable(confidence: Tensor, correct: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Both flat, the first in float64 and below 1, so that certainty falls into the last bin, not one of its own."""
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise InvalidValueError(f"bins={bins!r}: must be a whole number, at least 1")
    confidence, correct = confidence.double().flatten(), correct.flatten()
    if not len(confidence) or len(correct) != len(confidence):
        raise InvalidValueError(
            f"{len(confidence)} confidences, {len(correct)} marks of what is correct: must be as many, and at least one"
        )
    if not bool(((correct == 0) | (correct == 1)).all()):
        raise InvalidValueError("correct: must be true or false for each prediction")
    if not bool(((confidence >= 0.0) & (confidence <= 1.0 + uncertainty.ROUNDING)).all()):
        raise InvalidValueError("confidence: must lie in [0, 1]")
    return confidence.clamp_max(1.0 - torch.finfo(torch.float64).eps), correct

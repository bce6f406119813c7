"""Adversarial dropout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vardrop.methods.base import Method, Paper, check_range
from vardrop.noise import AdversarialNoise, Layout, Noise


@dataclass(frozen=True)
class AdversarialDropout(Method):
    """Adversarial dropout: Bernoulli dropout, and again with the worst mask near the random one; nothing dies.

    The loss is that of a pass with a random mask plus `weight` times that of a second pass, whose mask differs from the
    first in at most the share `budget` of the inputs of a layer, for each example: those whose change raises the loss
    the most to first order; in a recurrent layer for the whole minibatch. The divergence from the labels is the loss
    itself, as in the paper's supervised form. A second pass has to be run, so :class:`vardrop.ELBO` takes a function in
    place of its loss.

    It attacks every layer that is converted; on many of them, or before the net has learned anything, the surest
    answer to it is to learn nothing. Its paper attacks the last hidden layer: ``include`` that one, after plain epochs.

    Args:
        rate: probability of dropping, in [0, 1).
        budget: the paper's ``delta``, in [0, 1].
        weight: the paper's ``lambda``, at least 0; of several in one net the first counts.

    Raises:
        InvalidValueError: a field is outside its range; the message names it.

    Source: arXiv:1707.03631, algorithm 1; the numbers are choices of this library.

    >>> net = vd.convert(torch.nn.Linear(40, 2), vd.AdversarialDropout(budget=0.1))
    >>> x, y = torch.randn(3, 40), torch.zeros(3).long()
    >>> elbo = vd.ELBO(num_data=3)
    >>> bool(elbo(net, lambda: torch.nn.functional.cross_entropy(net(x), y)) > 2.0 * elbo.nll)
    True
    """

    paper: ClassVar[Paper] = Paper(
        "park2018adversarial",
        "Adversarial Dropout for Supervised and Semi-Supervised Learning",
        "Park, Sungrae and Park, Jun-Keon and Shin, Su-Jin and Moon, Il-Chul",
        2018,
        "1707.03631",
    )
    rate: float = 0.5
    budget: float = 0.05
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, "rate", above=0.0, below=1.0, closed=True, closed_below=False)
        check_range(self, "budget", above=0.0, below=1.0, closed=True)
        check_range(self, "weight", above=0.0, closed=True)

    def noise(self, weight: Tensor, layout: Layout) -> Noise:
        return AdversarialNoise(self.rate, in_axis=layout.in_axis, budget=self.budget, weight=self.weight)

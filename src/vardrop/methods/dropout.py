"""Dropout at a fixed rate: the two baselines that every Bayesian method starts from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vardrop.methods.base import Method, Paper, WeightMethod, check_on, check_range
from vardrop.noise import BernoulliNoise, Layout, MultiplicativeGate, MultiplicativeNoise, Noise


@dataclass(frozen=True)
class BernoulliDropout(Method):
    """Bernoulli dropout: each input of a layer is dropped with a fixed probability and the rest is scaled up.

    In recurrent layers the inputs and the hidden units that flow back are dropped once for all time steps of a
    sequence, each sequence for itself: binary variational dropout (arXiv:1512.05287). In embeddings the words are, once
    for a minibatch. A rate of 0 with another `recurrent_rate` drops the hidden units alone. With masks a recurrent
    layer runs step by step, slower than torch's own.

    Args:
        rate: probability of dropping, in [0, 1).
        recurrent_rate: that of the hidden units of recurrent layers; ``None`` for the same.

    Raises:
        InvalidValueError: a field is outside its range; the message names it.

    Source: arXiv:1207.0580; arXiv:1512.05287 for recurrent layers.

    >>> net = vd.convert(torch.nn.Linear(4, 2), vd.BernoulliDropout(rate=0.2))
    >>> vd.kl(net).item()
    0.0
    """

    paper: ClassVar[Paper] = Paper(
        "hinton2012improving",
        "Improving neural networks by preventing co-adaptation of feature detectors",
        "Hinton, Geoffrey E. and Srivastava, Nitish and Krizhevsky, Alex and Sutskever, Ilya and "
        "Salakhutdinov, Ruslan R.",
        2012,
        "1207.0580",
    )
    paper_on_recurrence: ClassVar[Paper] = Paper(
        "gal2016theoretically",
        "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks",
        "Gal, Yarin and Ghahramani, Zoubin",
        2016,
        "1512.05287",
    )
    rate: float = 0.5
    recurrent_rate: float | None = None

    def __post_init__(self) -> None:
        for field in ("rate", "recurrent_rate"):
            if getattr(self, field) is not None:
                check_range(self, field, above=0.0, below=1.0, closed=True, closed_below=False)

    def papers(self, parameter: str) -> tuple[Paper, ...]:
        recurrent = parameter.startswith(("weight_ih", "weight_hh"))
        return (self.paper, self.paper_on_recurrence) if recurrent else (self.paper,)

    def noise(self, weight: Tensor, layout: Layout) -> Noise:
        own = self.recurrent_rate if layout.recurrent else None
        return BernoulliNoise(self.rate if own is None else own, in_axis=layout.in_axis)


@dataclass(frozen=True)
class GaussianDropout(WeightMethod):
    """Gaussian dropout: weights with a fixed variance of rate / (1 - rate) times their squared mean.

    Independent weights and local reparameterisation, so the outputs are independent given the input ("type B"); or
    noise on the inputs, whose outputs are correlated ("type A"), one value for each input of each example, and
    for each word of an embedding.

    Args:
        rate: the Bernoulli rate with the same mean and variance, in (0, 1).
        on: ``"weights"`` or ``"inputs"``.

    Raises:
        InvalidValueError: a field is outside its range; the message names it.

    Source: arXiv:1506.02557, sections 3.1 and 3.2.

    >>> net = vd.convert(torch.nn.Linear(4, 2), vd.GaussianDropout(rate=0.2))
    >>> vd.kl(net).item()
    0.0
    """

    paper: ClassVar[Paper] = Paper(
        "kingma2015variational",
        "Variational Dropout and the Local Reparameterization Trick",
        "Kingma, Diederik P. and Salimans, Tim and Welling, Max",
        2015,
        "1506.02557",
    )
    rate: float = 0.5
    on: Literal["weights", "inputs"] = "weights"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "rate", above=0.0, below=1.0)
        check_on(self, self.on)

    @property
    def on_units(self) -> bool:
        return self.on == "inputs"

    def noise(self, weight: Tensor, layout: Layout) -> Noise:
        log_alpha = math.log(self.rate) - math.log1p(-self.rate)
        if self.on == "inputs":
            return MultiplicativeGate(weight, layout, "input", log_alpha=log_alpha, sharing="layer", learned=False)
        return MultiplicativeNoise(
            weight, layout, log_alpha=log_alpha, sharing="layer", learned=False, sampling=self.sampling
        )

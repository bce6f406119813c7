"""Variance networks: weights whose variance, not their mean, holds what was learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vardrop import functional as F
from vardrop.errors import InvalidValueError
from vardrop.methods.base import LARGEST_LOG, Paper, WeightMethod, check_choice, check_range
from vardrop.noise import AdditiveNoise, Layout, MultiplicativeNoise, Noise, ZeroMeanNoise

PARAMETERISATIONS = ("zero-mean", "layer", "input", "output", "weight", "additive")


@dataclass(frozen=True)
class VarianceNetwork(WeightMethod):
    """Variance network: weights of mean zero that hold all they know in their variances; predict by an ensemble.

    With zero means ``w = weight * eps``: the layer's own weight is the standard deviation of the posterior, and the KL
    to a log-uniform prior is a constant, left out. The other parameterisations are variational dropout with the exact
    KL to that prior and no bound on alpha; with one alpha for a layer or a neuron, training drives alpha towards
    infinity and the net becomes a variance network, with one for each weight and in the additive form it stays short
    of it.

    In eval mode such a net gives its biases alone, which is chance: use :func:`vardrop.predict`. Nothing is pruned.
    Batch-norm after each layer helps training. A weight at exactly zero stays there, since only its square counts.

    Args:
        parameterisation: ``"zero-mean"``; multiplicative with one alpha for a ``"layer"``, an ``"input"`` neuron, an
            ``"output"`` neuron or each ``"weight"``; or ``"additive"``, with a mean and a std for each weight.
        init_log_alpha: first value of log alpha, where there is one.
        init_log_std: first value of log std in the additive form.
        alpha_lr: learning rate of log alpha in ``vardrop.parameter_groups`` and on the command line; ``None`` for that
            of the weights. An alpha of many weights has a long way to go, and its slope falls like its inverse.

    Raises:
        InvalidValueError: a field is outside its range; the message names it.

    Source: arXiv:1803.03764, sections 4 and 5; first values are those of its authors' code.

    >>> net = vd.convert(torch.nn.Linear(4, 2, bias=False), vd.VarianceNetwork()).eval()
    >>> net(torch.ones(1, 4)).tolist()
    [[0.0, 0.0]]
    """

    paper: ClassVar[Paper] = Paper(
        "neklyudov2019variance",
        "Variance Networks: When Expectation Does Not Meet Your Expectations",
        "Neklyudov, Kirill and Molchanov, Dmitry and Ashukha, Arsenii and Vetrov, Dmitry",
        2019,
        "1803.03764",
    )
    by_ensemble: ClassVar[bool] = True
    parameterisation: Literal["zero-mean", "layer", "input", "output", "weight", "additive"] = "zero-mean"
    init_log_alpha: float = -5.0
    init_log_std: float = -5.0
    alpha_lr: float | None = None

    def __post_init__(self) -> None:
        if self.rule is not None or self.threshold is not None:
            raise InvalidValueError(
                f"VarianceNetwork(rule={self.rule!r}, threshold={self.threshold}): must both be None, since a rule "
                "judges a weight by its mean and would find all of them dead; SparseVD prunes"
            )
        super().__post_init__()
        check_choice(self, "parameterisation", PARAMETERISATIONS)
        for field in ("init_log_alpha", "init_log_std"):
            check_range(self, field, above=-LARGEST_LOG, closed=True)
        if self.alpha_lr is not None:
            check_range(self, "alpha_lr", above=0.0)
            if self.parameterisation in ("zero-mean", "additive"):
                raise InvalidValueError(
                    f"VarianceNetwork(alpha_lr={self.alpha_lr}): must be None with {self.parameterisation!r} weights, "
                    "which have no alpha to learn"
                )

    def noise(self, weight: Tensor, layout: Layout) -> Noise:
        if self.parameterisation == "zero-mean":
            return ZeroMeanNoise(self.sampling)
        if self.parameterisation == "additive":
            return AdditiveNoise(weight, self.init_log_std, sampling=self.sampling)
        return MultiplicativeNoise(
            weight,
            layout,
            log_alpha=self.init_log_alpha,
            sharing=self.parameterisation,
            learned=True,
            sampling=self.sampling,
        )

    def learning_rates(self, noise: Noise) -> dict[str, float]:
        return {} if self.alpha_lr is None else {"shared_log_alpha": self.alpha_lr}

    def kl(self, noise: Noise, weight: Tensor) -> Tensor:
        if isinstance(noise, AdditiveNoise):
            return noise.masked(F.log_uniform_kl(weight, noise.log_std)).sum()
        if isinstance(noise, MultiplicativeNoise):
            each = F.log_uniform_kl_from_log_alpha(noise.shared_log_alpha)
            return noise.masked(noise.spread(each, weight)).sum()
        return super().kl(noise, weight)

"""Structured Bayesian pruning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from vardrop import functional as F
from vardrop.errors import InvalidValueError
from vardrop.methods.base import GateMethod, Paper, check_choice, check_range
from vardrop.noise import Layout, Noise, TruncatedLogNormalGate

LEAST, GREATEST = -20.0, 5.0


@dataclass(frozen=True)
class StructuredBP(GateMethod):
    """Structured Bayesian pruning: truncated log-normal noise on units, dead at a signal-to-noise ratio <= 1.

    The prior of ``log theta`` is uniform on ``[low, high]``, its posterior a normal cut to that interval; at test
    time a unit is multiplied by ``E theta``. On a convolution's output it multiplies the bias too, which the authors
    add after it, so that a dead channel is zero. Before each training pass both parameters are put back into [-20, 5].

    Args:
        init_mu: first location of ``log theta``, in [-20, 5].
        init_log_sigma: log of its first scale, in [-20, 5].
        low: lower end of ``log theta``.
        high: upper end.
        draws: one of the noise for each ``"batch"``, as the authors do, or for each ``"example"``, which is slower
            and less noisy. A batch-norm that trains undoes a multiplier that the whole batch shares, so that the KL
            alone acts on it: in front of one take ``"example"``, or freeze it.

    Raises:
        InvalidValueError: a field is outside its range; the message names it.

    Source: arXiv:1705.07283.

    >>> net = vd.convert(torch.nn.Linear(4, 2), vd.StructuredBP())
    >>> net.gate.mean()
    tensor([0.9946, 0.9946, 0.9946, 0.9946], grad_fn=<ToCopyBackward0>)
    """

    paper: ClassVar[Paper] = Paper(
        "neklyudov2017structured",
        "Structured Bayesian Pruning via Log-Normal Multiplicative Noise",
        "Neklyudov, Kirill and Molchanov, Dmitry and Ashukha, Arsenii and Vetrov, Dmitry",
        2017,
        "1705.07283",
    )
    threshold: float = 1.0
    init_mu: float = 0.0
    init_log_sigma: float = -5.0
    low: float = -20.0
    high: float = 0.0
    draws: Literal["batch", "example"] = "batch"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "draws", ("batch", "example"))
        for field in ("init_mu", "init_log_sigma"):
            check_range(self, field, above=LEAST, below=GREATEST, closed=True)
        if not -math.inf < self.low < self.high < math.inf:
            raise InvalidValueError(f"StructuredBP(low={self.low}, high={self.high}): must satisfy low < high")

    def noise(self, weight: Tensor, layout: Layout) -> Noise:
        return TruncatedLogNormalGate(
            weight,
            layout,
            self.placed(weight),
            mu=self.init_mu,
            log_sigma=self.init_log_sigma,
            low=self.low,
            high=self.high,
            shared=self.draws == "batch",
        )

    def kl(self, noise: Noise, weight: Tensor) -> Tensor:
        gate = cast(TruncatedLogNormalGate, noise)
        return gate.sum_alive(gate.quick(F.truncated_lognormal_kl, gate.mu, gate.log_sigma, self.low, self.high))

    def score(self, noise: Noise, weight: Tensor) -> Tensor:
        gate = cast(TruncatedLogNormalGate, noise)
        mu, log_sigma = gate.mu.detach().double(), gate.log_sigma.detach().double()
        return F.truncated_lognormal_snr(mu, log_sigma, self.low, self.high)

    def cutoff(self, threshold: float | None = None) -> float:
        return math.nextafter(super().cutoff(threshold), math.inf)

    def project(self, noise: Noise) -> None:
        gate = cast(TruncatedLogNormalGate, noise)
        with torch.no_grad():
            gate.mu.data.clamp_(LEAST, GREATEST)
            gate.log_sigma.data.clamp_(LEAST, GREATEST)

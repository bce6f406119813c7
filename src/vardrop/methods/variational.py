"""Variational dropout with learned, shared rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, cast, get_args

import torch
from torch import Tensor

from vardrop import functional as F
from vardrop.errors import InvalidValueError
from vardrop.methods.base import Paper, WeightMethod, check_choice, check_on, check_range
from vardrop.methods.dropout import GaussianDropout
from vardrop.noise import Layout, MultiplicativeGate, MultiplicativeNoise, Noise
from vardrop.noise.weight import Sharing


@dataclass(frozen=True)
class VariationalDropout(WeightMethod):
    """Variational dropout: learned rates alpha <= 1, shared by a layer, an input, an output, or of each weight.

    The KL to the log-uniform prior counts once for each weight that shares an alpha; for noise on the inputs ("type
    A") once for each input feature or channel, though every element has a draw of its own: no posterior of the weights
    stands behind it.

    Args:
        alpha: who shares one alpha; ``"layer"`` or ``"input"`` for noise on inputs.
        on: ``"weights"`` or ``"inputs"``.
        init_log_alpha: first value of log alpha, at most 0.
        form: ``"exact"``, ``"sigmoid"``, or ``"cubic"`` as in the paper.

    Raises:
        InvalidValueError: a field is outside its range; the message names it.

    Source: arXiv:1506.02557, section 3.

    >>> net = vd.convert(torch.nn.Linear(4, 2), vd.VariationalDropout(alpha="input"))
    >>> net.noise.shared_log_alpha.shape
    torch.Size([1, 4])
    """

    paper: ClassVar[Paper] = GaussianDropout.paper
    alpha: Literal["layer", "input", "output", "weight"] = "layer"
    init_log_alpha: float = -3.0
    form: Literal["exact", "sigmoid", "cubic"] = "exact"
    on: Literal["weights", "inputs"] = "weights"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "alpha", get_args(Sharing))
        check_choice(self, "form", ("exact", "sigmoid", "cubic"))
        check_range(self, "init_log_alpha", below=0.0, closed=True)
        check_on(self, self.on)
        if self.on == "inputs" and self.alpha not in ("layer", "input"):
            raise InvalidValueError(
                f"VariationalDropout(on='inputs', alpha={self.alpha!r}): must be 'layer' or 'input' for noise on inputs"
            )

    @property
    def on_units(self) -> bool:
        return self.on == "inputs"

    def noise(self, weight: Tensor, layout: Layout) -> Noise:
        if self.on == "inputs":
            sharing: Literal["layer", "unit"] = "layer" if self.alpha == "layer" else "unit"
            return MultiplicativeGate(
                weight, layout, "input", log_alpha=self.init_log_alpha, sharing=sharing, learned=True
            )
        return MultiplicativeNoise(
            weight,
            layout,
            log_alpha=self.init_log_alpha,
            sharing=self.alpha,
            learned=True,
            sampling=self.sampling,
        )

    def kl(self, noise: Noise, weight: Tensor) -> Tensor:
        if isinstance(noise, MultiplicativeGate):
            log_alpha = noise.log_alpha(weight)
            return noise.sum_alive(F.log_uniform_kl_from_log_alpha(log_alpha, form=self.form))
        shared = cast(MultiplicativeNoise, noise)
        each = F.log_uniform_kl_from_log_alpha(shared.shared_log_alpha, form=self.form)
        return shared.masked(shared.spread(each, weight)).sum()

    def project(self, noise: Noise) -> None:
        with torch.no_grad():
            cast(MultiplicativeNoise | MultiplicativeGate, noise).shared_log_alpha.data.clamp_(max=0.0)

"""Sparse variational dropout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vardrop import functional as F
from vardrop.methods.additive import AdditiveMethod
from vardrop.methods.base import Paper, RuleName, check_choice


@dataclass(frozen=True)
class SparseVD(AdditiveMethod):
    """Sparse variational dropout: log-uniform prior, one dropout rate per weight, dead at log alpha >= 3.

    The KL is exact by default; ``form="sigmoid"`` is the fit of the paper (error up to 0.0094 nats a weight).

    Args:
        form: ``"exact"`` or ``"sigmoid"``.

    Raises:
        InvalidValueError: a field is outside its range; the message names it.

    Source: arXiv:1701.05369, equations 13 to 15.

    >>> net = vd.convert(torch.nn.Linear(4, 2), vd.SparseVD())
    >>> vd.kl(net).item() > 0
    True
    """

    paper: ClassVar[Paper] = Paper(
        "molchanov2017variational",
        "Variational Dropout Sparsifies Deep Neural Networks",
        "Molchanov, Dmitry and Ashukha, Arsenii and Vetrov, Dmitry",
        2017,
        "1701.05369",
    )
    rule: RuleName | None = "log_alpha"
    form: Literal["exact", "sigmoid"] = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "form", ("exact", "sigmoid"))

    def divergence(self, mean: Tensor, log_std: Tensor) -> Tensor:
        return F.log_uniform_kl(mean, log_std, form=self.form)

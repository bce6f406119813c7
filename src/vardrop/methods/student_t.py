"""The fully Bayesian counterpart of ARD with a Gamma hyper-prior."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vardrop import functional as F
from vardrop.functional.student_t import LEAST_B
from vardrop.methods.additive import AdditiveMethod
from vardrop.methods.ard import ARD
from vardrop.methods.base import Paper, RuleName, check_range


@dataclass(frozen=True)
class StudentT(AdditiveMethod):
    """Student-t prior: the Gamma(a, b) precision integrated out instead of maximised; dead at |mean| < 0.01.

    Its KL is a sum over some hundred nodes of a quadrature for each weight, the dearest of all methods here.

    Args:
        a: shape of the Gamma distribution of the precision, above 0; the prior has 2a degrees of freedom.
        b: its rate, at least 1e-30.

    Raises:
        InvalidValueError: a field is outside its range; the message names it.

    Source: arXiv:1811.00596, appendix C.

    >>> net = vd.convert(torch.nn.Linear(4, 2), vd.StudentT(a=1.0, b=0.1))
    >>> vd.kl(net).item() > 0
    True
    """

    kl_is_short: ClassVar[bool] = False
    paper: ClassVar[Paper] = ARD.paper
    rule: RuleName | None = "magnitude"
    init_spread: float = 0.1
    a: float = 0.51
    b: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "a", above=0.0)
        check_range(self, "b", above=LEAST_B, closed=True, closed_below=False)

    def divergence(self, mean: Tensor, log_std: Tensor) -> Tensor:
        return F.student_t_kl(mean, log_std, self.a, self.b)

"""The objective: mean negative log-likelihood plus the KL, divided by the number of training examples once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vardrop import warmup as schedules
from vardrop.errors import InvalidValueError
from vardrop.noise import AdversarialNoise
from vardrop.sites import Site, sites


def kl(model: nn.Module) -> Tensor:
    """KL of all noise in `model` to its priors: a sum over every weight, in nats; differentiable scalar.

    Zero for a model without noise. Where a method has a ``kl_factor``, its KL is counted that many times, as the
    objective weighs it; :func:`vardrop.summary` gives the bare KL of each layer.

    >>> net = vd.convert(torch.nn.Linear(8, 4), vd.ARD())
    >>> vd.kl(net).requires_grad
    True
    """
    return kl_at(model, list(sites(model)))


def kl_at(model: nn.Module, found: list[Site]) -> Tensor:
    """:func:`kl` where the sites of `model` are known already."""
    parts = [site.method.price(site.noise, site.weight) for site in found]
    first = next(model.parameters(), torch.zeros(()))
    return sum(parts[1:], parts[0]) if parts else torch.zeros((), device=first.device)


class ELBO:
    """The negative evidence lower bound per example, to be minimised.

    ``loss = nll + beta * kl / num_data`` with ``beta = kl_factor * warmup(epoch)``, and the loss of the second pass of
    :class:`AdversarialDropout`. Call :meth:`step_epoch` at the start of every epoch, so that the first epoch is
    number 0.

    Args:
        num_data: training examples, augmentation not counted; predicted tokens for a language model.
        warmup: weight of the KL by epoch, see :mod:`vardrop.warmup`; constant by default.
        kl_factor: constant factor on the KL, such as 0.05 for VGG in arXiv:1811.00596.

    Attributes:
        nll: mean negative log-likelihood of the last call, nats per example.
        kl: :func:`kl` at the last call, nats, summed over all weights and not yet divided.

    Raises:
        InvalidValueError: `num_data`, `warmup` or `kl_factor` is something else.

    >>> elbo = vd.ELBO(num_data=100, warmup=vd.warmup.linear(epochs=2))
    >>> net = vd.convert(torch.nn.Linear(8, 4), vd.ARD())
    >>> elbo.step_epoch(); elbo.step_epoch()
    >>> loss = elbo(net, torch.nn.functional.cross_entropy(net(torch.randn(5, 8)), torch.zeros(5).long()))
    >>> torch.allclose(loss, elbo.nll + 0.5 * elbo.kl / 100)
    True
    """

    nll: Tensor
    kl: Tensor

    def __init__(self, num_data: int, *, warmup: schedules.Schedule | None = None, kl_factor: float = 1.0) -> None:
        if not _is_within(num_data) or not num_data:
            raise InvalidValueError(f"num_data={num_data!r}: must be a finite number of training examples, above 0")
        if not _is_within(kl_factor):
            raise InvalidValueError(f"kl_factor={kl_factor!r}: must be a finite number, at least 0")
        if not (warmup is None or _is_schedule(warmup)):
            raise InvalidValueError(
                f"warmup={warmup!r}: must be a function of the epoch with values in [0, 1], as "
                "vardrop.warmup.linear(epochs=20) is"
            )
        self.num_data = num_data
        self.warmup = schedules.constant() if warmup is None else warmup
        self.kl_factor = kl_factor
        self.epoch = -1

    @property
    def beta(self) -> float:
        """The weight of the KL at present."""
        return self.kl_factor * self.warmup(max(self.epoch, 0))

    def step_epoch(self) -> None:
        """Begins the next epoch."""
        self.epoch += 1

    def __call__(self, model: nn.Module, nll: Tensor | Callable[[], Tensor]) -> Tensor:
        """The loss for a mean negative log-likelihood `nll`, a scalar in nats per example.

        Methods that need a second pass take a function that runs the model and gives it; the others take either.

        Raises:
            InvalidValueError: `nll` is no scalar, or the model trains with a warm-up of which no epoch has begun.
        """
        found = list(sites(model))
        learning = found if model.training and torch.is_grad_enabled() else []
        if learning and self.epoch < 0 and self.warmup(0) < 1.0:
            raise InvalidValueError(
                f"the warm-up stands still at {self.warmup(0)}: call elbo.step_epoch() at the start of every epoch"
            )
        nll, extra = _nll_and_extra(learning, nll)
        for site in learning:
            site.method.step(site.noise, site.weight, self.epoch)
        total = kl_at(model, found)
        self.nll, self.kl = nll.detach(), total.detach()
        return nll + extra + total * (self.beta / self.num_data)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the epoch."""
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up the epoch of :meth:`state_dict`."""
        self.epoch = int(state["epoch"])


def _nll_and_extra(learning: list[Site], nll: Tensor | Callable[[], Tensor]) -> tuple[Tensor, Tensor | float]:
    """The mean negative log-likelihood, and what a second pass adds to it if noise among `learning` is adversarial."""
    found = [site.noise for site in learning if isinstance(site.noise, AdversarialNoise) and site.noise.active]
    if not found:
        return _scalar(nll() if callable(nll) else nll), 0.0
    if not callable(nll):
        raise InvalidValueError(
            "nll is a tensor, but AdversarialDropout needs a second pass: give elbo a function that runs the model, "
            "such as elbo(net, lambda: cross_entropy(net(x), y))"
        )
    for noise in found:
        noise.begin()
    try:
        first = _scalar(nll())
        products = [done.product for noise in found for done in noise.first or []]
        gradients = iter(
            torch.autograd.grad(first, products, retain_graph=True, materialize_grads=True) if products else ()
        )
        for noise in found:
            noise.turn([next(gradients) for _ in noise.first or []])
        second = _scalar(nll())
    finally:
        for noise in found:
            noise.first = None
            noise.second.clear()
    return first, found[0].weight * second


def _is_within(number: Any) -> bool:
    """Whether `number` is one, finite and at least 0."""
    try:
        return bool(0.0 <= number < math.inf)
    except TypeError:
        return False


def _is_schedule(warmup: Any) -> bool:
    try:
        return 0.0 <= float(warmup(0)) <= 1.0
    except (TypeError, ValueError):
        return False


def _scalar(nll: Any) -> Tensor:
    if not isinstance(nll, Tensor):
        raise InvalidValueError(f"nll={nll!r:.80}: must be a scalar tensor, or a function that gives one")
    if nll.dim() != 0:
        raise InvalidValueError(f"nll has shape {tuple(nll.shape)}: must be a scalar, the mean over the minibatch")
    return nll

"""Prediction: the noise switch and the ensemble over draws."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor, nn

from vardrop.errors import InvalidValueError
from vardrop.sites import sites


class noise:
    """Switches the noise of `model` alone; batch-norm mode and pruning marks stay as they are.

    Takes effect at once; used with ``with``, the earlier state comes back at the end.

    Args:
        model: a converted model.
        on: ``True`` or ``False`` forces it; ``None`` lets it follow ``model.training`` again.
        generator: source of the draws from now on; ``None`` for torch's default.

    >>> net = vd.convert(torch.nn.Linear(8, 4), vd.ARD()).eval()
    >>> x = torch.randn(2, 8)
    >>> with vd.noise(net, on=True):
    ...     bool((net(x) == net(x)).all())
    False
    >>> bool((net(x) == net(x)).all())
    True
    """

    def __init__(self, model: nn.Module, on: bool | None = True, *, generator: torch.Generator | None = None) -> None:
        self._before = [(site.noise, site.noise.on, site.noise.generator) for site in sites(model)]
        for module, _, _ in self._before:
            module.on, module.generator = on, generator

    def __enter__(self) -> noise:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for module, on, generator in self._before:
            module.on, module.generator = on, generator


def predict(model: nn.Module, x: Tensor, *, samples: int = 20, generator: torch.Generator | None = None) -> Tensor:
    """Mean class probabilities over `samples` draws of the noise; batch-norm and plain dropout in eval mode.

    Probabilities are averaged, not logits. The model's mode and noise switch are as before afterwards.

    Args:
        model: returns logits ``(N, classes, *)``.
        x: one batch of inputs.
        samples: number of draws, above 0.
        generator: source of the draws.

    Returns:
        Probabilities of the shape of the logits; they sum to one over dimension 1.

    >>> net = vd.convert(torch.nn.Linear(8, 4), vd.ARD())
    >>> vd.predict(net, torch.randn(2, 8), samples=3).sum(dim=1)
    tensor([1., 1.])
    """
    if samples < 1:
        raise InvalidValueError(f"samples={samples}: must be at least 1")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), noise(model, on=True, generator=generator):
            total = torch.softmax(model(x).float(), dim=1)
            for _ in range(samples - 1):
                total += torch.softmax(model(x).float(), dim=1)
    finally:
        for module, training in modes.items():
            module.training = training
    return total / samples

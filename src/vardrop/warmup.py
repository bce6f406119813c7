"""Schedules for the weight of the KL: functions of the epoch (from 0) with values in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from vardrop.errors import InvalidValueError

Schedule = Callable[[int], float]


def constant() -> Schedule:
    """The full KL from the first epoch.

    >>> vd.warmup.constant()(0)
    1.0
    """
    return _always


def linear(epochs: int, *, start: int = 0) -> Schedule:
    """Zero up to epoch `start`, then a straight line that reaches one at epoch `epochs`.

    ``linear(20)`` is the schedule of arXiv:1811.00596, ``linear(20, start=5)`` that of arXiv:1701.05369 on MNIST.

    Raises:
        InvalidValueError: unless ``0 <= start < epochs``.

    >>> [vd.warmup.linear(epochs=4)(epoch) for epoch in range(6)]
    [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """
    return _ramp(epochs, start, power=1)


def cubic(epochs: int, *, start: int = 0) -> Schedule:
    """Like :func:`linear`, but the cube of the line: slow at first.

    Raises:
        InvalidValueError: unless ``0 <= start < epochs``.

    >>> vd.warmup.cubic(epochs=2)(1)
    0.125
    """
    return _ramp(epochs, start, power=3)


def step(epoch: int) -> Schedule:
    """No KL before `epoch`, all of it from there on.

    >>> [vd.warmup.step(2)(epoch) for epoch in range(4)]
    [0.0, 0.0, 1.0, 1.0]
    """
    return partial(_from, epoch)


def _ramp(epochs: int, start: int, *, power: int) -> Schedule:
    try:
        fits = 0 <= start < epochs
    except TypeError:
        fits = False
    if not fits:
        raise InvalidValueError(f"epochs={epochs!r}, start={start!r}: must be numbers with 0 <= start < epochs")
    return partial(_risen, start, epochs, power)


# Functions of the module rather than closures: an objective travels to other processes, and into a saved module.


def _always(epoch: int) -> float:
    return 1.0


def _from(first: int, epoch: int) -> float:
    return float(epoch >= first)


def _risen(start: int, epochs: int, power: int, epoch: int) -> float:
    return float(min(1.0, max(0.0, (epoch - start) / (epochs - start))) ** power)

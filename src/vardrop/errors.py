"""Every error vardrop raises on purpose: the message names the thing, its value and what would be right.

Each class is also the built-in error that a caller would expect, so ``except ValueError`` keeps working.
"""

from __future__ import annotations


class VardropError(Exception):
    """Base of every error raised on purpose by vardrop."""


class InvalidValueError(VardropError, ValueError):
    """An argument lies outside its allowed range or form."""


class ApartError(InvalidValueError):
    """Runs that were to train in one batched pass must train one by one."""


class UnsupportedLayerError(VardropError, TypeError):
    """A layer was named for conversion that no site class covers."""


class ConversionError(VardropError, RuntimeError):
    """A model cannot be converted as asked (nothing matched, or it is converted already)."""


class GraphError(VardropError, RuntimeError):
    """A model's graph holds an operation that compaction cannot follow exactly."""


class DataError(VardropError, ValueError):
    """A data set is missing, of another layout, or holds values a network cannot be trained on."""


class StorageError(VardropError, OSError):
    """A stored model, run or checkpoint is missing, foreign, truncated or cannot be written."""


class TrainingError(VardropError, RuntimeError):
    """Training cannot go on, for example because the loss is no longer finite."""


class MissingExtraError(VardropError, ImportError):
    """A feature needs an optional package; the message names the extra that brings it."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f'{feature} needs an optional package; install it with: pip install "vardrop[{extra}]"')


class VardropWarning(UserWarning):
    """Base of all warnings of this library."""


class EmptyLayerWarning(VardropWarning):
    """Pruning would have emptied a layer, so its best site was kept."""


class CompactionWarning(VardropWarning):
    """A plain net cannot do all that the model did from which it was made."""


class FastPathWarning(VardropWarning):
    """A part of the fast path is not to be had on this machine, so the plain one does its work."""

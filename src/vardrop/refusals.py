"""What is said of a model that cannot be used as asked, in the same words wherever that shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from vardrop.errors import InvalidValueError


def check_model(model: Any) -> None:
    """Raises unless `model` is a module.

    Raises:
        InvalidValueError: it is something else.
    """
    if not isinstance(model, nn.Module):
        other = ", not its state" if isinstance(model, Mapping) else ""
        raise InvalidValueError(f"model is a {type(model).__name__}: must be a torch.nn.Module{other}")


def does_not_run(model: nn.Module, arguments: Iterable[Any], error: Exception) -> str:
    """What to say where a pass of `model` on `arguments` ends in `error`."""
    shapes = ", ".join(str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in arguments)
    reason = str(error) or type(error).__name__
    return f"{type(model).__name__} does not run on inputs of shape {shapes}: {reason}"

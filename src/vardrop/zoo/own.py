"""A user's own nets and data, named as ``file.py:function``."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from pathlib import Path
from typing import Any

from torch import nn

from vardrop.errors import InvalidValueError


def is_own(spec: str) -> bool:
    """Whether `spec` names a function in a file rather than something of the zoo."""
    return re.fullmatch(r".+\.py:\w+", spec) is not None


def call_own(spec: str, **offered: Any) -> Any:
    """Calls the function that `spec` names with those of the `offered` arguments that it takes.

    Raises:
        InvalidValueError: file or function do not exist, or the function raised.
    """
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise InvalidValueError(f"{spec!r}: there is no file {path}")
    module_spec = importlib.util.spec_from_file_location(f"_own_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise InvalidValueError(f"{spec!r}: {path} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # where a dataclass looks up its annotations
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise InvalidValueError(f"{spec!r}: {path} could not be run: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise InvalidValueError(f"{spec!r}: {path} has no function {name!r}; it has: {', '.join(known) or 'none'}")
    if isinstance(function, nn.Module):
        raise InvalidValueError(f"{spec!r} is a {type(function).__name__}: must be a function that gives one")
    taken = inspect.signature(function).parameters
    try:
        return function(**{key: value for key, value in offered.items() if key in taken})
    except Exception as error:
        raise InvalidValueError(f"{spec!r} raised {type(error).__name__}: {error}") from error

"""Values of fields, given as texts."""

from __future__ import annotations

import types
from typing import Any, Literal, Union, get_args, get_origin

from vardrop.errors import InvalidValueError


def value_of(text: str, hint: Any) -> bool | int | float | str | None:
    """`text` as a value of the type `hint`: a number, a truth value, a word, or none.

    Raises:
        InvalidValueError: it is none; the message says what it must be, and its caller what it is of.

    >>> from vardrop.settings import value_of
    >>> value_of("0.1", float), value_of("none", int | None), value_of("True", bool)
    (0.1, None, True)
    """
    options = alternatives(hint)
    if text.lower() == "none" and type(None) in options:
        return None
    if bool in options:
        if text.lower() not in ("true", "false"):
            raise InvalidValueError("must be true or false")
        return text.lower() == "true"
    kind = next((kind for kind in (float, int) if kind in options), None)
    if kind is not None:
        try:
            return kind(text)
        except ValueError:
            raise InvalidValueError(f"must be {'a number' if kind is float else 'a whole number'}") from None
    words = [word for option in options if get_origin(option) is Literal for word in get_args(option)]
    if words and text not in words:
        raise InvalidValueError(f"must be one of {', '.join(words)}")
    return text


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The types that a value of the type `hint` may have."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)

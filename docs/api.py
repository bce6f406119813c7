"""Writes docs/api.md: what may be called, one line each, from the docstrings.

python docs/api.py
"""

import inspect
import re
from pathlib import Path
from types import ModuleType

import vardrop as vd
from vardrop import errors

PAGE = Path(__file__).with_suffix(".md")
ROOMS = (vd.functional, vd.uncertainty, vd.metrics, vd.warmup, errors)


def first_line(value: object) -> str:
    """The first paragraph of a docstring, as one line of Markdown."""
    text = " ".join((inspect.getdoc(value) or "").partition("\n\n")[0].split())
    return re.sub(r":\w+:`(?:vardrop\.)?([\w.]+)`", r"`\1`", text).replace("``", "`").replace("|", "\\|")


def names_of(room: ModuleType) -> dict[str, object]:
    """The functions and classes that a room offers; from elsewhere only where it names them so."""
    return {
        name: value
        for name, value in sorted(vars(room).items())
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__.startswith(room.__name__)
    }


def table(names: dict[str, object]) -> str:
    """A row for each name."""
    rows = [f"| `{name}` | {first_line(value)} |" for name, value in names.items()]
    return "\n".join(["| name | what it does |", "|---|---|", *rows]) + "\n"


def page() -> str:
    """The whole page."""
    methods = {*vd.methods().values(), *vd.baselines().values()}
    own = {name: value for name, value in names_of(vd).items() if value not in methods}
    parts = [
        "# What may be called\n\nMade by `python docs/api.py` from the docstrings, which say more: `help(vd.compact)`. "
        "The methods have [a table of their own](../README.md#the-methods), and their fields are listed by "
        "`vardrop methods`.\n",
        f"## `vardrop`, as `vd`\n\n{table({f'vd.{name}': value for name, value in own.items()})}",
        *(f"## `{room.__name__}`\n\n{first_line(room)}\n\n{table(names_of(room))}" for room in ROOMS),
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())

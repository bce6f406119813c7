"""What the scripts share that make pages and pictures of finished runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vardrop.errors import VardropError
from vardrop.files import replace_file

CONFIG = ("net", "data", "method", "schedule", "include")
PICTURES = (".png", ".svg", ".pdf")


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Takes finished runs to evaluate, or ``--write`` for what is stored already."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("runs", type=Path, nargs="*", help="folders that `vardrop compress` wrote")
    made.add_argument("--data-root", type=Path)
    made.add_argument("--write", action="store_true", help="only make the page anew of what is stored")
    return made


def parse(known: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """What was asked for; leaves with a word of help where it is neither runs nor ``--write``, or both."""
    given = known.parse_args(arguments)
    if given.write == bool(given.runs):
        known.error("give either runs, or --write alone")
    return given


def picture(text: str) -> Path:
    """The picture to write, as an argument says it."""
    path = Path(text)
    if path.suffix not in PICTURES:
        raise argparse.ArgumentTypeError(f"{text!r}: its name must end in one of {', '.join(PICTURES)}")
    return path


def run(main: Callable[[], None]) -> None:
    """Does what a script is for; an error raised on purpose is one line, not a trace."""
    try:
        main()
    except VardropError as error:
        raise SystemExit(f"error: {error}") from error


def identity(folder: Path, run: Mapping[str, Any]) -> dict[str, Any]:
    """What a page says of a finished `run`, whose `folder` names it."""
    return {"run": folder.name, **{key: run["config"][key] for key in CONFIG}, "commit": run["commit"]}


def line(run: Mapping[str, Any]) -> str:
    """An entry in the list of runs at the end of a page."""
    layers = f" on layer {', '.join(run['include'])}" if run.get("include") else ""
    return (
        f"- {run['run']}: `{run['net']}` on `{run['data']}`, `{run['method']['name']}`{layers}, "
        f"{run['schedule']['epochs']} epochs, seed {run['schedule']['seed']}"
    )


def keep(path: Path, record: Mapping[str, Any]) -> None:
    """Writes `record` as JSON, whole or not at all."""
    replace_file(path, lambda aside: aside.write_text(json.dumps(record, indent=1) + "\n"))

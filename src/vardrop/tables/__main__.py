"""Cells of a table that differ in their seed alone, in a process of their own: what the runner starts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vardrop.errors import VardropError
from vardrop.memory import keep_freed_memory
from vardrop.tables.recipes import Cell, load_tables
from vardrop.tables.runner import BUSY, BusyError, Options, ended_by_sigterm, run_seeds


def main(text: str) -> None:
    """Runs the cells that `text`, a JSON object, describes; an error raised on purpose is the last line of stderr."""
    keep_freed_memory()
    told = json.loads(text)
    recipes = Path(told["recipes"])
    run = load_tables(recipes)[told["table"]].rows[told["row"]].runs[told["column"]]
    data_root = None if told["data_root"] is None else Path(told["data_root"])
    try:
        cells = [Cell(run, told["budget"], seed) for seed in told["seeds"]]
        with ended_by_sigterm():
            run_seeds(cells, Options(Path(told["folder"]), data_root, recipes=recipes))
    except VardropError as error:
        print("error:", *str(error).splitlines(), file=sys.stderr)
        sys.exit(BUSY if isinstance(error, BusyError) else 1)


if __name__ == "__main__":
    main(sys.argv[1])

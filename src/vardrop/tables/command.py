"""What ``vardrop reproduce`` does: run what is missing, keep it, show the tables."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from vardrop.errors import DataError, StorageError
from vardrop.files import make_folder, replace_file
from vardrop.tables.page import legend, markdown, page
from vardrop.tables.recipes import Budget, Cell, find_tables
from vardrop.tables.runner import Options, Watch, cells_of, run_cells
from vardrop.tables.show import beside, watching
from vardrop.tables.store import TABLES, Found, found_in, is_kept, keep, left_to_run, record_of, stored_in


def reproduce(
    names: Sequence[str],
    options: Options,
    console: Console,
    *,
    budget: Budget,
    seeds: int,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    store: Path | None = None,
) -> dict[str, str]:
    """Runs the cells that are missing and shows the tables; gives what failed, cells and tables, with the reasons.

    Writes ``TABLE/table.md`` and ``TABLE/table.html`` into the folder of all tables.

    Args:
        names: tables by id, or ``all``.
        options: where and how the cells run.
        console: where the tables are shown.
        budget: ``"full"`` or ``"short"``.
        seeds: runs of each row, with seeds from 0; 0 to show what is there.
        rows: names of rows; empty for all.
        columns: names of columns that are networks; empty for all.
        store: folder that gets a small record of each cell as soon as it is finished; what it holds is shown, and is
            run again only where a cell that is missing starts from it.

    Raises:
        InvalidValueError: there is no such table, row or column, or an option is out of range.
        DataError: nothing can be run for want of data, and there is no `store` to show.
        StorageError: a folder cannot be made.
    """
    tables = find_tables(names, options.recipes)
    cells = cells_of(tables, budget, seeds, rows, columns)
    failed: dict[str, str] = {}
    make_folder(options.folder)
    if store is not None:
        make_folder(store / TABLES)
        cells, failed = left_to_run(cells, options.folder, store)
    try:
        with watching(console, cells, options.folder) if cells else nullcontext() as watch:
            outcome = run_cells(cells, options, _storing(watch or Watch(), options, store, failed))
        failed = outcome.failed | failed
    except DataError as error:
        if store is None:
            raise
        failed["data"] = str(error)
        console.print(f"nothing was run: [yellow]{escape(str(error))}[/yellow]", soft_wrap=True)
    for table in tables:
        runs = list(table.runs())
        found = Found() if store is None else stored_in(store, runs)
        found.update(found_in(options.folder, runs))
        if found.refused:
            failed[table.id] = "; ".join(found.refused)
            console.print(f"{table.id}: [yellow]{escape(failed[table.id])}[/yellow]", soft_wrap=True)
        for part in beside(table, found):
            console.print(part)
        where = options.folder / table.id
        for path, text in (
            (where / "table.md", f"{markdown(table, found)}\n{legend()}"),
            (where / "table.html", page([table], found)),
        ):
            replace_file(path, lambda aside, text=text: aside.write_text(text, encoding="utf-8"))  # type: ignore[misc]
        console.print(f"the table is in {where / 'table.html'} and {where / 'table.md'}", soft_wrap=True)
    return failed


def _storing(watch: Watch, options: Options, store: Path | None, failed: dict[str, str]) -> Watch:
    """`watch`, which also keeps the record of each finished cell that `store` has none of, or says why it `failed`."""
    if store is None:
        return watch

    def on_end(cell: Cell, reason: str) -> None:
        if not reason and _is_missing(cell, store):
            try:
                keep(cell, record_of(cell, options.folder) or {}, store)
            except StorageError as error:
                reason = failed[cell.place] = str(error)
        watch.on_end(cell, reason)

    return replace(watch, on_end=on_end)


def _is_missing(cell: Cell, store: Path) -> bool:
    """Whether `store` is to get a record of `cell`; one of no use is not replaced."""
    try:
        return not is_kept(cell, store)
    except StorageError:
        return False

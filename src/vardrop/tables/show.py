"""The tables in the terminal: a list of them, their progress, and each with ours beside the paper's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.table import Table as Grid

from vardrop.tables.figures import DASH
from vardrop.tables.page import FAILS, HOLDS, lines_of, verdicts
from vardrop.tables.recipes import Budget, Cell, Table
from vardrop.tables.runner import Watch, cells_of, epochs_done
from vardrop.tables.store import Found, has_record

COLOURS = {"within": "green", "better": "bold green", "short by": "yellow"}


def overview(tables: Sequence[Table], folder: Path, budget: Budget, seeds: int, *, store: Path | None = None) -> Grid:
    """The tables with how many of their cells are finished below `folder` or have a record in `store`."""
    grid = Grid(Column("table", no_wrap=True), "what it shows", "source", f"cells done, {budget}", title="Tables")
    for table in tables:
        cells = cells_of([table], budget, seeds)
        done = sum(has_record(cell, folder, store) for cell in cells)
        grid.add_row(table.id, escape(table.title), table.source, f"{done} / {len(cells)}")
    return grid


def beside(table: Table, found: Found) -> Iterator[Grid | str]:
    """The `table` with what was found of our runs, and what the paper claims."""
    grid = Grid("", "", *map(escape, table.labels), "note", title=escape(f"{table.title} ({table.source})"))
    grid.box = box.SIMPLE_HEAD
    last = ""
    notes: dict[str, int] = {}
    for line in lines_of(table, found):
        if line.row != last and last:
            grid.add_section()
        name, last = ("" if line.row == last else line.row), line.row
        note = str(notes.setdefault(line.remark, len(notes) + 1)) if line.remark else ""
        grid.add_row(escape(name), line.origin, *map(_coloured, line.cells), note)
    yield grid
    for remark, number in notes.items():
        yield f"{number}: {escape(remark)}"
    if table.kind or table.caption:
        yield escape(
            " ".join(part for part in (f"In each column: {table.kind}." * bool(table.kind), table.caption) if part)
        )
    for claim, verdict in verdicts(table, found):
        colour = "green" if verdict.startswith(HOLDS) else "yellow" if verdict.startswith(FAILS) else "dim"
        yield f"{escape(claim)}: [{colour}]{escape(verdict)}[/{colour}]"


@contextmanager
def watching(console: Console, cells: Sequence[Cell], folder: Path) -> Iterator[Watch]:
    """Shows which cells are finished, and the epochs of those at work."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24))
    counts = TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}")
    with Progress(*columns, counts, TimeElapsedColumn(), console=console) as progress:
        whole = progress.add_task("all", total=len(cells), unit="cells")
        shown: dict[str, tuple[Cell, TaskID]] = {}

        def on_start(cell: Cell) -> None:
            if cell.place in shown:
                return
            epochs = cell.run.recipe[cell.budget].get("epochs", 0)
            shown[cell.place] = cell, progress.add_task(escape(cell.label), total=epochs, unit="epochs")

        def on_end(cell: Cell, reason: str) -> None:
            if cell.place in shown:
                progress.remove_task(shown.pop(cell.place)[1])
            if reason:
                console.print(f"{escape(cell.label)}: [yellow]{DASH} {escape(reason)}[/yellow]", soft_wrap=True)
            progress.advance(whole)

        def on_tick() -> None:
            for cell, task in shown.values():
                progress.update(task, completed=epochs_done(cell, folder))

        yield Watch(on_start, on_end, on_tick)


def _coloured(cell: str) -> str:
    text, sign, said = cell.rpartition(", ")
    colour = next((colour for word, colour in COLOURS.items() if said.startswith(word)), "")
    return f"{escape(text)}{sign}[{colour}]{escape(said)}[/{colour}]" if colour else escape(cell)

"""A table with ours beside the paper's: as lines of text, in Markdown and in HTML."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vardrop.tables.figures import DASH, TEST_EXAMPLES, Figure, Joined, join, mark, nowhere
from vardrop.tables.recipes import Ordering, Row, Table
from vardrop.tables.store import Found

HOLDS, FAILS, CLOSE = "holds", "does not hold here", "too close to say"
NOT_RUN, NO_FIGURE = "not run", "not to be had here"
LEGEND = (
    "Ours is the mean over the seeds, or the median where the table says so, with the sample standard deviation where "
    "there are several; in brackets the seeds of a figure that has fewer than its line. A list is layer by layer. An "
    "em-dash: no figure.",
    "*within*: ours differs from the paper's figure by no more than both standard deviations joined, as the root of "
    "the sum of their squares (one seed has none, nor has a paper that prints none), or than half of the last decimal "
    "shown. *better* and *short by*: beyond that, to the one side or the other; *off by* where no side is better. "
    "Lists of units are compared by their sums, which have deviations that are not shown, and half a decimal of each "
    "layer.",
    "Runs *after* another row start from a net trained by its recipe, on top of its epochs; for some that net was "
    "trained anew, and its error differs a little from the one shown.",
    "A claim *holds*, or *does not hold here*, where rows differ by more than that; of an error or an accuracy of a "
    "single seed the deviation is then what the number of test examples leaves to chance, or the largest over the "
    "seeds of a row of that column where that is more. It is *too close to say* "
    "where some row that it is compared with differs no more, and none the other way. In brackets: the budget; the "
    "rows that are better (against) or too close (close to); those that were not run (without), or only in some of "
    "the columns (only in part compared with). A verdict that rests on a single seed says so: another seed may "
    "overturn it.",
    "Speed-ups on a CPU are timed when a run ends, perhaps beside others.",
)
STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --soft: #667; --line: #8883; --ground: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ec; --soft: #9aa; --ground: #16191f; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); max-width: 75rem;
  margin: 2rem auto; padding: 0 1rem; }
h2 { font-size: 1.1rem; margin-top: 2.5rem; } p.sub, td.from, td.remark, li { color: var(--soft); }
div.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem 1.2rem .3rem 0; vertical-align: top; }
tr.first td { border-top: 1px solid var(--line); }
"""


@dataclass(frozen=True)
class Line:
    """One line of a table: the paper's figures of a row, or ours with one budget.

    Attributes:
        row: name of the row.
        origin: ``"paper"``, or budget and seeds of ours.
        cells: a text for each column.
        remark: why ours may differ, or why there is none.
    """

    row: str
    origin: str
    cells: tuple[str, ...]
    remark: str = ""


def lines_of(table: Table, found: Found) -> list[Line]:
    """All lines of `table` with what was found of our runs."""
    lines = []
    for row in table.rows.values():
        told = [_with_std(table.figures[name], row.paper.get(name), row.std.get(name)) for name in table.columns]
        if row.paper:
            lines.append(Line(row.name, "paper", tuple(told)))
        lines += _ours(table, row, found)
    return lines


def verdicts(table: Table, found: Found) -> list[tuple[str, str]]:
    """What the paper claims of the order of rows, and whether it holds here."""
    return [(_claim(table, ordering), _verdict(table, ordering, found)) for ordering in table.orderings]


def markdown(table: Table, found: Found) -> str:
    """The `table` in Markdown, headed by its title."""
    head = ["", "", *table.labels, "remarks"]
    rows = [head, ["---"] * len(head)]
    last = ""
    for line in lines_of(table, found):
        rows.append(["" if line.row == last else line.row, line.origin, *line.cells, line.remark])
        last = line.row
    claims = "".join(f"- {claim}: {verdict}\n" for claim, verdict in verdicts(table, found))
    return f"## {table.title}\n\n{_heading(table)}\n\n{_grid(rows)}" + (f"\n{claims}" if claims else "")


def contents(tables: Sequence[Table], found: Found) -> str:
    """A line for each of `tables` in Markdown: how much of it was run, and how many of the paper's claims hold."""
    head = ["table", "source", "cells run", "claims that hold", "that do not", CLOSE, "not checked"]
    rows = [head, ["---"] * len(head)]
    for table in tables:
        runs = [row.runs.values() or [None] for row in table.rows.values()]
        done = [run is not None and bool(found.budgets([run])) for row in runs for run in row]
        said = [verdict for _, verdict in verdicts(table, found)]
        counts = [sum(verdict.startswith(start) for verdict in said) for start in (HOLDS, FAILS, CLOSE, "not ")]
        anchor = re.sub(r"[^\w\- ]", "", table.title.lower()).replace(" ", "-")
        rows.append([f"[{table.title}](#{anchor})", table.source, f"{sum(done)} of {len(done)}", *map(str, counts)])
    return _grid(rows)


def _grid(rows: Sequence[Sequence[str]]) -> str:
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)


def legend() -> str:
    """What the words in a table mean, in Markdown."""
    return "".join(f"- {text}\n" for text in LEGEND)


def page(tables: Sequence[Table], found: Found) -> str:
    """The `tables` as one HTML file without any outside resource."""
    parts = [_section(table, found) for table in tables]
    texts = "".join(f"<li>{html.escape(text)}</li>" for text in LEGEND)
    texts = re.sub(r"\*([\w ]+)\*", r"<em>\1</em>", texts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Tables of the papers</title>\n'
        f"<style>{STYLE}</style></head><body>\n<h1>Tables of the papers, made again</h1>\n<ul class=sub>{texts}</ul>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _section(table: Table, found: Found) -> str:
    head = "".join(f"<th>{html.escape(label)}</th>" for label in table.labels)
    body, last = [], ""
    for line in lines_of(table, found):
        name, last = ("" if line.row == last else line.row), line.row
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in line.cells)
        body.append(
            f"<tr{' class=first' if name else ''}><td>{html.escape(name)}</td>"
            f"<td class=from>{html.escape(line.origin)}</td>{cells}"
            f"<td class=remark>{html.escape(line.remark)}</td></tr>"
        )
    claims = "".join(f"<li>{html.escape(f'{claim}: {verdict}')}</li>" for claim, verdict in verdicts(table, found))
    return (
        f"<h2>{html.escape(table.title)}</h2>\n<p class=sub>{html.escape(_heading(table))}</p>\n<div class=wide><table>"
        f"<tr><th></th><th></th>{head}<th></th></tr>\n" + "\n".join(body) + f"\n</table></div>\n<ul>{claims}</ul>"
    )


def _heading(table: Table) -> str:
    kind = f" In each column: {table.kind}." if table.kind else ""
    statistic = " Medians over the seeds." if table.statistic == "median" else ""
    caption = f" {table.caption}" if table.caption else ""
    return f"`{table.id}`: {table.source}, {table.where}.{kind}{statistic}{caption}"


def _ours(table: Table, row: Row, found: Found) -> list[Line]:
    lines: list[Line] = []
    for budget in found.budgets(list(row.runs.values())):
        others = _other_nets(row, budget, found)
        seeds = {seed for run in row.runs.values() for seed in found.of(run, budget)}
        cells = [
            _cell(table.figures[name], _joined(table, row, name, budget, found), row, name, len(seeds), not others)
            for name in table.columns
        ]
        origin = ", ".join([_epochs(row, budget, found), *others, _seeds(seeds)])
        lines.append(Line(row.name, origin, tuple(cells), "" if lines else row.reason))
    if not lines:
        remark = row.not_run or "; ".join(filter(None, ("not run yet", row.reason)))
        lines.append(Line(row.name, "ours", (DASH,) * len(table.columns), remark))
    return lines


def _epochs(row: Row, budget: str, found: Found) -> str:
    """Budget and epochs of our figures, the row from whose net they start, and how often dead units leave for good."""
    records = [record for run in row.runs.values() for record in found.of(run, budget).values()]
    epochs = {record["config"]["schedule"]["epochs"] for record in records}
    told = budget if "epoch" in budget else f"{budget}, {' or '.join(map(str, sorted(epochs)))} epochs"
    plain = {record["config"].get("pretrain", 0) for record in records} - {0}
    if plain and "epoch" not in budget:
        told += f" after {' or '.join(map(str, sorted(plain)))} plain ones"
    before = {run.before.row: None for run in row.runs.values() if run.before is not None}
    told += f" after {' or '.join(before)}" if before else ""
    every = {record["config"]["schedule"].get("shrink_every") for record in records} - {None}
    return f"{told}, dead units leave {' or '.join(map(_every, sorted(every)))}" if every else told


def _every(epochs: int) -> str:
    return "every epoch" if epochs == 1 else f"every {epochs} epochs"


def _other_nets(row: Row, budget: str, found: Found) -> list[str]:
    """The nets that were run in place of the table's own."""
    own = {run.recipe["net"] for run in row.runs.values()}
    return sorted(
        {record["config"]["net"] for run in row.runs.values() for record in found.of(run, budget).values()} - own
    )


def _joined(table: Table, row: Row, column: str, budget: str, found: Found) -> Joined | None:
    """Our figure over all seeds."""
    run = row.runs.get(column) or row.runs.get("")
    records: Mapping[int, Mapping[str, Any]] = {} if run is None else found.of(run, budget)
    read = [table.figures[column].read(record) for _, record in sorted(records.items())]
    return join([value for value in read if value is not None], table.statistic)


def _cell(figure: Figure, joined: Joined | None, row: Row, column: str, seeds: int, alike: bool) -> str:
    """Our figure of a line with so many `seeds`, marked against the paper's where the nets are `alike`."""
    if joined is None:
        return DASH
    text = _with_std(figure, joined.value, joined.std)
    if joined.count < seeds:
        text += f" ({joined.count} {'seed' if joined.count == 1 else 'seeds'})"
    paper = row.paper.get(column) if column not in row.unmarked and (alike or not figure.counts) else None
    said = "" if paper is None else mark(figure, joined, paper, row.std.get(column))
    return f"{text}, {said}" if said else text


def _with_std(figure: Figure, value: Any, std: float | None) -> str:
    spread = "" if std is None or value is None or isinstance(value, tuple) else f" ± {std:,.{figure.decimals(value)}f}"
    return figure.show(value) + spread


def _seeds(seeds: set[int]) -> str:
    if len(seeds) < 2:
        return f"seed {min(seeds)}"
    named = (
        f"{min(seeds)} to {max(seeds)}"
        if max(seeds) - min(seeds) == len(seeds) - 1
        else ", ".join(map(str, sorted(seeds)))
    )
    return f"seeds {named}"


def _claim(table: Table, ordering: Ordering) -> str:
    others = [name for name in table.rows if name != ordering.better]
    than = "every other row" if len(others) > 1 and set(others) == set(ordering.than) else " and ".join(ordering.than)
    labels = [label.partition(", ") for label in table.labels]
    names = [f"{what} ({of})" if of else what for what, _, of in labels]
    chosen = [name for column, name in zip(table.columns, names, strict=True) if column in ordering.columns]
    return f"{ordering.better} is better than {than} in {' and '.join(chosen)}"


def _list(names: Sequence[str], everyone: Sequence[str]) -> str:
    return "all" if len(names) == len(everyone) > 1 else " and ".join(names)


def _verdict(table: Table, ordering: Ordering, found: Found) -> str:
    """Whether the claim holds among the rows that were run, with the first budget that compares any."""

    def deviation(column: str, row: Row, joined: Joined) -> float | None:
        data = {run.recipe["data"] for run in row.runs.values()}
        others = [_joined(table, other, column, budget, found) for other in table.rows.values()]
        seen = max((other.std or 0.0 for other in others if other is not None), default=0.0)
        return table.figures[column].deviation(joined, min(TEST_EXAMPLES.get(name, 0) for name in data), seen)

    if any(table.figures[column].read is nowhere for column in ordering.columns):
        return NO_FIGURE
    best = table.rows[ordering.better]
    budgets = found.budgets(list(best.runs.values()))
    for budget in budgets:
        compared, fewest = False, math.inf
        rest: dict[str, list[str]] = {"against": [], "close to": [], "without": [], "only in part compared with": []}
        for name in ordering.than:
            row = table.rows[name]
            pairs = [
                (column, _joined(table, best, column, budget, found), _joined(table, row, column, budget, found))
                for column in ordering.columns
            ]
            known = [(column, ours, other) for column, ours, other in pairs if ours is not None and other is not None]
            if len(known) < len(pairs):
                rest["only in part compared with" if known else "without"].append(name)
            apart = [
                table.figures[column].beats(ours.value, other.value)
                for column, ours, other in known
                if not table.figures[column].alike(
                    ours.value, other.value, deviation(column, best, ours), deviation(column, row, other)
                )
            ]
            if not all(apart):
                rest["against"].append(name)
            elif len(apart) < len(known):
                rest["close to"].append(name)
            compared |= bool(known)
            fewest = min([fewest, *(joined.count for _, *both in known for joined in both)])
        if compared:
            verdict = FAILS if rest["against"] else CLOSE if rest["close to"] else HOLDS
            told = [f"{how} {_list(names, ordering.than)}" for how, names in rest.items() if names]
            on = f"{budget}, single seed" if fewest == 1 else budget
            return f"{verdict} ({'; '.join([on, *told])})"
    figures = [_joined(table, best, column, budget, found) for column in ordering.columns for budget in budgets]
    return NO_FIGURE if budgets and not any(figures) else NOT_RUN

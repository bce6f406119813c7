"""The tables as they stand in ``papers/``: one TOML file each, the paper's figures and how to make ours."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from vardrop.baselines import baselines
from vardrop.compress import NOISY, SMALL, Job
from vardrop.errors import InvalidValueError
from vardrop.methods import Method, methods
from vardrop.tables.figures import FIGURES, Figure, Need, Statistic, Value
from vardrop.train import Schedule

Budget = Literal["full", "short"]
PAPERS = Path(__file__).parent / "papers"
SCHEDULE = {field.name for field in dataclasses.fields(Schedule)}
RECIPE = {
    "net",
    "data",
    "validation",
    "include",
    "exclude",
    "method",
    "fields",
    "parts",
    "after",
    "from",
    "full",
    "short",
}

BUDGET = {"net", "pretrain", "fields", "parts"}
"""What a budget may say beside its schedule."""


@dataclass(frozen=True)
class Run:
    """What is trained for a row, or for one cell of a row whose columns are networks: a recipe and a place.

    Attributes:
        table: id of the table that it belongs to.
        row: name of its row.
        column: the column that it fills, or "" for all.
        recipe: net, data, method, its fields, and a schedule for each budget, which may name another net,
            and other fields or parts of the method; a part of a budget stands in the place of the row's.
        needs: what else must be measured for any table that shows it.
        before: the run whose net it starts from.
    """

    table: str
    row: str
    column: str
    recipe: Mapping[str, Any]
    needs: frozenset[Need]
    before: Run | None = None

    @property
    def place(self) -> str:
        """Its folder below the folder of all tables."""
        return f"{self.table}/{slug(f'{self.row} {self.column}')}"

    @property
    def label(self) -> str:
        """How a line of progress names it."""
        return f"{self.table}: {self.row}" + (f", {self.column}" if self.column else "")


@dataclass(frozen=True)
class Cell:
    """A run with a budget and a seed: one folder, one training."""

    run: Run
    budget: Budget
    seed: int

    @property
    def place(self) -> str:
        """Its folder below the folder of all tables."""
        return f"{self.run.place}/{self.budget}-seed-{self.seed}"

    @property
    def label(self) -> str:
        """How a line of progress names it."""
        return f"{self.run.label}, {self.budget}, seed {self.seed}"

    @property
    def before(self) -> Cell | None:
        """The cell whose net this one starts from."""
        return None if self.run.before is None else Cell(self.run.before, self.budget, self.seed)

    def job(self, folder: Path, *, data_root: Path | None = None) -> Job:
        """What is compressed, and how; `folder` is that of all tables.

        Raises:
            InvalidValueError: the method is not there, or does not take a field of the recipe.
        """
        recipe = self.run.recipe
        budget = dict(recipe[self.budget])
        fields = recipe.get("fields", {}) | budget.pop("fields", {})
        method = _method(recipe["method"], fields)
        changed = recipe.get("parts", {}) | budget.pop("parts", {})
        parts = {pattern: _method(recipe["method"], fields | values) for pattern, values in changed.items()}
        before = self.before
        return Job(
            net=budget.pop("net", recipe["net"]),
            data=recipe["data"],
            method=method,
            parts=tuple(parts.items()),
            pretrain=budget.pop("pretrain", 0),
            pretrained=None if before is None else folder.resolve() / before.place / recipe.get("from", SMALL),
            validation=recipe.get("validation", 0),
            include=tuple(recipe.get("include", ())),
            exclude=tuple(recipe.get("exclude", ())),
            schedule=Schedule(**budget, seed=self.seed),
            data_root=data_root,
        )


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        name: as the paper calls it.
        paper: the paper's figures by column; missing where it prints none.
        std: their standard deviations, where it prints them.
        runs: what is trained for it; by column, with "" for all columns at once.
        reason: why it differs from the paper's recipe, or why ours may come out otherwise.
        not_run: why there is no run of it at all.
        unmarked: columns that the paper counts otherwise, so that ours are not held against them.
    """

    name: str
    paper: Mapping[str, Value]
    std: Mapping[str, float]
    runs: Mapping[str, Run]
    reason: str = ""
    not_run: str = ""
    unmarked: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ordering:
    """A claim of the paper: row `better` beats each of the rows `than` in each of the columns."""

    better: str
    than: tuple[str, ...]
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A result table of a paper, and how to make it again.

    Attributes:
        id: its name here, such as ``svd-mnist-fc``.
        title: what it shows, in words.
        source: the paper.
        where: the place in the paper.
        caption: what a reader must know about the data or the protocol.
        columns: its columns; each stands for a figure of a run, or for a network.
        labels: what stands above them.
        figures: the figure of each column.
        kind: that figure, where the columns are networks.
        statistic: how runs with several seeds are joined.
        rows: by name.
        orderings: claims of the paper that are checked.
    """

    id: str
    title: str
    source: str
    where: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    figures: Mapping[str, Figure]
    rows: Mapping[str, Row]
    kind: str = ""
    caption: str = ""
    statistic: Statistic = "mean"
    orderings: tuple[Ordering, ...] = field(default=())

    def runs(self, rows: Sequence[str] = (), columns: Sequence[str] = ()) -> Iterator[Run]:
        """What is trained for the `rows` called so, or for all; of a table of networks, for these `columns`, or all.

        Raises:
            InvalidValueError: the table has no such row, or no network in such a column.
        """
        for name in rows:
            if name not in self.rows:
                raise InvalidValueError(f"row {name!r} is not in table {self.id}; it has: {', '.join(self.rows)}")
        networks = self.columns if self.kind else ()
        for name in columns:
            if name not in networks:
                has = f"it has: {', '.join(networks)}" if networks else "its columns are figures of the same run"
                raise InvalidValueError(f"column {name!r} is no network of table {self.id}; {has}")
        for name, row in self.rows.items():
            if not rows or name in rows:
                yield from (run for column, run in row.runs.items() if not columns or column in columns)


@cache
def load_tables(folder: Path = PAPERS) -> dict[str, Table]:
    """The tables that the TOML files in `folder` describe, by id; those of the papers by default.

    Raises:
        InvalidValueError: a file has a field or names a thing that does not exist.

    >>> from vardrop.tables import load_tables
    >>> load_tables()["svd-mnist-fc"].rows["Sparse VD"].paper["compression"]
    68
    """
    stored = {path.stem: _read(path) for path in sorted(folder.glob("*.toml"))}
    if not stored:
        raise InvalidValueError(f"{folder} holds no tables: must hold TOML files, one for each")
    needs: dict[str, set[Need]] = {}
    for name, table in stored.items():
        for row in table["rows"]:
            key = row.get("same_as", f"{name}/{row['name']}")
            needs.setdefault(key, set()).update(figure.need for figure in _figures(name, table).values() if figure.need)
    return {name: _table(name, table, stored, needs) for name, table in stored.items()}


def find_tables(names: Sequence[str], folder: Path = PAPERS) -> list[Table]:
    """The tables called so; ``all`` is all of them.

    Raises:
        InvalidValueError: there is no such table.
    """
    tables = load_tables(folder)
    if "all" in names:
        return list(tables.values())
    for name in names:
        if name not in tables:
            raise InvalidValueError(f"table {name!r} is unknown; known are: {', '.join(tables)}")
    return [tables[name] for name in names]


def find_run(table: str, row: str, column: str = "") -> Run:
    """The run behind a row of a table of the papers; of a table whose columns are networks, behind one of them.

    Raises:
        InvalidValueError: there is no such table or row, or nothing is trained for this column of it.

    >>> from vardrop.tables import find_run
    >>> find_run("vbd-4-fc", "VD").place
    'svd-mnist-fc/sparse-vd'
    """
    (found,) = find_tables([table])
    runs = {run.column: run for run in found.runs([row])}
    if column not in runs:
        raise InvalidValueError(
            f"column={column!r}: nothing is trained for it in row {row!r} of table {table}; must be one of "
            f"{', '.join(map(repr, runs))}"
        )
    return runs[column]


def slug(text: str) -> str:
    """`text` as the name of a folder.

    >>> from vardrop.tables.recipes import slug
    >>> slug("Sparse VD (from W^h), n=100")
    'sparse-vd-from-w-h-n-100'
    """
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def _read(path: Path) -> dict[str, Any]:
    """A table with all that it must say."""
    try:
        table = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise InvalidValueError(f"{path} is not readable as TOML: {error}") from error
    _has(f"table {path.stem}", table, "title", "source", "where", "rows")
    _has(f"table {path.stem}", table, *(("nets", "figure") if "nets" in table else ("columns",)))
    for row in table["rows"]:
        _has(f"a row of table {path.stem}", row, "name")
    return table


def _has(what: str, given: Mapping[str, Any], *keys: str) -> None:
    for key in keys:
        if key not in given:
            raise InvalidValueError(f"{what} has no {key!r}: must say it")


def _table(name: str, table: Mapping[str, Any], stored: Mapping[str, Any], needs: Mapping[str, set[Need]]) -> Table:
    figures = _figures(name, table)
    rows = {row["name"]: _row(name, row, stored, needs) for row in table["rows"]}
    orderings = []
    for claim in table.get("orderings", []):
        _has(f"an ordering of table {name}", claim, "better")
        others = tuple(claim.get("than", [row for row in rows if row != claim["better"]]))
        columns = tuple(claim.get("columns", figures))
        for row in (claim["better"], *others):
            _known(f"a row of an ordering of table {name}", row, rows)
        for column in columns:
            _known(f"a column of an ordering of table {name}", column, figures)
        orderings.append(Ordering(claim["better"], others, columns))
    told = {key: table[key] for key in ("title", "source", "where", "caption", "statistic") if key in table}
    _known(f"the statistic of table {name}", told.get("statistic", "mean"), get_args(Statistic))
    by_net = "nets" in table
    return Table(
        id=name,
        columns=tuple(figures),
        labels=tuple(column if by_net else figure.label for column, figure in figures.items()),
        figures=figures,
        kind=FIGURES[table["figure"]].label if by_net else "",
        rows=rows,
        orderings=tuple(orderings),
        **told,
    )


def _figures(name: str, table: Mapping[str, Any]) -> dict[str, Figure]:
    if "nets" in table:
        _known(f"the figure of table {name}", table["figure"], FIGURES)
        return dict.fromkeys(table["nets"], FIGURES[table["figure"]])
    for column in table["columns"]:
        _known(f"a column of table {name}", column, FIGURES)
    return {column: FIGURES[column] for column in table["columns"]}


def _row(name: str, row: Mapping[str, Any], stored: Mapping[str, Any], needs: Mapping[str, set[Need]]) -> Row:
    columns = stored[name].get("nets", [""]) if "not_run" not in row else ()
    runs = {column: _run(name, row["name"], column, stored, needs) for column in columns}
    origin = row
    while "same_as" in origin:
        home, _, of = origin["same_as"].partition("/")
        origin = next(other for other in stored[home]["rows"] if other["name"] == of)
    reason = row.get("reason", origin.get("reason", ""))
    unmarked = tuple(row.get("unmarked", ()))
    for column in (*row.get("paper", {}), *row.get("std", {}), *unmarked):
        _known(f"a figure of the paper in row {row['name']!r} of table {name}", column, _figures(name, stored[name]))
    paper = _tuples(row.get("paper", {}))
    return Row(row["name"], paper, row.get("std", {}), runs, reason, row.get("not_run", ""), unmarked)


def _run(
    name: str,
    row: str,
    column: str,
    stored: Mapping[str, Any],
    needs: Mapping[str, set[Need]],
    later: tuple[str, ...] = (),
) -> Run:
    """The run of a row, which lies with another table where the row is the same as one there.

    The rows that come `later` start from it, or are the same.
    """
    if (place := f"{name}/{row}") in later:
        raise InvalidValueError(f"row {row!r} of table {name} starts from itself, or is taken from itself")
    later = (*later, place)
    _known("a table that a row is taken from", name, stored)
    table = stored[name]
    given = {other["name"]: other for other in table["rows"]}
    _known(f"a row of table {name} that another one is taken from or starts from", row, given)
    if "same_as" in given[row]:
        home, _, of = given[row]["same_as"].partition("/")
        return _run(home, of, column, stored, needs, later)
    recipe = _recipe(name, table.get("recipe", {}), given[row])
    if column:
        recipe["net"] = table["nets"][column]
    _has(f"row {row!r} of table {name}, or its [recipe],", recipe, "method", "net", "data")
    before = _run(name, recipe["after"], column, stored, needs, later) if "after" in recipe else None
    return Run(name, row, column, recipe, frozenset(needs.get(f"{name}/{row}", ())), before)


def _recipe(name: str, common: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    recipe = {key: value for key, value in {**common, **row}.items() if key in RECIPE}
    for budget in get_args(Budget):
        recipe[budget] = {**common.get(budget, {}), **row.get(budget, {})}
        for key in recipe[budget]:
            _known(f"{budget} of row {row['name']!r} of table {name}", key, SCHEDULE | BUDGET)
    for key in row:
        _known(f"row {row['name']!r} of table {name}", key, RECIPE | {"name", "paper", "std", "reason", "unmarked"})
    if recipe.get("from", SMALL) not in (SMALL, NOISY):
        raise InvalidValueError(
            f"from={recipe['from']!r} of row {row['name']!r} of table {name}: must be small or noisy"
        )
    return recipe


def _method(name: str, values: Mapping[str, Any]) -> Method:
    known = methods() | baselines()
    _known("the method of a recipe", name, known)
    for key in values:
        _known(f"a field of method {name}", key, [field.name for field in dataclasses.fields(known[name])])
    return known[name](**values)


def _known(what: str, name: str, known: Iterator[str] | Mapping[str, Any] | Sequence[str] | set[str]) -> None:
    if name not in known:
        raise InvalidValueError(f"{what}: {name!r} is unknown; known are: {', '.join(sorted(known))}")


def _tuples(paper: Mapping[str, Any]) -> dict[str, Value]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in paper.items()}

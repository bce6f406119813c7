"""The records of finished cells: where they lie, and all that a folder holds of them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from vardrop.errors import StorageError
from vardrop.files import replace_file
from vardrop.tables.recipes import Budget, Cell, Run

CELL = "cell.json"
TABLES = "tables"
LARGEST = 50_000
"""Bytes up to which a stored record keeps its history."""


@dataclass
class Found:
    """Records by run, budget and seed, and why others are of no use."""

    records: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)

    def add(self, place: str, budget: str, seed: int, record: Mapping[str, Any]) -> None:
        """Keeps the `record` of the run whose folder is `place`."""
        self.records.setdefault((place, budget), {})[seed] = record

    def update(self, other: Found) -> None:
        """Takes over all records of `other`; of two records of one cell they win, unless they lack a figure."""
        for key, records in other.records.items():
            mine = self.records.setdefault(key, {})
            for seed, record in records.items():
                if mine.get(seed, {}).keys() <= record.keys():
                    mine[seed] = record
        self.refused += other.refused

    def of(self, run: Run, budget: str) -> dict[int, Mapping[str, Any]]:
        """The records of `run` with this budget, by seed."""
        return self.records.get((run.place, budget), {})

    def budgets(self, runs: Sequence[Run]) -> list[str]:
        """The budgets that any of the `runs` has records of: full, short, then others."""
        places = {run.place for run in runs}
        names = {budget for place, budget in self.records if place in places}
        return sorted(names, key=lambda name: ({"full": 0, "short": 1}.get(name, 2), name))


def record_of(cell: Cell, folder: Path) -> dict[str, Any] | None:
    """The record of `cell` below `folder`, if it is finished and holds all that the tables ask of it.

    Raises:
        StorageError: the record is damaged, or was made by another recipe.
    """
    return _finished(cell, folder / cell.place / CELL, folder / cell.place)


def left_to_run(cells: Sequence[Cell], folder: Path, store: Path) -> tuple[list[Cell], dict[str, str]]:
    """Those of the `cells` whose record :func:`keep` did not put into `store`, and those that they start from.

    Args:
        cells: those that others start from before these.
        folder: where ``vardrop reproduce`` works.
        store: the folder that records are kept in.

    Returns:
        the cells, and why others have a stored record that is of no use, by their places; these are not run.
    """
    left: list[Cell] = []
    refused: dict[str, str] = {}
    starts: set[str] = set()
    for cell in reversed(cells):
        if cell.place not in starts:
            try:
                if is_kept(cell, store):
                    continue
            except StorageError as error:
                refused[cell.place] = str(error)
                continue
        left.append(cell)
        if cell.before is not None and _is_wanting(cell, folder):
            starts.add(cell.before.place)
    return left[::-1], refused


def has_record(cell: Cell, folder: Path, store: Path | None) -> bool:
    """Whether there is any record of `cell`, below `folder` or in `store`."""
    return (folder / cell.place / CELL).exists() or (store is not None and _stored(cell, store).exists())


def found_in(folder: Path, runs: Sequence[Run]) -> Found:
    """All records of the `runs` below `folder`, where ``vardrop reproduce`` works."""
    return _found(
        folder, runs, re.compile(r"(?P<budget>full|short)-seed-(?P<seed>\d+)/" + re.escape(CELL)), f"*/{CELL}"
    )


def stored_in(folder: Path, runs: Sequence[Run]) -> Found:
    """All records of the `runs` below `folder`, where :func:`keep` put them."""
    return _found(folder / TABLES, runs, re.compile(r"(?P<budget>full|short)-seed-(?P<seed>\d+)\.json"), "*.json")


def keep(cell: Cell, record: Mapping[str, Any], folder: Path) -> Path:
    """Stores the `record` of a finished cell as a small file below `folder` and gives its path.

    A history that makes it large is left out but for its last epoch; a start from another cell is named by its place.
    """
    kept = dict(record)
    if len(json.dumps(kept)) > LARGEST:
        kept["history"] = kept["history"][-1:]
    before = cell.before
    if before is not None:
        kept["config"] = {**kept["config"], "pretrained": before.place}
    path = _stored(cell, folder)
    replace_file(path, lambda aside: aside.write_text(json.dumps(kept, indent=1) + "\n"))
    return path


def _is_wanting(cell: Cell, folder: Path) -> bool:
    """Whether `cell` is to be trained below `folder`, which a record of no use forbids."""
    try:
        return record_of(cell, folder) is None
    except StorageError:
        return False


def is_kept(cell: Cell, store: Path) -> bool:
    """Whether :func:`keep` put a record of `cell` into `store` that holds all that the tables ask of it.

    Raises:
        StorageError: the record is damaged, or was made by another recipe.
    """
    path = _stored(cell, store)
    return _finished(cell, path, path) is not None


def _stored(cell: Cell, store: Path) -> Path:
    return store / TABLES / f"{cell.place}.json"


def _finished(cell: Cell, path: Path, where: Path) -> dict[str, Any] | None:
    """The record of `cell` at `path`, if it is there and holds all that the tables ask of it; errors name `where`."""
    if not path.exists():
        return None
    record = _read(path)
    check_recipe(cell, record, where)
    return record if all(need in record for need in cell.run.needs) else None


def _found(folder: Path, runs: Sequence[Run], name: re.Pattern[str], pattern: str) -> Found:
    found = Found()
    for place, run in sorted({run.place: run for run in runs}.items()):
        for path in sorted((folder / place).glob(pattern)):
            match = name.fullmatch(path.relative_to(folder / place).as_posix())
            if match:
                try:
                    record = _read(path)
                    check_recipe(Cell(run, cast(Budget, match["budget"]), int(match["seed"])), record, path)
                except StorageError as error:
                    found.refused.append(str(error))
                else:
                    found.add(place, match["budget"], int(match["seed"]), record)
    return found


def check_recipe(cell: Cell, record: Mapping[str, Any], where: Path) -> None:
    """Raises unless the recipe still says what the `record` was made with; what either knows nothing of may differ."""
    wanted = json.loads(json.dumps(cell.job(Path()).config))
    differing = [
        key
        for key in wanted
        if key not in ("parts", "pretrained")
        and key in record["config"]
        and not _agree(record["config"][key], wanted[key])
    ]
    stored = record["config"]
    if stored.get("parts", {}) != wanted.get("parts", {}):
        differing.append("parts")
    if (stored.get("pretrained") is None) != (wanted["pretrained"] is None):
        differing.append("the net that it starts from")
    if differing:
        raise StorageError(
            f"{where} was made by another recipe (it differs in {', '.join(differing)}): move it away, or choose "
            "another folder"
        )


def _agree(stored: Any, wanted: Any) -> bool:
    if isinstance(stored, dict) and isinstance(wanted, dict):
        return all(_agree(stored[key], wanted[key]) for key in stored.keys() & wanted.keys())
    return bool(stored == wanted)


def _read(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        record["config"]["net"], record["config"]["schedule"]["epochs"], record["pruned"]["error"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{path} is not a readable record of a cell ({type(error).__name__}: {error}): move it away"
        ) from error
    return record

"""Trains what the tables need: one process a cell, side by side, each cell once however many runners there are."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from vardrop.checkpoint import HISTORY
from vardrop.compress import compress, compress_together
from vardrop.errors import (
    ApartError,
    DataError,
    InvalidValueError,
    MissingExtraError,
    StorageError,
    TrainingError,
    VardropError,
)
from vardrop.evaluate import ONE_DRAW, ensemble_of, evaluate, measure_run
from vardrop.files import RUN, make_folder, read_run, replace_file
from vardrop.tables.figures import ENSEMBLE, TIMED_BATCH, TIMED_THREADS
from vardrop.tables.recipes import PAPERS, Budget, Cell, Table
from vardrop.tables.store import CELL, check_recipe, record_of
from vardrop.together import why_alone
from vardrop.zoo import load_data

if TYPE_CHECKING:
    from filelock import FileLock

Device = Literal["auto", "cpu", "cuda"]
TICK = 0.2
"""Seconds between looks at the processes."""

BUSY = 75
"""Exit status of a process that found its cell in the hands of another runner."""

REPEATS = 50


@dataclass(frozen=True)
class Options:
    """Where and how the cells run.

    Args:
        folder: of all tables.
        data_root: folder that holds data sets in their Hub layout; ``None`` for the Hub.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"`` for an accelerator where there is one.
        jobs: cells side by side, at least 1.
        recipes: folder of the recipes.
        together: train the seeds of a run in one batched pass where its method allows; ``None`` for where there is a
            GPU.
    """

    folder: Path
    data_root: Path | None = None
    device: Device = "auto"
    jobs: int = 1
    recipes: Path = PAPERS
    together: bool | None = None

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise InvalidValueError(f"jobs={self.jobs}: must be at least 1")
        if self.device not in get_args(Device):
            raise InvalidValueError(f"device={self.device!r}: must be one of {', '.join(get_args(Device))}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InvalidValueError("device='cuda': torch finds no such device here; must be cpu or auto")

    @property
    def batched(self) -> bool:
        """Whether seeds train together."""
        return self.device != "cpu" and torch.cuda.is_available() if self.together is None else self.together


@dataclass
class Watch:
    """What is told of the progress.

    Attributes:
        on_start: of each cell that starts.
        on_end: of each cell that ended, with the reason where it failed and "" where it did not.
        on_tick: several times a second.
    """

    on_start: Callable[[Cell], None] = lambda cell: None
    on_end: Callable[[Cell, str], None] = lambda cell, reason: None
    on_tick: Callable[[], None] = lambda: None


@dataclass
class Outcome:
    """The cells that are finished, and why others are not, by their places."""

    finished: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)


def cells_of(
    tables: Sequence[Table], budget: Budget, seeds: int, rows: Sequence[str] = (), columns: Sequence[str] = ()
) -> list[Cell]:
    """The cells of the tables, those that others start from before these, each once.

    Raises:
        InvalidValueError: an unknown budget or row, or a negative number of seeds.
    """
    if budget not in get_args(Budget):
        raise InvalidValueError(f"budget={budget!r}: must be one of {', '.join(get_args(Budget))}")
    if seeds < 0:
        raise InvalidValueError(f"seeds={seeds}: must be at least 0")
    found: dict[str, Cell] = {}
    runs = [run for table in tables for run in table.runs(rows, columns)]
    for seed in range(seeds):
        for run in runs:
            chain = [Cell(run, budget, seed)]
            while (before := chain[-1].before) is not None:
                chain.append(before)
            for cell in reversed(chain):
                found.setdefault(cell.place, cell)
    return list(found.values())


def epochs_done(cell: Cell, folder: Path) -> int:
    """Epochs of its last stage that the checkpoint of `cell` holds."""
    try:
        return len((folder / cell.place / HISTORY).read_text().splitlines())
    except OSError:
        return 0


def run_seeds(cells: Sequence[Cell], options: Options) -> None:
    """Trains the `cells` of one run in this process, or goes on where they were broken off; finished ones stay.

    Several seeds train together, unless their method does not allow it, or one of them fails: then one after the
    other, and one that fails does not stop the rest.

    Raises:
        BusyError: another process works on one of them.
        VardropError: some of them failed; says why.
    """
    with ExitStack() as locks:
        for cell in cells:
            if not locks.enter_context(_locked(options.folder / cell.place)):
                raise BusyError(f"{options.folder / cell.place} is being worked on by another process")
        left = [cell for cell in cells if record_of(cell, options.folder) is None]
        jobs = {
            options.folder / cell.place: cell.job(options.folder, data_root=options.data_root)
            for cell in left
            if not (options.folder / cell.place / RUN).exists()
        }
        if len(jobs) > 1:
            with suppress(ApartError, TrainingError):  # of a seed that diverges the others learn nothing
                compress_together(jobs)
                jobs = {}
        failed: dict[int, VardropError] = {}
        for cell in left:
            place = options.folder / cell.place
            try:
                if place in jobs:
                    compress(jobs[place], place)
                _keep_figures(cell, options)
            except VardropError as error:
                failed[cell.seed] = error
        if failed:
            reasons = [f"seed {seed}: {error}" if len(cells) > 1 else str(error) for seed, error in failed.items()]
            raise TrainingError("; ".join(reasons))


def _keep_figures(cell: Cell, options: Options) -> None:
    """Writes the record of a trained `cell`, with all that tables show of it."""
    place = options.folder / cell.place
    record = read_run(place)
    check_recipe(cell, record, place)
    if "times" in cell.run.needs:
        record["times"] = _times(place, options)
    if "ensemble" in cell.run.needs:
        ways = evaluate(place, data_root=options.data_root, samples=ENSEMBLE)["rows"]
        record["ensemble"] = {"1": ways[ONE_DRAW], str(ENSEMBLE): ways[ensemble_of(ENSEMBLE)]}
    replace_file(place / CELL, lambda path: path.write_text(json.dumps(record, indent=1)))


def _times(place: Path, options: Options) -> dict[str, Any]:
    """Latency of the small net beside the original's."""
    found = measure_run(
        place,
        data_root=options.data_root,
        repeats=REPEATS,
        onnx=False,
        batch_sizes=(TIMED_BATCH,),
        threads=(TIMED_THREADS,),
    ).record
    return {name: figure for name, figure in found.items() if name.startswith("seconds")}


def run_cells(cells: Iterable[Cell], options: Options, watch: Watch | None = None) -> Outcome:
    """Runs the cells that are not finished, each in a process of its own; what fails does not stop the rest.

    Several runners may share a folder: a cell belongs to whoever holds its lock, which falls with its process.

    Args:
        cells: those that others start from before these; what an unfinished one starts from must be among them.
        options: where and how.
        watch: told of the progress.

    Raises:
        DataError: not one of the cells has its data.
        InvalidValueError: a cell that an unfinished one starts from is not among them.
    """
    watch = watch or Watch()
    outcome = Outcome()
    cells = list(cells)
    waiting: list[Cell] = []
    for cell in cells:
        try:
            finished, reason = record_of(cell, options.folder) is not None, ""
            cell.job(options.folder)
        except (InvalidValueError, StorageError) as error:
            finished, reason = False, str(error)
        if reason:
            outcome.failed[cell.place] = reason
        elif finished:
            outcome.finished.add(cell.place)
        else:
            waiting.append(cell)
            continue
        watch.on_end(cell, reason)
    _drop_without_data(waiting, options, outcome, watch)
    given = {cell.place for cell in cells}
    for cell in waiting:
        if cell.before is not None and cell.before.place not in given:
            raise InvalidValueError(f"cells: {cell.label} starts from {cell.before.label}, which must be among them")
    working: dict[int, tuple[list[Cell], subprocess.Popen[bytes]]] = {}
    with ended_by_sigterm():
        try:
            while waiting or working:
                for cell in list(waiting):
                    if len(working) < options.jobs and cell in waiting:
                        _start(cell, waiting, working, options, outcome, watch)
                for slot, (group, process) in list(working.items()):
                    if process.poll() is not None:
                        del working[slot]
                        if process.returncode == BUSY:
                            waiting.extend(group)
                            continue
                        _end(group, process.returncode, options, outcome, watch)
                watch.on_tick()
                time.sleep(TICK if waiting or working else 0.0)
        finally:
            for _, process in working.values():
                process.terminate()
            for _, process in working.values():
                process.wait()
    return outcome


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Lets SIGTERM end the block as Ctrl-C does, so that no process is left behind.

    Unlike SIGINT, it also reaches what a script started in the background.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, usual)


def _start(
    cell: Cell,
    waiting: list[Cell],
    working: dict[int, tuple[list[Cell], subprocess.Popen[bytes]]],
    options: Options,
    outcome: Outcome,
    watch: Watch,
) -> None:
    """Starts `cell`, with its other seeds where they train together, if its turn has come."""
    job = cell.job(options.folder)
    batched = options.batched and why_alone(job.schedule, [job.method, *dict(job.parts).values()]) is None
    mates = [mate for mate in waiting if mate.run == cell.run] if batched else [cell]
    group = [mate for mate in mates if _is_ready(mate, waiting, options, outcome, watch)]
    if group:
        slot = min(set(range(options.jobs)) - working.keys())
        working[slot] = group, _process(group, options, slot)
    for mate in group:
        waiting.remove(mate)
        watch.on_start(mate)


def _is_ready(cell: Cell, waiting: list[Cell], options: Options, outcome: Outcome, watch: Watch) -> bool:
    """Whether what `cell` starts from is finished and nobody works on it; one that needs no run leaves the queue."""
    before = cell.before
    if before is not None and before.place in outcome.failed:
        waiting.remove(cell)
        outcome.failed[cell.place] = f"it starts from {before.label}, which failed"
        watch.on_end(cell, outcome.failed[cell.place])
        return False
    if before is not None and before.place not in outcome.finished:
        return False
    with _locked(options.folder / cell.place) as free:
        if not free:
            return False
    if record_of(cell, options.folder) is not None:
        waiting.remove(cell)
        outcome.finished.add(cell.place)
        watch.on_end(cell, "")
        return False
    return True


def _end(cells: Sequence[Cell], status: int, options: Options, outcome: Outcome, watch: Watch) -> None:
    reason = _reason(status, _log(cells[0], options)) if status else ""
    for cell in cells:
        if reason and record_of(cell, options.folder) is None:
            outcome.failed[cell.place] = reason
        else:
            outcome.finished.add(cell.place)
        watch.on_end(cell, outcome.failed.get(cell.place, ""))


def _reason(status: int, log: Path) -> str:
    """Why a process failed: the signal that ended it, or else the last thing that it said."""
    if status < 0:
        return f"its process was ended by {signal.Signals(-status).name}"
    said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return said[-1].removeprefix("error: ") if said else f"its process ended with status {status}"


def _process(cells: Sequence[Cell], options: Options, slot: int) -> subprocess.Popen[bytes]:
    """A process that trains `cells`, on the device of this `slot`, counted from 0."""
    run = cells[0].run
    told = {
        "table": run.table,
        "row": run.row,
        "column": run.column,
        "budget": cells[0].budget,
        "seeds": [cell.seed for cell in cells],
        "folder": str(options.folder),
        "data_root": None if options.data_root is None else str(options.data_root),
        "recipes": str(options.recipes),
    }
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    if options.device == "cpu":
        environment["ACCELERATE_USE_CPU"] = "true"
    elif torch.cuda.is_available():
        seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        devices = seen.split(",")
        environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    with _log(cells[0], options).open("wb") as log:
        command = [sys.executable, "-m", "vardrop.tables", json.dumps(told)]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def _log(cell: Cell, options: Options) -> Path:
    place = options.folder / cell.place
    return place.with_name(f"{place.name}.log")


def _drop_without_data(waiting: list[Cell], options: Options, outcome: Outcome, watch: Watch) -> None:
    """Reads each data set once, which also fills its cache, and gives up the cells whose data is not there.

    Raises:
        DataError: that is all of them.
    """
    missing: dict[str, str] = {}
    for spec in {cell.run.recipe["data"]: None for cell in waiting}:
        try:
            load_data(spec, data_root=options.data_root)
        except VardropError as error:
            missing[spec] = str(error)
    if missing and not outcome.finished and all(cell.run.recipe["data"] in missing for cell in waiting):
        raise DataError("; ".join(missing.values()))
    for cell in list(waiting):
        reason = missing.get(cell.run.recipe["data"])
        if reason:
            waiting.remove(cell)
            outcome.failed[cell.place] = reason
            watch.on_end(cell, reason)


class BusyError(StorageError):
    """A cell is being worked on by another process."""


class _locked:
    """Tries to lock a cell for a ``with`` block, which gets whether it succeeded."""

    def __init__(self, place: Path) -> None:
        try:
            from filelock import FileLock
        except ImportError as error:
            raise MissingExtraError("the runner of tables", "cli") from error
        make_folder(place.parent)
        self.lock: FileLock = FileLock(place.with_name(f".{place.name}.lock"), blocking=False)

    def __enter__(self) -> bool:
        from filelock import Timeout

        try:
            self.lock.acquire()
        except Timeout:
            return False
        return True

    def __exit__(self, *_: object) -> None:
        self.lock.release()

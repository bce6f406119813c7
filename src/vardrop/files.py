"""The files of a run's folder, and writing one so that nobody ever sees half of it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vardrop.errors import StorageError

RUN = "run.json"
HISTOGRAMS = "histograms.json"
FIRST_LAYER = "first_layer.safetensors"
EVALUATION = "evaluation.json"
TOLD = {"config", "seed", "versions", "layers", "commit", "seconds", "history", "pruned", "compacted"}
"""What every record of a run says."""
PART = ".part"
"""Suffix of a file that is being written; one whose process was killed stays behind and is no one's."""


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a file beside `path`, flushes it to disk and renames it to `path` in one stroke.

    Raises:
        StorageError: `path` is a folder, or the file could not be written; what was at `path` before is still there.
    """
    if not path.name or is_folder(path):
        raise StorageError(f"{path} is a folder: name a file")
    aside = path.with_name(f".{path.name}.{os.getpid()}{PART}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.touch()
        mode = aside.stat().st_mode
        write(aside)
        aside.chmod(mode)  # safetensors makes files that nobody else may read
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    except (OSError, RuntimeError) as error:
        raise StorageError(f"{path} could not be written ({error}); what was there before is unharmed") from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder.

    Raises:
        StorageError: nothing can be called so.
    """
    try:
        return path.resolve().is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        raise StorageError(f"{str(path)!r:.80} cannot be a path ({error}): choose another") from error


def make_folder(path: Path) -> None:
    """Makes the folder `path`, and those above it, where they are not there.

    Raises:
        StorageError: it cannot be made, or is a file.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{path} cannot be a folder ({error.strerror}): choose another") from error


def read_run(folder: str | Path) -> dict[str, Any]:
    """What a finished run in `folder` says of itself.

    Raises:
        StorageError: there is no finished run, or its record is damaged.
    """
    path = Path(folder) / RUN
    if not path.is_file():
        raise StorageError(f"{path} does not exist: {folder} must be the folder of a finished `vardrop compress`")
    try:
        run: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise StorageError(f"{path} is not readable JSON ({error})") from error
    config = run.get("config") if isinstance(run, dict) and run.keys() >= TOLD else None
    if not isinstance(config, dict) or not config.keys() >= {"net", "data", "method"}:
        raise StorageError(
            f"{path} is no record of a run: {folder} must be the folder of a finished `vardrop compress`"
        )
    return run


def size_on_disk(folder: str | Path) -> int:
    """Bytes of all files in `folder`.

    Raises:
        StorageError: there is no such folder.

    >>> import tempfile, pathlib
    >>> from vardrop.files import size_on_disk
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (folder / "five").write_text("bytes")
    >>> size_on_disk(folder)
    5
    """
    if not Path(folder).is_dir():
        raise StorageError(f"{folder} is not a folder, so it has no size on disk")
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())

"""What a run in progress keeps on disk: a checkpoint to go on from bit for bit, and the history that people read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from vardrop.errors import StorageError
from vardrop.files import replace_file

CHECKPOINT = "checkpoint.pt"
HISTORY = "history.jsonl"
FORMAT = 1


@dataclass
class Epoch:
    """One line of the history. Errors are fractions, `nll` is nats per label, `kl` nats in all.

    Of a net that shrinks, the counts are against the net as it was, the KL is that of what is left.
    `alive` counts weights, or units of a gate, by site; `units` are those of all gates, such as ``"294-110-71"``.
    """

    epoch: int
    lr: float
    beta: float
    train_error: float
    train_nll: float
    kl: float
    valid_error: float | None
    test_error: float | None
    nonzero: int
    compression: float
    seconds: float
    alive: dict[str, int] = field(default_factory=dict)
    units: str = ""


def write(
    folder: Path, identity: str, state: Mapping[str, Any], history: list[Epoch], *, apart: int | None = None
) -> None:
    """Replaces history and checkpoint in `folder`: `state`, and that of torch's random numbers.

    A run that trains beside others may go on alone, and must not draw what they draw then: `apart` seeds its numbers.
    """
    lines = "".join(json.dumps(asdict(epoch)) + "\n" for epoch in history)
    random = torch.get_rng_state()
    random_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    if apart is not None:
        random = torch.Generator().manual_seed(apart).get_state()
        random_cuda = [torch.Generator(f"cuda:{at}").manual_seed(apart).get_state() for at in range(len(random_cuda))]
    checkpoint = {
        "format": FORMAT,
        "identity": identity,
        **state,
        "random": random,
        "random_cuda": random_cuda,
        "history": [asdict(epoch) for epoch in history],
    }
    replace_file(folder / HISTORY, lambda path: path.write_text(lines))
    replace_file(folder / CHECKPOINT, lambda path: torch.save(checkpoint, path))


def read(folder: Path, identity: str) -> dict[str, Any] | None:
    """The checkpoint in `folder` as :func:`write` made it; ``None`` where there is none.

    Raises:
        StorageError: it is foreign or damaged, or of a run with another `identity`.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        stored: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        kind = stored["format"]
    except Exception as error:
        raise StorageError(
            f"{path} is not a readable checkpoint of vardrop ({type(error).__name__}); it may be truncated or "
            "foreign: move it away to start the run anew"
        ) from error
    if kind != FORMAT or stored["identity"] != identity:
        raise StorageError(f"{path} belongs to another run; choose another folder, or the options of that run")
    return stored


def draw_on_from(stored: Mapping[str, Any]) -> None:
    """Puts torch's random numbers back to where the checkpoint `stored` was made."""
    torch.set_rng_state(stored["random"])
    if stored["random_cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(stored["random_cuda"])


def epochs_in(stored: Mapping[str, Any]) -> list[Epoch]:
    """The history up to the checkpoint `stored`."""
    return [Epoch(**epoch) for epoch in stored["history"]]

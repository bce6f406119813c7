"""A finished run taken up again: its figures anew, what its small net saves, its small net as ONNX."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vardrop.compare import Measured, measure
from vardrop.compress import NOISY, ORIGINAL, RUN, SMALL, error_and_nll
from vardrop.errors import StorageError
from vardrop.export import export_onnx
from vardrop.files import replace_file
from vardrop.io import load
from vardrop.predict import predict
from vardrop.zoo import Data, Split, build_net, load_data

BATCH = 1000
MEASURED = "measure.json"


def read_run(folder: Path) -> dict[str, Any]:
    """What a finished run in `folder` says of itself.

    Raises:
        StorageError: there is no finished run, or its record is damaged.
    """
    path = folder / RUN
    if not path.is_file():
        raise StorageError(f"{path} does not exist: {folder} must be the folder of a finished `vardrop compress`")
    try:
        run: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise StorageError(f"{path} is not readable JSON ({error})") from error
    return run


def load_small(folder: Path, data: Data) -> nn.Module:
    """The small net of the run in `folder`, in eval mode."""
    return _load(folder, SMALL, data)


def evaluate(folder: Path, *, data_root: Path | None, samples: int = 20) -> dict[str, dict[str, float]]:
    """Error and negative log-likelihood on the test data: small net, pruned net, and ensemble of `samples` draws."""
    data = _data(folder, data_root)
    noisy = _load(folder, NOISY, data)
    found = {"small net": load_small(folder, data), "pruned net": noisy}
    rows = {}
    for name, model in found.items():
        error, nll = error_and_nll(model, data.test)
        rows[name] = {"error": error, "nll": nll}
    rows[f"ensemble of {samples} draws"] = _ensemble(noisy, data.test, samples)
    return rows


def measure_run(
    folder: Path,
    *,
    data_root: Path | None = None,
    repeats: int = 200,
    onnx: bool = True,
    batch_sizes: Sequence[int] = (1, 128),
    threads: Sequence[int] = (1, 2),
) -> Measured:
    """Weighs and times the small net of the run in `folder` beside the original; written to ``measure.json`` there.

    Without any batch size the nets are weighed alone.
    A run that keeps no plain original is measured against the net built anew: sizes and times depend on shapes alone.
    """
    data = _data(folder, data_root)
    stored = (folder / ORIGINAL).is_dir()
    original = _load(folder, ORIGINAL, data) if stored else _build(folder, data).eval()
    found = measure(
        original,
        load_small(folder, data),
        example_inputs=data.test.x[:128],
        batch_sizes=batch_sizes,
        threads=threads,
        repeats=repeats,
        engines=("torch", "onnxruntime") if onnx else ("torch",),
    )
    text = json.dumps(found.record, indent=1, allow_nan=False)
    replace_file(folder / MEASURED, lambda path: path.write_text(text))
    return found


def export(folder: Path, path: Path, *, data_root: Path | None = None) -> None:
    """Writes the small net of the run in `folder` to the ONNX file `path`."""
    data = _data(folder, data_root)
    export_onnx(load_small(folder, data), path, example_inputs=data.test.x[:2])


def _ensemble(model: nn.Module, split: Split, samples: int) -> dict[str, float]:
    wrong, nll = 0.0, 0.0
    for x, y in zip(split.x.split(BATCH), split.y.split(BATCH), strict=True):
        probabilities = predict(model, x, samples=samples)
        wrong += float((probabilities.argmax(dim=1) != y).sum())
        nll += float(F.nll_loss(probabilities.clamp_min(torch.finfo(torch.float32).tiny).log(), y, reduction="sum"))
    return {"error": wrong / split.y.numel(), "nll": nll / split.y.numel()}


def _data(folder: Path, data_root: Path | None) -> Data:
    config = read_run(folder)["config"]
    return load_data(config["data"], data_root=data_root)


def _load(folder: Path, part: str, data: Data) -> nn.Module:
    return load(folder / part, lambda: _build(folder, data)).eval()


def _build(folder: Path, data: Data) -> nn.Module:
    return build_net(read_run(folder)["config"]["net"], input_shape=data.input_shape, num_classes=data.num_classes)

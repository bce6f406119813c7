"""A finished run taken up again: its figures anew, what its small net saves, its small net as ONNX."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vardrop import metrics, uncertainty
from vardrop.compare import Measured, measure
from vardrop.compress import NOISY, ORIGINAL, SMALL
from vardrop.errors import DataError, InvalidValueError
from vardrop.export import export_onnx
from vardrop.files import EVALUATION, read_run, replace_file
from vardrop.io import load
from vardrop.metrics import Judged
from vardrop.predict import draws
from vardrop.report import figures
from vardrop.zoo import Data, Split, build_net, load_data, load_inputs

BATCH = 200
MEASURED = "measure.json"
PICTURE = "evaluation.png"
MEASURES = {"entropy": "predictive_entropy", "mutual_information": "mutual_information"}
HISTOGRAM_BINS = 40
ONE_DRAW = "one draw"
Predictions = Callable[[Tensor], dict[str, Tensor]]
"""Gives the log probabilities ``(draws, N, classes, *)`` of a batch by each way to predict."""


def ensemble_of(samples: int) -> str:
    """What the ensemble of so many draws is called among the ways to predict."""
    return f"ensemble of {samples} draws"


ONE_PASS = (figures.SMALL, figures.PRUNED, ONE_DRAW, ensemble_of(1))
"""The ways to predict in which no two draws can disagree."""


def load_small(folder: str | Path, data: Data) -> nn.Module:
    """The small net of the run in `folder`, in eval mode.

    Raises:
        StorageError: there is none, or it is damaged.
    """
    return _load(folder, SMALL, data)


def load_noisy(folder: str | Path, data: Data) -> nn.Module:
    """The pruned net of the run in `folder` with its noise, in eval mode.

    Raises:
        StorageError: there is none, or it is damaged.
    """
    return _load(folder, NOISY, data)


def evaluate(
    folder: str | Path, *, data_root: str | Path | None = None, samples: int = 20, ood: str | None = None
) -> dict[str, Any]:
    """How well the run in `folder` predicts its test data, and how well it knows when it does not know.

    The ways to predict are the small net, the pruned net, one draw of the noise, and the ensemble of `samples` draws.
    Draws come from the run's own seed. What is returned is also written to ``evaluation.json`` in `folder` and drawn in
    ``evaluation.png`` there.

    Args:
        folder: written by ``vardrop compress``.
        data_root: folder with data sets in their Hub layout; ``None`` for the Hub.
        samples: draws in the ensemble, above 0.
        ood: data unlike that of the run, see :func:`vardrop.zoo.load_inputs`; its inputs should look uncertain.

    Returns:
        Under ``rows``, for each way: ``error`` (a fraction), ``nll`` (nats), ``brier``, ``ece`` (a fraction), and with
        `ood` ``auroc_entropy`` and ``auroc_mutual_information``, ``None`` where a single pass has no such measure.
        Beside them the reliability diagrams, and histograms of both measures on known and strange inputs.

    Raises:
        StorageError: there is no finished run in `folder`.
        InvalidValueError: `samples` is below 1.
        DataError: the data of the run, or `ood`, cannot be had or does not fit.
        MissingExtraError: an extra is not installed.
    """
    if samples < 1:
        raise InvalidValueError(f"samples={samples}: must be at least 1")
    metrics.need()
    figures.need()
    folder = Path(folder)
    data = _data(folder, data_root)
    strange = None if ood is None else load_inputs(ood, input_shape=data.input_shape, data_root=data_root)
    if strange is not None and strange.dtype != data.test.x.dtype:
        raise DataError(f"data {ood!r}: inputs of type {strange.dtype}, but the net takes {data.test.x.dtype}")
    generator = torch.Generator().manual_seed(read_run(folder)["seed"])
    small, noisy = load_small(folder, data), load_noisy(folder, data)

    def predictions(x: Tensor) -> dict[str, Tensor]:
        drawn = draws(noisy, x, samples=samples, generator=generator)
        with torch.no_grad():
            ways = {figures.SMALL: small(x.clone())[None], figures.PRUNED: noisy(x.clone())[None], ONE_DRAW: drawn[:1]}
        ways[ensemble_of(samples)] = drawn
        return {way: logits.double().log_softmax(dim=2) for way, logits in ways.items()}

    known = _judged(predictions, data.test)
    unknown = None if strange is None else _measured(predictions, strange)
    record = {"samples": samples, "ood": ood, **_figures(known, unknown)}
    text = json.dumps(record, indent=1, allow_nan=False)
    picture = figures.uncertainty(record)
    replace_file(folder / EVALUATION, lambda path: path.write_text(text))
    figures.keep(picture, folder / PICTURE)
    return record


def measure_run(
    folder: str | Path,
    *,
    data_root: str | Path | None = None,
    repeats: int = 200,
    onnx: bool = True,
    batch_sizes: Sequence[int] = (1, 128),
    threads: Sequence[int] = (1, 2),
) -> Measured:
    """Weighs and times the small net of the run in `folder` beside the original; written to ``measure.json`` there.

    Without any batch size the nets are weighed alone.
    A run that keeps no plain original is measured against the net built anew: sizes and times depend on shapes alone.

    Raises:
        StorageError: there is no finished run in `folder`.
        DataError: the data of the run cannot be had.
        MissingExtraError: an extra is not installed.
    """
    folder = Path(folder)
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


def export(folder: str | Path, path: str | Path, *, data_root: str | Path | None = None) -> None:
    """Writes the small net of the run in `folder` to the ONNX file `path`.

    Raises:
        StorageError: there is no finished run in `folder`.
        DataError: the data of the run cannot be had.
        MissingExtraError: an extra is not installed.
    """
    data = _data(folder, data_root)
    export_onnx(load_small(folder, data), path, example_inputs=data.test.x[:2])


def _judged(predictions: Predictions, split: Split) -> dict[str, Judged]:
    parts: dict[str, list[Judged]] = {}
    for x, y in zip(split.x.split(BATCH), split.y.split(BATCH), strict=True):
        for way, log_probabilities in predictions(x).items():
            parts.setdefault(way, []).append(metrics.judge(log_probabilities, y))
    return {way: Judged(*map(torch.cat, zip(*found, strict=True))) for way, found in parts.items()}


def _measured(predictions: Predictions, inputs: Tensor) -> dict[str, dict[str, Tensor]]:
    """Each measure of uncertainty on unlabelled `inputs`, by way of predicting."""
    parts: dict[str, dict[str, list[Tensor]]] = {}
    for x in inputs.split(BATCH):
        for way, log_probabilities in predictions(x).items():
            for name in MEASURES:
                measured = getattr(uncertainty, MEASURES[name])(log_probabilities).flatten()
                parts.setdefault(way, {}).setdefault(name, []).append(measured)
    return {way: {name: torch.cat(found) for name, found in measures.items()} for way, measures in parts.items()}


def _figures(known: dict[str, Judged], unknown: dict[str, dict[str, Tensor]] | None) -> dict[str, dict[str, Any]]:
    """Rows, reliability diagrams, and histograms of uncertainty."""
    rows: dict[str, dict[str, float | None]] = {}
    diagrams: dict[str, dict[str, list[float]]] = {}
    histograms: dict[str, dict[str, dict[str, list[float]]]] = {}
    for way, judged in known.items():
        right = judged.correct.double().mean()
        means = {name: float(getattr(judged, name).double().mean()) for name in ("nll", "brier")}
        ece = metrics.calibration_error(judged.confidence, judged.correct)
        rows[way] = {"error": float(1.0 - right), **means, "ece": ece}
        diagram = metrics.reliability(judged.confidence, judged.correct)
        diagrams[way] = {name: values.tolist() for name, values in diagram._asdict().items()}
        if unknown is None:
            continue
        histograms[way] = {}
        for name, outside in unknown[way].items():
            inside = getattr(judged, name)
            told = name == "entropy" or way not in ONE_PASS
            rows[way][f"auroc_{name}"] = metrics.ood_auroc(inside, outside) if told else None
            if told:
                histograms[way][name] = _histogram(inside, outside)
    return {"rows": rows, "reliability": diagrams, "histograms": histograms}


def _histogram(inside: Tensor, outside: Tensor) -> dict[str, list[float]]:
    largest = max(float(inside.max()), float(outside.max()), torch.finfo(torch.float32).tiny)
    edges = torch.linspace(0.0, largest, HISTOGRAM_BINS + 1, dtype=torch.float64)
    counts = {
        name: torch.histogram(values.double().cpu().clamp(0.0, largest), edges).hist.tolist()
        for name, values in (("inside", inside), ("outside", outside))
    }
    return {"edges": edges.tolist(), **counts}


def _data(folder: str | Path, data_root: str | Path | None) -> Data:
    config = read_run(folder)["config"]
    return load_data(config["data"], data_root=data_root)


def _load(folder: str | Path, part: str, data: Data) -> nn.Module:
    return load(Path(folder) / part, lambda: _build(folder, data)).eval()


def _build(folder: str | Path, data: Data) -> nn.Module:
    return build_net(read_run(folder)["config"]["net"], input_shape=data.input_shape, num_classes=data.num_classes)

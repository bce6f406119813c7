"""The whole road in about a minute, on data that comes with scikit-learn."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vardrop.compare import onnx_call
from vardrop.compress import ORIGINAL, Job, Listeners, check_folder, compress
from vardrop.evaluate import load_small
from vardrop.export import export_onnx
from vardrop.files import RUN, read_run, replace_file
from vardrop.io import load
from vardrop.measure import latencies
from vardrop.methods import SparseVD
from vardrop.report import figures, report
from vardrop.train import Schedule
from vardrop.zoo import build_net, load_data

NET = "lenet-300-100"
SCHEDULE = Schedule(epochs=60, batch_size=50, lr=2e-3, decay_from=30, warmup_start=0, warmup_epochs=40)
PRETRAIN_EPOCHS = 20


@dataclass(frozen=True)
class Shown:
    """What the demo shows: one row for each net, and where its pictures lie."""

    rows: dict[str, dict[str, Any]]
    largest_difference: float
    picture: Path
    page: Path


def demo(folder: str | Path, *, listeners: Listeners | None = None) -> Shown:
    """Trains a plain net on digits, sparsifies it, makes it small, exports it, and compares the two.

    Writes the run, both nets as ONNX, a report and a picture into `folder`. A finished demo in `folder` is not
    trained again, only measured.
    """
    job = Job(net=NET, data="digits", method=SparseVD(train_clip=True), schedule=SCHEDULE, pretrain=PRETRAIN_EPOCHS)
    folder = Path(folder)
    check_folder(folder, job)
    run = read_run(folder) if (folder / RUN).exists() else compress(job, folder, listeners=listeners)
    data = load_data(job.data)

    def build() -> torch.nn.Module:
        return build_net(NET, input_shape=data.input_shape, num_classes=data.num_classes)

    nets = {"original": load(folder / ORIGINAL, build).eval(), "small": load_small(folder, data)}
    example = data.test.x[:1]
    files = {name: folder / f"{name}.onnx" for name in nets}
    for name, net in nets.items():
        export_onnx(net, files[name], example_inputs=example)
    in_torch = latencies(nets, example)
    in_onnx = latencies({name: onnx_call(path, example) for name, path in files.items()})
    rows = {}
    for name, stage in (("original", run["original"]), ("small", run["compacted"])):
        rows[name] = {
            **{key: stage[key] for key in ("error", "nonzero", "parameters", "bytes")},
            "onnx_bytes": files[name].stat().st_size,
            "seconds": in_torch[name],
            "onnx_seconds": in_onnx[name],
        }
    replace_file(folder / "demo.json", lambda path: path.write_text(json.dumps(rows, indent=1)))
    return Shown(rows, run["compacted"]["largest_difference"], picture=_draw(folder, rows), page=report(folder))


def _draw(folder: Path, rows: dict[str, dict[str, Any]]) -> Path:
    """Bars of the original against the small net, each scaled to the original."""
    figures.need()
    import matplotlib.figure

    keys = {
        "nonzero": "non-zero parameters",
        "parameters": "parameters",
        "bytes": "bytes on disk",
        "onnx_bytes": "bytes as ONNX",
        "seconds": "latency, torch",
        "onnx_seconds": "latency, onnxruntime",
    }
    figure = matplotlib.figure.Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for offset, name, colour in ((0.2, "original", "#b8bcc6"), (-0.2, "small", "#2563a8")):
        shares = [rows[name][key] / rows["original"][key] for key in keys]
        places = [len(keys) - 1 - index + offset for index in range(len(keys))]
        axes.barh(
            places,
            shares,
            height=0.36,
            color=colour,
            label=f"{name}: {100 * rows[name]['error']:.1f} % error",
        )
        for place, key, share in zip(places, keys, shares, strict=True):
            axes.text(share + 0.01, place, _text(key, rows[name][key]), va="center", fontsize=8)
    axes.set_yticks(range(len(keys)), list(reversed(keys.values())))
    axes.set_xlim(0, 1.2)
    axes.set_xlabel("share of the original")
    figure.legend(frameon=False, loc="outside upper center", ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    path = folder / "demo.png"
    replace_file(path, lambda aside: figure.savefig(aside, format="png", dpi=130))
    return path


def _text(key: str, value: float) -> str:
    return f"{1e6 * value:.0f} us" if "seconds" in key else f"{value:,.0f}"

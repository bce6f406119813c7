"""The figures of a report, each a matplotlib figure that can be read on a light and on a dark ground."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vardrop.errors import MissingExtraError
from vardrop.files import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#7a828e"
COLOURS = ("#3b82c4", "#e0803a", "#4aa564", "#b05fb0", "#c2504f", "#8a7a5c")
UNITS_SHOWN = 40
SMALL, PRUNED = "small net", "pruned net"
"""The ways to predict without noise, as an evaluation calls them."""


def keep(figure: Figure, path: Path) -> None:
    """Writes `figure` to `path`, in the format of its suffix; an SVG of the same data is always the same."""
    import matplotlib

    kind = path.suffix.removeprefix(".")
    metadata = {"Date": None} if kind == "svg" else None
    with matplotlib.rc_context({"svg.hashsalt": path.name, "svg.fonttype": "none"}):
        replace_file(path, lambda aside: figure.savefig(aside, format=kind, dpi=140, metadata=metadata))


def training_curves(history: list[dict[str, Any]]) -> Figure:
    """Error, negative log-likelihood, KL and its weight, over the epochs."""
    figure, axes = _panels(2, 2, (9.0, 5.0))
    epochs = [entry["epoch"] + 1 for entry in history]
    for key, label in (
        ("train_error", "training, noisy"),
        ("valid_error", "validation"),
        ("test_error", "test"),
    ):
        percent = [100 * entry[key] for entry in history if entry.get(key) is not None]
        if len(percent) == len(epochs):
            axes[0].plot(epochs, percent, label=label)
    axes[0].set_yscale("log")
    axes[0].legend(frameon=False, labelcolor=INK, fontsize=8)
    _title(axes[0], "error, %")
    for axis, key, title in zip(
        axes[1:],
        ("train_nll", "kl", "beta"),
        ("NLL, nats an example", "KL, nats in all", "weight of the KL"),
        strict=True,
    ):
        axis.plot(epochs, [entry[key] for entry in history])
        _title(axis, title)
    if any(entry["kl"] > 0 for entry in history):
        axes[2].set_yscale("log")
    for axis in axes[2:]:
        axis.set_xlabel("epoch")
    return figure


def alive_weights(history: list[dict[str, Any]], totals: dict[str, int]) -> Figure:
    """Live weights of each layer, and living units of each gate, over the epochs, as a share of all."""
    figure, (axis,) = _panels(1, 1, (9.0, 3.2))
    epochs = [entry["epoch"] + 1 for entry in history]
    for name, total in totals.items():
        alive = [100 * entry["alive"].get(name, total) / total for entry in history]
        what = "units" if name.endswith("gate") else "weights"
        axis.plot(epochs, alive, label=f"{name}, {total:,} {what}")
    axis.set_yscale("log")
    axis.set_xlabel("epoch")
    axis.legend(frameon=False, labelcolor=INK, fontsize=8)
    _title(axis, "alive, %")
    return figure


def log_alpha_histograms(histograms: dict[str, Any], threshold: float | None) -> Figure:
    """How log alpha is spread in each layer, with the threshold of the rule where it is one on log alpha."""
    columns = min(2, len(histograms))
    rows = math.ceil(len(histograms) / columns)
    figure, axes = _panels(rows, columns, (4.5 * columns, 2.3 * rows))
    for axis, (name, found) in zip(axes, histograms.items(), strict=False):
        axis.stairs(found["log_alpha"]["counts"], found["log_alpha"]["edges"], fill=True)
        axis.set_yscale("log")
        if threshold is not None:
            axis.axvline(threshold, color=COLOURS[4], linewidth=1)
        _title(axis, f"log alpha in layer {name}")
    for axis in axes[len(histograms) :]:
        axis.set_visible(False)
    return figure


def trade_off(points: list[tuple[float, float]], front: list[tuple[float, float]], size: str) -> Figure:
    """Error (a fraction) against size, ``"compression"`` or ``"flops"``, of all trials, and the front among them."""
    figure, (axis,) = _panels(1, 1, (6.0, 4.0))
    axis.scatter([x for x, _ in points], [100 * y for _, y in points], s=14, alpha=0.5, label="trials")
    ordered = sorted(front)
    axis.plot([x for x, _ in ordered], [100 * y for _, y in ordered], marker="o", color=COLOURS[1], label="front")
    axis.set_xscale("log")
    axis.set_xlabel({"compression": "compression, all weights over living ones", "flops": "FLOPs of one example"}[size])
    axis.legend(frameon=False, labelcolor=INK, fontsize=8)
    _title(axis, "validation error, %")
    return figure


def uncertainty(record: dict[str, Any]) -> Figure:
    """Reliability diagrams of an evaluation, and its uncertainty on known and strange inputs where it has them."""
    ways = [way for way in record["rows"] if way != SMALL]
    rows = 2 if record["histograms"] else 1
    figure, axes = _panels(rows, len(ways), (3.4 * len(ways), 2.9 * rows))
    for axis, way in zip(axes, ways, strict=False):
        _reliability(axis, record["reliability"][way])
        axis.set_xlabel(f"confidence, {way}", fontsize=8)
        _title(axis, f"calibration error {100 * record['rows'][way]['ece']:.2f} %")
    if rows == 2:
        _histograms(axes[len(ways) :], record, "")
    return figure


def ood(records: dict[str, dict[str, Any]]) -> Figure:
    """Uncertainty on known and strange inputs: a row for each evaluation, by its name."""
    figure, axes = _panels(len(records), 3, (10.2, 2.6 * len(records)))
    for row, (name, record) in enumerate(records.items()):
        _histograms(axes[3 * row : 3 * row + 3], record, f"{name}: ")
    return figure


def _histograms(axes: list[Axes], record: dict[str, Any], prefix: str) -> None:
    """Shares of known and of strange inputs by entropy of the quiet pass, and both measures of the ensemble."""
    drawn = [(way, name) for way in (PRUNED, *list(record["rows"])[-1:]) for name in record["histograms"][way]]
    for axis in axes[len(drawn) :]:  # a single draw has no mutual information
        axis.set_visible(False)
    for axis, (way, name) in zip(axes, drawn, strict=False):
        found = record["histograms"][way][name]
        for kind, label in (("inside", "test data"), ("outside", "strange inputs")):
            shares = [100 * count / sum(found[kind]) for count in found[kind]]
            axis.stairs(shares, found["edges"], fill=True, alpha=0.55, label=label)
        axis.set_yscale("log")
        axis.set_xlabel(f"{name.replace('_', ' ')}, nats, {way}", fontsize=8)
        axis.set_ylabel("share of inputs, %", color=INK, fontsize=8)
        axis.legend(frameon=False, labelcolor=INK, fontsize=8)
        _title(axis, f"{prefix}AUROC {record['rows'][way][f'auroc_{name}']:.3f}")


def _reliability(axis: Axes, found: dict[str, list[float]]) -> None:
    """Accuracy over confidence; a dot's area tells how many predictions it stands for."""
    kept = [row for row in zip(*found.values(), strict=True) if row[0]]
    most = max(count for count, _, _ in kept)
    axis.plot([0, 1], [0, 1], color=INK, linewidth=1)
    axis.plot([mean for _, mean, _ in kept], [hits for _, _, hits in kept], linewidth=1)
    sizes = [8 + 80 * count / most for count, _, _ in kept]
    axis.scatter([mean for _, mean, _ in kept], [hits for _, _, hits in kept], s=sizes, color=COLOURS[0])
    axis.set_ylabel("accuracy", color=INK, fontsize=8)


def first_layer(weight: Tensor, input_shape: list[int]) -> Figure:
    """What the first layer still looks at: a map of the inputs and its strongest units, or its kernels."""
    images, summed = _as_images(weight, input_shape)
    strength = images.abs().flatten(1).sum(dim=1)
    best = strength.argsort(descending=True)[:UNITS_SHOWN]
    best = best[strength[best] > 0]
    columns = 10
    rows = max(1, math.ceil(len(best) / columns))
    offset = 0 if summed is None else 3
    figure, axes = _panels(rows, columns + offset, (9.0 + 0.6 * offset, 0.85 * rows + 0.3))
    for axis in axes:
        axis.axis("off")
    for index, unit in enumerate(best.tolist()):
        axis = axes[(index // columns) * (columns + offset) + offset + index % columns]
        bound = float(images[unit].abs().max())
        axis.imshow(images[unit].numpy(), cmap="RdBu_r", vmin=-bound, vmax=bound)
    if summed is not None:
        wide = figure.add_axes((0.01, 0.05, 0.19, 0.85))
        wide.imshow(summed.numpy(), cmap="magma")
        wide.axis("off")
        _title(wide, "live weights per input")
    return figure


def _as_images(weight: Tensor, input_shape: list[int]) -> tuple[Tensor, Tensor | None]:
    """One picture for each unit, and for a dense layer the count of live weights at each input."""
    if weight.dim() == 4:
        return weight.sum(dim=1), None
    if len(input_shape) == 3 and weight.shape[1] == math.prod(input_shape):
        pictures = weight.view(-1, *input_shape)
        return pictures.sum(dim=1), (pictures != 0).sum(dim=(0, 1)).float()
    return weight.flatten(1)[:, None, :], None


def need() -> None:
    """Raises unless figures can be drawn."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("drawing a figure", "report") from error


def _panels(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    need()
    from cycler import cycler
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    figure.patch.set_alpha(0.0)
    grid = figure.subplots(rows, columns, squeeze=False)
    axes: list[Axes] = list(grid.flat)
    for axis in axes:
        axis.patch.set_alpha(0.0)
        axis.set_prop_cycle(cycler(color=COLOURS))
        axis.tick_params(colors=INK, labelsize=8, which="both")
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(INK)
        axis.xaxis.label.set_color(INK)
    return figure, axes


def _title(axis: Axes, text: str) -> None:
    axis.set_title(text, color=INK, fontsize=9, loc="left")

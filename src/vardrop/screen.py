"""What the command line shows: progress, and figures as tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from vardrop.checkpoint import Epoch
from vardrop.compress import Listeners


def progress_of(console: Console) -> Progress:
    """One bar for each stage of a job."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=12),
        TextColumn("epoch {task.completed:.0f}/{task.total:.0f}", table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
        console=console,
    )


def listeners_of(progress: Progress) -> Listeners:
    """Shows stages and epochs: error, NLL, KL and compression."""
    tasks: list[TaskID] = []

    def on_stage(name: str, epochs: int) -> None:
        tasks.append(progress.add_task(name, total=epochs, figures=""))

    def on_epoch(epoch: Epoch) -> None:
        error, kind = (epoch.train_error, "train") if epoch.valid_error is None else (epoch.valid_error, "valid")
        figures = (
            f"{kind} error {100 * error:.2f} %, NLL {epoch.train_nll:.4f}, KL {epoch.kl:,.0f} nats, "
            f"{epoch.compression:.1f}x" + (f", units {epoch.units}" if epoch.units else "")
        )
        progress.update(tasks[-1], completed=epoch.epoch + 1, figures=figures)

    return Listeners(on_epoch=on_epoch, on_stage=on_stage)


def result_table(result: dict[str, Any]) -> Table:
    """The figures of a run, a column for each stage."""
    stages = {name: row for name in ("original", "trained", "pruned", "compacted") if (row := result[name]) is not None}
    table = Table(Column("", no_wrap=True), *(Column(name, no_wrap=True) for name in stages))

    def add(label: str, text: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(label, *map(text, stages.values()))

    add("test error %", lambda row: f"{100 * row['error']:.2f}")
    add("NLL, nats", lambda row: f"{row['nll']:.4f}")
    add("living weights", lambda row: count(row["nonzero"] if "total" in row else None))
    add("compression", lambda row: f"{row['compression']:.1f}x" if "compression" in row else "")
    add("parameters", lambda row: count(row.get("parameters")))
    add("non-zero ones", lambda row: count(row["nonzero"] if "parameters" in row else None))
    add("bytes on disk", lambda row: count(row.get("bytes")))
    return table


def evaluation_table(rows: dict[str, dict[str, float | None]]) -> Table:
    """The figures of each way to predict side by side, those that were measured."""
    shown = {
        "error": ("test error %", 100, 2),
        "nll": ("NLL, nats", 1, 4),
        "brier": ("Brier score", 1, 4),
        "ece": ("calibration error %", 100, 2),
        "auroc_entropy": ("AUROC by entropy", 1, 4),
        "auroc_mutual_information": ("AUROC by mutual information", 1, 4),
    }
    table = Table("prediction", *rows)
    for key, (label, factor, digits) in shown.items():
        values = [row.get(key) for row in rows.values()]
        if any(value is not None for value in values):
            table.add_row(label, *("" if value is None else f"{factor * value:.{digits}f}" for value in values))
    return table


def demo_table(rows: dict[str, dict[str, Any]]) -> Table:
    """The original beside the small net."""
    table = Table("", *rows, "ratio")
    table.add_row("test error %", *(f"{100 * row['error']:.2f}" for row in rows.values()), "")
    kinds = {
        "nonzero": "non-zero parameters",
        "parameters": "parameters",
        "bytes": "bytes on disk",
        "onnx_bytes": "bytes as ONNX",
        "seconds": "latency in torch, microseconds",
        "onnx_seconds": "latency in onnxruntime, microseconds",
    }
    for key, label in kinds.items():
        values = [row[key] * (1e6 if "seconds" in key else 1) for row in rows.values()]
        table.add_row(label, *(f"{value:,.0f}" for value in values), f"{values[0] / values[-1]:.1f}x")
    return table


def short(value: Any) -> str:
    """A setting as text."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def count(value: int | None) -> str:
    """A number with its thousands apart; nothing for none."""
    return "" if value is None else f"{value:,}"

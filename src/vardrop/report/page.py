"""The page: what is in a run's folder, as one HTML file without any outside resource."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from vardrop.files import EVALUATION, FIRST_LAYER, HISTOGRAMS, read_run, replace_file
from vardrop.methods.base import WeightMethod
from vardrop.report import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --soft: #667; --line: #8883; --ground: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ec; --soft: #9aa; --ground: #16191f; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2rem; }
p.sub, footer, p.missing { color: var(--soft); } img { max-width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; }
footer { margin-top: 3rem; font-size: .85rem; overflow-wrap: anywhere; }
"""

STAGES = (
    ("original", "original, plain"),
    ("trained", "trained"),
    ("pruned", "pruned"),
    ("compacted", "compacted"),
)
COLUMNS = (
    ("nonzero", "total", "living weights", "{:,}"),
    ("compression", "compression", "compression", "{:.1f}x"),
    ("parameters", "parameters", "parameters", "{:,}"),
    ("nonzero", "parameters", "non-zero ones", "{:,}"),
    ("bytes", "bytes", "bytes on disk", "{:,}"),
)
"""A figure of a stage, the one that must stand beside it for it to mean what the label says, the label, and a form."""


def report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Writes a self-contained page about the run in `folder` and returns where it lies.

    Figures, training curves, live weights of each layer over time, histograms of log alpha, and pictures of the first
    layer's surviving weights; what the run did not record is said to be missing.

    Args:
        folder: written by ``vardrop compress``.
        out: the page; ``report.html`` in `folder` by default.

    Raises:
        StorageError: `folder` holds no finished run.
        MissingExtraError: the extra ``report`` is not installed.
    """
    folder = Path(folder)
    page = _page(folder, read_run(folder))
    target = folder / "report.html" if out is None else Path(out)
    replace_file(target, lambda aside: aside.write_text(page, encoding="utf-8"))
    return target


def _page(folder: Path, run: dict[str, Any]) -> str:
    config, history = run["config"], run["history"]
    title = f"{config['net']} on {config['data']}, {config['method']['name']}"
    histograms = _json(folder / HISTOGRAMS)
    threshold = _threshold(config["method"])
    evaluation = _json(folder / EVALUATION)
    sections = [
        ("Figures on the test data", _figures_table(run)),
        ("Training", _picture(figures.training_curves(history)) if history else None),
        (
            "Alive over time",
            _picture(figures.alive_weights(history, run["layers"])) if history else None,
        ),
        (
            "Log alpha at the end",
            _picture(figures.log_alpha_histograms(histograms, threshold)) if histograms else None,
        ),
        ("Uncertainty, by `vardrop evaluate`", _picture(figures.uncertainty(evaluation)) if evaluation else None),
        ("First noisy layer: surviving weights", _first_layer(folder / FIRST_LAYER)),
        ("Configuration", _config_table(config)),
    ]
    body = "".join(
        f"<h2>{heading}</h2>{content or '<p class=missing>not recorded</p>'}" for heading, content in sections
    )
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version)
    footer = f"seed {run['seed']}, {run['seconds']:,.0f} seconds of training, commit {run['commit']}, {versions}"
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1><p class=sub>{_headline(run)}</p>{body}"
        f"<footer>{html.escape(footer)}</footer></html>"
    )


def _headline(run: dict[str, Any]) -> str:
    pruned, small = run["pruned"], run["compacted"]
    return (
        f"{100 * pruned['error']:.2f} % error with {pruned['nonzero']:,} of {pruned['total']:,} weights "
        f"({pruned['compression']:.1f}x); as a plain network {small['parameters']:,} parameters, same outputs to "
        f"{small['largest_difference']:.1e}"
    )


def _figures_table(run: dict[str, Any]) -> str:
    head = ["net", "error %", "NLL, nats", *(label for _, _, label, _ in COLUMNS)]
    rows = []
    for key, label in STAGES:
        stage = run.get(key)
        if stage is not None:
            cells = [label, f"{100 * stage['error']:.2f}", f"{stage['nll']:.4f}"]
            cells += [form.format(stage[name]) if beside in stage else "" for name, beside, _, form in COLUMNS]
            rows.append(cells)
    return _table(head, rows)


def _config_table(config: dict[str, Any]) -> str:
    rows = []
    for key, value in config.items():
        shown = ", ".join(f"{name} {part}" for name, part in value.items()) if isinstance(value, dict) else str(value)
        rows.append([key, shown])
    return _table(["option", "value"], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(head, "th") + "".join(line(row, "td") for row in rows) + "</table>"


def _first_layer(path: Path) -> str | None:
    try:
        with safe_open(path, framework="pt") as stored:
            weight, shape = stored.get_tensor("weight"), json.loads(stored.metadata()["input_shape"])
    except (OSError, SafetensorError, KeyError, TypeError):
        return None
    return _picture(figures.first_layer(weight.float(), shape), kind="png")


def _picture(figure: Figure, kind: str = "svg") -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=140)
    mime = {"svg": "image/svg+xml", "png": "image/png"}[kind]
    return f'<img alt="" src="data:{mime};base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _threshold(method: dict[str, Any]) -> float | None:
    """The bar on log alpha, where the method's rule is one on log alpha."""
    if method.get("rule") != "log_alpha":
        return None
    own = method.get("threshold")
    return WeightMethod.default_thresholds["log_alpha"] if own is None else float(own)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None

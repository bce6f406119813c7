"""How much faster and smaller finished runs are: python results/latency.py RUN... [--data-root ROOT]

Weighs and times the small net of each run beside the original on this machine, stores the figures in
results/latency.json, and makes docs/latency.md of them. With --write instead of runs, the page is made anew of what is
stored.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import pages
import torch

from vardrop.evaluate import measure_run
from vardrop.files import read_run, replace_file

HERE = Path(__file__).parent
STORED = HERE / "latency.json"
PAGE = HERE.parent / "docs" / "latency.md"
TIMES = "seconds, "


def store(runs: list[Path], *, data_root: Path | None, repeats: int) -> None:
    """Measures the `runs` one after the other and writes their figures to ``latency.json``."""
    found = []
    for folder in runs:
        run = read_run(folder)
        figures = {"units": run["pruned"]["units"], "small_units": run["compacted"].get("units", [])}
        original = None if run["original"] is None else run["original"]["error"]
        errors = {"original": original, "small": run["compacted"]["error"]}
        measured = measure_run(folder, data_root=data_root, repeats=repeats).record
        found.append({**pages.identity(folder, run), **figures, "error": errors, "measured": measured})
    machine = {"torch": torch.__version__, "processor": platform.machine(), "repeats": repeats}
    pages.keep(STORED, {**machine, "runs": found})


def table(stored: dict[str, Any]) -> str:
    """A row for each run: what is left of it, and original over small for FLOPs and each way of timing."""
    times = [name for name in stored["runs"][0]["measured"] if name.startswith(TIMES)]
    labels = ["run", "test error, %", "units", "FLOPs", *(name.removeprefix(TIMES) for name in times)]
    lines = [f"| {' | '.join(labels)} |", "|" + "---|" * len(labels)]
    for run in stored["runs"]:
        measured = run["measured"]
        error = f"{100 * run['error']['small']:.2f}"
        if run["error"]["original"] is not None:
            error = f"{100 * run['error']['original']:.2f} to {error}"
        units = run["units"] or "-".join(map(str, run["small_units"]))
        ratios = [f"{measured[name]['ratio']:.2f}x" for name in ("flops", *times)]
        lines.append(f"| {run['run']} | {error} | {units} | {' | '.join(ratios)} |")
    return "\n".join(lines) + "\n"


def page(stored: dict[str, Any]) -> str:
    """The whole of docs/latency.md."""
    return (
        "# How much faster the small nets are\n\n"
        "Made by `python results/latency.py --write` from `results/latency.json`; `python results/latency.py RUN...` "
        "measures finished runs anew.\n\n"
        "Each figure is original over small, both timed in the same run: median of "
        f"{stored['repeats']} calls, batch size and threads as named, plain torch {stored['torch']} in eager mode and "
        f"onnxruntime, on one {stored['processor']} machine. FLOPs are twice the multiplications of one example. Units "
        "are those that a gate left, or else, where the runs kept them, those of the small net. The nets are those of "
        "earlier runs than the ones of the same names in [tables.md](tables.md).\n\n"
        f"{table(stored)}\n## The runs\n\n" + "\n".join(map(pages.line, stored["runs"])) + "\n"
    )


def main(arguments: list[str] | None = None) -> None:
    known = pages.parser(__doc__)
    known.add_argument("--repeats", type=int, default=200)
    given = pages.parse(known, arguments)
    if given.runs:
        store(given.runs, data_root=given.data_root, repeats=given.repeats)
    stored = json.loads(STORED.read_text())
    replace_file(PAGE, lambda path: path.write_text(page(stored)))
    print(table(stored))


if __name__ == "__main__":
    pages.run(main)

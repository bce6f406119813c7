"""How well finished runs know when they do not know: python results/ood.py RUN... --ood DATA [--data-root ROOT]

Evaluates each run on its test data and against strange inputs, stores the figures in results/ood.json, and makes of
them docs/uncertainty.md and docs/ood.svg. With --write instead of runs, the page and the picture are made anew of what
is stored.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pages
import torch

from vardrop.evaluate import evaluate
from vardrop.files import read_run, replace_file
from vardrop.report import figures

HERE = Path(__file__).parent
STORED = HERE / "ood.json"
DOCS = HERE.parent / "docs"
PAGE = "uncertainty.md"
PICTURE = "ood.svg"
WAYS = {"pruned net": "deterministic", "one draw": "stochastic, one draw"}
COLUMNS = {
    "error": ("error", "{:.2f} %", 100),
    "nll": ("NLL, nats", "{:.4f}", 1),
    "brier": ("Brier score", "{:.4f}", 1),
    "ece": ("calibration error", "{:.2f} %", 100),
    "auroc_entropy": ("AUROC by entropy", "{:.4f}", 1),
    "auroc_mutual_information": ("AUROC by mutual information", "{:.4f}", 1),
}


def store(runs: list[Path], *, ood: str, data_root: Path | None, samples: int) -> None:
    """Evaluates the `runs` and writes their figures to ``ood.json``."""
    found = []
    for folder in runs:
        run = read_run(folder)
        evaluation = evaluate(folder, data_root=data_root, samples=samples, ood=ood)
        evaluation["ood"] = Path(ood).name
        found.append({**pages.identity(folder, run), "evaluation": evaluation})
    pages.keep(STORED, {"torch": torch.__version__, "runs": found})


def table(stored: dict[str, Any]) -> str:
    """Three rows for each run: deterministic, one draw, and ensemble."""
    lines = [
        f"| run | prediction | {' | '.join(label for label, _, _ in COLUMNS.values())} |",
        "|" + "---|" * (2 + len(COLUMNS)),
    ]
    for run in stored["runs"]:
        for way, row in run["evaluation"]["rows"].items():
            if way != "small net":
                cells = (
                    "" if row[key] is None else f.format(factor * row[key]) for key, (_, f, factor) in COLUMNS.items()
                )
                lines.append(f"| {run['run']} | {WAYS.get(way, way)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def page(stored: dict[str, Any]) -> str:
    """The whole of docs/uncertainty.md."""
    runs = [
        f"{pages.line(run)}; OOD inputs are the test split of `{run['evaluation']['ood']}`" for run in stored["runs"]
    ]
    return (
        "# Does the net know when it does not know?\n\n"
        "Made by `python results/ood.py --write` from `results/ood.json`; `python results/ood.py RUN... --ood DATA` "
        "evaluates finished runs anew.\n\n"
        "Error, negative log-likelihood, Brier score and expected calibration error (15 bins, arXiv:1706.04599) are "
        "those of the test data. AUROC is the chance that an input unlike them (OOD) looks less certain than one of "
        "them (arXiv:1610.02136), by the entropy of the prediction or by the mutual information of label and weights, "
        "which only an ensemble has. Deterministic is one pass with the noise at its mean; nothing was tuned on these "
        "figures. The runs differ in net and schedule too, so that rows of different runs do not rank "
        f"the methods. Torch {stored['torch']}.\n\n"
        f"{table(stored)}\n![Uncertainty on the test data and on OOD inputs]({PICTURE})\n\n## The runs\n\n"
        + "\n".join(runs)
        + "\n"
    )


def write() -> None:
    """Page and picture of what is stored."""
    stored = json.loads(STORED.read_text())
    text, picture = page(stored), figures.ood({run["run"]: run["evaluation"] for run in stored["runs"]})
    replace_file(DOCS / PAGE, lambda path: path.write_text(text))
    figures.keep(picture, DOCS / PICTURE)


def main(arguments: list[str] | None = None) -> None:
    known = pages.parser(__doc__)
    known.add_argument("--ood", help="strange inputs, as for `vardrop evaluate`")
    known.add_argument("--samples", type=int, default=20)
    given = pages.parse(known, arguments)
    if bool(given.runs) != bool(given.ood):
        known.error("give either runs and --ood, or --write alone")
    if given.runs:
        store(given.runs, ood=given.ood, data_root=given.data_root, samples=given.samples)
    write()
    print(table(json.loads(STORED.read_text())))


if __name__ == "__main__":
    pages.run(main)

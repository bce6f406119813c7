"""Makes docs/performance.md of the stored benchmark: python benchmarks/render.py [--check]"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
STORED = HERE / "results" / "cpu.json"
NOTES = HERE / "notes.md"
TUNED = "plain, channels last, fused Adam"
PAGE = HERE.parent / "docs" / "performance.md"
GOALS = {
    "Linear 784-300, batch 100": (2.5, 2.0),
    "Linear 1024-1024, batch 512": (1.8, 1.5),
    "Linear 4096-4096, batch 512": (1.8, 1.5),
    "Conv2d 64-64 3x3 on 32x32, batch 64": (2.0, 1.6),
    "LeNet-5-Caffe step, batch 100, Adam": (1.8, 1.5),
    "VGG-like step, batch 100, Adam": (1.8, 1.5),
    "LeNet-5-Caffe step with gates, batch 100, Adam": (1.25, 1.0),
    "LSTM 1000-1000 step, sequence 100, batch 64, Adam": (1.5, 1.2),
}


def page() -> str:
    """The whole page."""
    found = json.loads(STORED.read_text())
    parts = [
        "# Performance\n\nMade by `python benchmarks/render.py` from `benchmarks/results/cpu.json`; "
        "`make bench` measures anew.\n",
        _machine(found["machine"]),
        "## A step against plain PyTorch\n\nForward, KL and backward of one layer in the middle of a net, and whole "
        "training steps, as ratios to the first row of each table, which is plain PyTorch in the same "
        "run. Contenders take turns; the median counts, with the quartiles in brackets. vardrop's own training "
        "loop has fused Adam and, for "
        "convolutions, the channels-last layout: where a plain net with both is in the table, a second ratio is to "
        "it.\n",
        *(_steps(name, rows) for name, rows in found["steps"].items()),
        "## Growth\n\nRatio of the fast path (SparseVD) to plain PyTorch.\n",
        _growth("square layer of so many units, batch 256", found["growth"]["units"]),
        _growth("batch, 1024-1024 layer", found["growth"]["batch"]),
        _memory(found["memory"]),
        "## Where the time goes\n",
        *(_operations(name, rows) for name, rows in found["operations"].items()),
        _floor(found),
        NOTES.read_text(),
    ]
    return "\n".join(parts)


def _machine(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    bfloat16 = "with" if machine["bfloat16_instructions"] else "without"
    return (
        f"Machine: {machine['processor']}, {machine['threads']} threads, {bfloat16} bfloat16 instructions; "
        f"{machine['system']}, Python {machine['python']}, {versions}.\n"
    )


def _steps(name: str, rows: dict[str, dict[str, float]]) -> str:
    plain, tuned = rows["plain"]["median"], rows.get(TUNED, {}).get("median")
    heads = ["", "ms", "ratio", *(["to the tuned plain one"] if tuned else []), "first step, s"]
    lines = [_goal(name, rows), f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for contender, row in rows.items():
        cells = [contender, f"{1e3 * row['median']:.2f} ({1e3 * row['low']:.2f} to {1e3 * row['high']:.2f})"]
        cells += [f"{row['median'] / base:.2f}x" for base in (plain, tuned) if base]
        lines.append(f"| {' | '.join([*cells, format(row['first'], '.2f')])} |")
    return "\n".join(lines) + "\n"


def _goal(name: str, rows: dict[str, dict[str, float]]) -> str:
    """What a step of ours is to cost at most, and which do."""
    must, aim = GOALS[name]
    ours = [row for row in rows if row.startswith("vardrop ") and not row.endswith(("reference", "not compiled"))]
    kept = {row: rows[row]["median"] <= must * rows["plain"]["median"] for row in ours}
    told = ", ".join(f"{row.split()[1].rstrip(',')} {'met' if kept[row] else 'missed'}" for row in ours)
    return f"### {name}\n\nGoal: at most {must}x; wished for: {aim}x. {told}.\n"


def _growth(label: str, rows: dict[str, dict[str, dict[str, float]]]) -> str:
    fast = "vardrop SparseVD, fast"
    lines = [f"| {label} | plain, ms | fast, ms | ratio |", "|---|---|---|---|"]
    for size, row in rows.items():
        plain, ours = 1e3 * row["plain"]["median"], 1e3 * row[fast]["median"]
        lines.append(f"| {size} | {plain:.2f} | {ours:.2f} | {ours / plain:.2f}x |")
    return "\n".join(lines) + "\n"


def _memory(memory: dict[str, Any]) -> str:
    """The log std and its gradient are two weights' worth; what is beyond them is scratch."""
    weight, peaks = memory["weight_bytes"], memory["peak_bytes"]
    lines = [
        "## Memory\n\nPeak of a step of Linear 4096-4096, batch 512, in units of the weight's bytes. The log std and "
        "its gradient are 2.0 of what is beyond plain; the rest is scratch. Goal: at most 1.0; wished for: 0.5.\n",
        "| | peak, parameters included | beyond plain | scratch |",
        "|---|---|---|---|",
    ]
    for name, peak in peaks.items():
        beyond = (peak - peaks["plain"]) / weight
        scratch = "" if name == "plain" else f"{beyond - 2:.2f}"
        lines.append(f"| {name} | {peak / weight:.2f} | {beyond:.2f} | {scratch} |")
    return "\n".join(lines) + "\n"


def _operations(name: str, rows: list[dict[str, Any]]) -> str:
    lines = [f"### {name}, SparseVD on the fast path\n", "| operation | ms a step | calls a step |", "|---|---|---|"]
    for row in rows:
        calls = f"{row['calls']:g}" if row["calls"] else ""
        title = "a compiled pass" if "CompiledFxGraph" in row["name"] else f"`{row['name']}`"
        lines.append(f"| {title} | {row['milliseconds']:.2f} | {calls} |")
    return "\n".join(lines) + "\n"


def _floor(found: dict[str, Any]) -> str:
    """What a step must do at least: the matmuls of the mean, those of the variance, and one pass over the weights."""
    lines = [
        "## The floor\n\nA Bayesian step of a dense layer needs the three matmuls of a plain one and three more for "
        "the variance. It must read the mean and log std (8 bytes a weight) in the forward pass, and read them again "
        "with two gradients (4 and 2 bytes) and write two (8 bytes) in the backward: 30 bytes a weight, and 6 more for "
        "the narrow variance, written once and read twice, since a matmul library takes whole matrices: 36 in all.\n",
        "| layer | plain matmuls, GFLOP | bytes over weights, MB | measured beyond plain, ms |",
        "|---|---|---|---|",
    ]
    for name, rows in found["steps"].items():
        if name.startswith("Linear"):
            sizes, batch = name.removeprefix("Linear ").split(", batch ")
            inputs, outputs = map(int, sizes.split("-"))
            beyond = 1e3 * (rows["vardrop SparseVD, fast"]["median"] - rows["plain"]["median"])
            flops, moved = 6e-9 * inputs * outputs * int(batch), 36e-6 * inputs * outputs
            lines.append(f"| {name} | {flops:.2f} | {moved:.1f} | {beyond:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(0 if PAGE.read_text() == page() else f"{PAGE} is not what render.py makes")
    PAGE.write_text(page())

"""Where nets keep what they know: python results/information_flow.py RUN... [--data-root ROOT] [--samples 20]

One layer at a time loses its means, or has its standard deviations permuted, and the net is evaluated without any
further training, in one deterministic pass and by an ensemble (arXiv:1803.03764). Stores the figures in
results/information_flow.json and makes docs/variance_networks.md of them. With --write instead of runs, the page is
made anew of what is stored.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pages
import torch
from torch import Tensor, nn

import vardrop as vd
from vardrop.evaluate import load_noisy
from vardrop.files import read_run, replace_file
from vardrop.zoo import load_data

HERE = Path(__file__).parent
STORED = HERE / "information_flow.json"
PAGE = HERE.parent / "docs" / "variance_networks.md"
TOY = "variance_toy.svg"
BATCH = 200
PARTS = {"means": "means set to zero", "spreads": "standard deviations permuted"}


def ablated(net: nn.Module, *, seed: int) -> dict[tuple[str, str], nn.Module]:
    """`net` as it is, and with one part of one layer gone, by layer and what was done."""
    nets = {("", "intact"): net}
    for site in vd.sites(net):
        if site.counts == "weights":
            for part, label in PARTS.items():
                generator = torch.Generator().manual_seed(seed)
                nets[site.name, label] = vd.ablate(net, site.name, part, generator=generator)
    return nets


def information_flow(
    nets: dict[tuple[str, str], nn.Module], x: Tensor, y: Tensor, *, samples: int, seed: int
) -> list[dict[str, str | float]]:
    """Accuracy (a fraction) of each of the `nets`."""
    return [
        {"layer": layer, "change": change, **_accuracies(changed.eval(), x, y, samples, seed)}
        for (layer, change), changed in nets.items()
    ]


@torch.no_grad()
def _accuracies(net: nn.Module, x: Tensor, y: Tensor, samples: int, seed: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    quiet = torch.cat([net(part) for part in x.split(BATCH)])
    ensemble = torch.cat([vd.predict(net, part, samples=samples, generator=generator) for part in x.split(BATCH)])
    right = {"deterministic": quiet, "ensemble": ensemble}
    return {name: float((found.argmax(dim=1) == y).double().mean()) for name, found in right.items()}


def table(stored: dict[str, Any]) -> str:
    """One row for each change of each run."""
    lines = [
        f"| run | layer | change | deterministic accuracy | ensemble of {stored['samples']} |",
        "|---|---|---|---|---|",
    ]
    for run in stored["runs"]:
        for row in run["rows"]:
            accuracies = (f"{100 * row[key]:.2f} %" for key in ("deterministic", "ensemble"))
            lines.append(f"| {run['run']} | {row['layer']} | {row['change']} | {' | '.join(accuracies)} |")
    return "\n".join(lines) + "\n"


def page(stored: dict[str, Any]) -> str:
    """The whole of docs/variance_networks.md."""
    runs = "\n".join(map(pages.line, stored["runs"]))
    return (
        "# What a net without means knows\n\n"
        "A variance network has weights of mean zero: all that it has learned lies in how much they vary. One "
        "deterministic pass then tells nothing, and an ensemble over draws tells everything (arXiv:1803.03764). The "
        "tables `variance-classification` and `variance-parameterisations` are in [tables.md](tables.md).\n\n"
        "## Where it is kept\n\nTest accuracy after one layer has lost its means, or has its standard deviations "
        "permuted, without any further training. Made by `python results/information_flow.py --write` from "
        "`results/information_flow.json`; `python results/information_flow.py RUN...` evaluates finished runs anew. "
        f"Layer 9 of `lenet-5-bn` is its first dense one, of `lenet-5` its last. Torch {stored['torch']}.\n\n"
        f"{table(stored)}\n{runs}\n\n## Two units and four classes\n\n"
        "Samples of the two units of a zero-mean layer for points of four classes, from several starts: all that a "
        "unit can say is how far from zero it falls. Drawn by "
        "`python results/variance_toy.py docs/variance_toy.svg`.\n\n"
        f"![Activations of two units without a mean]({TOY})\n"
    )


def main(arguments: list[str] | None = None) -> None:
    known = pages.parser(__doc__)
    known.add_argument("--samples", type=int, default=20)
    given = pages.parse(known, arguments)
    if given.runs:
        found, ready = [], []
        for folder in given.runs:
            run = read_run(folder)
            data = load_data(run["config"]["data"], data_root=given.data_root)
            ready.append((folder, run, data, ablated(load_noisy(folder, data), seed=run["seed"])))
        for folder, run, data, nets in ready:
            rows = information_flow(nets, *data.test, samples=given.samples, seed=run["seed"])
            found.append({**pages.identity(folder, run), "rows": rows})
        pages.keep(STORED, {"torch": torch.__version__, "samples": given.samples, "runs": found})
    stored = json.loads(STORED.read_text())
    replace_file(PAGE, lambda path: path.write_text(page(stored)))
    print(table(stored))


if __name__ == "__main__":
    pages.run(main)

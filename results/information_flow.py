"""Where the net of a run keeps what it knows: python results/information_flow.py RUN [--data-root ROOT] [--samples 20]

One layer at a time loses its means, or the places of its standard deviations, and the net is evaluated without any
further training, in one deterministic pass and by an ensemble (arXiv:1803.03764). Prints a table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor, nn

import vardrop as vd
from vardrop.evaluate import load_noisy
from vardrop.zoo import load_data

BATCH = 200
PARTS = {"means": "means set to zero", "spreads": "standard deviations permuted"}


def information_flow(net: nn.Module, x: Tensor, y: Tensor, *, samples: int, seed: int) -> list[dict[str, str | float]]:
    """Accuracy (a fraction) of `net` as it is, and with one part of one layer gone."""
    nets = {("", "intact"): net}
    for site in vd.sites(net):
        if site.counts == "weights":
            for part, label in PARTS.items():
                generator = torch.Generator().manual_seed(seed)
                nets[site.name, label] = vd.ablate(net, site.name, part, generator=generator)
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


def table(rows: list[dict[str, str | float]], samples: int) -> str:
    """One row for each change."""
    lines = [f"| layer | change | deterministic accuracy | ensemble of {samples} |", "|---|---|---|---|"]
    for row in rows:
        accuracies = (f"{100 * float(row[key]):.2f} %" for key in ("deterministic", "ensemble"))
        lines.append(f"| {row['layer']} | {row['change']} | {' | '.join(accuracies)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--samples", type=int, default=20)
    given = parser.parse_args(arguments)
    run = json.loads((given.run / "run.json").read_text())
    data = load_data(run["config"]["data"], data_root=given.data_root)
    rows = information_flow(load_noisy(given.run, data), *data.test, samples=given.samples, seed=run["seed"])
    print(table(rows, given.samples))


if __name__ == "__main__":
    main()

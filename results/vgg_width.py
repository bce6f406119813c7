"""Error and sparsity of the VGG-like net over its width: python results/vgg_width.py

Draws docs/vgg_width.svg from the short runs of the table bb-1-cifar10 and from the stored runs
results/vgg-like-*.json, for each method of the same schedule, each with its own factor k on the
widths (arXiv:1701.05369, section 5). A method is shown that was run at two of them or more. Those of k = 0.0625 were
made by

vardrop compress vgg-like-0.0625 --data uoft-cs/cifar10 --epochs 20 --method bernoulli-dropout --set rate=0
    --decay-from 10 --weight-decay 0.0001 --out runs/vgg-like-0.0625-none
vardrop compress vgg-like-0.0625 --data uoft-cs/cifar10 --epochs 20 --method sparse-vd
    --pretrained runs/vgg-like-0.0625-none/small --decay-from 0 --warmup-start 2 --warmup-epochs 10
    --out runs/vgg-like-0.0625-sparse-vd
"""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from vardrop.report.figures import keep

HERE = Path(__file__).parent
PICTURE = HERE.parent / "docs" / "vgg_width.svg"
FAMILY = "vgg-like-"


def stored(folder: Path = HERE) -> dict[str, list[tuple[float, dict[str, Any]]]]:
    """The runs by method, each with its k, in the order of k."""
    found: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for path in (*folder.glob(f"{FAMILY}*.json"), *folder.glob("tables/bb-1-cifar10/*/short-seed-0.json")):
        run = json.loads(path.read_text())
        width = float(run["config"]["net"].removeprefix(FAMILY))
        method = run["config"]["method"]
        name = "no dropout" if method.get("rate") == 0.0 else method["name"]
        found.setdefault(name, []).append((width, run))
    return {name: sorted(runs, key=lambda run: run[0]) for name, runs in sorted(found.items()) if len(runs) > 1}


def draw(runs: dict[str, list[tuple[float, dict[str, Any]]]]) -> Figure:
    """Test error on the left; on the right the share of dead weights, of methods that have any."""
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    error, dead = figure.subplots(1, 2)
    for index, (method, found) in enumerate(runs.items()):
        name = f"{method}, after no dropout" if any(run["config"].get("pretrained") for _, run in found) else method
        widths = [width for width, _ in found]
        error.plot(widths, [100 * run["pruned"]["error"] for _, run in found], "o-", c=f"C{index}", label=name)
        shares = [100 * (1 - run["pruned"]["nonzero"] / run["pruned"]["total"]) for _, run in found]
        if any(shares):
            dead.plot(widths, shares, "o-", c=f"C{index}", label=name)
    widths = sorted({width for found in runs.values() for width, _ in found})
    for axis, label in ((error, "test error, %"), (dead, "dead weights, %")):
        axis.set_xticks(widths)
        axis.set_xlabel("k, factor on all widths")
        axis.set_ylabel(label)
    error.legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    found = stored()
    if not found:
        raise SystemExit(
            f"{HERE} holds no method at two widths: copy run.json of finished runs there, as {FAMILY}K-METHOD.json"
        )
    keep(draw(found), PICTURE)

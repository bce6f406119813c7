"""Which units an input-dependent net opens for which class, and how alike the classes are to its layers.

python results/dependent_gates.py RUN OUT.svg [--data-root FOLDER]

RUN is the folder of a finished `vardrop compress --method dependent-beta-bernoulli`. Above: class averages of the
openings of its gates, a row a class, a column a unit that is not dead. Below: correlations of these averages
between classes (arXiv:1805.10896, figures 2 and 4).
"""

import argparse
from pathlib import Path

import pages
import torch
from matplotlib.figure import Figure

from vardrop.evaluate import load_small
from vardrop.files import read_run
from vardrop.noise.dependent import InputGate
from vardrop.report.figures import keep
from vardrop.zoo import Data, load_data

BATCH = 1000


def class_averages(net: torch.nn.Module, data: Data) -> dict[str, torch.Tensor]:
    """Mean opening of each unit over the test inputs of each class, ``(classes, units)``, by the name of its gate."""
    gates = {name: module for name, module in net.named_modules() if isinstance(module, InputGate)}
    if not gates:
        raise SystemExit("the small net has no input-dependent gate: RUN must be of dependent-beta-bernoulli")
    openings: dict[str, list[torch.Tensor]] = {name: [] for name in gates}

    def look(name: str):
        def hook(gate: InputGate, inputs: tuple[torch.Tensor]) -> None:
            openings[name].append(gate.opening(inputs[0]).flatten(1))

        return hook

    hooks = [gate.register_forward_pre_hook(look(name)) for name, gate in gates.items()]
    with torch.no_grad():
        for x in data.test.x.split(BATCH):
            net(x)
    for hook in hooks:
        hook.remove()
    of_class = [data.test.y == label for label in range(data.num_classes)]
    return {
        name: torch.stack([torch.cat(parts)[chosen].mean(dim=0) for chosen in of_class])
        for name, parts in openings.items()
    }


def draw(averages: dict[str, torch.Tensor]) -> Figure:
    """The averages of each layer above, the correlation between classes below."""
    figure = Figure(figsize=(2.9 * len(averages), 5.2), layout="constrained")
    for column, (name, average) in enumerate(averages.items(), start=1):
        above = figure.add_subplot(2, len(averages), column)
        order = average.std(dim=0).argsort(descending=True)
        above.imshow(average[:, order].numpy(), aspect="auto", vmin=0.0, vmax=1.0, cmap="viridis")
        above.set_title(f"{name}: {average.shape[1]} units", fontsize=9)
        above.set_yticks(range(len(average)))
        below = figure.add_subplot(2, len(averages), len(averages) + column)
        seen = below.imshow(torch.corrcoef(average).numpy(), vmin=-1.0, vmax=1.0, cmap="RdBu_r")
        below.set_xticks(range(len(average)))
        below.set_yticks(range(len(average)))
    figure.colorbar(seen, ax=below, shrink=0.8)
    return figure


def main() -> None:
    """Draws the gates of the run that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=pages.picture)
    parser.add_argument("--data-root", type=Path)
    given = parser.parse_args()
    data = load_data(read_run(given.run)["config"]["data"], data_root=given.data_root)
    keep(draw(class_averages(load_small(given.run, data), data)), given.out)


if __name__ == "__main__":
    pages.run(main)

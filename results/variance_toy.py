"""What two units without a mean can say of four classes: samples of their activations, from several starts.

python results/variance_toy.py OUT.svg

Four clouds of points in the plane, told apart by a layer of two units whose weights have mean zero and a plain net on
top of it. All that a unit can say is how far from zero it falls: two units may say the same, or different things
(arXiv:1803.03764, figure 1).
"""

import argparse

import pages
import torch
from matplotlib.figure import Figure

import vardrop as vd
from vardrop.report.figures import keep

CENTRES = torch.tensor([[1.0, 0.2], [0.2, 1.0], [3.0, 2.5], [0.1, 0.1]])
STARTS = range(4)
POINTS, STEPS, SHOWN = 400, 3000, 150


def clouds(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points ``(N, 2)`` and their classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(POINTS) % len(CENTRES)
    return CENTRES[labels] + 0.05 * torch.randn(POINTS, 2, generator=generator), labels


def train(seed: int) -> torch.nn.Module:
    """A net whose first layer has zero-mean weights."""
    torch.manual_seed(seed)
    head = [torch.nn.Linear(2, 64), torch.nn.ReLU(), torch.nn.Linear(64, len(CENTRES))]
    net = vd.convert(torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), *head), vd.VarianceNetwork(), include=["0"])
    x, y = clouds(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net


def draw() -> Figure:
    """Samples of the two units for each class, one panel a start."""
    figure = Figure(figsize=(3.2 * len(STARTS), 3.4), layout="constrained")
    for place, seed in enumerate(STARTS, start=1):
        net = train(seed)
        x, y = clouds(seed + len(STARTS))
        accuracy = float((vd.predict(net, x, samples=100).argmax(dim=1) == y).float().mean())
        vd.noise(net, on=True)
        with torch.no_grad():
            activations = net[0](x)
        axis = figure.add_subplot(1, len(STARTS), place)
        for label in range(len(CENTRES)):
            axis.scatter(*activations[y == label][:SHOWN].T.numpy(), s=5, alpha=0.6, label=f"class {label}")
        axis.set_title(f"start {seed}: {100 * accuracy:.0f} % by an ensemble", fontsize=9)
        axis.set_xscale("symlog", linthresh=0.1)
        axis.set_yscale("symlog", linthresh=0.1)
    figure.legend(
        *axis.get_legend_handles_labels(), loc="outside lower center", ncols=len(CENTRES), frameon=False, fontsize=8
    )
    return figure


def main() -> None:
    """Draws the picture whose path is the argument."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pages.picture)
    given = parser.parse_args()
    keep(draw(), given.out)


if __name__ == "__main__":
    pages.run(main)

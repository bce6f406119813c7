"""Error against FLOPs of every method on MNIST, ours and the paper's: python results/trade_off.py

Draws docs/trade_off.svg from the stored runs of the tables bb-2-fc and bb-2-conv (arXiv:1805.10896, figure 2).
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from render import found
from vardrop.report.figures import keep
from vardrop.tables import load_tables
from vardrop.tables.figures import FIGURES

TABLES = ("bb-2-fc", "bb-2-conv")
PICTURE = Path(__file__).parent.parent / "docs" / "trade_off.svg"
MARKERS = {"full": "o", "short": "^"}


def draw() -> Figure:
    """One panel for each net; the paper's points are hollow."""
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    stored, tables = found(), load_tables()
    for place, name in enumerate(TABLES, start=1):
        axis = figure.add_subplot(1, len(TABLES), place)
        for index, row in enumerate(tables[name].rows.values()):
            colour = f"C{index}"
            axis.plot(100.0 / row.paper["bb_speedup"], row.paper["error"], "s", mfc="none", c=colour, label=row.name)
            for budget, marker in MARKERS.items():
                for record in stored.of(row.runs[""], budget).values():
                    speedup, error = (FIGURES[key].read(record) for key in ("bb_speedup", "error"))
                    if speedup is not None:
                        axis.plot(100.0 / speedup, error, marker, c=colour)
        axis.set_xscale("log")
        axis.set_xlabel("FLOPs left, %, as the authors count")
        axis.set_title(tables[name].title, fontsize=9, loc="left")
    figure.axes[0].set_ylabel("test error, %")
    axis.legend(frameon=False, fontsize=8, title="squares: the paper\ncircles: ours, triangles: ours, short")
    return figure


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    keep(draw(), PICTURE)

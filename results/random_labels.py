"""What is learned by heart: training error and living weights over the epochs: python results/random_labels.py

Draws docs/random_labels.svg from the stored runs of the tables on random labels (arXiv:1701.05369): the
paper's Bernoulli dropout memorises labels that mean nothing, sparse variational dropout throws its weights away.
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from render import found
from vardrop.report.figures import keep
from vardrop.tables import Table, load_tables
from vardrop.tables.store import Found

TABLES = ("svd-random-labels-mnist", "svd-random-labels-cifar10")
PICTURE = Path(__file__).parent.parent / "docs" / "random_labels.svg"


def draw(tables: list[Table], stored: Found) -> Figure:
    """A row of panels for each table, from its first seed; of its budgets that with the longest history stored."""
    figure = Figure(figsize=(9.0, 3.4 * len(tables)), layout="constrained")
    panels = figure.subplots(len(tables), 2, squeeze=False)
    for table, (error, alive) in zip(tables, panels, strict=True):
        for index, row in enumerate(table.rows.values()):
            run = row.runs[""]
            histories = {budget: min(stored.of(run, budget).items())[1]["history"] for budget in stored.budgets([run])}
            budget = max(histories, key=lambda name: len(histories[name]), default="")
            history = histories.get(budget, [])
            if len(history) > 1:
                epochs = [epoch["epoch"] + 1 for epoch in history]
                errors = [100.0 * epoch["train_error"] for epoch in history]
                error.plot(epochs, errors, c=f"C{index}", label=f"{row.name}, {budget}")
                alive.plot(epochs, [100.0 / epoch["compression"] for epoch in history], c=f"C{index}")
        error.set_title(table.title, fontsize=9, loc="left")
        error.set_ylabel("training error under noise, %")
        error.set_ylim(0.0, 100.0)
        alive.set_ylabel("weights alive, %")
        alive.set_yscale("log")
        error.legend(frameon=False, fontsize=8)
    for axis in panels[-1]:
        axis.set_xlabel("epoch")
    return figure


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    stored, tables = found(), load_tables()
    shown = [tables[name] for name in TABLES if stored.budgets(list(tables[name].runs()))]
    if not shown:
        raise SystemExit(f"no run of {' or '.join(TABLES)} is stored: run vardrop reproduce first")
    keep(draw(shown, stored), PICTURE)

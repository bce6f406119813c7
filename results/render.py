"""Prints the table of the stored runs beside the papers' figures: python results/render.py [--write]

With --write it also puts the table into results/README.md and between the marks in README.md, and all tables of the
papers, with the runs stored here and in results/tables/, into docs/tables.md.
"""

import json
import sys
from pathlib import Path

from vardrop.tables import Found, find_run, load_tables, stored_in
from vardrop.tables.figures import FIGURES, join
from vardrop.tables.page import contents, legend, markdown

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
PICTURES = {
    "trade_off.svg": "Error against FLOPs on MNIST, of the tables `bb-2-fc` and `bb-2-conv` (arXiv:1805.10896, figure "
    "2): `python results/trade_off.py`.",
    "dependent_gates.svg": "Dependent beta-Bernoulli dropout on LeNet-500-300: how far each layer's gates open for "
    "each class, and how alike the classes are to them (arXiv:1805.10896, figures 2 and 4): "
    "`python results/dependent_gates.py tables/bb-2-fc/dbb/full-seed-0 docs/dependent_gates.svg`, after `vardrop "
    "reproduce bb-2-fc --row DBB`.",
    "random_labels.svg": "What is learned by heart from labels that mean nothing (arXiv:1701.05369): the paper's "
    "dropout memorises them all, of which that on MNIST shows the beginning; sparse variational dropout throws its "
    "weights away: `python results/random_labels.py`.",
    "emptying.png": "LeNet-5-Caffe as it empties under sparse variational dropout: the filters of its first layer and "
    "a corner of its dense one ([as an animation](emptying.gif)): `python results/emptying.py runs/emptying`.",
    "vgg_width.svg": "Error and sparsity of the VGG-like net at the widths that were run, a single seed; 20 epochs "
    "without noise, and as many again of the method, which starts from that net: `python results/vgg_width.py`.",
}
SHOWN = ("error", "compression")
BEGIN, END = "<!-- results: begin -->\n", "<!-- results: end -->"


def seeds(place: dict[str, str], stored: Found) -> str:
    """The same row of a table at the full budget, where it ran with several seeds."""
    records = stored.of(find_run(place["id"], place["row"]), "full")
    joined = {name: join([FIGURES[name].read(record) for record in records.values()], "mean") for name in SHOWN}
    if len(records) < 2:
        return ""
    error, compression = (joined[name] for name in SHOWN)
    return f"; {len(records)} seeds by the fast path: {error.value:.2f} ± {error.std:.2f} %, {compression.value:.0f}x"


def table() -> str:
    """One row for each stored run named in rows.json."""
    stored = found()
    lines = [
        "| run | paper: error, compression | error here | compression | the small plain net | compacted |",
        "|---|---|---|---|---|---|",
    ]
    for row in json.loads((HERE / "rows.json").read_text()):
        path = HERE / f"{row['run']}.json"
        if not path.exists():
            continue
        run = json.loads(path.read_text())
        pruned, small = run["pruned"], run["compacted"]
        largest = small["largest_difference"]
        same = f"outputs differ by at most {largest:.0e}" if largest else "the same outputs to the bit"
        several = seeds(row["table"], stored) if "table" in row else ""
        paper = "{error:.2f} %, {compression}x ({source})".format(**row["paper"]) if "paper" in row else ""
        lines.append(
            f"| {row['title']} | {paper} "
            f"| {100 * pruned['error']:.2f} %{several} | {pruned['compression']:.1f}x "
            f"| {small['parameters']:,} parameters, {small['bytes']:,} bytes "
            f"| {100 * small['error']:.2f} %, {same} |"
        )
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole of results/README.md."""
    commands = [
        f"- `{row['run']}.json`\n  ```\n  {row['command']}\n  ```"
        for row in json.loads((HERE / "rows.json").read_text())
        if (HERE / f"{row['run']}.json").exists()
    ]
    return (
        "# Stored runs\n\nOne JSON for each run, as `vardrop compress` writes it: configuration, seed, versions, "
        "commit, history by epoch (of large records in `tables/` the last one only), figures after pruning and "
        "after compaction. Add `--data-root FOLDER` for a local copy of the data. `tables/` holds the cells of "
        "[the papers' tables](../docs/tables.md), each made again by `vardrop reproduce`; some started from an "
        "original that was trained anew, not from the one stored beside them, as the error of their `original` "
        "tells. This page is made by `python results/render.py --write`.\n\n"
        f"{table()}\n## The commands\n\n" + "\n".join(commands) + "\n"
    )


def found() -> Found:
    """The stored runs by the rows of the tables that they belong to."""
    stored = stored_in(HERE, [run for table in load_tables().values() for run in table.runs()])
    if stored.refused:
        raise SystemExit("\n".join(stored.refused))
    for row in json.loads((HERE / "rows.json").read_text()):
        path = HERE / f"{row['run']}.json"
        if path.exists() and "table" in row:
            run, place = json.loads(path.read_text()), row["table"]
            stored.add(find_run(place["id"], place["row"]).place, place["budget"], run["seed"], run)
    return stored


def tables_page() -> str:
    """The whole of docs/tables.md."""
    stored = found()
    tables = list(load_tables().values())
    return (
        "# The tables of the papers, made again\n\nThe 25 result tables of the seven papers behind this library, with "
        "the papers' figures and those of the stored runs (`results/`). `vardrop reproduce TABLE` makes a table again; "
        "`--budget full` follows the paper's schedule where no caption or remark says otherwise, `short` a fraction of "
        "it, for some tables on a narrower net; runs of other lengths name theirs. "
        f"This page is made by `python results/render.py --write`.\n\n{legend()}\n"
        + contents(tables, stored)
        + "\n"
        + "\n".join(markdown(table, stored) for table in tables)
        + "\n## Figures\n"
        + "".join(f"\n{text}\n\n![{name}]({name})\n" for name, text in PICTURES.items() if (DOCS / name).exists())
    )


def readme_with(table: str) -> str:
    """README.md with `table` between its marks."""
    text = (HERE.parent / "README.md").read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table + END + after


if __name__ == "__main__":
    print(table())
    if "--write" in sys.argv:
        (HERE / "README.md").write_text(page())
        (HERE.parent / "README.md").write_text(readme_with(table()))
        (DOCS / "tables.md").write_text(tables_page())

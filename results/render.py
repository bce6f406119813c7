"""Prints the table of the stored runs beside the papers' figures: python results/render.py [--write]

With --write it also puts the table into results/README.md and between the marks in README.md.
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
BEGIN, END = "<!-- results: begin -->\n", "<!-- results: end -->"


def table() -> str:
    """One row for each stored run named in rows.json."""
    lines = [
        "| MNIST run | paper: error, compression | error here | compression | the small plain net | compacted |",
        "|---|---|---|---|---|---|",
    ]
    for row in json.loads((HERE / "rows.json").read_text()):
        path = HERE / f"{row['run']}.json"
        if not path.exists():
            continue
        run, paper = json.loads(path.read_text()), row["paper"]
        pruned, small = run["pruned"], run["compacted"]
        lines.append(
            f"| {row['title']} | {paper['error']:.2f} %, {paper['compression']}x ({paper['source']}) "
            f"| {100 * pruned['error']:.2f} % | {pruned['compression']:.1f}x "
            f"| {small['parameters']:,} parameters, {small['bytes']:,} bytes "
            f"| {100 * small['error']:.2f} %, outputs differ by at most {small['largest_difference']:.0e} |"
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
        "commit, history by epoch, figures after pruning and after compaction. Add `--data-root FOLDER` for a local "
        "copy of the data. This page is made by `python results/render.py --write`.\n\n"
        f"{table()}\n## The commands\n\n" + "\n".join(commands) + "\n"
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

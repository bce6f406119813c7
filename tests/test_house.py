"""Holds the drawing of the house: who may import whom, how big a room may be, what an import loads."""

import ast
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vardrop as vd

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "vardrop"
FILES = sorted(SOURCE.rglob("*.py"))

# From the street to the cellar: a room may import from rooms further down, and from itself, never upwards.
FLOORS = [
    {"__main__"},
    {"cli"},
    {"screen", "demo", "tables"},
    {"evaluate", "sweep"},
    {"compress"},
    {"together"},
    {"train", "zoo", "report"},
    {"fast", "compare"},
    {"ablate", "elbo", "predict", "metrics", "measure", "io", "export", "cite"},
    {"uncertainty", "checkpoint"},
    {"surgery"},
    {"sites"},
    {"baselines"},
    {"methods", "layers"},
    {"noise"},
    {"fused"},
    {"lrt"},
    {"functional"},
    {"warmup", "files", "memory", "modes", "refusals", "settings", "streams"},
    {"errors"},
]
FLOOR = {room: depth for depth, rooms in enumerate(FLOORS) for room in rooms}
HEAVY = (
    "accelerate",
    "onnx",
    "onnxruntime",
    "matplotlib",
    "datasets",
    "sklearn",
    "typer",
    "rich",
    "PIL",
    "tensorboard",
    "optuna",
    "torchmetrics",
    "torch._dynamo",
    "sympy",
)


METHODS = vd.methods() | vd.baselines()


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vardrop":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("vardrop.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_run_one_way(path):
    room = room_of(path)
    if room == "__init__":
        return
    for other in imported_rooms(path) - {room}:
        assert FLOOR[room] < FLOOR[other], f"{path.name} ({room}) imports from {other}"


def test_methods_and_layers_do_not_know_each_other():
    for path in FILES:
        if room_of(path) in ("methods", "layers"):
            assert not imported_rooms(path) & ({"methods", "layers"} - {room_of(path)}), path


def test_every_room_has_its_floor():
    assert {room_of(path) for path in FILES} - {"__init__"} == set(FLOOR)


def test_no_file_is_over_500_lines():
    long = {str(path): count for path in FILES if (count := len(path.read_text().splitlines())) > 500}
    assert not long


def test_importing_loads_nothing_heavy():
    code = f"import sys, vardrop; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_method_file_is_exported_and_public():
    defined = set()
    for path in (path for room in ("methods", "baselines") for path in (SOURCE / room).glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and any(
                isinstance(item, ast.AnnAssign) and ast.unparse(item.target) == "paper" and item.value
                for item in node.body
            ):
                defined.add(node.name)
    assert defined == {cls.__name__ for cls in METHODS.values()}
    assert all(getattr(vd, name).__name__ == name for name in defined)


PUBLIC = {
    name: value
    for name, value in vars(vd).items()
    if not name.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value))
}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_docstring_with_an_example(name):
    text = inspect.getdoc(PUBLIC[name]) or ""
    assert ">>>" in text or name == "Method", f"{name} shows no example"


@pytest.mark.parametrize("cls", METHODS.values(), ids=METHODS)
def test_every_method_names_its_source(cls):
    assert re.search(r"Source: arXiv:\d{4}\.\d{4,5}", cls.__doc__)
    assert "\n\n    Raises:\n        InvalidValueError: " in cls.__doc__
    assert re.fullmatch(r"\d{4}\.\d{4,5}", cls.paper.arxiv)


def test_every_functional_name_has_its_source_and_an_example():
    for name, value in vars(vd.functional).items():
        if inspect.isfunction(value) and not name.startswith("_"):
            text = inspect.getdoc(value) or ""
            assert "arXiv:" in text and ">>>" in text, name


def test_nothing_loads_a_pickle():
    for path in FILES:
        text = path.read_text()
        assert "import pickle" not in text, path
        for call in re.findall(r"torch\.load\(.*", text):
            assert "weights_only=True" in call, f"{path}: {call}"


def test_readme_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert blocks
    names: dict = {}
    for block in blocks:
        exec(block, names)


def test_the_readme_shows_what_the_stored_runs_say():
    sys.path.insert(0, str(ROOT / "results"))
    import render

    assert (ROOT / "results" / "README.md").read_text() == render.page()
    assert (ROOT / "README.md").read_text() == render.readme_with(render.table())
    assert (ROOT / "docs" / "tables.md").read_text() == render.tables_page()
    for row in json.loads((ROOT / "results" / "rows.json").read_text()):
        path = ROOT / "results" / f"{row['run']}.json"
        if path.exists():
            run = json.loads(path.read_text())
            assert run["pruned"]["error"] == run["compacted"]["error"], row["run"]
            assert len(run["history"]) == run["config"]["schedule"]["epochs"], row["run"]


def test_the_page_on_performance_shows_what_the_stored_benchmark_says():
    made = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "render.py"), "--check"], capture_output=True)
    assert made.returncode == 0, made.stderr


def test_the_page_of_names_shows_what_the_docstrings_say():
    sys.path.insert(0, str(ROOT / "docs"))
    import api

    assert api.PAGE.read_text() == api.page(), "python docs/api.py makes it anew"


def test_the_page_on_uncertainty_shows_what_the_stored_evaluations_say():
    sys.path.insert(0, str(ROOT / "results"))
    import ood

    written = [path.exists() for path in (ood.STORED, ood.DOCS / ood.PAGE, ood.DOCS / ood.PICTURE)]
    assert all(written) or not any(written)
    if all(written):
        assert (ood.DOCS / ood.PAGE).read_text() == ood.page(json.loads(ood.STORED.read_text()))

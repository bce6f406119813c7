"""What every test and doctest starts from."""

import importlib.util
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import vardrop as vd

signal.signal(signal.SIGINT, signal.default_int_handler)  # tests of Ctrl-C also run in the background of a script


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict) -> None:
    doctest_namespace["vd"] = vd
    doctest_namespace["torch"] = torch


@pytest.fixture
def load_script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Gives a script of the folder results by its name."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "results")

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "results" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        return script

    return load

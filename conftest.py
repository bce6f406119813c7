"""What every test and doctest starts from."""

import pytest
import torch

import vardrop as vd


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict) -> None:
    doctest_namespace["vd"] = vd
    doctest_namespace["torch"] = torch

"""Recipes on data that only the Hub has: a short way through each on made data of the same layout."""

from dataclasses import replace
from pathlib import Path

import numpy
import pytest

from vardrop.compress import compress
from vardrop.tables import Cell, find_run
from vardrop.zoo import load_data

datasets = pytest.importorskip("datasets")
SVHN_CARD = """---
configs:
- config_name: cropped_digits
  data_files:
  - split: train
    path: cropped_digits/train-*
  - split: test
    path: cropped_digits/test-*
- config_name: full_numbers
  data_files:
  - split: train
    path: full_numbers/train-*
---
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def images(folder: Path, column: str, label: str, classes: int, **more: list[int]) -> None:
    from PIL import Image

    generator = numpy.random.default_rng(0)
    folder.mkdir(parents=True)
    for part in ("train", "test"):
        pixels = [Image.fromarray(generator.integers(256, size=(32, 32, 3), dtype=numpy.uint8)) for _ in range(12)]
        labels = [*range(6), *range(classes - 6, classes)]
        table = datasets.Dataset.from_dict({column: pixels, label: labels, **more})
        table.cast_column(column, datasets.Image()).to_parquet(folder / f"{part}-00000-of-00001.parquet")


def make_cifar100(root: Path) -> None:
    images(root / "uoft-cs" / "cifar100" / "cifar100", "img", "fine_label", 100, coarse_label=[0] * 12)


def make_svhn(root: Path) -> None:
    home = root / "ufldl-stanford" / "svhn"
    images(home / "cropped_digits", "image", "label", 10)
    images(home / "full_numbers", "image", "digits", 10)
    (home / "README.md").write_text(SVHN_CARD)


def make_imdb(root: Path) -> None:
    home = root / "stanfordnlp" / "imdb" / "plain_text"
    home.mkdir(parents=True)
    for part, label in (("train", [0, 1] * 4), ("test", [0, 1] * 4), ("unsupervised", [-1] * 8)):
        table = datasets.Dataset.from_dict({"text": ["a bad film", "a good <br /> film"] * 4, "label": label})
        table.to_parquet(home / f"{part}-00000-of-00001.parquet")


@pytest.mark.parametrize(
    ("make", "name", "shape", "classes"),
    [
        (make_cifar100, "cifar100", (3, 32, 32), 100),
        (make_svhn, "svhn", (3, 32, 32), 10),
        (make_imdb, "imdb", (5,), 2),
    ],
)
def test_the_layout_of_the_hub_is_read(tmp_path, make, name, shape, classes):
    make(tmp_path)
    data = load_data(name, data_root=tmp_path)
    assert data.input_shape == shape
    assert data.num_classes == classes and len(data.train.y) == len(data.test.y)


@pytest.mark.parametrize(
    ("make", "table", "row"),
    [
        (make_cifar100, "bb-1-cifar100", "Original"),
        (make_svhn, "vbd-3-svhn", "VBD"),
        (make_imdb, "rnn-sentiment", "Sparse VD (random init)"),
    ],
)
def test_a_recipe_runs_from_end_to_end(tmp_path, make, table, row):
    make(tmp_path)
    cell = Cell(find_run(table, row), "short", 0)
    job = cell.job(tmp_path / "out", data_root=tmp_path)
    job = replace(job, schedule=replace(job.schedule, epochs=1, decay_from=0, batch_size=4))
    record = compress(job, tmp_path / "out" / cell.place)
    assert 0.0 <= record["pruned"]["error"] <= 1.0 and record["compacted"]["largest_difference"] < 1e-3

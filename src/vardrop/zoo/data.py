"""Data sets by name, whole and in memory, checked before anything is trained on them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vardrop.errors import DataError, InvalidValueError, MissingExtraError
from vardrop.files import replace_file
from vardrop.zoo.own import call_own, is_own
from vardrop.zoo.text import classified, running

DATASETS = {
    "digits": "scikit-learn",
    "mnist": "ylecun/mnist",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "svhn": "ufldl-stanford/svhn",
    "imdb": "stanfordnlp/imdb",
}
"""Short names, and where the data behind them comes from: scikit-learn, or a Hub data set."""

HUB_CONFIGS = {"ufldl-stanford/svhn": "cropped_digits"}
"""The part to take of Hub data sets that come in several."""

PARTS = {"training": "train", "test": "test", "validation": "validation"}
"""The parts of a data set, and what they are called on the Hub; the last may be missing."""

IMAGE_COLUMNS = ("image", "img")
TEXT_COLUMNS = ("text", "sentence")
LABEL_COLUMNS = ("label", "fine_label", "labels")
PIXELS = "rgb"
"""How images become pixels: part of the name of what is cached, so that another way finds nothing old."""
DIGITS_SEED = 0
SPLIT_SEED = 0
LABELS_SEED = 0
RANDOM_LABELS = ":random-labels"


class Split(NamedTuple):
    """Examples ``(N, *input_shape)``, float32 or, of text, int64; int64 labels ``(N,)``, of each token ``(N, T)``."""

    x: Tensor
    y: Tensor

    def on(self, device: torch.device) -> Split:
        """The same on `device`, or as it is where it finds no room there."""
        try:
            return Split(self.x.to(device), self.y.to(device))
        except torch.OutOfMemoryError:
            return self


@dataclass(frozen=True)
class Data:
    """A data set in memory. Images are ``(N, channels, height, width)``, scaled to [0, 1]; text is token ids.

    `validation` is there where the data set itself sets examples apart.
    """

    name: str
    train: Split
    test: Split
    num_classes: int
    validation: Split | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.train.x.shape[1:])


def load_data(spec: str, *, data_root: str | Path | None = None) -> Data:
    """The data set called `spec`, checked.

    Args:
        spec: a name in ``DATASETS`` such as ``mnist`` (``digits`` comes with scikit-learn), the id of another data set
            on the Hub, or one's own ``file.py:function`` that returns ``((x_train, y_train), (x_test, y_test))``. A
            Hub data set holds images and labels; or texts and labels (see :func:`vardrop.zoo.text.classified`); or
            texts alone, for the prediction of the next character (:func:`vardrop.zoo.text.running`). Beside the splits
            train and test, a split called validation is read where there is one, and must be sound too. Of one's own,
            int64 inputs stay as they are, such as token ids, all others become float32. Behind the name of a data set,
            ``:random-labels`` gives each example a label by lot, so that there is nothing to learn but by heart
            (arXiv:1701.05369, section 5.4).
        data_root: folder with data sets in the layout they have on the Hub, such as ``ROOT/ylecun/mnist``; ``None``
            for the Hub itself.

    Raises:
        DataError: the folder is missing or of another layout, inputs are not finite, labels are out of range.

    >>> from vardrop.zoo import load_data
    >>> load_data("digits").train.x.shape
    torch.Size([1437, 1, 8, 8])
    """
    if spec.endswith(RANDOM_LABELS):
        return _with_random_labels(spec, load_data(spec.removesuffix(RANDOM_LABELS), data_root=data_root))
    if is_own(spec):
        return _checked(spec, _own_splits(spec))
    if spec == "digits":
        return _checked(spec, _digits())
    return _checked(spec, _from_hub(DATASETS.get(spec, spec), data_root))


def load_inputs(spec: str, *, input_shape: tuple[int, ...], data_root: str | Path | None = None) -> Tensor:
    """The test inputs of the data set called `spec`, which may have other labels than a net knows, or no train split.

    Args:
        spec: as in :func:`load_data`; of a Hub data set, one of images. It may also be the path of a folder.
        input_shape: the shape that one input must have.
        data_root: as in :func:`load_data`.

    Raises:
        DataError: the folder is missing or of another layout, or inputs are of another shape or not finite.

    >>> from vardrop.zoo import load_inputs
    >>> load_inputs("digits", input_shape=(1, 8, 8)).shape
    torch.Size([360, 1, 8, 8])
    """
    spec = spec.removesuffix(RANDOM_LABELS)
    if spec == "digits" or is_own(spec):
        x = load_data(spec).test.x
    else:
        name = DATASETS.get(spec, spec)
        table = _tables(name, data_root, "test")["test"]
        x = _images(name, table, _column(name, table, "an image", IMAGE_COLUMNS))
    if x.shape[1:] != input_shape:
        raise DataError(f"data {spec!r}: inputs of shape {tuple(x.shape[1:])}, but the net takes {input_shape}")
    return x


def validation_split(split: Split, count: int, *, seed: int) -> tuple[Split, Split]:
    """Sets `count` examples apart, drawn by `seed`: what is left, and what was set apart.

    Raises:
        InvalidValueError: nothing would be left to train on.
    """
    if not 0 < count < len(split.y):
        raise InvalidValueError(f"validation={count}: must lie in 1 to {len(split.y) - 1}, below the training examples")
    order = torch.randperm(len(split.y), generator=torch.Generator().manual_seed(seed))
    apart, rest = order[:count], order[count:]
    return Split(split.x[rest], split.y[rest]), Split(split.x[apart], split.y[apart])


def _checked(name: str, splits: Sequence[Split]) -> Data:
    parts = dict(zip(PARTS, splits, strict=False))
    for part, (x, y) in parts.items():
        where = f"{part} data of {name!r}"
        if len(y) == 0:
            raise DataError(f"{where}: there are no examples")
        if len(x) != len(y):
            raise DataError(f"{where}: {len(x)} inputs, but {len(y)} labels")
        finite = torch.isfinite(x.flatten(1)).all(dim=1)
        if not finite.all():
            raise DataError(f"{where}: example {int((~finite).nonzero()[0])} holds NaN or infinite values")
    classes = int(splits[0].y.max()) + 1
    for part, (x, y) in parts.items():
        outside = (y < 0) | (y >= classes)
        if outside.any():
            index = int(outside.nonzero()[0, 0])
            raise DataError(
                f"{part} data of {name!r}: label {int(y[outside][0])} of example {index} is out of range; "
                f"labels must lie in 0 to {classes - 1}, the largest in the training data"
            )
        if x.shape[1:] != splits[0].x.shape[1:]:
            raise DataError(f"{part} data of {name!r}: inputs of shape {tuple(x.shape[1:])}, unlike the training data")
    if classes < 2:
        raise DataError(f"training data of {name!r}: all labels are 0, so there is nothing to tell apart")
    return Data(name, parts["training"], parts["test"], classes, parts.get("validation"))


def _with_random_labels(spec: str, data: Data) -> Data:
    generator = torch.Generator().manual_seed(LABELS_SEED)

    def at_random(split: Split) -> Split:
        return Split(split.x, torch.randint(data.num_classes, split.y.shape, generator=generator))

    train, test = at_random(data.train), at_random(data.test)
    return Data(spec, train, test, data.num_classes, data.validation and at_random(data.validation))


def _own_splits(spec: str) -> tuple[Split, Split]:
    with torch.random.fork_rng(devices=()):  # a split that is drawn falls the same each time the data are read
        torch.manual_seed(SPLIT_SEED)
        given = call_own(spec)
    try:
        (x_train, y_train), (x_test, y_test) = given
    except (TypeError, ValueError):
        raise DataError(
            f"{spec!r} must return ((x_train, y_train), (x_test, y_test)), not {type(given).__name__}"
        ) from None
    return _own_split(spec, x_train, y_train), _own_split(spec, x_test, y_test)


def _own_split(spec: str, x: Any, y: Any) -> Split:
    x, y = _own_tensor(spec, "inputs", x), _own_tensor(spec, "labels", y)
    labels = y.long()
    broken = y[labels != y]
    if broken.numel():
        raise DataError(f"{spec!r} returned a label {float(broken[0]):g}: labels must be whole numbers, the classes")
    return Split(x if x.dtype == torch.int64 else x.float(), labels)


def _own_tensor(spec: str, what: str, given: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        raise DataError(
            f"{spec!r} returned {what} that are no array of numbers, but {type(given).__name__}: {error}"
        ) from error
    if tensor.dim() < (2 if what == "inputs" else 1):
        wanted = "an example a row, (N, ...)" if what == "inputs" else "(N,)"
        raise DataError(f"{spec!r} returned {what} of shape {tuple(tensor.shape)}: must be {wanted}")
    return tensor


def _digits() -> tuple[Split, Split]:
    """8x8 grey images; a fifth of them, stratified, is the test set."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise MissingExtraError("the digits data set", "cli") from error
    digits = load_digits()
    images, labels = digits.images / 16.0, digits.target
    parts = train_test_split(images, labels, test_size=0.2, random_state=DIGITS_SEED, stratify=labels)
    x_train, x_test, y_train, y_test = (torch.as_tensor(part) for part in parts)
    return Split(x_train.float()[:, None], y_train.long()), Split(x_test.float()[:, None], y_test.long())


def _tables(name: str, data_root: str | Path | None, *splits: str) -> Any:
    """The data set `name` as it is on the Hub; it must have the `splits`."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingExtraError(f"the data set {name!r}", "cli") from error
    path = name if data_root is None else str(Path(data_root) / name)
    if data_root is not None and not Path(path).is_dir():
        raise DataError(f"data {name!r}: there is no folder {path}; it must hold the data set as it is on the Hub")
    try:
        found = load_dataset(path, HUB_CONFIGS.get(name))
    except Exception as error:
        where = path if data_root is not None else f"{name} on the Hub"
        raise DataError(
            f"data {name!r} could not be read from {where}: {type(error).__name__}: {error}; "
            "a local copy is named with --data-root"
        ) from error
    if not set(splits) <= set(found):
        raise DataError(f"data {name!r} has the splits {', '.join(found)}: must have {' and '.join(splits)}")
    return found


def _from_hub(name: str, data_root: str | Path | None) -> tuple[Split, ...]:
    found = _tables(name, data_root, "train", "test")
    tables = {part: found[split] for part, split in PARTS.items() if split in found}
    columns = set(tables["training"].column_names)
    column = next((column for column in TEXT_COLUMNS if column in columns), None)
    if column is None:
        return tuple(_decoded(name, table) for table in tables.values())
    texts = {part: table[column] for part, table in tables.items()}
    if columns == {column}:
        return tuple(Split(*stretches) for stretches in running(name, **texts))
    label = next((label for label in LABEL_COLUMNS if label in columns), None)
    if label is None:
        raise DataError(
            f"data {name!r} has the columns {', '.join(sorted(columns))}: beside {column} there must be a label column "
            f"({' or '.join(LABEL_COLUMNS)}), or nothing"
        )
    for part, lines in texts.items():
        if None in lines:
            raise DataError(f"{part} data of {name!r}: example {list(lines).index(None)} has no {column}")
    labels = (_labels(name, table, label) for table in tables.values())
    return tuple(Split(x, y) for x, y in zip(classified(*texts.values()), labels, strict=True))


def _decoded(name: str, table: Any) -> Split:
    """All images of a table with their labels."""
    image, label = _column(name, table, "an image", IMAGE_COLUMNS), _column(name, table, "a label", LABEL_COLUMNS)
    return Split(_images(name, table, image), _labels(name, table, label))


def _column(name: str, table: Any, what: str, known: Sequence[str]) -> str:
    found = next((column for column in known if column in table.column_names), None)
    if found is None:
        columns = ", ".join(table.column_names)
        raise DataError(f"data {name!r} has the columns {columns}: must have {what} column ({' or '.join(known)})")
    return found


def _images(name: str, table: Any, column: str) -> Tensor:
    """All images of a table as one tensor; decoding takes a while, so the pixels are kept in a cache."""
    cached = _cache_folder() / f"{name.replace('/', '--')}-{table._fingerprint}-{PIXELS}.safetensors"
    try:
        pixels = load_file(cached)["pixels"]
    except (OSError, SafetensorError, KeyError):
        pixels = _pixels(name, table[column])
        replace_file(cached, lambda path: save_file({"pixels": pixels}, path))
    return pixels.float() / 255.0


def _labels(name: str, table: Any, column: str) -> Tensor:
    """The `column` of classes, each a whole number."""
    labels = list(table[column])
    for index, label in enumerate(labels):
        if not isinstance(label, int):
            raise DataError(
                f"data {name!r}: example {index} has the {column} {label!r}: must be a whole number, its class from 0"
            )
    return torch.tensor(labels, dtype=torch.int64)


def _pixels(name: str, images: Any) -> Tensor:
    import numpy

    arrays = [numpy.asarray(image.convert("RGB") if getattr(image, "mode", "") == "P" else image) for image in images]
    shapes = {array.shape for array in arrays}
    if len(shapes) != 1:
        raise DataError(f"data {name!r}: images of different sizes, such as {sorted(shapes)[:2]}; must all be alike")
    stacked = torch.as_tensor(numpy.stack(arrays))
    if stacked.dtype != torch.uint8:
        raise DataError(f"data {name!r}: pixels of type {stacked.dtype}; must be 8-bit grey or colour images")
    return stacked[:, None].contiguous() if stacked.dim() == 3 else stacked.permute(0, 3, 1, 2).contiguous()


def _cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vardrop"

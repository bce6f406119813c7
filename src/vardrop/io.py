"""Storing models without a pickle: tensors as safetensors, everything else as JSON.

A folder holds ``model.safetensors``, ``vardrop.json`` and nothing else. The JSON tells the shape of every layer that
compaction may have cut, so that a compacted model is rebuilt from the code of the original one.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vardrop.errors import InvalidValueError, StorageError
from vardrop.methods import Method, methods
from vardrop.sites import sites
from vardrop.surgery.convert import convert

FORMAT = 1
TENSORS = "model.safetensors"
RECORD = "vardrop.json"
CSR = "::csr."
DIMENSIONS = (
    "in_features",
    "out_features",
    "in_channels",
    "out_channels",
    "groups",
    "num_features",
    "num_parameters",
)


def save(model: nn.Module, folder: str | Path, *, sparse: bool = False, overwrite: bool = False) -> None:
    """Stores `model`, plain, compacted or converted, in `folder`.

    Args:
        model: the model; its class is not stored, :func:`load` gets it from code.
        folder: made new, in one stroke: it holds the whole model or does not exist.
        sparse: store each weight as CSR (row starts, columns, values) where that takes fewer bytes.
        overwrite: replace a model stored there earlier.

    Raises:
        StorageError: `folder` holds something, or cannot be written; what was there before is unharmed.

    >>> import tempfile, pathlib
    >>> folder = pathlib.Path(tempfile.mkdtemp()) / "small"
    >>> vd.save(torch.nn.Linear(4, 2), folder)
    >>> vd.load(folder, lambda: torch.nn.Linear(9, 9)).weight.shape
    torch.Size([2, 4])
    """
    folder = Path(folder)
    if folder.exists() and not (overwrite and is_model_folder(folder)):
        what = "a stored model: pass overwrite=True to replace it" if is_model_folder(folder) else "something else"
        raise StorageError(f"{folder} exists and holds {what}")
    tensors, aliases = _tensors(model)
    record = {
        "format": FORMAT,
        "torch": torch.__version__,
        "aliases": aliases,
        "layers": {name: _dimensions(module) for name, module in model.named_modules() if _dimensions(module)},
        "dense_shapes": {name: list(tensor.shape) for name, tensor in tensors.items()},
        "methods": {
            site.name: {"name": site.method.command_name(), "fields": asdict(site.method)} for site in sites(model)
        },
    }
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stored |= (_as_csr(name, tensor) if sparse else None) or {name: tensor}
    _write(folder, stored, record)


def load(folder: str | Path, build: Callable[[], nn.Module]) -> nn.Module:
    """The model stored in `folder`.

    Args:
        folder: written by :func:`save`.
        build: gives the original, uncut and unconverted model; its layers are cut to the stored shapes.

    Raises:
        StorageError: the folder is missing, damaged or foreign, or holds a model of another architecture.
        InvalidValueError: `build` does not give a module.

    >>> import tempfile, pathlib
    >>> folder = pathlib.Path(tempfile.mkdtemp()) / "net"
    >>> vd.save(vd.convert(torch.nn.Linear(4, 2), vd.ARD()), folder)
    >>> vd.load(folder, lambda: torch.nn.Linear(4, 2)).noise.method == vd.ARD()
    True
    """
    folder = Path(folder)
    record, tensors = _read(folder)
    model = build() if callable(build) else None
    if not isinstance(model, nn.Module):
        raise InvalidValueError(f"build={build!r}: must be a function that gives the original torch.nn.Module")
    modules = dict(model.named_modules())
    foreign = sorted(set(record["layers"]) - set(modules))
    if foreign:
        raise StorageError(f"{folder} holds a layer {foreign[0]!r}, which the built {type(model).__name__} lacks")
    for name, dimensions in record["layers"].items():
        _cut(modules[name], name, dimensions, tensors)
    if record["methods"]:
        convert(model, {name: _method(entry) for name, entry in record["methods"].items()})
    state = {**tensors, **{alias: tensors[name] for alias, name in record["aliases"].items()}}
    _check_same(folder, model, state)
    model.load_state_dict(state)
    return model


def is_model_folder(folder: Path) -> bool:
    """Whether `folder` holds a stored model and nothing else."""
    return folder.is_dir() and {path.name for path in folder.iterdir()} == {TENSORS, RECORD}


def size_on_disk(folder: str | Path) -> int:
    """Bytes of all files in `folder`."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of the state once, and the further names of tied ones."""
    first: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[name] = tensor.detach().cpu().contiguous().clone()
    return tensors, aliases


def _dimensions(module: nn.Module) -> dict[str, Any]:
    found = {name: getattr(module, name) for name in DIMENSIONS if isinstance(getattr(module, name, None), int)}
    if found:
        found["bias"] = getattr(module, "bias", None) is not None
    return found


def _as_csr(name: str, tensor: Tensor) -> dict[str, Tensor] | None:
    """The parts of `tensor` as a CSR matrix ``(first axis, rest)``, or ``None`` where dense takes no more bytes."""
    if tensor.dim() < 2 or not tensor.is_floating_point():
        return None
    matrix = tensor.flatten(1)
    alive = matrix != 0
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), alive.sum(dim=1).cumsum(0)])
    columns = alive.nonzero()[:, 1]
    parts = {
        f"{name}{CSR}starts": _narrow(starts),
        f"{name}{CSR}columns": _narrow(columns),
        f"{name}{CSR}values": matrix[alive].contiguous(),
    }
    size = sum(part.numel() * part.element_size() for part in parts.values())
    return parts if size < tensor.numel() * tensor.element_size() else None


def _narrow(integers: Tensor) -> Tensor:
    largest = int(integers.max()) if integers.numel() else 0
    kind = next(
        kind for kind in (torch.uint8, torch.int16, torch.int32, torch.int64) if largest <= torch.iinfo(kind).max
    )
    return integers.to(kind)


def _from_csr(starts: Tensor, columns: Tensor, values: Tensor, shape: list[int]) -> Tensor:
    rows = torch.repeat_interleave(torch.arange(shape[0]), starts.long().diff())
    dense = torch.zeros(shape, dtype=values.dtype)
    dense.flatten(1)[rows, columns.long()] = values
    return dense


def _write(folder: Path, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Fills a folder beside `folder`, then renames it."""
    aside: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
        save_file(tensors, aside / TENSORS)
        (aside / RECORD).write_text(json.dumps(record, indent=1))
        aside.chmod(0o755)
        if folder.exists():
            old = aside.with_suffix(".old")
            folder.rename(old)
            aside.rename(folder)
            shutil.rmtree(old)
        else:
            aside.rename(folder)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{folder} could not be written ({error}); what was there before is unharmed") from error
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for name in (RECORD, TENSORS):
        if not (folder / name).is_file():
            raise StorageError(f"{folder / name} does not exist: {folder} must be a folder written by vardrop.save")
    try:
        record = json.loads((folder / RECORD).read_text())
        kind = record["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{folder / RECORD} is not a record of vardrop.save ({error})") from error
    if kind != FORMAT:
        raise StorageError(f"{folder / RECORD} has format {kind!r}, this version reads format {FORMAT}")
    try:
        stored = load_file(folder / TENSORS)
    except (SafetensorError, OSError) as error:
        raise StorageError(f"{folder / TENSORS} is truncated or not a safetensors file ({error})") from error
    tensors = {}
    for name, shape in record["dense_shapes"].items():
        starts, columns, values = (stored.get(f"{name}{CSR}{part}") for part in ("starts", "columns", "values"))
        if starts is not None and columns is not None and values is not None:
            tensors[name] = _from_csr(starts, columns, values, shape)
        elif name in stored:
            tensors[name] = stored[name]
        else:
            raise StorageError(f"{folder / TENSORS} lacks the tensor {name!r}")
    return record, tensors


def _cut(module: nn.Module, name: str, dimensions: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Gives `module` the stored dimensions, with new, still empty parameters where a shape differs."""
    for key, value in dimensions.items():
        if key != "bias":
            if not hasattr(module, key):
                raise StorageError(f"layer {name!r} is a {type(module).__name__} without {key}, unlike the stored one")
            setattr(module, key, value)
    for key in ("weight", "bias", "running_mean", "running_var"):
        full = f"{name}.{key}" if name else key
        old = getattr(module, key, None)
        stored = tensors.get(full)
        if stored is None or (isinstance(old, Tensor) and old.shape == stored.shape):
            continue
        if isinstance(old, nn.Parameter) or key in module._parameters:
            if old is not None and not _is_cut_of(stored, old):
                raise StorageError(
                    f"layer {name!r}: the stored {key} has shape {tuple(stored.shape)}, which is no cut of the built "
                    f"one, {tuple(old.shape)}: the model is of another architecture"
                )
            dtype = stored.dtype if old is None else old.dtype
            setattr(module, key, nn.Parameter(torch.empty(stored.shape, dtype=dtype)))
        elif isinstance(old, Tensor):
            setattr(module, key, torch.empty(stored.shape, dtype=old.dtype))


def _is_cut_of(stored: Tensor, built: Tensor) -> bool:
    """Whether units may have been taken from `built` to get `stored`: fewer of the first two axes, the rest alike."""
    if stored.dim() != built.dim() or stored.shape[2:] != built.shape[2:]:
        return False
    return all(small <= large for small, large in zip(stored.shape[:2], built.shape[:2], strict=True))


def _method(entry: dict[str, Any]) -> Method:
    known = methods()
    if entry["name"] not in known:
        raise StorageError(f"the stored model uses the method {entry['name']!r}; known are: {', '.join(known)}")
    return known[entry["name"]](**entry["fields"])


def _check_same(folder: Path, model: nn.Module, state: dict[str, Tensor]) -> None:
    """Names and shapes of the built model against the stored ones, before anything is loaded."""
    built = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored = {name: tuple(tensor.shape) for name, tensor in state.items() if not name.endswith("noise.mask")}
    differing = [name for name in sorted(built.keys() | stored.keys()) if built.get(name) != stored.get(name)]
    if differing:
        lines = [
            f"  {name}: stored {stored.get(name, 'not at all')}, built {built.get(name, 'not at all')}"
            for name in differing[:8]
        ]
        more = f"\n  and {len(differing) - 8} more" if len(differing) > 8 else ""
        raise StorageError(f"{folder} holds a model of another architecture:\n" + "\n".join(lines) + more)

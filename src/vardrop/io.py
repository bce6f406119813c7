"""Storing models without a pickle: tensors as safetensors, everything else as JSON.

A folder holds ``model.safetensors``, ``vardrop.json`` and nothing else. The JSON tells the shape of every layer that
compaction may have cut, so that a compacted model is rebuilt from the code of the original one.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.parameter import is_lazy

from vardrop.baselines import baselines
from vardrop.errors import InvalidValueError, StorageError
from vardrop.files import is_folder
from vardrop.methods import Method, methods
from vardrop.noise import InputGate
from vardrop.refusals import check_model
from vardrop.sites import SLOTS, noises, sites
from vardrop.surgery.convert import attach
from vardrop.surgery.reading import HOLDERS, LAYERS
from vardrop.surgery.selection import InputSelection
from vardrop.surgery.sizes import kind_of, make_room, resizable, resize, sizes

FORMAT = 1
TENSORS = "model.safetensors"
RECORD = "vardrop.json"
CSR = "::csr."
LISTED = 8


def _is_method(entry: Any) -> bool:
    known = isinstance(entry, dict) and isinstance(entry.get("name"), str)
    return known and isinstance(entry.get("fields"), dict)


ENTRIES: dict[str, Callable[[Any], bool]] = {
    "aliases": lambda entry: isinstance(entry, str),
    "layers": lambda entry: isinstance(entry, dict),
    "dense_shapes": lambda entry: isinstance(entry, list) and all(isinstance(size, int) for size in entry),
    "methods": lambda entry: all(map(_is_method, entry if isinstance(entry, list) else [entry])),
    "gates": lambda entry: isinstance(entry, dict) and {"shape", "place"} <= entry.keys(),
    "selections": lambda entry: isinstance(entry, int),
}
"""The tables of a record, and what an entry of each looks like."""
OPTIONAL = ("gates", "selections")


def save(model: nn.Module, folder: str | Path, *, sparse: bool = False, overwrite: bool = False) -> None:
    """Stores `model`, plain, compacted or converted, in `folder`.

    Args:
        model: the model; its class is not stored, :func:`load` gets it from code.
        folder: made new, in one stroke: it holds the whole model or does not exist.
        sparse: store each weight as CSR (row starts, columns, values) where that takes fewer bytes; every number
            comes back exactly, but a zero without its sign.
        overwrite: replace a model stored there earlier.

    Raises:
        StorageError: `folder` holds something, or cannot be written, or the state of `model` holds something else
            than dense tensors; what was in `folder` before is unharmed.
        InvalidValueError: `model` is no module.

    >>> import tempfile, pathlib
    >>> folder = pathlib.Path(tempfile.mkdtemp()) / "small"
    >>> vd.save(torch.nn.Linear(4, 2), folder)
    >>> vd.load(folder, lambda: torch.nn.Linear(9, 9)).weight.shape
    torch.Size([2, 4])
    """
    check_model(model)
    folder = Path(folder)
    if is_model_folder(folder):
        if not overwrite:
            raise StorageError(f"{folder} exists and holds a stored model: pass overwrite=True to replace it")
    elif folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise StorageError(f"{folder} exists and holds something else: choose an empty or a new folder")
    noisy = methods_by_layer(model)
    tensors, aliases = _tensors(model)
    record = {
        "format": FORMAT,
        "vardrop": _version(),
        "torch": torch.__version__,
        "aliases": aliases,
        "layers": sizes(model),
        "dense_shapes": {name: list(tensor.shape) for name, tensor in tensors.items()},
        "methods": {name: _entry(used) for name, used in noisy.items()},
        "gates": {
            name: {"place": gate.place, "shape": list(gate.scale.shape)}
            for name, layer in model.named_modules()
            if isinstance(gate := layer._modules.get("gate"), InputGate)
        },
        "selections": {
            name: len(selection.kept)
            for name, layer in model.named_modules()
            if isinstance(selection := layer._modules.get("selection"), InputSelection)
        },
    }
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stored |= (_as_csr(name, tensor) if sparse else None) or {name: tensor}
    _write(folder.resolve(), stored, record)


def load(folder: str | Path, build: Callable[[], nn.Module]) -> nn.Module:
    """The model stored in `folder`, in the mode and on the device that `build` gives, in the data type stored.

    Args:
        folder: written by :func:`save`.
        build: gives the original, uncut and unconverted model; its layers are cut to the stored shapes.

    Raises:
        StorageError: the folder is missing, damaged or foreign, or holds a model of another architecture.
        InvalidValueError: `build` does not give a plain module.

    >>> import tempfile, pathlib
    >>> folder = pathlib.Path(tempfile.mkdtemp()) / "net"
    >>> vd.save(vd.convert(torch.nn.Linear(4, 2), vd.ARD()), folder)
    >>> vd.load(folder, lambda: torch.nn.Linear(4, 2)).noise.method == vd.ARD()
    True
    """
    folder = Path(folder)
    record, tensors = _read(folder)
    model = build() if _takes_nothing(build) and not isinstance(build, nn.Module) else None
    if not isinstance(model, nn.Module):
        raise InvalidValueError(
            f"build={build!r:.80}: must be a function without arguments that gives the original torch.nn.Module"
        )
    if next(sites(model), None) is not None:
        raise InvalidValueError(
            f"build={build!r:.80}: gives a converted model; must give the plain one, which load converts itself"
        )
    return _filled(folder, model, record, tensors)


def _takes_nothing(build: Any) -> bool:
    try:
        inspect.signature(build).bind()
    except TypeError:
        return False
    except ValueError:  # what is written in C may have no signature
        return callable(build)
    return True


def _filled(folder: Path, model: nn.Module, record: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    """The freshly built `model`, cut, converted and with the values of what `folder` stores."""
    state = _with_aliases(record, tensors)
    noisy = {name: _methods_of(folder, entry) for name, entry in record["methods"].items()}
    plain = _without_noise(state, _all_names(folder, model, noisy))
    _hang_children(folder, model, record.get("gates", {}), record.get("selections", {}))
    _check_fits(folder, model, record, plain)
    resize(model, record["layers"], state)
    attach(model, noisy)
    _check_same(folder, model, state)
    make_room(model, state)
    model.load_state_dict(state)
    return model


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """`model` with the values stored at `path`, in place; from a folder also with its noise, and cut as that net was.

    Args:
        model: the plain model, whole.
        path: a safetensors file with the state of such a model, or a folder written by :func:`save`. A net without
            noise must have all its units, and `model` is not changed unless it has; one with noise may have lost some
            to :func:`vardrop.shrink`, so that a narrower net passes for one that did.

    Raises:
        StorageError: `path` is missing or damaged, or holds another net; then names and shapes stand side by side.

    >>> import tempfile, pathlib
    >>> from vardrop.io import load_weights
    >>> folder = pathlib.Path(tempfile.mkdtemp()) / "net"
    >>> vd.save(torch.nn.Linear(4, 2), folder)
    >>> load_weights(torch.nn.Linear(3, 2), folder)
    Traceback (most recent call last):
    vardrop.errors.StorageError: ...
      weight: stored (2, 4), built (2, 3)
    """
    path = Path(path)
    if path.is_dir():
        record, tensors = _read(path)
        if record["methods"]:
            return _filled(path, model, record, tensors)
        state = _with_aliases(record, tensors)
    else:
        state = _read_file(path)
    stored = {name: tuple(tensor.shape) for name, tensor in state.items()}
    _refuse_other(path, stored, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    model.load_state_dict(state)
    return model


def _with_aliases(record: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The stored tensors under all of their names."""
    return {**tensors, **{alias: tensors[name] for alias, name in record["aliases"].items()}}


def is_model_folder(folder: Path) -> bool:
    """Whether `folder` holds a stored model and nothing else."""
    return is_folder(folder) and {path.name for path in folder.iterdir()} == {TENSORS, RECORD}


def methods_by_layer(model: nn.Module) -> dict[str, tuple[Method, ...]]:
    """The methods of every noisy layer, each once, also where two layers share one noise."""
    found = {
        name: tuple(dict.fromkeys(held.noise.method for held in noises(layer))) for name, layer in model.named_modules()
    }
    return {name: used for name, used in found.items() if used}


def _entry(used: tuple[Method, ...]) -> Any:
    """The record of a layer's method, or a list of them."""
    entries = [{"name": method.command_name(), "fields": asdict(method)} for method in used]
    return entries[0] if len(entries) == 1 else entries


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of the state once, and the further names of tied ones."""
    state = model.state_dict(keep_vars=True)
    tensors: dict[str, Tensor] = {}
    aliases = _aliases(state)
    for name, tensor in state.items():
        if name in aliases:
            continue
        unfit = not isinstance(tensor, Tensor) or is_lazy(tensor) or tensor.is_meta or tensor.is_quantized
        if unfit or tensor.layout != torch.strided:
            raise StorageError(f"{name!r} in the state of the model is no dense tensor with values: {tensor!r:.80}")
        tensors[name] = tensor.detach().cpu().contiguous().clone()
    return tensors, aliases


def _aliases(state: Mapping[str, Tensor]) -> dict[str, str]:
    """From the second and further names of each tensor to its first."""
    first: dict[int, str] = {}
    return {name: first[id(tensor)] for name, tensor in state.items() if first.setdefault(id(tensor), name) != name}


def _version() -> str | None:
    try:
        return version("vardrop")
    except PackageNotFoundError:
        return None


def _as_csr(name: str, tensor: Tensor) -> dict[str, Tensor] | None:
    """The parts of `tensor` as a CSR matrix ``(first axis, rest)``, or ``None`` where dense takes no more bytes."""
    if tensor.dim() < 2 or not tensor.is_floating_point():
        return None
    matrix = tensor.flatten(1)
    alive = matrix != 0
    starts = pad(alive.sum(dim=1).cumsum(0), (1, 0))
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


def _from_csr(parts: list[Tensor], shape: list[int]) -> Tensor:
    starts, columns, values = parts
    rows = torch.repeat_interleave(torch.arange(shape[0], device="cpu"), starts.long().diff())
    dense = torch.zeros(shape, dtype=values.dtype, device="cpu")
    dense.flatten(1)[rows, columns.long()] = values
    return dense


def _write(folder: Path, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Fills a folder beside `folder`, then renames it; the old one is put back where that fails."""
    aside: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
        new, old = aside / "new", aside / "old"
        new.mkdir()
        (new / RECORD).write_text(json.dumps(record, indent=1))
        save_file(tensors, new / TENSORS)
        (new / TENSORS).chmod((new / RECORD).stat().st_mode)
        for path in new.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        try:
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
        except BaseException:  # also of a key pressed between the two
            if old.exists() and not folder.exists():
                old.rename(folder)
            raise
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
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{folder / RECORD} is not a record of vardrop.save ({error})") from error
    if kind != FORMAT:
        newer = ": update vardrop" if isinstance(kind, int) and kind > FORMAT else ""
        raise StorageError(f"{folder / RECORD} has format {kind!r}, this version reads format {FORMAT}{newer}")
    for key, is_entry in ENTRIES.items():
        table = record.get(key, {} if key in OPTIONAL else None)
        if not isinstance(table, dict):
            raise StorageError(f"{folder / RECORD} is damaged: it has no table {key!r}")
        for name, entry in table.items():
            if not is_entry(entry):
                raise StorageError(f"{folder / RECORD} is damaged: {key} of {name!r} is {entry!r:.80}")
    astray = sorted(set(record["aliases"].values()) - set(record["dense_shapes"]))
    if astray:
        raise StorageError(f"{folder / RECORD} is damaged: nothing called {astray[0]!r} is stored to be tied to")
    try:
        stored = load_file(folder / TENSORS)
    except (SafetensorError, OSError) as error:
        raise StorageError(f"{folder / TENSORS} is truncated or not a safetensors file ({error})") from error
    return record, {name: _dense(folder, name, shape, stored) for name, shape in record["dense_shapes"].items()}


def _read_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise StorageError(f"{path} does not exist: must be a safetensors file, or a folder written by vardrop.save")
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise StorageError(f"{path} is truncated or not a safetensors file ({error})") from error


def _dense(folder: Path, name: str, shape: list[int], stored: dict[str, Tensor]) -> Tensor:
    """The tensor `name` from among the `stored` ones, made dense if it is in parts."""
    parts = [stored[key] for part in ("starts", "columns", "values") if (key := f"{name}{CSR}{part}") in stored]
    if name not in stored and len(parts) < 3:
        raise StorageError(f"{folder / TENSORS} lacks the tensor {name!r}")
    try:
        tensor = stored[name] if name in stored else _from_csr(parts, shape)
    except (RuntimeError, IndexError) as error:
        raise StorageError(f"{folder / TENSORS} is damaged: {name!r} is no CSR matrix ({error})") from error
    if list(tensor.shape) != shape:
        raise StorageError(f"{folder} is damaged: {name!r} has shape {list(tensor.shape)}, its record says {shape}")
    return tensor


def _methods_of(folder: Path, entry: Any) -> tuple[Method, ...]:
    return tuple(_method(folder, one) for one in (entry if isinstance(entry, list) else [entry]))


def _method(folder: Path, entry: dict[str, Any]) -> Method:
    """The method of a stored layer: vardrop's, or one's own once its module is imported."""
    kinds: list[type[Method]] = [Method]
    for kind in kinds:
        kinds += kind.__subclasses__()
    known = {kind.command_name(): kind for kind in kinds} | methods() | baselines()
    if entry["name"] not in known:
        raise StorageError(
            f"the stored model uses the method {entry['name']!r}; known are: {', '.join(methods())}, and those of "
            "one's own whose module is imported"
        )
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in entry["fields"].items()}
    try:
        return known[entry["name"]](**fields)
    except (TypeError, InvalidValueError) as error:
        raise StorageError(f"{folder / RECORD} has a method that cannot be made ({error})") from error


def _all_names(folder: Path, model: nn.Module, names: Iterable[str]) -> list[str]:
    """All names of the noisy modules of `model` called so: one that hangs in two places has two."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        if name not in modules:
            raise StorageError(f"{folder} holds noise for {name!r}, which the built {type(model).__name__} lacks")
    meant = {modules[name] for name in names}
    return [name for name, module in modules.items() if module in meant]


def _without_noise(state: dict[str, Tensor], noisy: Iterable[str]) -> dict[str, Tensor]:
    prefixes = tuple(f"{name}.{slot}.".lstrip(".") for name in noisy for slot in SLOTS)
    return {name: tensor for name, tensor in state.items() if not name.startswith(prefixes)}


def _check_fits(folder: Path, model: nn.Module, record: dict[str, Any], stored: dict[str, Tensor]) -> None:
    """Raises where the plain tensors `stored` are no cut of the built `model`; nothing is changed yet."""
    modules = dict(model.named_modules(remove_duplicate=False))
    built: dict[str, Tensor] = model.state_dict()
    faults = []
    for name, layer in record["layers"].items():
        if name not in modules:
            raise StorageError(f"{folder} holds a layer {name!r}, which the built {type(model).__name__} lacks")
        kind = kind_of(modules[name])
        if layer.get("type", kind) != kind:
            faults.append(f"{name or '(model)'}: stored a {layer['type']}, built a {kind}")
    for name in sorted(built.keys() | stored.keys()):
        parent, _, attribute = name.rpartition(".")
        if name in built and name in stored:
            there, here = tuple(stored[name].shape), tuple(built[name].shape)
            if there != here and not (parent in modules and _is_cut(there, here, modules[parent])):
                faults.append(
                    f"{name}: the stored {attribute} has shape {there}, which is no cut of the built one, {here}"
                )
        elif name in built:
            faults.append(f"{name}: stored not at all, built {tuple(built[name].shape)}")
        elif attribute != "bias" or not isinstance(modules.get(parent), LAYERS):
            faults.append(f"{name}: stored {tuple(stored[name].shape)}, built not at all")
    _refuse(folder, [*faults, *_ties_apart(model, record["aliases"])])


def _hang_children(folder: Path, model: nn.Module, gates: dict[str, Any], selections: dict[str, int]) -> None:
    """Gives the freshly built `model` the gates and selections that a compacted one has, still without values."""
    modules = dict(model.named_modules())
    for name, entry in gates.items():
        if not isinstance(modules.get(name), LAYERS):
            raise StorageError(f"{folder} holds a gate for {name!r}, which is no layer of the built model")
        InputGate(tuple(entry["shape"]), entry["place"]).hang_on(modules[name])
    for name, count in selections.items():
        layer = modules.get(name)
        if not isinstance(layer, nn.Linear):
            raise StorageError(f"{folder} selects inputs of {name!r}, which is no linear layer of the built model")
        InputSelection(torch.zeros(count)).hang_on(layer)


def _ties_apart(model: nn.Module, stored: dict[str, str]) -> list[str]:
    """Parameters of the built `model` that are tied in another way than the stored ones."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    built = _aliases(parameters)
    faults = []
    for name in parameters:
        if built.get(name) != stored.get(name):
            there, here = (f"tied to {ties[name]}" if name in ties else "on its own" for ties in (stored, built))
            faults.append(f"{name}: stored {there}, built {here}")
    return faults


def _is_cut(stored: tuple[int, ...], built: tuple[int, ...], owner: nn.Module) -> bool:
    """Whether units may have been taken from a tensor of shape `built` in `owner` to get the shape `stored`."""
    if len(stored) != len(built) or any(small > large for small, large in zip(stored, built, strict=True)):
        return False
    if resizable(owner):
        return stored[2:] == built[2:]
    own = {base for base in type(owner).__mro__ if base.__module__.startswith("torch.nn.modules.")}
    return own <= {nn.Module, *HOLDERS}


def _check_same(folder: Path, model: nn.Module, state: dict[str, Tensor]) -> None:
    """Names and shapes of the built, cut and converted `model` against the stored ones, before values are set."""
    built = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, layer in model.named_modules(remove_duplicate=False):
        for slot, parameter, noise in noises(layer):
            mask = f"{name}.{slot}.mask".lstrip(".")
            if mask in state:
                built[mask] = tuple(noise.mask_shape(layer.get_parameter(parameter)))
    _refuse_other(folder, {name: tuple(tensor.shape) for name, tensor in state.items()}, built)


def _refuse_other(folder: Path, stored: dict[str, tuple[int, ...]], built: dict[str, tuple[int, ...]]) -> None:
    faults = [
        f"{name}: stored {stored.get(name, 'not at all')}, built {built.get(name, 'not at all')}"
        for name in sorted(built.keys() | stored.keys())
        if built.get(name) != stored.get(name)
    ]
    _refuse(folder, faults)


def _refuse(folder: Path, faults: list[str]) -> None:
    if faults:
        more = [f"and {len(faults) - LISTED} more"] if len(faults) > LISTED else []
        lines = "\n".join(f"  {fault}" for fault in [*faults[:LISTED], *more])
        raise StorageError(f"{folder} holds a model of another architecture:\n{lines}")

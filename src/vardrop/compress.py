"""The whole road as one job: build, convert, train, prune, compact, store. The command line calls it."""

from __future__ import annotations

import json
import platform
import subprocess
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from vardrop.checkpoint import Epoch
from vardrop.errors import CompactionWarning, InvalidValueError, StorageError
from vardrop.fast import compile_seconds, fast, has_fast_bfloat16
from vardrop.files import FIRST_LAYER, HISTOGRAMS, PART, RUN, replace_file, size_on_disk
from vardrop.io import load_weights, methods_by_layer, save
from vardrop.measure import count_nonzero, count_parameters, flops, living_units, open_units
from vardrop.methods import Method
from vardrop.modes import in_eval_mode
from vardrop.sites import folded, sites
from vardrop.surgery.compact import compact
from vardrop.surgery.convert import attach, convert
from vardrop.surgery.prune import Pruned, count_alive, prune
from vardrop.surgery.selection import select_inputs
from vardrop.surgery.shrink import why_whole
from vardrop.together import Member, train_together
from vardrop.train import Schedule, accelerator_of, is_first_process, train
from vardrop.zoo import Batches, Data, Split, build_net, check_fits, load_data, validation_split

CONFIG = "config.json"
ORIGINAL = "original"
SMALL = "small"
NOISY = "noisy"
PRETRAIN = "pretrain"
RUN_FORMAT = 1
PACKAGES = ("vardrop", "torch", "numpy", "accelerate", "safetensors", "datasets")
EVALUATION_BATCH = 1000
WORTH_COMPILING = 1_000_000
"""Examples seen in training from which compiled passes win back the seconds of their compilation."""


@dataclass(frozen=True)
class Job:
    """What to compress and how.

    Args:
        net: name of a network, or ``file.py:function``.
        data: name of a data set, or ``file.py:function``.
        method: the method, with its hyper-parameters.
        schedule: how to train.
        validation: training examples set apart to choose by; they are not trained on. With none, those that the data
            set itself sets apart, where it does.
        pretrain: epochs of plain training before the conversion.
        pretrained: weights to start from: a safetensors file, or a folder written by :func:`vardrop.save`.
        data_root: folder that holds data sets in their Hub layout; ``None`` for the Hub.
        include: name patterns of the layers to convert; empty for all that can be.
        exclude: name patterns of the layers to leave plain.
        parts: methods of layers that differ from `method`, by name pattern; the first match wins.
        on_empty: what to do with a layer whose weights are all dead: keep its best one and say so, or refuse.
        on_unknown: what to do with an operation that compaction has no rule for: refuse the net before it is trained,
            or keep all units around the operation.
        fast: train on the fast path, compiled where the run sees examples enough to pay for it.
    """

    net: str
    data: str
    method: Method
    schedule: Schedule
    validation: int = 0
    pretrain: int = 0
    pretrained: str | Path | None = None
    data_root: str | Path | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    parts: tuple[tuple[str, Method], ...] = ()
    on_empty: Literal["keep-best", "refuse"] = "keep-best"
    on_unknown: Literal["refuse", "keep"] = "refuse"
    fast: bool = True

    def __post_init__(self) -> None:
        if self.on_empty not in ("keep-best", "refuse"):
            raise InvalidValueError(f"on_empty={self.on_empty!r}: must be 'keep-best' or 'refuse'")
        if self.on_unknown not in ("refuse", "keep"):
            raise InvalidValueError(f"on_unknown={self.on_unknown!r}: must be 'refuse' or 'keep'")
        for name in ("pretrain", "validation"):
            if getattr(self, name) < 0:
                raise InvalidValueError(f"{name}={getattr(self, name)}: must be at least 0")
        obstacle = why_whole(self.method)
        if self.schedule.shrink_every is not None and obstacle is not None:
            raise InvalidValueError(f"shrink_every={self.schedule.shrink_every}: {obstacle}; leave it out")
        methods = [self.method, *dict(self.parts).values()]
        if self.schedule.gate_lr is not None and not any(method.on_units for method in methods):
            raise InvalidValueError(
                f"gate_lr={self.schedule.gate_lr}: {type(self.method).__name__} acts on weights and has no gate; leave "
                "it out"
            )

    @property
    def config(self) -> dict[str, Any]:
        """All that the figures depend on, ready for JSON."""
        return {
            "net": self.net,
            "data": self.data,
            "method": _named(self.method),
            "schedule": asdict(self.schedule),
            "validation": self.validation,
            "pretrain": self.pretrain,
            "fast": self.fast,
            "pretrained": None if self.pretrained is None else str(self.pretrained),
            "include": self.include,
            "exclude": self.exclude,
            **({"parts": {pattern: _named(method) for pattern, method in self.parts}} if self.parts else {}),
            **({"on_unknown": self.on_unknown} if self.on_unknown != "refuse" else {}),
        }


def _named(method: Method) -> dict[str, Any]:
    return {"name": method.command_name(), **asdict(method)}


@dataclass(frozen=True)
class Listeners:
    """Where a job reports its progress."""

    on_epoch: Callable[[Epoch], None] = lambda epoch: None
    on_stage: Callable[[str, int], None] = lambda name, epochs: None


def compress(job: Job, folder: str | Path, *, listeners: Listeners | None = None) -> dict[str, Any]:
    """Does the whole `job` in `folder` and returns what it also writes to ``run.json``.

    A `folder` in which the same job was broken off is taken up where it stood.

    Raises:
        StorageError: `folder` holds something else.
        DataError: the data does not fit the net, or cannot be trained on.
    """
    listeners = listeners or Listeners()
    folder = Path(folder)
    work = _begin(job, folder)
    with _where_to_write(folder) as work.folder:
        if job.pretrain:
            listeners.on_stage("plain", job.pretrain)
            _train(work, work.plain, folder / PRETRAIN, listeners)
        whole = _convert(work)
        if job.fast:
            device = accelerator_of().device
            compiled = job.schedule.epochs * len(work.fit.y) >= WORTH_COMPILING
            fast(work.net.to(device), compiled=compiled)
            if compiled:
                example = work.fit.x[: job.schedule.batch_size].clone().to(device)
                work.facts["compile_seconds"] = compile_seconds(work.net, example)
        listeners.on_stage(job.method.command_name(), job.schedule.epochs)
        return _finish(work, whole, _train(work, job.schedule, folder, listeners))


@contextmanager
def _where_to_write(folder: Path) -> Iterator[Path]:
    """`folder` for the first of processes that train together, and one that goes away for the others."""
    if is_first_process():
        yield folder
    else:
        with TemporaryDirectory() as other:
            yield Path(other)


def compress_together(jobs: Mapping[Path, Job], *, listeners: Listeners | None = None) -> list[dict[str, Any]]:
    """Does several `jobs`, by folder, that differ in their seed alone, all training steps in one batched pass.

    The outcome has the law of :func:`compress` job by job, and each ``run.json`` says how many trained together; see
    :func:`vardrop.together.train_together`. On a GPU this takes little longer than a single job.

    Raises:
        ApartError: the jobs cannot train together; says why.
        StorageError: a folder holds something else.
        DataError: the data does not fit the net, or cannot be trained on.
    """
    listeners = listeners or Listeners()
    works: list[_Work] = []
    for folder, job in jobs.items():
        works.append(_begin(job, folder, works[0].data if works and works[0].job.data == job.data else None))
    job = works[0].job
    if job.pretrain:
        listeners.on_stage("plain", job.pretrain)
        _train_together(works, [work.plain for work in works], PRETRAIN, listeners)
    wholes = []
    for work in works:
        torch.set_rng_state(work.random)
        wholes.append(_convert(work))
        work.facts["together"] = len(works)
    listeners.on_stage(job.method.command_name(), job.schedule.epochs)
    histories = _train_together(works, [work.job.schedule for work in works], "", listeners)
    return [_finish(*done) for done in zip(works, wholes, histories, strict=True)]


@dataclass
class _Work:
    """A job under way: its net, what could live in it before any unit left it, its data, and what its record will say.

    `whole` is known from the start in a second stage, and else with the conversion.
    """

    job: Job
    folder: Path
    net: nn.Module
    whole: Pruned | None
    data: Data
    fit: Split
    valid: Split | None
    random: Tensor
    facts: dict[str, Any]

    @property
    def plain(self) -> Schedule:
        """That of the training before the conversion."""
        job = self.job
        return replace(job.schedule, epochs=job.pretrain, decay_from=job.pretrain // 2, shrink_every=None)

    @property
    def identity(self) -> str:
        return json.dumps(self.job.config, sort_keys=True)

    def evaluate(self, model: nn.Module) -> tuple[float | None, float | None]:
        """Error on the examples set apart, where there are some, and on the test data."""
        valid_error = None if self.valid is None else error_and_nll(model, self.valid)[0]
        return valid_error, error_and_nll(model, self.data.test)[0]


def _begin(job: Job, folder: Path, data: Data | None = None) -> _Work:
    """The net before its training, and the data, which are read where they are not given."""
    check_folder(folder, job)
    facts = {"commit": _commit(), "original": None, "compile_seconds": 0.0}
    data = data or load_data(job.data, data_root=job.data_root)
    torch.manual_seed(job.schedule.seed)
    net = build_net(job.net, input_shape=data.input_shape, num_classes=data.num_classes)
    check_fits(job.net, net, data)
    whole = None
    if job.pretrained is not None:
        net, whole = _started(net, job.pretrained)
    for parameter in net.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)
    with torch.random.fork_rng(devices=()):  # what cannot go the whole road is refused before anything is trained
        trial = deepcopy(net)
        _put_noise(trial, job)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CompactionWarning)
            compact(trial, data.test.x[:2], dry_run=True, on_unknown=job.on_unknown)
    fit, valid = data.train, data.validation
    if job.validation:
        fit, valid = validation_split(data.train, job.validation, seed=job.schedule.seed)
    replace_file(folder / CONFIG, lambda path: path.write_text(json.dumps(job.config, indent=1)))
    return _Work(job, folder, net, whole, data, fit, valid, torch.get_rng_state(), facts)


def _convert(work: _Work) -> Pruned:
    """Keeps the plain net, where it has learned something, puts the noise in, and counts all that may live."""
    job, net = work.job, work.net.cpu()
    if job.pretrain or (job.pretrained is not None and next(sites(net), None) is None):
        work.facts["original"] = _describe(net, work.data, work.folder / ORIGINAL)
    _put_noise(net, job)
    return work.whole or count_alive(net)


def _put_noise(net: nn.Module, job: Job) -> None:
    convert(net, {**dict(job.parts), "*": job.method}, include=job.include or None, exclude=job.exclude or None)


def _started(net: nn.Module, stored: str | Path) -> tuple[nn.Module, Pruned | None]:
    """`net` with the weights `stored`; where these have noise, also what could live before any unit left."""
    uncut = deepcopy(net)
    net = load_weights(net, stored)
    methods = methods_by_layer(net)
    attach(uncut, methods)
    return net, count_alive(uncut) if methods else None


def _finish(work: _Work, whole: Pruned, history: list[Epoch]) -> dict[str, Any]:
    job, folder, net, data = work.job, work.folder, work.net, work.data
    net.eval()
    trained = _figures(net, data.test)
    net.cpu()
    counted = prune(net, on_empty=job.on_empty).against(whole)
    valid_error, valid_nll = (None, None) if work.valid is None else error_and_nll(net, work.valid)
    pruned = {
        **_figures(net, data.test),
        "train_error": error_and_nll(net, work.fit)[0],
        "valid_error": valid_error,
        "valid_nll": valid_nll,
        **_counts(counted),
    }
    save(net, folder / NOISY, overwrite=True)
    small = compact(net, data.test.x[:2], on_unknown=job.on_unknown)
    if counted.alive < counted.total:
        small = select_inputs(small)
    compacted = {
        **_describe(small, data, folder / SMALL, sparse=True),
        "flops": flops(small, data.test.x[:1]),
        "units": living_units(small),
        "open_units": open_units(small, data.test.x),
        "largest_difference": _largest_difference(net, small, data.test.x),
    }
    result = {
        "format": RUN_FORMAT,
        "config": job.config,
        "seed": job.schedule.seed,
        "versions": _versions(),
        "machine": _machine(),
        "num_data": work.fit.y.numel(),
        "layers": {name: count.total for name, count in counted.layers.items()},
        **work.facts,
        "trained": trained,
        "pruned": pruned,
        "compacted": compacted,
        "seconds": sum(epoch.seconds for epoch in history),
        "history": [asdict(epoch) for epoch in history],
    }
    _keep_pictures(net, folder, data)
    replace_file(folder / RUN, lambda path: path.write_text(json.dumps(result, indent=1)))
    return result


def differing(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The keys in which two configurations differ, such as ``"schedule.lr, validation"``."""
    found = []
    for key in sorted(stored.keys() | wanted.keys()):
        one, other = stored.get(key), wanted.get(key)
        if one == other:
            continue
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += [f"{key}.{inner}" for inner in differing(one, other).split(", ")]
        else:
            found.append(key)
    return ", ".join(found)


def check_folder(folder: Path, job: Job) -> None:
    """Raises unless `folder` is free, or holds this very job."""
    path = folder / CONFIG
    if path.exists():
        wanted = json.loads(json.dumps(job.config))
        try:
            stored = json.loads(path.read_text())
        except ValueError as error:
            raise StorageError(f"{path} is not readable JSON: choose another folder") from error
        if not isinstance(stored, dict):
            raise StorageError(f"{path} is no configuration of a run: choose another folder")
        if stored != wanted:
            raise StorageError(
                f"{folder} holds another run (it differs in {differing(stored, wanted)}): choose another folder"
            )
    elif folder.exists() and (not folder.is_dir() or any(path.suffix != PART for path in folder.iterdir())):
        raise StorageError(f"{folder} is not empty and holds no run: choose an empty or a new folder")


def _train(work: _Work, schedule: Schedule, folder: Path, listeners: Listeners) -> list[Epoch]:
    return train(
        work.net,
        Batches(work.fit, schedule.batch_size, seed=schedule.seed),
        schedule,
        folder,
        num_data=work.fit.y.numel(),
        evaluate=work.evaluate,
        identity=work.identity,
        whole=work.whole,
        on_epoch=listeners.on_epoch,
    )


def _train_together(
    works: Sequence[_Work], schedules: Sequence[Schedule], folder: str, listeners: Listeners
) -> list[list[Epoch]]:
    device = accelerator_of().device
    fits = {id(work.fit): work.fit for work in works}
    fits = {key: fit.on(device) for key, fit in fits.items()}  # one copy for all that learn from the same examples
    members = [
        Member(
            work.net,
            Batches(fits[id(work.fit)], schedule.batch_size, seed=schedule.seed),
            schedule,
            work.folder / folder,
            work.identity,
            work.evaluate,
            work.whole,
        )
        for work, schedule in zip(works, schedules, strict=True)
    ]
    num_data = works[0].fit.y.numel()
    return train_together(members, num_data=num_data, on_epoch=lambda _, epoch: listeners.on_epoch(epoch))


@torch.no_grad()
def error_and_nll(model: nn.Module, split: Split) -> tuple[float, float]:
    """Error (a fraction) and mean negative log-likelihood (nats) of `model` in eval mode; its mode is given back."""
    device = next(model.parameters()).device
    wrong, nll = 0.0, 0.0
    with in_eval_mode(model):
        for x, y in zip(split.x.split(EVALUATION_BATCH), split.y.split(EVALUATION_BATCH), strict=True):
            logits = model(x.clone().to(device)).float()  # a net may change its input in place
            wrong += (logits.argmax(dim=1) != y.to(device)).sum().item()
            nll += F.cross_entropy(logits, y.to(device), reduction="sum").item()
    return wrong / split.y.numel(), nll / split.y.numel()


def _figures(model: nn.Module, split: Split) -> dict[str, Any]:
    error, nll = error_and_nll(model, split)
    return {"error": error, "nll": nll}


def _counts(counted: Pruned) -> dict[str, Any]:
    return {
        "compression": counted.compression,
        "units": counted.units,
        "nonzero": counted.alive,
        "total": counted.total,
        "alive": {name: count.alive for name, count in counted.layers.items()},
    }


@torch.no_grad()
def _largest_difference(net: nn.Module, small: nn.Module, x: Tensor) -> float:
    pairs = ((net(part.clone()), small(part.clone())) for part in x.split(EVALUATION_BATCH))
    return max(float((left - right).abs().max()) for left, right in pairs)


def _describe(model: nn.Module, data: Data, folder: Path, *, sparse: bool = False) -> dict[str, Any]:
    """Stores a plain `model` in `folder` and gives its figures."""
    save(model, folder, sparse=sparse, overwrite=True)
    return {
        **_figures(model, data.test),
        "parameters": count_parameters(model),
        "nonzero": count_nonzero(model),
        "bytes": size_on_disk(folder),
    }


def _keep_pictures(net: nn.Module, folder: Path, data: Data) -> None:
    """What a report draws: the histograms of log alpha and the first layer's surviving weights."""
    found = list(sites(net))
    histograms = {}
    for site in found:
        log_alpha = site.noise.log_alpha(site.weight)
        if log_alpha is not None:
            counts, edges = torch.histogram(log_alpha.detach().double().cpu().clamp(-20, 20).flatten(), bins=80)
            histograms[site.name] = {"log_alpha": {"edges": edges.tolist(), "counts": counts.tolist()}}
    replace_file(folder / HISTOGRAMS, lambda path: path.write_text(json.dumps(histograms)))
    first = folded(found[0].layer)[found[0].parameter].detach().cpu().contiguous()
    shape = {"input_shape": json.dumps(list(data.input_shape))}
    replace_file(folder / FIRST_LAYER, lambda path: save_file({"weight": first}, path, metadata=shape))


def _versions() -> dict[str, str | None]:
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that this code runs from, with a plus sign where it was changed since."""
    here = Path(__file__).resolve().parent
    try:  # installed into an environment that lies in another project's checkout, this file is not one of that
        subprocess.run(
            ["git", "-C", str(here), "ls-files", "--error-unmatch", __file__], capture_output=True, check=True
        )
        run = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _machine() -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "system": platform.system(),
        "torch_threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "fast_bfloat16": has_fast_bfloat16(accelerator_of().device),  # then the fast path has its variances in it
    }

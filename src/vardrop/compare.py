"""Original and small net side by side: what they weigh, and how long they take."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from vardrop.errors import InvalidValueError, MissingExtraError
from vardrop.export import export_onnx
from vardrop.files import size_on_disk
from vardrop.io import save
from vardrop.measure import Candidate, Inputs, count_nonzero, count_parameters, flops, latencies
from vardrop.surgery.convert import strip
from vardrop.surgery.graph import as_batch

Engine = Literal["torch", "onnxruntime"]


@dataclass(frozen=True)
class Figure:
    """One quantity of both nets. `name` holds its unit where it is a time: ``"seconds, torch, batch 1, threads 2"``."""

    name: str
    original: float
    small: float

    @property
    def ratio(self) -> float:
        """Original over small; infinite where the small one alone has none."""
        if not self.small:
            return float("inf") if self.original else 1.0
        return self.original / self.small


@dataclass(frozen=True)
class Measured:
    """What :func:`measure` found; printing it gives a table.

    Attributes:
        figures: parameters, non-zero numbers, bytes, FLOPs, and the median seconds of a call by engine, batch size and
            threads.
    """

    figures: tuple[Figure, ...]

    def __getitem__(self, name: str) -> Figure:
        found = {figure.name: figure for figure in self.figures}
        if name not in found:
            raise InvalidValueError(f"figure {name!r} was not measured; there are: {'; '.join(found)}")
        return found[name]

    @property
    def record(self) -> dict[str, dict[str, float | None]]:
        """The figures ready for JSON, by name; an infinite ratio is ``None``."""
        return {
            figure.name: {
                "original": figure.original,
                "small": figure.small,
                "ratio": figure.ratio if figure.small else None,
            }
            for figure in self.figures
        }

    def __str__(self) -> str:
        rows = [("", "original", "small", "ratio"), *map(_cells, self.figures)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if place else cell.ljust(width)
                for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )


def measure(
    original: nn.Module,
    small: nn.Module,
    *,
    example_inputs: Inputs,
    batch_sizes: Sequence[int] = (1, 128),
    threads: Sequence[int] = (1, 2),
    repeats: int = 200,
    engines: Sequence[Engine] = ("torch",),
) -> Measured:
    """Weighs and times `original` and `small` side by side.

    - ``parameters``, ``nonzero``: numbers in all parameters, tied ones once.
    - ``bytes``: the folder that :func:`vardrop.save` writes with ``sparse=True``.
    - ``flops``: of one example, as ``flops`` of the module ``vardrop.measure`` counts: dense matrix products and
      convolutions, a multiplication and an addition apart.
    - ``seconds, ENGINE, batch N, threads T``: the median of `repeats` calls in eval mode; the two nets are called in
      turns, so that a slow moment of the machine hits both.

    Args:
        original: the net before; a converted one is taken as :func:`vardrop.strip` leaves it. Both are left as they
            are.
        small: the net after.
        example_inputs: one tensor, or a tuple of them, whose first dimension is the batch; their rows are repeated to
            get a batch of each size.
        batch_sizes: examples a timed call.
        threads: threads a timed call may use.
        repeats: timed calls of each.
        engines: ``"torch"`` is eager torch, on the device of the nets; ``"onnxruntime"`` runs on the processor.

    Raises:
        InvalidValueError: `engines` names another, a number is below 1, or the inputs have no batch.
        MissingExtraError: onnxruntime is asked for and the extra ``onnx`` is not installed.

    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> small = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
    >>> found = vd.measure(net, small, example_inputs=torch.randn(1, 4), repeats=3)
    >>> found["parameters"]
    Figure(name='parameters', original=58, small=16)
    """
    inputs = as_batch(example_inputs)
    _check(batch_sizes, threads, repeats, engines)
    nets = {"original": strip(deepcopy(original)).eval(), "small": strip(deepcopy(small)).eval()}
    return Measured(
        (
            *_sizes(nets, _batch(inputs, 1)),
            *(figure for engine in engines for figure in _times(nets, engine, inputs, batch_sizes, threads, repeats)),
        )
    )


def _check(
    batch_sizes: Sequence[int],
    threads: Sequence[int],
    repeats: int,
    engines: Sequence[Engine],
) -> None:
    if any(not isinstance(number, int) or number < 1 for number in (*batch_sizes, *threads, repeats)):
        raise InvalidValueError(
            f"batch_sizes={tuple(batch_sizes)}, threads={tuple(threads)}, repeats={repeats}: must all be whole "
            "numbers, at least 1"
        )
    if isinstance(engines, str) or not set(engines) <= set(get_args(Engine)):
        raise InvalidValueError(f"engines={engines!r}: must be a list out of {', '.join(get_args(Engine))}")


def _sizes(nets: dict[str, nn.Module], example: tuple[Tensor, ...]) -> list[Figure]:
    return [
        _figure("parameters", nets, count_parameters),
        _figure("nonzero", nets, count_nonzero),
        _figure("bytes", nets, _bytes),
        _figure("flops", nets, lambda net: flops(net, example)),
    ]


def _figure(name: str, nets: dict[str, nn.Module], of: Callable[[nn.Module], float]) -> Figure:
    return Figure(name, of(nets["original"]), of(nets["small"]))


def _bytes(net: nn.Module) -> int:
    with tempfile.TemporaryDirectory() as folder:
        save(net, Path(folder) / "net", sparse=True)
        return size_on_disk(Path(folder) / "net")


def _times(
    nets: dict[str, nn.Module],
    engine: Engine,
    inputs: tuple[Tensor, ...],
    batch_sizes: Sequence[int],
    threads: Sequence[int],
    repeats: int,
) -> list[Figure]:
    """One engine at a time: threads of another, idle but awake, would take the processor from the one that is timed."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.onnx" for name in nets}
        if engine == "onnxruntime":
            for name, net in nets.items():
                export_onnx(net, files[name], _batch(inputs, 2))
        for size in batch_sizes:
            batch = _batch(inputs, size)
            for count in threads:
                calls: dict[str, Candidate] = dict(nets)
                if engine == "onnxruntime":
                    calls = {name: onnx_call(path, batch, threads=count) for name, path in files.items()}
                seconds = latencies(calls, batch, repeats=repeats, threads=count)
                title = f"seconds, {engine}, batch {size}, threads {count}"
                found.append(Figure(title, seconds["original"], seconds["small"]))
    return found


def onnx_call(path: Path, inputs: Inputs, *, threads: int = 1) -> Callable[[], object]:
    """A call of the ONNX file `path` on `inputs` in onnxruntime, on the processor with so many threads, to be timed.

    Raises:
        MissingExtraError: the extra ``onnx`` is not installed.

    >>> import tempfile, pathlib
    >>> from vardrop.compare import onnx_call
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "net.onnx"
    >>> vd.export_onnx(torch.nn.Linear(4, 2), path, torch.ones(3, 4))
    >>> onnx_call(path, torch.ones(5, 4))()[0].shape
    (5, 2)
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("running ONNX files", "onnx") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    runner: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    tensors = (inputs,) if isinstance(inputs, Tensor) else inputs
    feed = {slot.name: x.detach().cpu().numpy() for slot, x in zip(runner.get_inputs(), tensors, strict=True)}
    return lambda: runner.run(None, feed)


def _batch(inputs: tuple[Tensor, ...], size: int) -> tuple[Tensor, ...]:
    """The rows of `inputs`, repeated or cut to `size` examples."""
    return tuple(x[torch.arange(size, device=x.device) % len(x)] for x in inputs)


def _cells(figure: Figure) -> tuple[str, str, str, str]:
    scale, name = 1.0, figure.name
    if name.startswith("seconds"):
        scale, name = 1e6, name.replace("seconds", "microseconds")
    digits = 1 if scale > 1 else 0
    original, small = (f"{scale * value:,.{digits}f}" for value in (figure.original, figure.small))
    return name, original, small, f"{figure.ratio:,.1f}x"

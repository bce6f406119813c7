"""Export to ONNX, checked against the original before it is kept."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from vardrop.errors import ConversionError, MissingExtraError, StorageError
from vardrop.files import replace_file
from vardrop.sites import sites

LARGEST_RELATIVE_DIFFERENCE = 1e-4


def export_onnx(model: nn.Module, path: str | Path, example_inputs: Tensor | tuple[Tensor, ...]) -> None:
    """Writes `model` as ONNX file `path`, with a free batch size, and checks it in onnxruntime first.

    The model is exported in eval mode; a converted one as its deterministic, pruned network.

    Args:
        model: plain, compacted or converted.
        path: the file to write.
        example_inputs: one tensor, or a tuple of them; the first dimension of each is the batch.

    Raises:
        ConversionError: the noise of the model is switched on.
        StorageError: onnxruntime gives other outputs, or the file cannot be written.
        MissingExtraError: the extra ``onnx`` is not installed.

    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "net.onnx"
    >>> vd.export_onnx(torch.nn.Linear(4, 2), path, torch.randn(3, 4))
    >>> path.stat().st_size > 0
    True
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("export to ONNX", "onnx") from error
    if any(site.noise.on for site in sites(model)):
        raise ConversionError("the noise of the model is switched on: call vardrop.noise(model, on=None) before export")
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    path = Path(path)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            expected = model(*inputs)
        replace_file(path, lambda aside: _write(model, inputs, aside, expected, onnxruntime))
    finally:
        for module, training in modes.items():
            module.training = training


def _write(model: nn.Module, inputs: tuple[Tensor, ...], path: Path, expected: Tensor, onnxruntime: object) -> None:
    batch = torch.export.Dim.DYNAMIC
    shapes = tuple({0: batch} for _ in inputs)
    many = tuple(x if len(x) > 1 else x.repeat(2, *(1,) * (x.dim() - 1)) for x in inputs)
    with _quiet():
        program = torch.onnx.export(model, many, dynamo=True, dynamic_shapes=shapes, verbose=False)
        assert program is not None  # as it is whenever no path is given
        program.save(str(path), external_data=False)
    runner = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])  # type: ignore[attr-defined]
    feed = {slot.name: x.numpy() for slot, x in zip(runner.get_inputs(), inputs, strict=True)}
    found = torch.as_tensor(runner.run(None, feed)[0])
    difference = float((found - expected).abs().max())
    if not difference <= LARGEST_RELATIVE_DIFFERENCE * max(1.0, float(expected.abs().max())):
        raise StorageError(f"{path.name}: onnxruntime differs from torch by {difference:.2e}, so the file is not kept")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter talks on stdout, in warnings and in the log; nothing of it helps a user."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)

"""Export to ONNX, checked against the original before it is kept."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vardrop.errors import ConversionError, MissingExtraError, StorageError
from vardrop.files import replace_file
from vardrop.modes import copied
from vardrop.refusals import does_not_run
from vardrop.sites import sites
from vardrop.surgery.graph import as_batch, quiet
from vardrop.surgery.plain import plain_copy

LARGEST_RELATIVE_DIFFERENCE = 1e-4


def export_onnx(model: nn.Module, path: str | Path, example_inputs: Tensor | tuple[Tensor, ...]) -> None:
    """Writes `model` as ONNX file `path`, with a free batch size, and checks it in onnxruntime first.

    What is exported is the model in eval mode; of a converted one its deterministic, pruned network. Outputs in a dict
    keep its keys as their names. The file's outputs must be those of torch, to 1e-4 of the largest or of 1, whichever
    is more, on the example and on a batch one longer.

    Args:
        model: plain, compacted or converted; it is left as it is.
        path: the file to write.
        example_inputs: one tensor, or a tuple of them; the first dimension of each is the batch.

    Raises:
        InvalidValueError: `example_inputs` holds something else than tensors with a batch dimension.
        ConversionError: the noise of the model is switched on, the model does not run on such inputs (or on a batch
            one longer) or gives NaN there, or torch cannot export it.
        GraphError: a weight with noise is used outside its layer too, so that no plain model computes the same.
        StorageError: onnxruntime does not take the file or gives other outputs, or the file cannot be written.
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
    inputs = tuple(x.detach() for x in as_batch(example_inputs))
    if any(site.noise.on for site in sites(model)):
        raise ConversionError("the noise of the model is switched on: call vardrop.noise(model, on=None) before export")
    plain = plain_copy(model, inputs).eval()
    longer = tuple(torch.cat([x, x[:1]]) for x in inputs)
    expected = [(batch, _outputs(plain, batch)) for batch in (inputs, longer)]
    program = _export(plain, longer)

    def write(aside: Path) -> None:
        with quiet():
            program.save(str(aside), external_data=False)
        try:
            runner = onnxruntime.InferenceSession(str(aside), providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors have no class of their own
            reason = str(error).strip().partition("\n")[0]
            raise StorageError(
                f"onnxruntime does not take the exported {type(model).__name__}: {reason}; a net in half precision is "
                "exported after model.float()"
            ) from error
        for batch, outputs in expected:
            for difference in _differences(runner, batch, outputs):
                if not difference <= LARGEST_RELATIVE_DIFFERENCE:
                    raise StorageError(
                        f"onnxruntime differs from torch by {difference:.2e} of the largest output; a net in half "
                        "precision is exported after model.float()"
                    )

    replace_file(Path(path), write)


def _outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    try:
        with torch.no_grad():
            found = [leaf.cpu().double() for leaf in tree_leaves(model(*copied(inputs)))]
    except Exception as error:
        raise ConversionError(does_not_run(model, inputs, error)) from error
    if any(bool(output.isnan().any()) for output in found):
        raise ConversionError(
            f"{type(model).__name__} gives NaN on the example inputs, by which no export can be checked: give others"
        )
    return found


def _names(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[str] | None:
    """The keys of a model that returns its outputs by name."""
    with torch.no_grad():
        outputs = model(*copied(inputs))
    named = isinstance(outputs, Mapping) and all(isinstance(output, Tensor) for output in outputs.values())
    return list(map(str, outputs)) if named else None


def _export(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    shapes: tuple[Any, ...] = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)
    kinds = [parameter.kind for parameter in inspect.signature(model.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        named = kinds.index(inspect.Parameter.VAR_POSITIONAL)
        shapes = (*shapes[:named], shapes[named:])
    try:
        with quiet():
            return torch.onnx.export(
                model, inputs, dynamo=True, dynamic_shapes=shapes, output_names=_names(model, inputs), verbose=False
            )
    except RuntimeError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = str(cause).strip().partition("\n")[0]
        raise ConversionError(f"torch cannot export {type(model).__name__} to ONNX: {reason}") from error


def _differences(runner: Any, inputs: tuple[Tensor, ...], expected: list[Tensor]) -> list[float]:
    """For each output the largest difference, relative to its largest number or to 1; infinite if shapes differ."""
    feed = {slot.name: x.cpu().numpy() for slot, x in zip(runner.get_inputs(), inputs, strict=True)}
    found = [torch.as_tensor(output).double() for output in runner.run(None, feed)]
    if [output.shape for output in found] != [output.shape for output in expected]:
        return [math.inf]
    return [_difference(a, b) for a, b in zip(found, expected, strict=True)]


def _difference(found: Tensor, expected: Tensor) -> float:
    largest = expected[expected.isfinite()].abs().max() if expected.isfinite().any() else torch.ones(())
    apart = torch.where(found == expected, 0.0, (found - expected).abs())  # two infinities are alike
    return float(apart.max() / largest.clamp_min(1.0)) if apart.numel() else 0.0

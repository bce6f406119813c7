"""What a model weighs and how long it takes: parameters, non-zeros, FLOPs, seconds, and a summary by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vardrop.errors import InvalidValueError
from vardrop.sites import sites

Inputs = Tensor | tuple[Tensor, ...]


def count_parameters(model: nn.Module) -> int:
    """Numbers in all parameters of `model`, noise not counted, tied ones once.

    >>> from vardrop.measure import count_parameters
    >>> count_parameters(torch.nn.Linear(4, 2))
    10
    """
    return sum(parameter.numel() for parameter in _parameters(model))


def count_nonzero(model: nn.Module) -> int:
    """Numbers other than zero in all parameters of `model`, noise not counted.

    >>> from vardrop.measure import count_nonzero
    >>> layer = torch.nn.Linear(4, 2)
    >>> _ = torch.nn.init.zeros_(layer.bias)
    >>> count_nonzero(layer)
    8
    """
    return sum(int(parameter.count_nonzero()) for parameter in _parameters(model))


def flops(model: nn.Module, example_inputs: Inputs) -> int:
    """Floating-point operations of one pass in eval mode: matrix products and convolutions, multiply and add apart.

    >>> from vardrop.measure import flops
    >>> flops(torch.nn.Linear(4, 2), torch.ones(1, 4))
    16
    """
    training = model.training
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.eval()(*_as_tuple(example_inputs))
    model.train(training)
    return int(counter.get_total_flops())


def latencies(
    candidates: Mapping[str, nn.Module | Callable[[], object]],
    example_inputs: Inputs | None = None,
    *,
    repeats: int = 200,
    threads: int = 1,
) -> dict[str, float]:
    """Median seconds of a call of each candidate, taken in turns so that a slow moment of the machine hits them all.

    Args:
        candidates: modules, called in eval mode on `example_inputs`, or functions without arguments.
        example_inputs: one tensor or a tuple of them.
        repeats: timed rounds after a tenth as many untimed ones.
        threads: threads of torch; functions see to their own.

    >>> from vardrop.measure import latencies
    >>> layer = torch.nn.Linear(4, 2)
    >>> latencies({"layer": layer}, torch.ones(1, 4), repeats=3)["layer"] > 0
    True
    """
    if repeats < 1 or threads < 1:
        raise InvalidValueError(f"repeats={repeats}, threads={threads}: must both be at least 1")
    calls = {name: _as_call(candidate, example_inputs) for name, candidate in candidates.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            for turn in range(-max(1, repeats // 10), repeats):
                for name, call in calls.items():
                    started = perf_counter()
                    call()
                    if turn >= 0:
                        seconds[name].append(perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    return {name: median(times) for name, times in seconds.items()}


@dataclass(frozen=True)
class Row:
    """One layer with weights; `kl`, in nats, and `log_alpha`, the mean of log alpha, are ``None`` without noise."""

    name: str
    kind: str
    shape: tuple[int, ...]
    alive: int
    total: int
    kl: float | None
    log_alpha: float | None


@dataclass(frozen=True)
class Summary:
    """A model layer by layer; printing it gives a table.

    `flops` are those of one pass over the example inputs, dense, as :func:`flops` counts them; ``None`` if there were
    no example inputs. `tensor_bytes` is the size of all parameters and buffers but the noise.
    """

    rows: list[Row]
    parameters: int
    tensor_bytes: int
    flops: int | None

    @property
    def compression(self) -> float:
        """``|W| / |W != 0|`` over the weights listed, biases not counted (arXiv:1811.00596)."""
        return sum(row.total for row in self.rows) / max(1, sum(row.alive for row in self.rows))

    def __str__(self) -> str:
        head = ("layer", "kind", "shape", "alive", "of", "KL, nats", "mean log alpha")
        body = [
            (
                row.name or "(model)",
                row.kind,
                "x".join(map(str, row.shape)),
                f"{row.alive:,}",
                f"{row.total:,}",
                "" if row.kl is None else f"{row.kl:,.1f}",
                "" if row.log_alpha is None else f"{row.log_alpha:.2f}",
            )
            for row in self.rows
        ]
        widths = [max(len(line[column]) for line in [head, *body]) for column in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(width) if index < 3 else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in [head, *body]
        ]
        facts = [
            f"compression {self.compression:.1f}x",
            f"{self.parameters:,} parameters",
            f"{self.tensor_bytes:,} bytes",
        ]
        facts += [] if self.flops is None else [f"{self.flops:,} FLOPs"]
        return "\n".join([*lines, ", ".join(facts)])


def summary(model: nn.Module, *, example_inputs: Inputs | None = None) -> Summary:
    """What each layer of `model`, converted or plain, has left: live weights, KL, log alpha; and what all weighs.

    In a plain model a weight is alive when it is not zero.

    >>> net = vd.convert(torch.nn.Sequential(torch.nn.Linear(4, 2)), vd.ARD())
    >>> print(vd.summary(net, example_inputs=torch.ones(1, 4)).rows[0].total)
    8
    """
    noisy = {site.layer: site for site in sites(model)}
    rows = []
    for name, layer in model.named_modules():
        weight = layer._parameters.get("weight")
        if weight is None or weight.dim() < 2:
            continue
        site = noisy.get(layer)
        kind = type(layer).__name__.removeprefix("Noisy") if site else type(layer).__name__
        shape = tuple(weight.shape)
        if site is None:
            rows.append(Row(name, kind, shape, int(weight.count_nonzero()), weight.numel(), None, None))
            continue
        alive = weight.numel() if site.noise.mask is None else int(site.noise.mask.sum())
        with torch.no_grad():
            log_alpha = site.noise.log_alpha(weight)
            kl = float(site.method.kl(site.noise, weight))
        mean = None if log_alpha is None else float(log_alpha.double().mean())
        rows.append(Row(name, kind, shape, alive, weight.numel(), kl, mean))
    kept = [tensor for name, tensor in model.state_dict().items() if "noise." not in name]
    return Summary(
        rows=rows,
        parameters=count_parameters(model),
        tensor_bytes=sum(tensor.numel() * tensor.element_size() for tensor in kept),
        flops=None if example_inputs is None else flops(model, example_inputs),
    )


def _parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if "noise." not in name]


def _as_tuple(inputs: Inputs) -> tuple[Tensor, ...]:
    return (inputs,) if isinstance(inputs, Tensor) else inputs


def _as_call(candidate: nn.Module | Callable[[], object], inputs: Inputs | None) -> Callable[[], object]:
    if not isinstance(candidate, nn.Module):
        return candidate
    if inputs is None:
        raise InvalidValueError("example_inputs=None: a module needs example inputs to be timed on")
    module, arguments = candidate.eval(), _as_tuple(inputs)
    return lambda: module(*arguments)

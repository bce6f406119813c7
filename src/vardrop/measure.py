"""What a model weighs and how long it takes: parameters, non-zeros, FLOPs, seconds, and a summary by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from vardrop.errors import InvalidValueError
from vardrop.modes import copied, in_eval_mode
from vardrop.noise import InputGate
from vardrop.refusals import does_not_run
from vardrop.sites import Site, folded, sites, tensor_of

Inputs = Any
"""One input, a tensor or a dict or a list of them, or a tuple with the arguments of the model's forward."""
Candidate = nn.Module | Callable[[], object]
COUNTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
WITH_VECTORS = {
    torch.ops.aten.mv: lambda matrix, vector, **_: 2 * math.prod(matrix),
    torch.ops.aten.addmv: lambda bias, matrix, vector, **_: 2 * math.prod(matrix),
    torch.ops.aten.dot: lambda left, right, **_: 2 * math.prod(left),
    torch.ops.aten.vdot: lambda left, right, **_: 2 * math.prod(left),
    torch.ops.aten.addbmm: lambda bias, left, right, **_: 2 * math.prod(left) * right[-1],
}
"""FLOPs, by the shapes of the arguments, of the products that torch's counter leaves out."""


def count_parameters(model: nn.Module) -> int:
    """Numbers in all parameters of `model`, noise not counted, tied ones once.

    >>> from vardrop.measure import count_parameters
    >>> count_parameters(torch.nn.Linear(4, 2))
    10
    """
    return sum(parameter.numel() for parameter in _without_noise(model, model.parameters()))


def count_nonzero(model: nn.Module) -> int:
    """Numbers other than zero in all parameters of `model`; noise and weights marked dead not counted.

    >>> from vardrop.measure import count_nonzero
    >>> layer = torch.nn.Linear(4, 2)
    >>> _ = torch.nn.init.zeros_(layer.bias)
    >>> count_nonzero(layer)
    8
    """
    with torch.no_grad():
        plain = {parameter: parameter for parameter in _without_noise(model, model.parameters())}
        for site in sites(model):
            for name, value in folded(site.layer).items():
                plain[tensor_of(site.layer, name)] = value
        return sum(int(tensor.count_nonzero()) for tensor in plain.values())


def living_units(model: nn.Module) -> list[int]:
    """Units in use, layer by layer: inputs of linear layers that a weight reads, channels of convolutions with one.

    This is how the papers count: ``[784, 500, 300]`` for 784-500-300-10, ``[20, 50, 800, 500]`` for LeNet-5-Caffe.

    Source: arXiv:1705.07283, section 5.

    >>> from vardrop.measure import living_units
    >>> living_units(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)))
    [4, 3]
    """
    found = []
    for layer in model.modules():
        if isinstance(layer, COUNTED):
            axis = 0 if layer.weight.dim() > 2 else 1
            weight = folded(layer).get("weight", layer.weight).detach()
            found.append(int(weight.movedim(axis, 0).flatten(1).count_nonzero(dim=1).count_nonzero()))
    return found


@torch.no_grad()
def open_units(model: nn.Module, x: Tensor, *, batch_size: int = 1000) -> list[float]:
    """Units that each input-dependent gate leaves open for an average one of the examples `x`, gate by gate.

    Source: arXiv:1805.10896, section 5, which counts the units of dependent beta-Bernoulli dropout so.

    >>> from vardrop.measure import open_units
    >>> net = vd.convert(torch.nn.Sequential(torch.nn.Linear(8, 4)), vd.BetaBernoulli())
    >>> small = vd.strip(vd.convert(net, vd.DependentBetaBernoulli()))
    >>> [count <= 8 for count in open_units(small, torch.randn(5, 8))]
    [True]
    """
    gates = [module for module in model.modules() if isinstance(module, InputGate)]
    totals = dict.fromkeys(gates, 0)

    def count(gate: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        totals[cast(InputGate, gate)] += int(cast(InputGate, gate).opening(inputs[0]).count_nonzero())

    handles = [gate.register_forward_pre_hook(count) for gate in gates]
    try:
        with in_eval_mode(model):
            for part in x.split(batch_size) if gates else ():
                model(part.clone())
    finally:
        for handle in handles:
            handle.remove()
    return [total / len(x) for total in totals.values()]


def flops(model: nn.Module, example_inputs: Inputs) -> int:
    """Floating-point operations of one pass in eval mode: matrix products and convolutions, multiply and add apart.

    Zeros count like other numbers, so this is what dense arithmetic costs. Elementwise operations do not count, nor do
    the sums of three factors in ``nn.Bilinear``, nor quantised products.

    Raises:
        InvalidValueError: `example_inputs` is neither a tensor nor a tuple of the inputs, or nothing `model` runs on.

    >>> from vardrop.measure import flops
    >>> flops(torch.nn.Linear(4, 2), torch.ones(1, 4))
    16
    """
    counter, inputs = FlopCounterMode(display=False, custom_mapping=WITH_VECTORS), _as_tuple(example_inputs)
    with torch.no_grad(), in_eval_mode(model), _without_draws(model), _in_plain_operations(), counter:
        try:
            model(*copied(inputs))
        except Exception as error:
            raise InvalidValueError(does_not_run(model, inputs, error)) from error
    return int(counter.get_total_flops())


@contextmanager
def _without_draws(model: nn.Module) -> Iterator[None]:
    """The noise of `model` switched off, whatever its switch says; that comes back at the end."""
    switches = {site.noise: site.noise.on for site in sites(model)}
    try:
        for noise in switches:
            noise.on = False
        yield
    finally:
        for noise, on in switches.items():
            noise.on = on


def latency(
    candidate: Candidate, example_inputs: Inputs | None = None, *, repeats: int = 200, threads: int = 1
) -> float:
    """Median seconds of a call of one `candidate`; to compare several, take :func:`latencies`.

    Raises:
        InvalidValueError: `repeats` or `threads` is below 1, or there is a module but no `example_inputs`.

    >>> from vardrop.measure import latency
    >>> latency(torch.nn.Linear(4, 2), torch.ones(1, 4), repeats=3) > 0
    True
    """
    return latencies({"": candidate}, example_inputs, repeats=repeats, threads=threads)[""]


def latencies(
    candidates: Mapping[str, Candidate],
    example_inputs: Inputs | None = None,
    *,
    repeats: int = 200,
    threads: int = 1,
) -> dict[str, float]:
    """Median seconds of a call of each candidate, taken in turns so that a slow moment of the machine hits them all.

    Args:
        candidates: modules, called in eval mode on `example_inputs`, or functions without arguments.
        example_inputs: one tensor or a tuple of them; where they lie on an accelerator, its work is waited for.
        repeats: timed rounds after a tenth as many untimed ones.
        threads: threads of torch; functions see to their own.

    Raises:
        InvalidValueError: `repeats` or `threads` is below 1, or there is a module but no `example_inputs`.

    >>> from vardrop.measure import latencies
    >>> layer = torch.nn.Linear(4, 2)
    >>> latencies({"layer": layer}, torch.ones(1, 4), repeats=3)["layer"] > 0
    True
    """
    if not all(isinstance(number, int) and number >= 1 for number in (repeats, threads)):
        raise InvalidValueError(f"repeats={repeats!r}, threads={threads!r}: must both be whole numbers, at least 1")
    calls = {name: _as_call(candidate, example_inputs) for name, candidate in candidates.items()}
    wait = example_inputs is not None and any(
        isinstance(x, Tensor) and not x.is_cpu for x in tree_leaves(example_inputs)
    )
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad(), in_eval_mode(*(c for c in candidates.values() if isinstance(c, nn.Module))):
            for turn in range(-max(1, repeats // 10), repeats):
                for name, (call, arguments) in calls.items():
                    fresh = copied(arguments)
                    started = perf_counter()
                    call(*fresh)
                    if wait:
                        torch.accelerator.synchronize()
                    if turn >= 0:
                        seconds[name].append(perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    return {name: median(times) for name, times in seconds.items()}


@dataclass(frozen=True)
class Row:
    """One weight, or the units of one gate.

    `kl` is in nats, ``None`` in a plain layer, and zero for weights without noise in a layer with a gate; `log_alpha`,
    the mean of log alpha, is ``None`` where there is none.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    alive: int
    total: int
    kl: float | None
    log_alpha: float | None
    counts: Literal["weights", "units"] = "weights"


@dataclass(frozen=True)
class Summary:
    """A model weight by weight, and gate by gate; printing it gives a table.

    `flops` are those of one pass over the example inputs, dense, as :func:`flops` counts them; ``None`` if there were
    no example inputs. `tensor_bytes` is the size of all parameters and buffers but the noise, tied ones once.
    """

    rows: list[Row]
    parameters: int
    tensor_bytes: int
    flops: int | None

    @property
    def compression(self) -> float:
        """``|W| / |W != 0|`` over the weights of the converted layers, biases not counted (arXiv:1811.00596).

        Of a plain model over all weights listed. Infinite if all are dead, one if there are none.
        """
        weights = [row for row in self.rows if row.counts == "weights"]
        rows = [row for row in weights if row.kl is not None] or weights
        alive, total = sum(row.alive for row in rows), sum(row.total for row in rows)
        return total / alive if alive else math.inf if total else 1.0

    @property
    def units(self) -> str:
        """The living units of all gates in order, such as ``"294-110-71"``; empty without gates."""
        return "-".join(str(row.alive) for row in self.rows if row.counts == "units")

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
            f"{self.tensor_bytes:,} dense bytes",
        ]
        facts += [f"units {self.units}"] if self.units else []
        facts += [] if self.flops is None else [f"{self.flops:,} FLOPs for the example inputs"]
        return "\n".join([*lines, ", ".join(facts)])


def summary(model: nn.Module, *, example_inputs: Inputs | None = None) -> Summary:
    """What each weight and gate of `model`, converted or plain, has left alive, its KL and log alpha; what all weighs.

    Bytes and parameters are those of the dense net without its noise; FLOPs are those of one pass over
    `example_inputs`, so of a whole batch where they are one, as :func:`vardrop.measure.flops` counts them. A weight is
    a parameter of two or more dimensions; a tied one is listed once. A number in a converted layer is alive until
    :func:`vardrop.prune` marks it dead, in a plain layer as long as it is not zero.

    Raises:
        InvalidValueError: `example_inputs` is neither a tensor nor a tuple of the inputs.

    >>> net = vd.convert(torch.nn.Sequential(torch.nn.Linear(4, 2)), vd.ARD())
    >>> print(vd.summary(net, example_inputs=torch.ones(1, 4)).rows[0].total)
    8
    """
    found: dict[Tensor, dict[str, Site]] = {}
    for site in sites(model):
        found.setdefault(site.weight, {})[site.counts] = site
    rows: list[Row] = []
    for weight, (name, owner) in dict(_weights(model)).items():
        rows += _rows(name, owner, weight, found.get(weight, {}))
    return Summary(
        rows=rows,
        parameters=count_parameters(model),
        tensor_bytes=sum(
            tensor.numel() * tensor.element_size()
            for tensor in _without_noise(model, [*model.parameters(), *model.buffers()])
        ),
        flops=None if example_inputs is None else flops(model, example_inputs),
    )


def _weights(model: nn.Module) -> Iterator[tuple[Tensor, tuple[str, nn.Module]]]:
    """Each weight with the name it is listed by and the module it belongs to; a ``weight`` goes by its layer's name."""
    kept = set(_without_noise(model, model.parameters()))
    for name, parameter in model.named_parameters():
        if parameter in kept and parameter.dim() >= 2:
            parent, _, attribute = name.rpartition(".")
            yield parameter, (parent if attribute == "weight" else name, model.get_submodule(parent))


@torch.no_grad()
def _rows(name: str, owner: nn.Module, weight: Tensor, found: Mapping[str, Site]) -> Iterator[Row]:
    """The row of a weight, and that of the gate at its layer."""
    kind, shape = type(owner).__name__, tuple(weight.shape)
    if not found:
        yield Row(name, kind, shape, int(weight.count_nonzero()), weight.numel(), None, None)
        return
    living = torch.ones_like(weight, dtype=torch.bool)
    for site in found.values():
        if site.noise.mask is not None:
            living &= site.noise.on_weights(site.noise.mask, weight)
    kl, log_alpha = _figures(found["weights"]) if "weights" in found else (0.0, None)
    yield Row(name, kind.removeprefix("Noisy"), shape, int(living.sum()), weight.numel(), kl, log_alpha)
    if "units" in found:
        gate = found["units"]
        total = gate.noise.mask_shape(weight).numel()
        alive = total if gate.noise.mask is None else int(gate.noise.mask.sum())
        kl, log_alpha = _figures(gate)
        yield Row(gate.name, type(gate.method).__name__, (total,), alive, total, kl, log_alpha, "units")


def _figures(site: Site) -> tuple[float, float | None]:
    """KL, nats, and the mean of log alpha where there is one."""
    log_alpha = site.noise.log_alpha(site.weight)
    mean = None if log_alpha is None else float(log_alpha.double().mean())
    return float(site.method.kl(site.noise, site.weight)), mean


def _without_noise(model: nn.Module, tensors: Iterable[Tensor]) -> list[Tensor]:
    """Those of `tensors` that are no parameters or buffers of a noise, each once."""
    noise = {tensor for site in sites(model) for tensor in (*site.noise.parameters(), *site.noise.buffers())}
    return [tensor for tensor in dict.fromkeys(tensors) if tensor not in noise]


@contextmanager
def _in_plain_operations() -> Iterator[None]:
    """Without the fused forms of attention and recurrence, in which torch's counter does not see all products."""
    mkldnn, cudnn, mha = torch.backends.mkldnn, torch.backends.cudnn, torch.backends.mha
    before = mkldnn.enabled, cudnn.enabled, mha.get_fastpath_enabled()
    mkldnn.enabled, cudnn.enabled = False, False  # type: ignore[assignment]
    mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        mkldnn.enabled, cudnn.enabled = before[:2]
        mha.set_fastpath_enabled(before[2])


def _as_tuple(inputs: Inputs) -> tuple[Any, ...]:
    found = inputs if isinstance(inputs, tuple) else (inputs,)
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(found)):
        raise InvalidValueError(
            f"example_inputs is a {type(inputs).__name__}: must be a tensor or a tuple of the inputs"
        )
    return found


def _as_call(candidate: Candidate, inputs: Inputs | None) -> tuple[Callable[..., object], tuple[Any, ...]]:
    """What is timed, and its arguments."""
    if not isinstance(candidate, nn.Module):
        return candidate, ()
    if inputs is None:
        raise InvalidValueError("example_inputs=None: a module needs example inputs to be timed on")
    return candidate, _as_tuple(inputs)

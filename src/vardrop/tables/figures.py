"""What a column of a table stands for: where it lies in the record of a run, its unit, and which way is better."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, median, stdev
from typing import Any, Literal

from vardrop.tables.counting import Rule, layout_of, multiplications, numbers, operations

Value = float | tuple[float, ...]
Need = Literal["times", "ensemble"]
Statistic = Literal["mean", "median"]
DASH = "—"
TIMED_BATCH, TIMED_THREADS = 128, 1
ENSEMBLE = 20
"""Draws."""
TEST_EXAMPLES = {
    "ylecun/mnist": 10_000,
    "uoft-cs/cifar10": 10_000,
    "uoft-cs/cifar100": 10_000,
    "ufldl-stanford/svhn": 26_032,
    "stanfordnlp/imdb": 25_000,
}
TIMED = f"seconds, torch, batch {TIMED_BATCH}, threads {TIMED_THREADS}"


@dataclass(frozen=True)
class Figure:
    """A figure of a run.

    Attributes:
        label: with its unit.
        read: the figure in a record, or ``None`` where it is not there.
        digits: decimals that the papers print.
        better: which way is better, or ``None`` where neither is.
        need: what must be measured after the run to have it, and where the record keeps that.
        counts: whether it counts parts of the net, so that a net of another width is not held against the paper's.
        small: decimals that a figure below 10 shows, where that is more.
        sampled: whether it is a percentage of the test examples.
    """

    label: str
    read: Callable[[Mapping[str, Any]], Value | None]
    digits: int = 0
    better: Literal["lower", "higher"] | None = None
    need: Need | None = None
    counts: bool = False
    small: int = 0
    sampled: bool = False

    def decimals(self, value: float) -> int:
        """Those that `value` shows.

        >>> from vardrop.tables.figures import FIGURES
        >>> [FIGURES["compression"].decimals(value) for value in (68.4, 1.34)]
        [0, 2]
        """
        return max(self.digits, self.small) if abs(value) < 10.0 else self.digits

    def show(self, value: Value | None) -> str:
        """The figure as text; a list of layers is joined by dashes.

        >>> from vardrop.tables.figures import FIGURES
        >>> FIGURES["units"].show((784, 500, 300)), FIGURES["error"].show(1.5), FIGURES["error"].show(None)
        ('784-500-300', '1.50', '—')
        """
        if value is None:
            return DASH
        parts = value if isinstance(value, tuple) else (value,)
        return "-".join(f"{part:,.{self.decimals(part)}f}" for part in parts)

    def size(self, value: Value) -> float:
        """What is compared: the number itself, the sum over layers."""
        return math.fsum(value) if isinstance(value, tuple) else value

    def beats(self, value: Value, other: Value) -> bool:
        """Whether `value` is better than `other`."""
        less = self.size(value) < self.size(other)
        return less if self.better == "lower" else self.size(value) > self.size(other)

    def deviation(self, joined: Joined, examples: int, seen: float) -> float | None:
        """That of the seeds; of a single one, where it is a percentage of `examples`, what is known of its chance.

        That is what so many test examples leave to chance, or the deviation `seen` over the seeds of rows like it.

        >>> from vardrop.tables.figures import FIGURES, Joined
        >>> [round(FIGURES["error"].deviation(Joined(0.8, None, 1), 10_000, seen), 2) for seen in (0.0, 0.5)]
        [0.09, 0.5]
        """
        if joined.std is not None or not self.sampled or not examples:
            return joined.std
        share = self.size(joined.value) / 100.0
        return max(seen, 100.0 * math.sqrt(share * (1.0 - share) / examples))

    def alike(self, value: Value, other: Value, *spreads: float | None) -> bool:
        """Whether they differ by at most the standard deviations `spreads`, joined, or half the last decimal shown."""
        layers = len(value) if isinstance(value, tuple) else 1
        decimals = self.decimals(max(abs(self.size(value)), abs(self.size(other))))
        slack = max(0.5 * 10.0**-decimals * layers, math.hypot(*(spread or 0.0 for spread in spreads)))
        return abs(self.size(value) - self.size(other)) <= slack * (1 + 1e-9)


@dataclass(frozen=True)
class Joined:
    """A figure over several seeds: its mean or median, its standard deviation, and how many there are.

    The deviation of a list is that of its sum.
    """

    value: Value
    std: float | None
    count: int


def join(values: Sequence[Value], statistic: Statistic) -> Joined | None:
    """Joins what several seeds gave, layer by layer.

    >>> from vardrop.tables.figures import join
    >>> join([1.0, 3.0], "mean")
    Joined(value=2.0, std=1.4142135623730951, count=2)
    """
    if not values:
        return None
    middle = fmean if statistic == "mean" else median
    numbers = [value for value in values if not isinstance(value, tuple)]
    if len(numbers) == len(values):
        return Joined(middle(numbers), stdev(numbers) if len(numbers) > 1 else None, len(numbers))
    lists = [value for value in values if isinstance(value, tuple)]
    spread = stdev(map(math.fsum, lists)) if len(lists) > 1 else None
    return Joined(tuple(middle(layer) for layer in zip(*lists, strict=True)), spread, len(values))


def mark(figure: Figure, ours: Joined, paper: Value, paper_std: float | None) -> str:
    """``within``, ``better`` or ``short by``, or ``off by`` where no side is better: ours against the paper's.

    Within is a difference of at most the standard deviations of both, joined (what a single seed, or a paper without
    them, does not have counts as zero), or of half the last decimal shown.

    >>> from vardrop.tables.figures import FIGURES, Joined, mark
    >>> error = FIGURES["error"]
    >>> [mark(error, Joined(value, 0.05, 5), 1.92, None) for value in (1.95, 1.8, 2.0)]
    ['within', 'better', 'short by 0.08']
    """
    if figure.need == "times" and paper == 1.0:  # a net timed against itself
        return ""
    if figure.better is None and isinstance(paper, tuple):
        return ""
    layers = len(paper) if isinstance(paper, tuple) else 1
    if layers != (len(ours.value) if isinstance(ours.value, tuple) else 1):
        return ""
    if figure.alike(ours.value, paper, ours.std, paper_std):
        return "within"
    if figure.better is not None and figure.beats(ours.value, paper):
        return "better"
    how = "off by" if figure.better is None else "short by"
    return f"{how} {abs(figure.size(ours.value) - figure.size(paper)):,.{figure.digits}f}"


def nowhere(record: Mapping[str, Any]) -> Value | None:
    """Reads a figure of the papers that no record holds."""
    return None


def _sparsity(record: Mapping[str, Any]) -> Value | None:
    alive = record["pruned"]["alive"]
    return tuple(100.0 * (1.0 - alive[name] / total) for name, total in record["layers"].items())


def _opened(record: Mapping[str, Any]) -> tuple[float, ...] | None:
    """Units that gates which depend on their input leave open for an average example."""
    opened = record["compacted"].get("open_units")
    return tuple(map(float, opened)) if opened else None


def _alive(record: Mapping[str, Any]) -> tuple[float, ...] | None:
    """Units left of all layers: as the method counts them, where it acts on every layer."""
    units = record["compacted"].get("units")
    marked = [float(part) for part in (record["pruned"].get("units") or "").split("-") if part]
    if marked and len(marked) == len(units or marked):
        return tuple(marked)
    return None if units is None else tuple(map(float, units))


def _accuracy(*path: str) -> Callable[[Mapping[str, Any]], Value | None]:
    def read(record: Mapping[str, Any]) -> Value | None:
        found: Any = record
        for key in path:
            found = found.get(key) if found else None
        return None if found is None else 100.0 * (1.0 - found)

    return read


def _bits(name: str) -> Callable[[Mapping[str, Any]], Value | None]:
    def read(record: Mapping[str, Any]) -> Value | None:
        nats = record["pruned"].get(name)
        return None if nats is None else float(nats) / math.log(2.0)

    return read


def _elbo(record: Mapping[str, Any]) -> Value | None:
    history = record.get("history")
    if not history or "num_data" not in record:
        return None
    return -float(history[-1]["train_nll"] * record["num_data"] + history[-1]["kl"])


def _time_saved(record: Mapping[str, Any]) -> Value | None:
    found = record.get("times", {}).get(TIMED)
    return None if found is None or not found["ratio"] else float(found["ratio"])


def _shrinkage(rule: Rule, record: Mapping[str, Any]) -> float | None:
    """What `rule` counts in the original net, over what it counts in the small one."""
    layout, units = layout_of(record["config"]["net"]), _alive(record)
    if layout is None or units is None or len(units) != len(layout.units):
        return None
    left = rule(layout, units, _opened(record))
    return rule(layout, layout.units, None) / left if left else None


def _memory(record: Mapping[str, Any]) -> Value | None:
    shrinkage = _shrinkage(numbers, record)
    return None if shrinkage is None else 100.0 / shrinkage


FIGURES = {
    "error": Figure("test error, %", lambda record: 100.0 * record["pruned"]["error"], 2, "lower", sampled=True),
    "compression": Figure("compression", lambda record: record["pruned"]["compression"], 0, "higher", small=2),
    "sparsity_per_layer": Figure("sparsity per layer, %", _sparsity, 2),
    "sparsity": Figure(
        "sparsity, %",
        lambda record: 100.0 * (1.0 - record["pruned"]["nonzero"] / record["pruned"]["total"]),
        1,
        "higher",
    ),
    "units": Figure("units per layer", lambda record: _opened(record) or _alive(record), 0, "lower", counts=True),
    "speedup_cpu": Figure("speed-up, CPU", _time_saved, 2, "higher", "times"),
    "speedup_gpu": Figure("speed-up, GPU", nowhere, 2, "higher"),
    "speedup_flops": Figure("speed-up, FLOPs", partial(_shrinkage, multiplications), 2, "higher"),
    "bb_speedup": Figure("speed-up, FLOPs", partial(_shrinkage, operations), 2, "higher"),
    "bb_memory": Figure("memory, %", _memory, 2, "lower"),
    "train_accuracy": Figure("training accuracy, %", _accuracy("pruned", "train_error"), 0),
    "test_accuracy": Figure("test accuracy, %", _accuracy("pruned", "error"), 0),
    "test_mse": Figure("test MSE", nowhere, 4, "lower"),
    "valid_bpc": Figure("validation, bits per character", _bits("valid_nll"), 3, "lower"),
    "test_bpc": Figure("test, bits per character", _bits("nll"), 3, "lower"),
    "elbo": Figure("ELBO, nats", _elbo, 0, "higher"),
    "deterministic_accuracy": Figure("deterministic accuracy, %", _accuracy("trained", "error"), 1),
    "stochastic_accuracy": Figure(
        "stochastic accuracy, %", _accuracy("ensemble", "1", "error"), 1, "higher", "ensemble", sampled=True
    ),
    "ensemble_accuracy": Figure(
        "ensemble accuracy, %", _accuracy("ensemble", str(ENSEMBLE), "error"), 1, "higher", "ensemble", sampled=True
    ),
}

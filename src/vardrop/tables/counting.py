"""FLOPs and memory as the papers count them: from the units of a net, by the rules that give their printed figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

CLASSES = 10
"""Units of the last layer, in every net."""


@dataclass(frozen=True)
class Convolution:
    """A convolution, as far as it is counted.

    Attributes:
        taps: of its kernel.
        positions: of its output.
        counted: positions at which its operations are counted.
        pooled: positions left by the pooling after it, or 0 where there is none.
    """

    taps: int
    positions: int
    counted: int
    pooled: int = 0


@dataclass(frozen=True)
class Layout:
    """A net of convolutions and dense layers, each with a ReLU but the last, which has ten units.

    Attributes:
        units: outputs of each convolution, inputs of each dense layer.
        convolutions: in order.
        channels: of an image.
        normed: whether batch-norm follows each layer but the last.
    """

    units: tuple[int, ...]
    convolutions: tuple[Convolution, ...] = ()
    channels: int = 1
    normed: bool = False


Rule = Callable[[Layout, Sequence[float], Sequence[float] | None], float]


def _vgg(scale: float) -> Layout:
    """The FLOPs of its convolutions are counted as if they were not padded, so that those on 2 x 2 have none."""
    widths, convolutions = [], []
    for side, width, depth in ((32, 64, 2), (16, 128, 2), (8, 256, 3), (4, 512, 3), (2, 512, 3)):
        for place in range(depth):
            last = place == depth - 1
            convolutions.append(Convolution(9, side**2, (side - 2) ** 2, (side // 2) ** 2 if last else 0))
            widths.append(max(1, round(scale * width)))
    return Layout((*widths, widths[-1], widths[-1]), tuple(convolutions), channels=3, normed=True)


LAYOUTS = {
    "lenet-500-300": Layout((784, 500, 300)),
    "lenet-5": Layout((20, 50, 800, 500), (Convolution(25, 576, 576, 144), Convolution(25, 64, 64, 16))),
}


def layout_of(net: str) -> Layout | None:
    """The layout of a net by its name, or ``None`` where the papers do not count it.

    >>> from vardrop.tables.counting import layout_of
    >>> layout_of("lenet-500-300").units
    (784, 500, 300)
    """
    if net.startswith("vgg-like"):
        return _vgg(float(net.removeprefix("vgg-like").removeprefix("-") or 1.0))
    return LAYOUTS.get(net)


def _products(layout: Layout, units: Sequence[float], reading: Sequence[float]) -> tuple[list[float], list[float]]:
    """Multiplications of each convolution and of each dense layer."""
    first = len(layout.convolutions)
    channels, outputs = (layout.channels, *reading), (*units[first + 1 :], CLASSES)
    return (
        [
            each.taps * read * out * each.counted
            for each, read, out in zip(layout.convolutions, channels, units, strict=False)
        ],
        [inputs * out for inputs, out in zip(reading[first:], outputs, strict=True)],
    )


def multiplications(layout: Layout, units: Sequence[float], left_open: Sequence[float] | None = None) -> float:
    """Multiplications of one pass of the net with `units` left, of which gates leave `left_open` to be read.

    Source: arXiv:1705.07283, whose figures for LeNet-500-300 these are.

    >>> from vardrop.tables.counting import layout_of, multiplications
    >>> net = layout_of("lenet-500-300")
    >>> round(multiplications(net, net.units) / multiplications(net, (245, 160, 55)), 2)  # the paper's, of SBP
    11.23
    """
    convolutions, dense = _products(layout, units, left_open or units)
    return sum(convolutions) + sum(dense)


def operations(layout: Layout, units: Sequence[float], left_open: Sequence[float] | None = None) -> float:
    """Operations of one pass of the net with `units` left, of which gates leave `left_open` to be read.

    A convolution multiplies, adds and rectifies at each position and adds its biases once; a dense layer multiplies,
    adds its biases and rectifies (its sums do not count); a pooling takes one operation a position; an input-dependent
    gate four a unit. Batch-norm is left out.

    Source: arXiv:1805.10896, its authors' code.

    >>> from vardrop.tables.counting import layout_of, operations
    >>> net = layout_of("lenet-5")
    >>> round(operations(net, net.units) / operations(net, (13, 25, 156, 54)), 2)  # the paper's, of BB
    2.94
    """
    reading, first = left_open or units, len(layout.convolutions)
    convolutions, dense = _products(layout, units, reading)
    pooled = sum(each.pooled * passed for each, passed in zip(layout.convolutions, reading, strict=False))
    biases = sum(units[:first]) + sum(units[first + 1 :]) + CLASSES
    gates = 4 * sum(units) if left_open else 0
    return 2 * sum(convolutions) + sum(dense) + biases + sum(units[first + 1 :]) + pooled + gates


def numbers(layout: Layout, units: Sequence[float], left_open: Sequence[float] | None = None) -> float:
    """Numbers that one pass of the net holds: weights, biases, batch-norms and the unfolded inputs of convolutions.

    Gates leave the units of `left_open`, and hold two numbers for each of `units`. Images have three channels here in
    every net.

    Source: arXiv:1805.10896, its authors' code.

    >>> from vardrop.tables.counting import layout_of, numbers
    >>> net = layout_of("lenet-5")
    >>> round(100 * numbers(net, (13, 25, 156, 54)) / numbers(net, net.units), 2)  # the paper's, of BB
    16.2
    """
    held, first = left_open or units, len(layout.convolutions)
    unfolded = sum(
        each.taps * read * (each.positions + out) + out
        for each, read, out in zip(layout.convolutions, (3, *held), held, strict=False)
    )
    dense = sum((inputs + 1) * out for inputs, out in pairwise((*held[first:], CLASSES)))
    norms = 2 * (sum(held[:first]) + sum(held[first + 1 :])) if layout.normed else 0
    gates = 2 * sum(units) if left_open else 0
    return unfolded + dense + norms + gates

"""Structured sparsity learning."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from vardrop.lrt import at_least_float32
from vardrop.methods.base import GateMethod, Paper, check_range
from vardrop.noise import Layout, MaskedUnits, Noise


@dataclass(frozen=True)
class StructuredSparsityLearning(GateMethod):
    """Structured sparsity learning: group lasso over filters, channels or units; no noise.

    The loss gains ``strength / N`` times the sum of the norms of the groups, so `strength` is the paper's factor
    ``lambda_g`` times the number N of training examples. A group is all weights that make a unit (the filter of a
    convolution) or that read it (a channel, an input of a linear layer), as `place` says; biases are in none. The
    paper leaves open when a group counts as zero; here it is dead where the root mean square of its weights is below
    the threshold.

    Args:
        strength: nats for each unit of norm, at least 0; the default is the authors' 0.005 for LeNet on the 60,000
            examples of MNIST.
        threshold: root mean square of the weights of a group.

    Raises:
        InvalidValueError: a field is outside its range; the message names it.

    Source: arXiv:1608.03665, equations 1 and 2.

    >>> net = vd.convert(torch.nn.Linear(2, 2, bias=False), vd.StructuredSparsityLearning(strength=10.0))
    >>> net.weight.data.copy_(torch.tensor([[3.0, 0.0], [4.0, 0.0]]))
    tensor([[3., 0.],
            [4., 0.]])
    >>> vd.kl(net).item()
    50.0
    >>> vd.prune(net).units
    '1'
    """

    paper: ClassVar[Paper] = Paper(
        "wen2016learning",
        "Learning Structured Sparsity in Deep Neural Networks",
        "Wen, Wei and Wu, Chunpeng and Wang, Yandan and Chen, Yiran and Li, Hai",
        2016,
        "1608.03665",
    )
    threshold: float = 1e-3
    strength: float = 300.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "strength", above=0.0, below=sys.float_info.max, closed=True)

    def noise(self, weight: Tensor, layout: Layout) -> Noise:
        return MaskedUnits(weight, layout, self.placed(weight))

    def kl(self, noise: Noise, weight: Tensor) -> Tensor:
        units = cast(MaskedUnits, noise)
        groups = units.groups_of(at_least_float32(weight))
        tiny = torch.finfo(groups.dtype).tiny  # a group at zero gets no gradient, as from a norm
        norms = groups.square().sum(dim=1).clamp(min=tiny).sqrt()  # less than half the time of norm() and its backward
        return self.strength * units.sum_alive(norms)

    def score(self, noise: Noise, weight: Tensor) -> Tensor:
        groups = cast(MaskedUnits, noise).groups_of(weight.detach().double())
        return groups.square().mean(dim=1).sqrt()

"""Random networks of every operation with a rule, with random zeros: the cut is exact whatever they are."""

import random
from copy import deepcopy

import pytest
import torch
from exactness import assert_same, parameters, randomised
from torch import nn
from torch.nn import functional as F

from vardrop.surgery.cut import cut

ACTIVATIONS = (F.relu, torch.sigmoid, F.gelu, torch.tanh, F.softplus, F.leaky_relu, F.hardswish)


class Gate(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.down, self.up = nn.Linear(channels, 3), nn.Linear(3, channels)

    def forward(self, x):
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))[:, :, None, None]


class Random(nn.Module):
    """A graph that is drawn step by step: each step reads earlier maps and makes a new one of 8 x 8."""

    def __init__(self, draw, steps):
        super().__init__()
        self.layers = nn.ModuleList()
        self.program = []
        self.channels = [3]
        for _ in range(steps):
            draw.choice((self.conv, self.conv, self.norm, self.activation, self.add, self.join, self.gate, self.pool))(
                draw
            )
        self.heads = nn.ModuleList(nn.Linear(self.channels[-1] * size, 3) for size in (1, 4))
        self.out = nn.Linear(6, 2)

    def step(self, channels, function, *sources):
        self.program.append((function, sources))
        self.channels.append(channels)

    def layer(self, module):
        self.layers.append(module)
        return module

    def source(self, draw):
        return draw.randrange(max(0, len(self.channels) - 3), len(self.channels))

    def conv(self, draw):
        source = self.source(draw)
        inputs, outputs = self.channels[source], draw.choice((4, 6, 8))
        groups = draw.choice([g for g in (1, 1, 2, 4, inputs) if inputs % g == 0 and outputs % g == 0] or [1])
        kernel = draw.choice((1, 3))
        mode = draw.choice(("zeros", "zeros", "reflect", "circular", "replicate"))
        conv = nn.Conv2d(
            inputs,
            outputs,
            kernel,
            padding=kernel // 2,
            groups=groups,
            padding_mode=mode,
            bias=draw.random() < 0.7,
        )
        if draw.random() < 0.15 and groups == 1:
            conv = nn.ConvTranspose2d(inputs, outputs, kernel, padding=kernel // 2)
        self.step(outputs, self.layer(conv), source)

    def norm(self, draw):
        source = self.source(draw)
        self.step(self.channels[source], self.layer(nn.BatchNorm2d(self.channels[source])), source)

    def activation(self, draw):
        source = self.source(draw)
        slopes = [self.layer(nn.PReLU(self.channels[source]))] if draw.random() < 0.2 else []
        self.step(self.channels[source], draw.choice(slopes or ACTIVATIONS), source)

    def add(self, draw):
        source = self.source(draw)
        other = draw.choice([i for i, c in enumerate(self.channels) if c == self.channels[source]])
        self.step(
            self.channels[source],
            draw.choice((torch.add, torch.sub, torch.mul, torch.maximum)),
            source,
            other,
        )

    def join(self, draw):
        first, second = self.source(draw), self.source(draw)
        if self.channels[first] + self.channels[second] <= 16:
            self.step(self.channels[first] + self.channels[second], lambda a, b: torch.cat([a, b], 1), first, second)

    def gate(self, draw):
        source = self.source(draw)
        self.step(self.channels[source], self.layer(Gate(self.channels[source])), source)

    def pool(self, draw):
        source = self.source(draw)
        pools = (
            lambda x: F.max_pool2d(x, 3, 1, 1),
            lambda x: F.avg_pool2d(x, 3, 1, 1),
            lambda x: F.interpolate(F.max_pool2d(x, 2), scale_factor=2),
            lambda x: F.interpolate(x[:, :, ::2, 1::2], size=(8, 8), mode="bilinear"),
            lambda x: x.transpose(2, 3).contiguous(),
        )
        self.step(self.channels[source], draw.choice(pools), source)

    def forward(self, x):
        maps = [x]
        for function, sources in self.program:
            maps.append(function(*(maps[source] for source in sources)))
        last = maps[-1]
        heads = [self.heads[0](last.mean((2, 3))), self.heads[1](F.adaptive_avg_pool2d(last, 2).flatten(1))]
        return self.out(F.relu(torch.cat(heads, 1)))


@torch.no_grad()
def with_zeros(model, draw):
    """Kills random rows and columns of every layer, and some single weights."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if weight is None or weight.ndim < 2:
            continue
        for dim in (0, 1):
            share = draw.choice((0.0, 0.2, 0.5))
            dead = [unit for unit in range(weight.shape[dim]) if draw.random() < share]
            weight.index_fill_(dim, torch.tensor(dead, dtype=torch.int64), 0.0)
        weight *= torch.rand_like(weight) < 0.9
        if draw.random() < 0.3 and module.bias is not None:
            module.bias.zero_()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and draw.random() < 0.3:
            module.bias.zero_()
            module.running_mean.zero_()


@pytest.mark.parametrize("seed", range(60))
def test_random_graphs_are_cut_exactly(seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model = randomised(Random(draw, steps=draw.randint(3, 12))).double()
    with_zeros(model, draw)
    large, x = deepcopy(model), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    done = cut(model, x)
    assert parameters(model) == done.parameters_after <= done.parameters_before == parameters(large)
    assert_same(large, model, torch.randn(5, 3, 8, 8, dtype=torch.float64), 1e-10)
    assert cut(model, x).parameters_after == done.parameters_after


def test_random_graphs_really_shrink():
    shares = []
    for seed in range(20):
        draw = random.Random(seed)
        torch.manual_seed(seed)
        model = randomised(Random(draw, steps=8))
        with_zeros(model, draw)
        done = cut(model, torch.randn(1, 3, 8, 8))
        shares.append(done.parameters_after / done.parameters_before)
    assert sorted(shares)[10] < 0.6

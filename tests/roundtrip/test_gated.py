"""Gated networks of every shape: the masked model, the folded one and the compact one agree."""

from copy import deepcopy

import pytest
import torch
from exactness import assert_same, parameters, randomised
from torch import nn

import vardrop as vd


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.left = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.right = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        y = x + self.left(x)
        return self.head(torch.cat([y, self.right(x)], dim=1).mean((2, 3)))


def lenet():
    return nn.Sequential(
        nn.Conv2d(2, 8, 3),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(8, 10, 2),
        nn.BatchNorm2d(10),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(40, 16),
        nn.ReLU(),
        nn.Linear(16, 3),
    )


def grouped():
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, groups=2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.PReLU(8),
        nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2),
        nn.Tanh(),
        nn.Conv2d(6, 4, 1, padding_mode="reflect"),
        nn.Flatten(),
        nn.Linear(4 * 64, 3),
    )


NETS = {"residual": Residual, "lenet": lenet, "grouped": grouped}
METHODS = {
    "beta-bernoulli": vd.BetaBernoulli(init_a=2.0),
    "structured-bp-input": vd.StructuredBP(place="input"),
    "structured-vbd": vd.StructuredVBD(init_spread=1.0),
    "with-noise": (vd.BetaBernoulli(init_a=2.0), vd.ARD(threshold=0.1)),
    "dependent": vd.DependentBetaBernoulli(init_shift=0.5),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("build", NETS.values(), ids=NETS)
@torch.no_grad()
def test_masked_folded_and_compact_agree(build, method):
    model = randomised(build())
    stages = [vd.BetaBernoulli(init_a=2.0), method] if method == METHODS["dependent"] else [method]
    for stage in stages:
        vd.convert(model, stage)
    x = torch.randn(16, 2, 8, 8)
    model.train()(x)
    for site in vd.sites(model):
        if site.counts == "units":
            site.noise.mask = torch.rand(site.noise.units) < 0.6
            site.noise.mask[0] = True
    model.double().eval()
    other = torch.randn(5, 2, 8, 8, dtype=torch.float64)
    folded = vd.strip(deepcopy(model))
    assert_same(model, folded, other, 1e-10)
    small = vd.compact(model, x.double())
    assert_same(model, small, other, 1e-10)
    assert parameters(small) < parameters(folded)

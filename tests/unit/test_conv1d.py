"""The dense layer of transformers' GPT-2, known by its name; a stand-in with the same contract serves here."""

import copy
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

import vardrop as vd


@pytest.fixture
def conv1d(monkeypatch):
    class Conv1D(nn.Module):
        def __init__(self, nf, nx):
            super().__init__()
            self.nf, self.nx = nf, nx
            self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

        def forward(self, x):
            return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)

    Conv1D.__module__, Conv1D.__qualname__ = "transformers.pytorch_utils", "Conv1D"
    module = ModuleType("transformers.pytorch_utils")
    module.Conv1D = Conv1D
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", module)
    return Conv1D


@pytest.mark.parametrize("sampling", ["local", "weight"])
def test_its_outputs_have_the_moments_of_its_weights(conv1d, sampling):
    net = vd.convert(conv1d(5, 4).double(), vd.ARD(init_log_std=-0.5, sampling=sampling))
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    draws = torch.stack([net(x) for _ in range(4000)]).detach()
    mean, variance = vd.functional.linear_moments(x, net.weight.t(), net.noise.log_std.t(), net.bias)
    torch.testing.assert_close(net.eval()(x), mean)
    assert ((draws.mean(dim=0) - mean).abs() <= 5 * (variance / 4000).sqrt()).all()
    torch.testing.assert_close(draws.var(dim=0), variance, rtol=5 * (2 / 4000) ** 0.5, atol=0)


def test_rates_know_its_axes_and_strip_gives_its_class_back(conv1d):
    net = vd.convert(nn.Sequential(conv1d(5, 4)), vd.VariationalDropout(alpha="input"))
    assert net[0].noise.shared_log_alpha.shape == (4, 1) and isinstance(net[0], conv1d)
    x = torch.randn(2, 4)
    expected = net.eval()(x)
    plain = vd.strip(copy.deepcopy(net))
    assert type(plain[0]) is conv1d
    torch.testing.assert_close(plain(x), expected)


def test_a_pruned_one_is_kept_whole_by_compaction_with_its_zeros(conv1d):
    net = vd.convert(nn.Sequential(nn.Linear(3, 4), conv1d(5, 4)), vd.SparseVD())
    with torch.no_grad():
        net[1].weight[1] *= 1e-6
    vd.prune(net)
    small = vd.compact(net, torch.randn(2, 3))
    assert type(small[1]) is conv1d and (small[1].weight[1] == 0).all()


def test_another_class_of_that_name_is_not_taken_for_it():
    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 2))

    net = vd.convert(nn.Sequential(nn.Linear(2, 2), Conv1D()), vd.ARD())
    assert [site.name for site in vd.sites(net)] == ["0"]

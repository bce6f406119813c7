"""The dense layer of transformers' GPT-2, known by its name; a stand-in with the same contract serves here."""

import copy
import pickle
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

import vardrop as vd
from vardrop.layers import samples_outputs


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


class Block(nn.Module):
    """The part of GPT-2 that has hidden units, and a projection cut into three as in its attention."""

    def __init__(self, conv1d):
        super().__init__()
        self.norm, self.attn, self.fc, self.proj = nn.LayerNorm(4), conv1d(12, 4), conv1d(6, 4), conv1d(4, 6)

    def forward(self, x):
        query, key, value = self.attn(x).split(4, dim=2)
        x = x + torch.nn.functional.scaled_dot_product_attention(query, key, value)
        return x + self.proj(torch.nn.functional.gelu(self.fc(self.norm(x))))


@pytest.fixture
def pruned(conv1d):
    """Of its hidden units one is not read, and two are constants, whose gelu folds into the bias of the reader."""
    net = vd.convert(Block(conv1d), vd.SparseVD())
    with torch.no_grad():
        net.proj.weight[1] *= 1e-6
        net.fc.weight[:, [2, 5]] *= 1e-6
        net.attn.weight[:, 3] *= 1e-6
    vd.prune(net)
    return net


def test_its_dead_units_are_cut_and_constants_fold(pruned, conv1d):
    x = torch.randn(2, 3, 4)
    small = vd.compact(pruned, x)
    assert small.fc.weight.shape == (4, 3) and small.proj.weight.shape == (3, 4)
    assert (small.fc.nx, small.fc.nf, small.proj.nx, small.proj.nf) == (4, 3, 3, 4)
    assert small.attn.weight.shape == (4, 12) and type(small.fc) is conv1d
    for size in (1, 2, 5):
        x = torch.randn(size, 3, 4)
        torch.testing.assert_close(small(x), pruned.eval()(x))


def test_a_noisy_and_a_cut_one_are_stored_and_loaded(pruned, conv1d, tmp_path):
    x = torch.randn(2, 3, 4)
    vd.save(pruned, tmp_path / "noisy")
    vd.save(vd.compact(pruned, x), tmp_path / "small", sparse=True)
    noisy = vd.load(tmp_path / "noisy", lambda: Block(conv1d))
    small = vd.load(tmp_path / "small", lambda: Block(conv1d))
    assert torch.equal(noisy.eval()(x), pruned.eval()(x)) and torch.equal(vd.kl(noisy), vd.kl(pruned))
    assert (small.proj.nx, small.proj.nf) == (3, 4)
    torch.testing.assert_close(small(x), pruned(x))


@pytest.mark.parametrize("place", ["input", "output"])
def test_a_gate_on_its_units_folds_and_compacts(conv1d, place):
    method = vd.BetaBernoulli(place=place)
    net = vd.convert(Block(conv1d), {"proj" if place == "input" else "fc": method})
    (site,) = vd.sites(net)
    site.noise.mask = torch.arange(6) < 2
    x = torch.randn(2, 3, 4)
    small = vd.compact(net, x)
    assert (small.fc.nf, small.proj.nx) == (2, 2)
    torch.testing.assert_close(small(x), net.eval()(x))


def test_another_class_of_that_name_is_not_taken_for_it():
    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 2))

    net = vd.convert(nn.Sequential(nn.Linear(2, 2), Conv1D()), vd.ARD())
    assert [site.name for site in vd.sites(net)] == ["0"]


def test_it_samples_its_outputs_so_many_draws_fit_into_one_pass(conv1d):
    net = vd.convert(nn.Sequential(conv1d(4, 6)), vd.ARD())
    assert samples_outputs(net[0]) and not samples_outputs(nn.LSTM(4, 6))


def test_a_whole_noisy_model_can_be_pickled(conv1d):
    net = vd.convert(Block(conv1d), vd.ARD()).eval()
    x = torch.randn(2, 3, 4)
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), net(x))

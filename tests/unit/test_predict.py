"""Draws made together have the law of draws made one after the other, and leave the model as it was."""

import copy
import sys
from itertools import pairwise

import pytest
import torch
from torch import nn

import vardrop as vd
from vardrop.errors import InvalidValueError

room = sys.modules["vardrop.predict"]  # the package's attribute of that name is the function
COUNT = 4000


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.cell = nn.LSTM(8, 6, batch_first=True)
        self.out = nn.Linear(6, 4)

    def forward(self, x):
        return self.out(self.cell(self.words(x))[0]).transpose(1, 2)


def dense():
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 3))


def conv():
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3))


def attending():
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    return nn.Sequential(nn.Unflatten(1, (1, 6)), layer, nn.Flatten(), nn.Linear(6, 3))


SOURCE = torch.Generator().manual_seed(5)
VECTORS, PICTURES = torch.randn(4, 6, generator=SOURCE), torch.randn(4, 1, 6, 6, generator=SOURCE)
WORDS = torch.randint(11, (4, 5), generator=SOURCE)
SPREAD = {"init_log_std": -1.0}
CASES = {
    "local": (dense, VECTORS, vd.ARD(**SPREAD), False),
    "weight": (dense, VECTORS, vd.ARD(**SPREAD, sampling="weight"), True),
    "convolution, local": (conv, PICTURES, vd.ARD(**SPREAD), False),
    "convolution, weight": (conv, PICTURES, vd.ARD(**SPREAD, sampling="weight"), True),
    "zero mean": (dense, VECTORS, vd.VarianceNetwork(), False),
    "Bernoulli": (dense, VECTORS, vd.BernoulliDropout(), False),
    "Gaussian on inputs": (dense, VECTORS, vd.GaussianDropout(on="inputs"), False),
    "concrete": (conv, PICTURES, vd.ConcreteDropout(), False),
    "a gate for the batch": (dense, VECTORS, vd.StructuredBP(init_log_sigma=0.0), True),
    "a gate for each example": (dense, VECTORS, vd.StructuredBP(init_log_sigma=0.0, draws="example"), False),
    "a gate of both kinds": (dense, VECTORS, vd.BetaBernoulli(), False),
    "recurrent": (Tagger, WORDS, vd.ARD(**SPREAD), None),
    "attention": (attending, VECTORS, vd.ARD(**SPREAD), None),
}
SLOW = ("recurrent", "attention", "a gate for the batch", "a gate for each example")


def converted(case):
    make, x, method, shared = CASES[case]
    torch.manual_seed(0)
    return vd.convert(make(), method), x, shared


def one_by_one(net, x, count, seed=1):
    net.eval()
    with torch.no_grad(), vd.noise(net, on=True, generator=torch.Generator().manual_seed(seed)):
        return torch.stack([net(x) for _ in range(count)])


@pytest.mark.parametrize("case", CASES)
def test_draws_made_together_have_the_moments_of_a_loop_and_do_not_know_each_other(case):
    net, x, _ = converted(case)
    count = 600 if case in SLOW else COUNT
    found = vd.draws(net, x, samples=count, generator=torch.Generator().manual_seed(2)).flatten(1).double()
    looped = one_by_one(net, x, count).flatten(1).double()
    std = looped.std(0)
    assert (std > 1e-4).all()
    assert ((found.mean(0) - looped.mean(0)) / std * (count / 2) ** 0.5).abs().max() < 4.5
    parts = [(part - looped.mean(0)) / std for part in (found, looped)]
    for other in (0, len(std) // 2):  # variances, and covariances of one example with another
        left, right = (part * part.roll(other, dims=1) for part in parts)
        error = ((left.var(0) + right.var(0)) / count).sqrt()
        assert ((left.mean(0) - right.mean(0)) / error).abs().max() < 4.5
    z = (found - found.mean(0)) / found.std(0)
    for lag in (1, 2, 7):
        assert ((z[lag:] * z[:-lag]).mean(0) * count**0.5).abs().max() < 4.5


@pytest.mark.parametrize("case", [case for case, given in CASES.items() if given[3] is not None])
def test_one_draw_of_weights_serves_the_batch_and_one_of_outputs_an_example(case):
    net, x, shared = converted(case)
    twice = vd.draws(net, x[:1].repeat(2, *[1] * (x.dim() - 1)), samples=5)
    assert torch.allclose(twice[:, 0], twice[:, 1], atol=1e-6) is shared
    assert all(not torch.allclose(one, other) for one, other in pairwise(twice))


def count(module, calls):
    """From now on each pass of `module` adds to `calls`."""
    usual = module.forward

    def forward(*inputs):
        calls.append(1)
        return usual(*inputs)

    module.forward = forward


@pytest.mark.parametrize("samples", [1, 2, 7, 20])
@pytest.mark.parametrize("largest", [1, 20, 60, 2**22])
def test_every_sample_is_drawn_once_however_many_fit_into_a_pass(monkeypatch, samples, largest):
    monkeypatch.setattr(room, "LARGEST_PASS", largest)
    net, x, _ = converted("local")
    found = vd.draws(net, x, samples=samples)
    assert found.shape == (samples, 4, 3)
    assert len(found.unique(dim=0)) == samples


def test_a_pass_holds_as_many_draws_as_its_largest_tensor_allows(monkeypatch):
    net, x, _ = converted("local")
    calls = []
    count(net, calls)
    vd.draws(net, x, samples=20)
    assert len(calls) == 2
    monkeypatch.setattr(room, "LARGEST_PASS", 4 * 6 * 4)
    vd.draws(net, x, samples=20)
    assert len(calls) == 2 + 1 + 5
    net, x, _ = converted("recurrent")
    calls.clear()
    count(net, calls)
    vd.draws(net, x, samples=20)
    assert len(calls) == 20


def test_whole_weights_count_towards_the_size_of_a_pass(monkeypatch):
    for sampling, calls_expected in (("local", 2), ("weight", 4)):
        net = vd.convert(nn.Linear(100, 3), vd.ARD(sampling=sampling))
        calls = []
        count(net, calls)
        monkeypatch.setattr(room, "LARGEST_PASS", 600)
        vd.draws(net, torch.randn(1, 100), samples=7)
        assert len(calls) == calls_expected


class Keeping(nn.Module):
    """Keeps what it computes, as an attribute and as a buffer."""

    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.register_buffer("seen", torch.zeros(6))

    def forward(self, x):
        self.features = self.layer(x)
        self.seen = 0.5 * self.seen + self.features.mean(dim=0)
        return self.last(self.features)


def test_a_net_that_keeps_what_it_computes_is_whole_afterwards():
    net, x = vd.convert(Keeping(), vd.ARD(init_log_std=0.0)), torch.randn(2, 4)
    assert len(vd.draws(net, x, samples=5).unique(dim=0)) == 5
    assert net.features.shape == (2, 6) and net.seen.shape == (6,)
    assert copy.deepcopy(net)(x).shape == (2, 3)


class Collecting(nn.Module):
    """A net that changes its input in place, and keeps what it computes in a list and in a dict of lists."""

    def __init__(self):
        super().__init__()
        self.linear, self.seen, self.kept = nn.Linear(4, 3), [], {"all": []}

    def forward(self, x):
        output = self.linear(x.add_(1.0))
        self.seen.append(output)
        self.kept["all"].append(output)
        return output


def test_what_a_net_does_to_its_input_and_keeps_in_lists_outlives_no_pass_together():
    net, x = vd.convert(Collecting(), vd.SparseVD(init_log_std=-9.0)), torch.zeros(5, 4)
    found = vd.draws(net, x, samples=6)
    assert not x.any()
    torch.testing.assert_close(found.mean(0), net.linear(x + 1.0), atol=1e-2, rtol=0)
    assert found.std(0).max() < 1e-2
    for kept in (net.seen, net.kept["all"]):
        assert len(kept) == 6
        torch.testing.assert_close(torch.stack(kept), found)
    copy.deepcopy(net)


class Guarded(dict):
    """A dict that is made by other arguments, and is not to be changed by others."""

    def __init__(self, one, other):
        super().__init__({one: other})

    clear = update = copy = None


def test_containers_of_a_class_of_their_own_look_after_themselves():
    net = vd.convert(Collecting(), vd.SparseVD(init_log_std=-1.0))
    net.guarded, net.empty = Guarded("x", torch.ones(1)), []
    net.empty.append(net.empty)
    assert vd.draws(net, torch.zeros(5, 4), samples=4).shape == (4, 5, 3)
    assert list(net.guarded) == ["x"] and len(net.seen) == 4


def test_hooks_see_every_draw_by_itself():
    net, seen = vd.convert(nn.Linear(4, 3), vd.ARD(init_log_std=0.0)), []
    net.register_forward_hook(lambda module, inputs, output: seen.append(output))
    found = vd.draws(net, torch.randn(2, 4), samples=5)
    assert torch.equal(torch.stack(seen), found)


class Wrapped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.layer, self.wrap = nn.Linear(4, 3), wrap

    def forward(self, x):
        return self.wrap(self.layer(x))


@pytest.mark.parametrize(("wrap", "kind"), [(lambda y: {"logits": y}, "dict"), (lambda y: (y, y), "tuple")])
def test_outputs_that_are_no_tensor_are_refused_by_their_type(wrap, kind):
    net = vd.convert(Wrapped(wrap), vd.ARD())
    for call in (vd.predict, vd.draws):
        with pytest.raises(InvalidValueError, match=f"the model returns a {kind}: must return a tensor"):
            call(net, torch.randn(2, 4))


def test_a_model_of_several_inputs_takes_them_in_a_tuple():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(4, 3), nn.Linear(2, 3)

        def forward(self, x, z):
            return self.left(x) + self.right(z)

    net, inputs = vd.convert(Two(), vd.SparseVD()), (torch.randn(5, 4), torch.randn(5, 2))
    drawn = vd.draws(net, inputs, samples=6, generator=torch.Generator().manual_seed(1))
    assert drawn.shape == (6, 5, 3) and drawn.std(dim=0).min() > 0
    expected = vd.predict(net, inputs, samples=6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(drawn.softmax(dim=2).mean(dim=0), expected)


def test_probabilities_need_classes_and_samples_are_whole():
    net = vd.convert(Wrapped(lambda y: y[:, 0]), vd.ARD())
    with pytest.raises(InvalidValueError, match=r"the model returns shape \(2,\): must be \(N, classes, \*\)"):
        vd.predict(net, torch.randn(2, 4))
    assert vd.draws(net, torch.randn(2, 4), samples=3).shape == (3, 2)
    with pytest.raises(InvalidValueError, match="samples=2.5: must be a whole number, at least 1"):
        vd.draws(net, torch.randn(2, 4), samples=2.5)


def test_what_cannot_be_followed_together_is_called_one_by_one():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 3)

        def forward(self, x):
            x = self.first(x)
            return x if float(x.sum()) > 0 else -x

    net = vd.convert(Branching(), vd.ARD(**SPREAD))
    found = vd.draws(net, VECTORS, samples=6)
    assert len(found.unique(dim=0)) == 6


def test_a_net_on_the_fast_path_is_drawn_together_and_stays_on_it():
    net, x, _ = converted("local")
    vd.fast(net, variance="float32", compiled=False)
    paths = [site.noise.fast for site in vd.sites(net)]
    calls = []
    count(net, calls)
    assert len(vd.draws(net, x, samples=9).unique(dim=0)) == 9
    assert len(calls) == 2 and [site.noise.fast for site in vd.sites(net)] == paths


@pytest.mark.parametrize("case", CASES)
def test_predict_is_the_mean_of_the_probabilities_of_the_same_draws(case):
    net, x, _ = converted(case)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    logits = vd.draws(net, x, samples=12, generator=generators[0])
    expected = sum(torch.softmax(each.double(), dim=1) for each in logits) / 12
    found = vd.predict(net, x, samples=12, generator=generators[1])
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


def test_a_single_class_is_no_classification():
    with pytest.raises(InvalidValueError, match=r"shape \(2, 1\), a single class: .* take vardrop\.draws"):
        vd.predict(vd.convert(nn.Linear(4, 1), vd.SparseVD()), torch.randn(2, 4))


def test_the_generator_of_the_switch_serves_where_none_is_given():
    net, x, _ = converted("local")
    vd.noise(net, None, generator=torch.Generator().manual_seed(5))
    found = vd.predict(net, x, samples=3)
    assert torch.equal(found, vd.predict(net, x, samples=3, generator=torch.Generator().manual_seed(5)))
    assert not torch.equal(found, vd.predict(net, x, samples=3))


def test_modes_switches_generators_and_statistics_come_back_even_after_an_error():
    net, x, _ = converted("local")
    net.train()
    net[4].eval()
    own = torch.Generator()
    vd.noise(net, on=False, generator=own)
    statistics = net[1].running_mean.clone()
    modes = [module.training for module in net.modules()]

    def same():
        noises = [site.noise for site in vd.sites(net)]
        assert [module.training for module in net.modules()] == modes
        assert all(noise.on is False and noise.generator is own for noise in noises)
        assert torch.equal(net[1].running_mean, statistics) and torch.is_grad_enabled()
        assert not any(module._forward_hooks for module in net.modules())

    assert not vd.draws(net, x, samples=3).requires_grad
    same()
    with pytest.raises(RuntimeError):
        vd.draws(net, torch.randn(2, 7), samples=3)
    same()
    for call in (vd.draws, vd.predict):
        with pytest.raises(InvalidValueError, match="samples=0"):
            call(net, x, samples=0)
    with pytest.raises(InvalidValueError, match="on='off': must be True, False, or None"):
        vd.noise(net, "off")
    same()


def test_plain_dropout_is_off_and_a_plain_net_draws_itself():
    plain = dense().train()
    found = vd.draws(plain, VECTORS, samples=5)
    expected = plain.eval()(VECTORS).expand(5, 4, 3)
    torch.testing.assert_close(found, expected)


def test_double_precision_is_kept():
    net = vd.convert(nn.Linear(6, 3).double(), vd.ARD())
    assert vd.predict(net, VECTORS.double(), samples=3).dtype == torch.float64
